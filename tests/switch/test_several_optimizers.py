"""Several optimizers, hooks of the user's, and what cannot be followed: CUDA graphs, steps inside the backward pass."""

import copy
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from nets import ConvNet, images, mlp, train, vectors
from torch import nn

import fxrank
from fxrank import wrappers


def watched(model, optimizer, x, policy=None, **options):
    policy = policy or fxrank.Pufferfish(E=3, ratio=0.25)
    return fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=8, steps_per_epoch=1, policy=policy, **options
    )


def steps(model, optimizers, batch, count=8):
    """An ordinary loop with several optimizers; the losses."""
    x, y = batch
    losses = []
    for _ in range(count):
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def halves(model, cls=torch.optim.SGD, **options):
    """The model's parameters in two optimizers, the convolutions apart."""
    inside = [p for p in model.parameters() if p.ndim == 4]
    rest = [p for p in model.parameters() if p.ndim != 4]
    return [cls(inside, **options), cls(rest, **options)]


@pytest.mark.parametrize("decay", [None, "auto"])
def test_two_optimizers_train_as_one_does(decay):
    batch = images()
    torch.manual_seed(0)
    model = ConvNet()
    twin = copy.deepcopy(model)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    policy = fxrank.Pufferfish(E=3, ratio=0.25, frobenius_decay=decay, rewarmup=0.25)
    one, several = torch.optim.SGD(twin.parameters(), **options), halves(model, **options)
    sessions = watched(twin, one, batch[0], policy), watched(model, several, batch[0], policy)
    assert steps(twin, [one], batch) == steps(model, several, batch)
    plans = [session.finish() for session in sessions]
    assert plans[0].R == plans[1].R == {"conv2": 2, "conv3": 4} and plans[1].switch_step == 3
    assert sessions[1].optimizers == tuple(several)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
    held = [id(p) for optimizer in several for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert len(several[0].param_groups[0]["params"]) == 5  # the first convolution, and two pairs


def test_the_step_of_the_last_one_counts_and_nobodys_gradient_is_lost():
    batch = images()
    torch.manual_seed(0)
    model = ConvNet()
    optimizers = halves(model, lr=0.05)
    session = watched(model, optimizers, batch[0])
    seen = []
    optimizers[1].register_step_pre_hook(
        lambda o, *_: seen.append(all(p.grad is not None for p in o.param_groups[0]["params"]))
    )
    steps(model, optimizers, batch, 3)
    assert session.clock.step == 3 and session.phase == "low-rank" and seen == [True] * 3


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_for_the_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(8, 16), nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(80, 3))
    batch = torch.randn(6, 5, 8), torch.arange(6) % 3
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01)
    session = watched(model, [muon, adamw], batch[0], fxrank.Pufferfish(E=3, K=0, ratio=0.25))
    losses = steps(model, [muon, adamw], batch)
    plan = session.finish()
    assert len(plan.R) == 8 and session.notes == [] and losses[-1] < losses[0]
    for parameter in muon.param_groups[0]["params"]:
        assert "momentum_buffer" in muon.state[parameter] and parameter.ndim == 2


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(8, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.lstm(self.first(x))[0][:, -1])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_weights_whose_factors_an_optimizer_does_not_take_stay_dense_and_say_so():
    model, x = Reader(), torch.randn(4, 5, 8)
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=0.25))
    muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)
    with pytest.raises(
        TypeError,
        match=re.escape(
            "an optimizer must take the factors that a plan asks for; of 'lstm.weight_ih_l0', its factors are stacks of matrices, which Muon does "
            "not take. Give this weight to another one."
        ),
    ):
        watched(model, muon, x, plan)
    assert not muon._optimizer_step_post_hooks
    with pytest.raises(
        fxrank.NothingToFactorizeError, match="its factors are stacks of matrices, which Muon does not take"
    ):
        watched(model, muon, x)


