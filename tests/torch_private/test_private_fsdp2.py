import copy

import torch
from teams import team
from torch import nn

from fxrank.torch_private import fsdp2
from fxrank.torch_private.dtensor import whole
from fxrank.torch_private.modules import own_parameters, post_hooks, pre_hooks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.layer.weight

    def forward(self, x):
        return self.again(self.layer(x))


def sharded():
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(Block(), nn.Linear(4, 2))
    fully_shard(net[0])
    return fully_shard(net)


def units(rank, size):
    net = sharded()
    found = list(fsdp2.groups(net))
    managed = {id(p.parameter): p for group in found for p in group.managed()}
    weight = managed[id(net[0].layer.weight)]
    return (
        [fsdp2.is_unit(m) for m in (net, net[0], net[1], nn.Linear(2, 2))] == [True, True, False, False],
        len(list(fsdp2.unit_states(net))) == 2,
        [group.processes for group in found] == [size] * 2 and not any(group.is_offloaded for group in found),
        managed.keys() == {id(p) for p in net.parameters()},
        weight.module is net[0].layer and weight.attribute == "weight" and not weight.was_dtensor,
    )


def test_units_and_what_they_manage_are_read():
    assert team(units, 2) == [(True,) * 5] * 2


def offloaded(rank, size):
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    net = fully_shard(nn.Linear(4, 4), offload_policy=CPUOffloadPolicy(pin_memory=False))
    return [group.is_offloaded for group in fsdp2.groups(net)]


def test_offloaded_shards_are_told():
    assert team(offloaded, 2) == [[True]] * 2


def copied(rank, size):
    net, x = sharded(), torch.ones(2, 4)
    expected = net(x)
    fsdp2.reshard(net)
    classes = [type(module) for module in net.modules()]
    memo = {id(state): state for state in fsdp2.unit_states(net)}
    for p in net.parameters():
        memo[id(p)] = nn.Parameter(whole(p.detach()))
    with fsdp2.of_own_classes(net):
        plain = copy.deepcopy(net, memo)
    fsdp2.drop_unit_hooks(plain)
    return (
        [type(module) for module in net.modules()] == classes,
        [type(plain), type(plain[0])] == [nn.Sequential, Block],
        not any(pre_hooks(m) or post_hooks(m) for m in plain.modules()),
        torch.equal(plain(x), expected) and torch.equal(net(x), expected),
    )


def test_a_copy_without_units_is_an_ordinary_model():
    assert team(copied, 2) == [(True,) * 4] * 2


def replaced(rank, size, used_before):
    net, x = sharded(), torch.arange(8.0).reshape(2, 4) / 8
    if used_before:
        net(x).sum().backward()
    net.zero_grad()
    fsdp2.reshard(net)
    old, block = net[0].layer.weight, net[0]
    others = [p for p in block.parameters() if p is not old]
    for layer in (block.layer, block.again):
        own_parameters(layer)["weight"] = nn.Parameter(torch.eye(4))
    block.again.weight = block.layer.weight
    block.scale = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        block.scale.weight.fill_(0.25)
    place = fsdp2.replace_in_unit(net, old, [block.layer.weight], [block.layer])
    place.add(net, [block.scale.weight])
    place.prepare_again()
    managed = [p for group in fsdp2.groups(net) for p in group.managed()]
    here = {id(p.parameter) for p in managed}
    net(x).sum().backward()
    bias = sum(whole(layer.bias.detach()) for layer in (block.layer, block.again))
    expected = (x + bias) @ whole(net[1].weight.detach()).T + whole(net[1].bias.detach())
    fsdp2.reshard(net)
    state = net.state_dict()
    return (
        here == {id(p) for p in net.parameters()} and id(old) not in here and len(others) == 2,
        all(hasattr(p, "full_tensor") for p in net.parameters()),
        block.layer.weight is block.again.weight and block.layer.weight.grad is not None,
        torch.allclose(net(x), expected, atol=1e-6),
        whole(state["0.scale.weight"]).tolist() == torch.full((4, 4), 0.25).tolist(),
    )


def test_a_unit_takes_other_parameters_in_place_of_one():
    for used_before in (False, True):
        assert team(replaced, 2, used_before) == [(True,) * 5] * 2
