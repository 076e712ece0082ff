import torch
import torch.nn.functional as F
from teams import team
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from fxrank.torch_private import ddp


def test_a_wrapper_that_is_not_built_yet_holds_nothing():
    unbuilt = DistributedDataParallel.__new__(DistributedDataParallel)
    assert ddp.inside(unbuilt) is None and ddp.averaged(unbuilt) == []
    assert any(wrapper is unbuilt for wrapper in ddp.wrappers())


def wrapped(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    return net, DistributedDataParallel(net, **options)


def backward(wrapper, rank):
    F.mse_loss(wrapper(torch.full((3, 4), 1.0 + rank)), torch.zeros(3, 2)).backward()
    return [p.grad.tolist() for p in wrapper.module.parameters()]


def parts(rank, size):
    net, wrapper = wrapped()
    parameters = list(net.parameters())
    return (
        any(found is wrapper for found in ddp.wrappers()),
        ddp.inside(wrapper) is net,
        all(a is b for a, b in zip(ddp.averaged(wrapper), parameters, strict=True)),
        all(a is b for a, b in zip(ddp.reduced(wrapper), parameters, strict=True)),
        not ddp.delays_all_reduce(wrapper) and not ddp.reduces_in_python(wrapper),
    )


def test_what_a_wrapper_keeps_is_read():
    assert team(parts, 2) == [(True,) * 5] * 2


def delayed(rank, size):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    named = [("0.weight", net[0].weight)]
    late = DistributedDataParallel(net, delay_all_reduce_named_params=named, param_to_hook_all_reduce=net[1].weight)
    with torch._dynamo.config.patch(optimize_ddp="python_reducer"):
        python = DistributedDataParallel(nn.Linear(2, 2))
    return ddp.delays_all_reduce(late), ddp.reduces_in_python(python)


def test_options_that_hook_parameters_are_told():
    assert team(delayed, 2) == [(True, True)] * 2


def replaced(rank, size, static):
    net, wrapper = wrapped(static_graph=static)
    backward(wrapper, rank)
    net[1] = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4))
    with torch.no_grad():
        for p in net[1].parameters():
            p.fill_(0.5)
    ddp.reduce_anew(wrapper)
    steps = []
    for _ in range(3):
        net.zero_grad()
        steps.append(backward(wrapper, rank))
    net.zero_grad()
    with wrapper.no_sync():
        mine = backward(wrapper, rank)
    return steps, mine


def test_a_reducer_made_again_averages_what_the_module_has_now():
    for static in (False, True):
        (steps, one), (others, two) = team(replaced, 2, static)
        expected = [torch.tensor([a, b]).mean(0) for a, b in zip(one, two, strict=True)]
        for step in (*steps, *others):
            assert all(torch.allclose(torch.tensor(a), b) for a, b in zip(step, expected, strict=True))
        assert one != two


def hooked(rank, size):
    _, wrapper = wrapped()
    wrapper.register_comm_hook(None, fp16_compress_hook)
    found = ddp.comm_hooks(wrapper)
    ddp.reduce_anew(wrapper)
    ddp.forget_comm_hooks(wrapper)
    empty = ddp.comm_hooks(wrapper)
    wrapper.register_comm_hook(None, fp16_compress_hook)
    return found == ddp.comm_hooks(wrapper) == [(fp16_compress_hook, None)] and empty == []


def test_communication_hooks_are_read_and_registered_again():
    assert team(hooked, 2) == [True, True]


def joined(rank, size):
    _, wrapper = wrapped()
    before = ddp.is_joined(wrapper)
    with wrapper.join():
        during = ddp.is_joined(wrapper)
        backward(wrapper, rank)
    return before, during, ddp.is_joined(wrapper)


def test_the_inside_of_join_is_told_from_its_end():
    assert team(joined, 2) == [(False, True, False)] * 2


def laid(rank, size):
    net, wrapper = wrapped(bucket_cap_mb=1)
    numbers = {id(p): number for number, p in enumerate(ddp.reduced(wrapper))}

    def now():
        return [[numbers[id(p)] for p in bucket] for bucket in ddp.buckets(wrapper)]

    backward(wrapper, rank)
    one = now()
    with ddp.laying(wrapper, [[0, 1, 2], [3, 4, 5]]):
        ddp.reduce_anew(wrapper)
    two = now()
    net.zero_grad()
    backward(wrapper, rank)
    embedding = DistributedDataParallel(nn.Embedding(4, 2, sparse=True))
    return [sorted(bucket) for bucket in one], [sorted(bucket) for bucket in two], ddp.buckets(embedding)


def test_buckets_are_read_and_laid():
    for one, two, sparse in team(laid, 2):
        assert sorted(number for bucket in one for number in bucket) == list(range(6))
        assert two == [[3, 4, 5], [0, 1, 2]] and sparse is None
