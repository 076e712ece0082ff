"""Parts that take no hooks, layers without numbers, options that are no number: left out with a reason, or an error of ours."""

import dataclasses
import math
import warnings

import pytest
import torch
from torch import nn

import fxrank

X = torch.randn(4, 8)
EMPTY = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.layer(x))


class Around(nn.Module):
    """Calls a scripted part from code that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.part, self.layer = scripted(Block()), nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.part(x)) if x.sum() > -1e9 else x


class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 0), nn.Linear(0, 8), nn.Linear(8, 8)
        self.raw = nn.Parameter(torch.zeros(8, 0))
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        x = self.a(x)
        return self.last(self.d(self.c(self.b(x) + x @ self.raw) + x))


def attached(model, policy=None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = fxrank.Pufferfish(E=0, ratio=0.25) if policy is None else policy
    options = {"example_inputs": X, "total_steps": 4, "policy": policy} | options
    return fxrank.LowRankSession.attach(model, optimizer, **options)


SCRIPTED = {
    "without weights": lambda: nn.Sequential(nn.Linear(8, 8), scripted(nn.Tanh()), nn.Linear(8, 8), nn.Linear(8, 8)),
    "with weights": lambda: nn.Sequential(nn.Linear(8, 8), scripted(Block()), nn.Linear(8, 8), nn.Linear(8, 8)),
    "inside": lambda: nn.Sequential(nn.Linear(8, 8), Around(), nn.Linear(8, 8), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("name", SCRIPTED)
@pytest.mark.parametrize("training", [True, False])
def test_a_scripted_part_stays_and_the_rest_is_factorized(name, training):
    model = SCRIPTED[name]().train(training)
    small = fxrank.factorize(model, X, rank=2)
    plan = fxrank.plan_of(small)
    assert "2" in plan.R and all(decision.reason for decision in plan.layers)
    inner = {"without weights": set(), "with weights": {"1.layer"}, "inside": {"1.part.layer"}}[name]
    assert inner <= {decision.name for decision in plan.layers} - plan.R.keys()
    session = attached(model)
    assert "2" in session.plan.R
    model(X).sum().backward()


@EMPTY
def test_layers_without_numbers_are_named_and_left():
    reason = "its weight has no numbers"
    for plan in (fxrank.plan_of(fxrank.factorize(Empty(), X, rank=2)), attached(Empty()).plan):
        assert plan.R == {"d": 2}
        assert {d.name for d in plan.layers if d.reason == reason} == {"b", "c", "raw"}
    assert fxrank.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match=f"layer 'b' cannot be factorized: {reason}"):
        fxrank.factorize(Empty(), X, rank={"b": 1})
    table = nn.Sequential(nn.Embedding(5, 0), nn.Linear(0, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    plan = fxrank.plan_of(fxrank.factorize(table, torch.randint(5, (2, 3)), rank=2, include="*"))
    assert {d.name for d in plan.layers if d.reason == reason} == {"0", "1"}


@EMPTY
def test_a_plan_for_a_layer_without_numbers_is_refused():
    plan = fxrank.plan_of(fxrank.factorize(Empty(), X, rank=2))
    changed = plan.with_layers([dataclasses.replace(plan.layer("b"), rank=1, full_rank=1)])
    with pytest.raises(fxrank.PlanMismatchError, match=r"must have numbers; 'b' has a weight \(0, 8\)"):
        fxrank.factorize(Empty(), X, rank=changed)


def test_a_weight_without_numbers_has_no_stable_rank():
    with pytest.raises(ValueError, match=r"a weight needs numbers to have a rank; got shape \(0, 4\)"):
        fxrank.stable_rank(torch.zeros(0, 4))


NAN = {
    fxrank.Cuttlefish: [
        "epsilon",
        "window",
        "latest",
        "speedup_threshold",
        "min_ratio",
        "xi",
        "round_to",
        "samples",
        "ratio",
    ],
    fxrank.Pufferfish: ["E", "K", "ratio", "frobenius_decay", "lr_scale", "rewarmup"],
}


@pytest.mark.parametrize(("kind", "option"), [(kind, option) for kind, options in NAN.items() for option in options])
def test_an_option_that_is_no_number_is_refused(kind, option):
    given = {"E": 1} if kind is fxrank.Pufferfish else {}
    with pytest.raises(ValueError, match=f"{option} is nan"):
        kind(**(given | {option: math.nan}))


def test_other_numbers_that_are_none():
    with pytest.raises(ValueError, match="total_steps and steps_per_epoch must be at least 1; got nan"):
        attached(Block(), total_steps=math.nan)
    with pytest.raises(fxrank.RankError, match="got nan"):
        fxrank.factorize(SCRIPTED["without weights"](), X, rank=math.nan)
    for options in ({"probe_ratio": math.nan}, {"speedup_threshold": math.nan}):
        with pytest.raises(ValueError, match="nan"):
            fxrank.profile(SCRIPTED["without weights"](), X, **options)
