"""Weights of zeros stay dense on every path: their factors would be zero, and stay so."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import fxrank
from fxrank.decisions import take
from fxrank.passes.errors import NothingToFactorizeError

ZERO = "its weight is zero (stable rank 0)"


class Residual(nn.Module):
    """Branches that start at zero: a layer's, a convolution's, a raw one's, and one that shares its weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.into, self.out = nn.Linear(12, 16), nn.Linear(16, 12)
        self.kernel = nn.Conv1d(4, 4, 3, padding=1)
        self.raw = nn.Parameter(torch.zeros(12, 12))
        self.last = nn.Linear(12, 3)
        for zero in (self.out.weight, self.out.bias, self.kernel.weight):
            nn.init.zeros_(zero)

    def forward(self, x):
        x = self.first(x)
        x = x + self.out(torch.relu(self.into(x)))
        x = x + self.kernel(x.unflatten(1, (4, 3))).flatten(1)
        return self.last(x + torch.tanh(x @ self.raw))


X = torch.randn(6, 12)
ZEROS = {"out", "kernel", "raw"}


def net():
    torch.manual_seed(0)
    return Residual()


def filled():
    model = net()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def check(plan, model):
    sizes = {"out": model.out.weight.numel(), "kernel": model.kernel.weight.numel(), "raw": model.raw.numel()}
    assert plan.R.keys() == {"into"} and hasattr(model.into, "u")
    assert {d.name for d in plan.layers if d.reason == ZERO} == ZEROS
    assert not any(hasattr(getattr(model, name), "u") for name in ZEROS)
    for decision in plan.layers:
        if decision.name in ZEROS:
            assert (decision.pair_parameters, decision.pair_macs, decision.truncation_error) == (None, None, None)
            assert decision.form == "channel" and decision.parameters == sizes[decision.name]


@pytest.mark.parametrize("rank", [2, 0.25])
def test_factorize(rank):
    small = fxrank.factorize(net(), X, rank=rank)
    check(fxrank.plan_of(small), small)
    everything = fxrank.factorize(net(), X, rank=rank, include="*")
    assert fxrank.plan_of(everything).R.keys() == {"first", "into", "last"}


def test_factorize_by_names_says_why_not():
    with pytest.raises(ValueError, match=r"layer 'out' cannot be factorized: its weight is zero"):
        fxrank.factorize(net(), X, rank={"out": 2})


def test_a_model_of_zeros_has_nothing_to_factorize():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(NothingToFactorizeError, match="its weight is zero"):
        fxrank.factorize(model, X[:, :8])


def test_a_plan_of_another_state_of_the_model():
    plan = fxrank.plan_of(fxrank.factorize(filled(), X, rank=2))
    assert plan.R.keys() == ZEROS | {"into"}
    small = fxrank.factorize(net(), X, rank=plan)
    check(fxrank.plan_of(small), small)
    assert fxrank.plan_of(small).layer("into") == plan.layer("into")


class Everything(fxrank.Policy):
    """A user's own policy, which looks at nothing."""

    def ready(self, clock, scene):
        return "now"

    def decide(self, scene):
        return [take(layer, 2, "all") for layer in scene.layers if layer.boundary is None]


CUTTLEFISH = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", wait=False, latest=0.0)
POLICIES = [Everything(), fxrank.Pufferfish(E=0), fxrank.SpectralInit(), CUTTLEFISH, "plan"]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p if isinstance(p, str) else type(p).__name__)
def test_a_session_with_any_policy(policy):
    if policy == "plan":
        policy = fxrank.plan_of(fxrank.factorize(filled(), X, rank=2))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=X, total_steps=4, policy=policy)
    if session.plan is None:
        session.step()
    check(session.plan, model)
    assert session.scene.factors == {}
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert all(getattr(model, name).weight.any() for name in ("out", "kernel")) and model.raw.any()


def test_one_zero_matrix_of_several():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 4, 3))
    nn.init.zeros_(model[1].weight[4:])
    x = torch.randn(2, 4, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = fxrank.factorize(model, x, rank=2, include="*")
    reason = "1 of the 2 matrices in its weight is zero (stable rank 0)"
    assert fxrank.plan_of(small).layer("1").reason == reason
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=4, policy=fxrank.Pufferfish(E=0, ratio=0.5), include="*"
    )
    assert session.plan.layer("1").reason == reason and "2" in session.plan.R


def test_one_number_is_enough_and_a_file_of_zeros_still_loads(tmp_path):
    model = net()
    with torch.no_grad():
        model.out.weight[3, 4] = 1e-30
    small = fxrank.factorize(model, X, rank=2)
    assert fxrank.plan_of(small).R.keys() == {"into", "out"}
    with torch.no_grad():
        small.out.u.weight.zero_()
        small.out.v.weight.zero_()
    fxrank.save(small, tmp_path)  # as an earlier fxrank made them
    loaded = fxrank.load(net(), tmp_path)
    assert fxrank.plan_of(loaded) == fxrank.plan_of(small) and torch.equal(loaded(X), small(X))


def test_on_the_meta_device_nobody_knows():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        small = fxrank.factorize(model, torch.randn(2, 8), rank=2)
    assert fxrank.plan_of(small).R == {"1": 2}
    assert dataclasses.replace(fxrank.plan_of(small).layer("1"), reason="").rank == 2
