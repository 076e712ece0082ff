import torch
from torch import nn

from fxrank.torch_private.modules import (
    CHECKPOINTED,
    COMPILED,
    become,
    can_become,
    made_of,
    own_buffers,
    own_children,
    own_parameters,
    post_hooks,
    pre_hooks,
    read_weights_again,
    times_written,
    weight_names,
)


def test_what_a_module_holds_can_be_read_and_changed():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    norm, weight = net[0], nn.Parameter(torch.full((3,), 2.0))
    assert own_parameters(norm) == {"weight": norm.weight, "bias": norm.bias} and own_parameters(net) == {}
    own_parameters(norm)["weight"] = weight
    assert norm.weight is weight and dict(net.named_parameters())["0.weight"] is weight
    own_buffers(norm)["running_mean"] = torch.ones(3)
    assert net.state_dict()["0.running_mean"].tolist() == [1, 1, 1]
    own_children(net)["1"] = norm
    assert net[1] is norm and list(own_children(net)) == ["0", "1"] and len(list(net.named_children())) == 1


def test_hooks_can_be_taken_off_without_their_handles():
    layer, called = nn.Identity(), []
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    layer.register_forward_hook(lambda *_: called.append("after"))
    layer(1)
    assert called == ["before", "after"]
    pre_hooks(layer).clear()
    layer(1)
    assert called == ["before", "after", "after"]
    post_hooks(layer).clear()
    layer(1)
    assert len(called) == 3


def test_writing_into_a_tensor_is_counted_and_reading_is_not():
    tensor = torch.zeros(2)
    before = times_written(tensor)
    tensor.sum()
    assert times_written(tensor) == before
    tensor.copy_(torch.ones(2))
    assert times_written(tensor) > before


def test_a_recurrent_layer_computes_with_the_weights_put_into_it():
    rnn, x = nn.GRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    rnn(x)
    assert weight_names(rnn)[:2] == ["weight_ih_l0", "weight_hh_l0"]
    assert sorted(weight_names(rnn)) == sorted(own_parameters(rnn))
    own_parameters(rnn).update({name: nn.Parameter(torch.zeros_like(p)) for name, p in rnn.named_parameters()})
    read_weights_again(rnn)
    assert rnn(x)[0].abs().max() == 0
    rnn(x)[0].sum().backward()
    assert rnn.weight_ih_l0.grad is not None


def test_the_wrappers_hold_what_they_wrap_under_these_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layer = nn.Linear(2, 2)
    assert own_children(torch.compile(layer)) == {COMPILED: layer}
    assert own_children(checkpoint_wrapper(layer)) == {CHECKPOINTED: layer}


def test_a_module_of_the_same_class_that_holds_other_things():
    norm = nn.BatchNorm1d(3)
    norm.note = ["kept"]
    weight, child = nn.Parameter(torch.zeros(3)), nn.ReLU()
    twin = made_of(norm, {"weight": weight}, {"running_mean": torch.ones(3)}, {"inner": child})
    assert type(twin) is nn.BatchNorm1d and twin.note is norm.note and twin.eps == norm.eps
    assert twin.weight is weight and twin.inner is child and list(twin.state_dict()) == ["weight", "running_mean"]
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_a_module_becomes_another_for_whoever_holds_it():
    layer, other = nn.Linear(2, 2), nn.Sequential(nn.ReLU())
    holder, held, mine = nn.Sequential(layer), [layer], vars(layer)
    assert can_become(layer, nn.Sequential)
    become(layer, other)
    assert type(holder[0]) is nn.Sequential and held[0] is layer and vars(layer) is mine and layer[0] is other[0]
    assert holder(torch.full((1,), -1.0)).item() == 0 and not list(holder.parameters())


def test_not_every_module_can_become_another():
    class Slots(nn.Linear):
        __slots__ = ("more",)

    class Items(dict, nn.Linear):
        pass

    assert not can_become(Slots(2, 2), nn.Linear) and not can_become(nn.Linear(2, 2), Slots)
    assert not can_become(Items.__new__(Items), nn.Linear)
