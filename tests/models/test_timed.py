"""One-shot factorization under budgets of time, as a user calls it, with a clock that counts multiply-adds."""

import copy
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import fxrank
from fxrank.passes.errors import BudgetError
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.profiling.clock import times_of
from fxrank.passes.profiling.timing import Profiler
from fxrank.policies import times


class Statistics(nn.Module):
    """Layers of two stacks, a BatchNorm and a Dropout between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Dropout(0.1)
        self.body = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise([64, 64, 64, 128, 64])])
        self.last = nn.Linear(64, 4)

    def forward(self, x):
        return self.last(self.body(self.drop(self.norm(self.first(x)))))


@pytest.fixture
def counting(monkeypatch):
    """A millisecond for each thousand numbers of a layer; in a model pairs save only `counting["honesty"]` of what they do alone."""
    said = {"honesty": 1.0, "backward": [], "trials": 0}

    def times_ms(self, layer, ranks):
        said["backward"].append(self._backward)
        return [layer.parameters / 1e3, *(layer.pair_parameters(rank) / 1e3 for rank in ranks)]

    def ms(model):
        total = sum(p.numel() for p in model.parameters())
        saved = sum(_saved(p) for p in model.modules() if isinstance(p, FactorPair))
        return (total + saved - said["honesty"] * saved) / 1e3

    def compare(models, example, watch, *, backward, **options):
        said["backward"].append(backward)
        said["trials"] += len(models) > 1
        return times_of([[ms(model) * factor for model in models] for factor in (0.99, 1.0, 1.02)], "clock")

    monkeypatch.setattr(Profiler, "times_ms", times_ms)
    monkeypatch.setattr(times, "compare", compare)
    return said


def _saved(pair):
    rows, cols = pair.dense_shape[:2]
    return rows * cols - pair.u.weight.numel() - pair.v.weight.numel()


@pytest.mark.parametrize("honesty", [1.0, 0.75])
@pytest.mark.parametrize("of", ["step_time", "latency"])
def test_the_target_is_met_and_the_original_untouched(counting, of, honesty):
    counting["honesty"] = honesty
    model, x = Statistics(), torch.randn(8, 16)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    small = fxrank.factorize(model, x, **{f"target_{of}": 0.6})
    assert set(counting["backward"]) == {of == "step_time"} and counting["trials"] == 1 + (honesty < 1)
    plan = fxrank.plan_of(small)
    budget = plan.budget
    assert (budget.of, budget.target, budget.spread) == (of, 0.6, 0.0)
    assert budget.reached == pytest.approx(0.6, rel=0.05) and plan.note == ""
    assert budget.device.startswith("cpu")
    assert all(d.rank % 4 == 0 for d in plan.layers if d.factorized)
    assert any(d.reason == f"rank {d.rank} of 64 under target_{of}=0.6" for d in plan.layers)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(p.grad is None for m in (model, small) for p in m.parameters())
    assert all(torch.equal(t, before[n]) for n, t in small.norm.state_dict(prefix="norm.").items())
    assert fxrank.Plan.from_json(plan.to_json()) == plan
    again = fxrank.factorize(model, x, rank=plan)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}


def test_with_data_and_in_every_form(counting):
    model, x = Statistics(), torch.randn(32, 16)
    small = fxrank.factorize(model, x, target_latency=0.6, form="auto", calibration=[x, x + 0.1], include="*")
    assert fxrank.plan_of(small).calibration_batches == 2
    assert fxrank.plan_of(small).budget.reached == pytest.approx(0.6, rel=0.05)
    assert all(d.output_error is not None for d in fxrank.plan_of(small).layers if d.factorized)


def test_out_of_reach_is_said_with_what_can_be_reached(counting):
    with pytest.raises(
        BudgetError,
        match=r"target_latency must be at least 0\.\d+ \(± 0\.000\) here, on cpu, \d+ threads, where each of 4 layers",
    ):
        fxrank.factorize(Statistics(), torch.randn(8, 16), target_latency=0.02)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"target_latency": 0.5, "target_step_time": 0.5},
            ValueError,
            "got target_step_time=0.5 and target_latency=0.5.",
        ),
        ({"target_latency": 0.5, "target_params": 0.5}, ValueError, "got target_params=0.5 and target_latency=0.5."),
        ({"target_step_time": 0.5, "rank": 4}, ValueError, "got target_step_time=0.5 and rank=."),
        ({"target_latency": 1.2}, ValueError, "target_latency is a share in (0, 1]; got 1.2."),
        ({"target_step_time": "fast"}, TypeError, "target_step_time is a number in (0, 1]; got str."),
    ],
)
def test_targets_are_checked(options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fxrank.factorize(Statistics(), torch.randn(8, 16), **options)


@pytest.mark.parametrize("of", ["step_time", "latency"])
def test_a_real_clock_leaves_nothing_behind(of):
    """Whatever it measures."""
    model, x = Statistics(), torch.randn(8, 16)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    try:
        small = fxrank.factorize(model, x, **{f"target_{of}": 0.9})
    except BudgetError as error:
        assert re.match(rf"target_{of} must be at least \d+\.\d+ \(± \d+\.\d+\) here, on cpu", str(error))  # noqa: PT017
    else:
        assert fxrank.plan_of(small).budget.spread >= 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters())
