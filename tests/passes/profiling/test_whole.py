"""Whole models timed against each other (never how long it takes)."""

import re

import pytest
import torch
from torch import nn

from fxrank.passes.profiling.clock import Share, Stopwatch
from fxrank.passes.profiling.whole import compare

CPU = torch.device("cpu")


class Noisy(nn.Module):
    """It draws random numbers, keeps statistics, and writes down how it is called."""

    def __init__(self):
        super().__init__()
        self.lin, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.calls = []

    def forward(self, x, shift=0.0):
        self.calls.append((self.training, torch.is_grad_enabled()))
        return {"out": self.drop(self.norm(self.lin(x))) + shift, "count": 3}


class Ticks(Stopwatch):
    """Each mark is as much later as the list says."""

    def __init__(self, ticks):
        super().__init__(CPU)
        self.ticks = iter(ticks)
        self.now = 0.0

    def mark(self):
        self._marks.append((self.now, self.now))
        self.now += next(self.ticks) / 1e3


@pytest.mark.parametrize("backward", [True, False])
def test_modes_and_gradients_are_those_of_what_is_timed(backward):
    models = [Noisy(), Noisy()]
    state = torch.get_rng_state()
    x = torch.randn(3, 4, requires_grad=True)
    after = torch.get_rng_state()
    watch = Ticks([1000, 500, 0] * 7)  # no more than 3 s, but 7 rounds
    times = compare(models, {"x": x, "shift": 1.0}, watch, backward=backward)
    assert times.ms == pytest.approx([1000, 500]) and times.shares[1] == Share(pytest.approx(0.5), pytest.approx(0))
    with pytest.raises(StopIteration):
        next(watch.ticks)
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)
    for model in models:
        assert set(model.calls) == {(backward, backward)}
        assert (model.lin.weight.grad is not None) == backward
    assert x.grad is None


def test_the_precision_is_the_jobs():
    seen = []
    model = nn.Linear(4, 4)
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    compare([model], torch.randn(2, 4), Stopwatch(CPU), backward=True, amp=torch.bfloat16, least=1, budget_ms=0)
    assert set(seen) == {torch.bfloat16}


def test_a_step_needs_gradients():
    frozen = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    text = "a training step needs outputs with gradients to be timed; those of Sequential have none. Unfreeze what is trained, or give target_latency."
    with pytest.raises(ValueError, match=re.escape(text)):
        compare([frozen], torch.randn(2, 4), Stopwatch(CPU), backward=True)
