"""Whole models timed against each other (never how long it takes)."""

import re

import pytest
import torch
from torch import nn

from fxrank.passes.profiling.timing import Stopwatch
from fxrank.passes.profiling.whole import Share, compare, share_of

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
        self._marks.append(self.now)
        self.now += next(self.ticks) / 1e3


def test_of_the_share_there_is_a_median_and_a_spread():
    assert share_of([10, 10, 20, 10], [5, 6, 12, 9]) == Share(pytest.approx(0.6), pytest.approx((0.675 - 0.575) / 2))
    assert share_of([10], [7]) == Share(pytest.approx(0.7), pytest.approx(0.0))


@pytest.mark.parametrize("backward", [True, False])
def test_modes_and_gradients_are_those_of_what_is_timed(backward):
    models = [Noisy(), Noisy()]
    state = torch.get_rng_state()
    x = torch.randn(3, 4, requires_grad=True)
    after = torch.get_rng_state()
    dense, small = compare(models, {"x": x, "shift": 1.0}, Ticks([1000, 500, 0] * 7), backward=backward)
    assert dense == pytest.approx([1000] * 7) and small == pytest.approx([500] * 7)  # no more than 3 s, but 7 rounds
    assert torch.equal(torch.get_rng_state(), after) and not torch.equal(state, after)
    for model in models:
        assert set(model.calls) == {(backward, backward)}
        assert (model.lin.weight.grad is not None) == backward
    assert x.grad is None


def test_a_step_needs_gradients():
    frozen = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    text = "a training step needs outputs with gradients to be timed; those of Sequential have none. Unfreeze what is trained, or give target_latency."
    with pytest.raises(ValueError, match=re.escape(text)):
        compare([frozen], torch.randn(2, 4), Stopwatch(CPU), backward=True)
