"""What the switch needs beside the model: the factors, their optimizer state, and no more than one layer."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

import fxrank
from benchmarks.switch_memory import new_bytes

CPU = torch.device("cpu")


def test_the_measure_sees_what_is_allocated():
    with new_bytes(CPU):
        torch.zeros(1) + 1  # the first use of a mode imports much
    with new_bytes(CPU) as found:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
    assert 8000 <= found["peak"] < 8000 + 65536  # two at a time, and Python's own objects
    assert third.sum() == 2000


def switched(widths, kind):
    """A model made low-rank by a switch, its weights' largest size, and the peak of what the switch allocated; bytes."""
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
    with new_bytes(CPU) as found:
        session._switch("now")
    assert len(session.plan.R) == len(widths) - 3
    return model, largest, found["peak"]


@pytest.mark.parametrize("widths", [[512] * 8, [256, 1024, 256, 1024, 256, 256]], ids=["even", "uneven"])
@pytest.mark.parametrize(("kind", "moments"), [(torch.optim.SGD, 1), (torch.optim.AdamW, 2)])
def test_no_more_than_the_factors_and_one_layer(widths, kind, moments):
    model, largest, peak = switched(widths, kind)
    factors = sum(p.nbytes for n, p in model.named_parameters() if ".u." in n or ".v." in n)
    # Another thread, of the test runner say, may allocate meanwhile, which only adds: the lesser of two.
    assert min(peak, switched(widths, kind)[2]) <= factors * (1 + moments) + largest


FRESH = """
import gc, weakref, torch, fxrank
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(4)])
    def forward(self, x):
        for part in self.parts:
            x = torch.relu(part(x)) + x
        return x
model = Net()
optimizer = torch.optim.AdamW(model.parameters())
weights = [weakref.ref(model.parts[i].weight) for i in (1, 2)]
x = torch.randn(4, 8)
policy = fxrank.Pufferfish(E=2, K=0, ratio=0.25)
session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=4, steps_per_epoch=1, policy=policy)
for _ in range(4):
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
assert len(session.plan.R) == 2
gc.collect()
assert [w() for w in weights] == [None, None]
assert torch.empty in torch.overrides.get_ignored_functions()
"""


def test_the_dense_weights_are_freed_also_after_the_first_trace_of_a_process():
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
