"""What the switch needs beside the model: the factors, their optimizer state, and no more than one layer."""

import itertools
import tracemalloc
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxrank


class NewBytes(TorchDispatchMode):
    """Peak of the memory that is allocated inside the block and not yet freed: torch's storages and numpy's arrays."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {storage(t) for t in tensors((args, kwargs))}
        outputs = function(*args, **(kwargs or {}))
        for tensor in tensors(outputs):
            key = storage(tensor)
            if key not in known and key not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.now += self.sizes[key]
                weakref.finalize(tensor.untyped_storage(), self.gone, key)
        self.peak = max(self.peak, self.now + tracemalloc.get_traced_memory()[0])
        return outputs

    def gone(self, key):
        self.now -= self.sizes.pop(key)


def storage(tensor):
    return tensor.untyped_storage()._cdata


def tensors(tree):
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.device.type == "cpu"]


def test_the_measure_sees_what_is_allocated():
    with NewBytes():
        torch.zeros(1) + 1  # the first use of a mode imports much
    tracemalloc.start()
    with NewBytes() as memory:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
    tracemalloc.stop()
    assert 8000 <= memory.peak < 8000 + 65536  # two at a time, and Python's own objects
    assert third.sum() == 2000


@pytest.mark.parametrize("widths", [[512] * 8, [256, 1024, 256, 1024, 256, 256]], ids=["even", "uneven"])
@pytest.mark.parametrize(("kind", "moments"), [(torch.optim.SGD, 1), (torch.optim.AdamW, 2)])
def test_no_more_than_the_factors_and_one_layer(widths, kind, moments):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(widths)])
    largest = max(p.nbytes for p in model.parameters())
    optimizer = kind(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    x = torch.randn(4, widths[0])
    policy = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", latest=1.0, wait=False)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=9, steps_per_epoch=1, policy=policy
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    tracemalloc.start()
    with NewBytes() as memory:
        session._switch("now")
    tracemalloc.stop()
    factors = sum(p.nbytes for n, p in model.named_parameters() if ".u." in n or ".v." in n)
    assert len(session.plan.R) == len(widths) - 3
    assert memory.peak <= factors * (1 + moments) + largest