def test_a_table_with_sparse_gradients_stays_dense_under_sparse_adam():
    model = nn.Sequential(nn.Embedding(20, 16, sparse=True), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    tokens = torch.arange(6)
    optimizers = [torch.optim.SparseAdam(model[0].parameters()), torch.optim.SGD(model[1:].parameters(), lr=0.1)]
    session = watched(model, optimizers, tokens, fxrank.Pufferfish(E=3, K=0, ratio=0.25), include="0")
    steps(model, optimizers, (tokens, tokens % 3))
    decisions = {d.name: d for d in session.finish().layers}
    assert decisions["0"].reason == "one of its factors has a dense gradient, which SparseAdam does not take"
    assert decisions["1"].rank == 4 and decisions["2"].rank == 4


def test_a_table_with_sparse_gradients_and_frobenius_decay():
    model = nn.Sequential(nn.Embedding(20, 16, sparse=True), nn.Linear(16, 16), nn.Linear(16, 3))
    tokens = torch.arange(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = watched(
        model, optimizer, tokens, fxrank.Pufferfish(E=3, K=0, ratio=0.25, frobenius_decay=0.5), include="0"
    )
    steps(model, [optimizer], (tokens, tokens % 3), 3)
    unused = model[0].v.weight[10].detach().clone()
    steps(model, [optimizer], (tokens, tokens % 3), 3)
    assert session.finish().R["0"] == 4
    assert model[0].v.weight[10].norm() < unused.norm()  # a row that no batch has asked for decays with the others


def test_several_optimizers_errors():
    model, x = mlp(), vectors()[0]
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    for given, error, text in (
        ([], ValueError, "a session needs one optimizer, or several different ones; got none."),
        ([one, one], ValueError, "got the same one twice. Pass those that step the model."),
        (
            [one, torch.optim.SGD(mlp().parameters(), lr=0.1)],
            ValueError,
            "the optimizer must hold the model's parameters; SGD holds",
        ),
        ([one, torch.optim.LBFGS(model.parameters())], TypeError, "LBFGS evaluates the model several times"),
        (
            [one, "sgd"],
            TypeError,
            "optimizer must be a torch optimizer, or a list of some in the order in which they step; got str.",
        ),
        (
            None,
            TypeError,
            "optimizer must be a torch optimizer, or a list of some in the order in which they step; got NoneType.",
        ),
    ):
        with pytest.raises(error, match=re.escape(text)):
            watched(model, given, x)
    assert not one._optimizer_step_post_hooks


# -- hooks


def test_hooks_on_a_replaced_layer_go_on_and_can_be_removed():
    model, batch = ConvNet(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    calls = {"forward": 0, "backward": 0, "pre": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    handles = [
        model.conv2.register_forward_hook(count("forward")),
        model.conv2.register_full_backward_hook(count("backward")),
        model.conv2.register_forward_pre_hook(count("pre")),
    ]
    session = watched(model, optimizer, batch[0])
    calls.update(dict.fromkeys(calls, 0))
    train(model, optimizer, 8, batch)
    assert session.finish().R == {"conv2": 2, "conv3": 4} and isinstance(model.conv2, fxrank.FactorPair)
    assert calls == {"forward": 8, "backward": 8, "pre": 8}
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1, batch)
    assert calls == {"forward": 8, "backward": 8, "pre": 8}


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_replaced_weight_get_the_gradients_of_its_factors(register):
    model, batch = ConvNet(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shapes = []
    handle = getattr(model.conv2.weight, register)(lambda value: shapes.append(tuple(value.shape)))
    dense = tuple(model.conv2.weight.shape)
    session = watched(model, optimizer, batch[0])
    train(model, optimizer, 4, batch)
    pair = model.conv2
    assert shapes[:3] == [dense] * 3
    assert sorted(shapes[3:]) == sorted([tuple(pair.u.weight.shape), tuple(pair.v.weight.shape)])
    assert session.notes == ["conv2: the hooks on its weight get the gradients of its factors now"]
    handle.remove()
    train(model, optimizer, 1, batch)
    assert len(shapes) == 5


def test_a_clamping_hook_clamps_the_factors():
    model, batch = ConvNet(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.conv2.weight.register_hook(lambda gradient: gradient.clamp(-1e-6, 1e-6))
    watched(model, optimizer, batch[0])
    train(model, optimizer, 3, batch)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    for factor in (model.conv2.u.weight, model.conv2.v.weight):
        assert 0 < factor.grad.abs().max() <= 1e-6
    assert model.conv3.u.weight.grad.abs().max() > 1e-6


def test_hooks_on_what_a_weight_was_derived_from_are_gone_and_it_is_said():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.utils.parametrizations.weight_norm(nn.Linear(24, 24)), nn.Linear(24, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model[1].parametrizations.weight.original1.register_hook(lambda g: g)
    batch = torch.randn(6, 12), torch.arange(6) % 3
    session = watched(model, optimizer, batch[0])
    train(model, optimizer, 4, batch)
    assert session.finish().R == {"1": 6}
    assert session.notes[0] == "1: the hooks on its weight are gone with the parameters that it was derived from"


# -- what cannot be followed


def graphed(module):
    """As `torch.cuda.make_graphed_callables` leaves a module."""

    def forward(*inputs):
        return type(module).forward(module, *inputs)

    forward.__qualname__ = "make_graphed_callables.<locals>.make_graphed_forward.<locals>.new_fwd"
    module.forward = forward


def test_graphed_callables_are_refused_before_and_after_attaching():
    model, batch = ConvNet(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    text = re.escape(
        "a CUDA graph goes on with the weights that it was captured with, so they cannot be replaced; 'conv2' is a graphed callable. "
        "Train eagerly, or with torch.compile(mode='reduce-overhead'), and graph the model after the switch."
    )
    session = watched(model, optimizer, batch[0])
    graphed(model.conv2)
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(TypeError, match=text):
        train(model, optimizer, 8, batch)
    assert session.phase == "full-rank" and before == {name: id(p) for name, p in model.named_parameters()}
    session.detach()
    with pytest.raises(TypeError, match=text):
        watched(model, optimizer, batch[0])
    graphed(model)
    with pytest.raises(TypeError, match="the whole ConvNet is a graphed callable"):
        watched(model, optimizer, batch[0])


def test_a_step_that_is_being_captured_is_refused(monkeypatch):
    model, batch = ConvNet(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watched(model, optimizer, batch[0])
    train(model, optimizer, 1, batch)
    device = SimpleNamespace(is_initialized=lambda: True, is_current_stream_capturing=lambda: True)
    monkeypatch.setattr(wrappers.torch, "cuda", device)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"capture after session\.finish\(\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_factors_that_a_replayed_graph_does_not_reach_are_noticed():
    model, batch = ConvNet(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watched(model, optimizer, batch[0])
    captured = copy.deepcopy(model)
    train(model, optimizer, 3, batch)
    assert isinstance(model.conv2, fxrank.FactorPair)
    nn.functional.cross_entropy(captured(batch[0]), batch[1]).backward()
    with pytest.warns(
        UserWarning, match="the factors must have gradients in the step after the switch; none of them has any"
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # once is enough


def test_a_replaced_weight_that_is_still_used_is_noticed():
    model, (x, y) = ConvNet(), images()
    held = [*model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watched(model, optimizer, x)
    train(model, optimizer, 3, (x, y))

    def step():
        penalty = 0.01 * sum(p.square().sum() for p in held)
        (nn.functional.cross_entropy(model(x), y) + penalty).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="has replaced it; conv2, conv3 got gradients in the step after it"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()  # once is enough


def test_a_weight_tied_to_another_model_stays_dense():
    model, other, (x, y) = ConvNet(), ConvNet(1), images()
    other.conv3.weight = model.conv3.weight
    optimizer = torch.optim.SGD(nn.ModuleList([model, other]).parameters(), lr=0.05)
    session = watched(model, optimizer, x)
    train(model, optimizer, 3, (x, y))
    assert list(session.plan.R) == ["conv2"] and other.conv3.weight is model.conv3.weight
    assert "is also 'weight' of a Conv2d outside of the model" in session.plan.layer("conv3").reason


def test_an_optimizer_that_steps_inside_the_backward_pass_is_refused():
    model, (x, y) = ConvNet(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watched(model, optimizer, x)
    model.conv2.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    loss = nn.functional.cross_entropy(model(x), y)
    with pytest.raises(
        RuntimeError, match=re.escape("this optimizer steps inside backward(), from a hook. Step after it.")
    ):
        loss.backward()
