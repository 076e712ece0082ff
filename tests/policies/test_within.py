"""Policies with a target: what they take, when it is refused, and what becomes of the model at the switch."""

import re
from dataclasses import dataclass, replace

import pytest
import torch
from nets import SOON, UNTIMED, ConvNet, SixLayers, attach, images, mlp, settings_of, sgd, snapshot, train, vectors

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.profiling.clock import times_of
from fxrank.passes.profiling.timing import Profiler
from fxrank.passes.tracing.trace import trace
from fxrank.policies.scene import Clock
from fxrank.training.measure import parameter_count


@dataclass(frozen=True, kw_only=True)
class Own(fxrank.Policy):
    """A policy of a user's: at step 3."""

    step: int = 3

    def ready(self, clock, scene):
        return "now" if clock.step >= self.step else None

    def decide(self, scene):
        raise AssertionError("under a target it is not asked")


POLICIES = [
    replace(SOON, target_params=0.7),
    fxrank.Pufferfish(E=0.5, K=0, target_params=0.7),
    fxrank.SpectralInit(K=0, target_params=0.7),
    Own(target_params=0.7),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.name)
def test_every_policy_that_chooses_ranks_keeps_to_its_target(policy):
    model = SixLayers()
    dense = parameter_count(model)
    session = attach(model, optimizer := sgd(model), policy)
    train(model, optimizer, 10)
    session.finish()
    budget = session.plan.budget
    assert (budget.of, budget.target) == ("params", 0.7)
    assert budget.reached == pytest.approx(parameter_count(model) / dense)
    assert 0.693 < budget.reached <= 0.7
    assert {d.reason for d in session.plan.layers if d.factorized} == {
        f"rank {d.rank} of {d.full_rank} under target_params=0.7" for d in session.plan.layers if d.factorized
    }
    assert fxrank.Plan.from_json(session.plan.to_json()) == session.plan


def test_ranks_are_those_that_lose_least_at_the_switch():
    model = mlp(width=32)
    with torch.no_grad():  # one weight of rank 2, the other without any decay
        model[2].weight.copy_(torch.randn(32, 2) @ torch.randn(2, 32))
        model[4].weight.copy_(torch.linalg.qr(torch.randn(32, 32))[0])
    session = attach(model, sgd(model), fxrank.SpectralInit(K=0, target_macs=0.6))
    budget, ranks = session.plan.budget, session.plan.R
    assert (ranks["2"] < 8 and "4" not in ranks) or ranks["4"] > ranks["2"] + 8
    macs = sum(d.macs if d.pair_macs is None else d.pair_macs for d in session.plan.layers)
    assert budget.reached == pytest.approx(macs / sum(d.macs for d in session.plan.layers))
    assert session.plan.layer("2").truncation_error < 1e-5


def test_layers_that_the_policy_leaves_alone_stay_so_if_the_target_can_be_met_without_them():
    model = SixLayers()
    kept = attach(model, sgd(model), fxrank.SpectralInit(K=4, target_params=0.8)).plan
    assert kept.R.keys() == {"l4"} and kept.layer("l3").reason == "among the first K = 4 layers"
    model = SixLayers()
    plan = attach(model, sgd(model), fxrank.SpectralInit(K=4, target_params=0.35)).plan
    assert plan.R.keys() >= {"l3", "l4"}
    rank = plan.R["l3"]
    assert plan.layer("l3").reason == (
        f"rank {rank} of 32 under target_params=0.35; taken in, as the target cannot be met without it: among the first K = 4 layers"
    )
    assert plan.layer("l4").reason == f"rank {plan.R['l4']} of 32 under target_params=0.35"
    assert plan.budget.reached <= 0.35


def test_layers_that_are_slow_stay_dense_and_speed_is_told(monkeypatch):
    def times(self, layer, ranks):
        return times_of([[1.0, *([2.0 if layer.name == "l3" else 0.5] * len(ranks))]], "clock")

    monkeypatch.setattr(Profiler, "times", times)
    model = SixLayers()
    session = attach(model, optimizer := sgd(model), replace(SOON, speedup_threshold=1.5, target_params=0.75))
    train(model, optimizer, 10)
    plan = session.plan
    assert not plan.layer("l3").factorized and "the threshold is 1.5x" in plan.layer("l3").reason
    assert plan.layer("l3").speedup == 0.5 and plan.layer("l4").speedup == 2.0
    assert plan.budget.reached <= 0.75


def test_forms_and_extra_batchnorms_are_counted():
    for options in ({"extra_bn": True}, {"form": "auto"}, {"form": "spatial"}):
        model = ConvNet()
        dense = parameter_count(model)
        policy = fxrank.SpectralInit(K=0, target_params=0.6, **options)
        session = attach(model, sgd(model), policy, images()[0])
        assert session.plan.budget.reached == pytest.approx(parameter_count(model) / dense)
        assert session.plan.budget.reached <= 0.6
        if "extra_bn" in options:
            assert any(d.extra_bn for d in session.plan.layers)
        if options.get("form") == "spatial":
            assert {d.form for d in session.plan.layers if d.factorized} >= {"spatial"}


def test_a_target_out_of_reach_is_refused_before_anything_is_hooked():
    model = SixLayers()
    optimizer = sgd(model)
    before, settings = snapshot(model), settings_of(optimizer)
    with pytest.raises(
        fxrank.BudgetError,
        match=r"target_params must be at least 0\.\d+ here, where each of 4 layers has rank 1; got 0\.05",
    ):
        attach(model, optimizer, replace(UNTIMED, target_params=0.05))
    assert snapshot(model) == before and settings_of(optimizer) == settings


def test_a_weight_that_is_zero_by_then_is_no_option():
    model = SixLayers()
    layers = discover(trace(model, vectors()[0]), model)
    with torch.no_grad():
        model.l2.weight.zero_()
    policy = fxrank.SpectralInit(K=0, target_params=0.7)
    plan = policy.plan(fxrank.policies.scene.Scene(model, layers), Clock(0, 10, 10), "now")
    assert plan.layer("l2").reason == "its weight is zero (stable rank 0)"
    assert plan.budget.reached <= 0.7


def test_one_rank_more_that_would_be_too_much_is_said():
    model = mlp(width=8)
    plan = attach(model, sgd(model), fxrank.SpectralInit(K=0, target_params=0.8)).plan
    assert 0.72 < plan.budget.reached < 0.792
    assert (
        f"target_params=0.8 is kept to with {plan.budget.reached:.4f}: no ranks that are worth their cost come nearer"
        in plan.note
    )


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"target_params": 0.5, "target_macs": 0.5},
            ValueError,
            "ranks are given, or chosen for one target, or to keep a share; got target_params=0.5 and target_macs=0.5.",
        ),
        ({"target_params": 0}, ValueError, "target_params is a share in (0, 1]; got 0.0. 0.5 halves them."),
        ({"target_macs": 1.5}, ValueError, "target_macs is a share in (0, 1]; got 1.5."),
        ({"target_params": True}, TypeError, "target_params is a number in (0, 1]; got bool."),
        ({"target_macs": "half"}, TypeError, "the option target_macs must be float or None; got str."),
        ({"target_params": float("nan")}, ValueError, "target_params is nan."),
    ],
)
def test_a_target_is_checked_as_in_factorize(options, error, text):
    for make in (fxrank.Cuttlefish, Own):
        with pytest.raises(error, match=re.escape(text)):
            make(**options)


def test_policies_that_choose_no_ranks_take_no_target():
    plan = fxrank.Plan("by hand", ())
    for make in (fxrank.FullRank, lambda **o: fxrank.FixedPlan(given=plan, **o)):
        with pytest.raises(
            ValueError,
            match=r"a target is what ranks are chosen for; F\w+ chooses none, and got target_macs=0\.5\. Leave it out",
        ):
            make(target_macs=0.5)


def test_a_repr_names_a_target_only_where_there_is_one():
    """Checkpoints of earlier versions hold what policies without a target were called."""
    assert (
        repr(Own())
        == f"{Own.__qualname__}(frobenius_decay='auto', extra_bn=False, form='channel', lr_scale=1.0, rewarmup=0.0, freeze=(), step=3)"
    )
    for policy in (*POLICIES, fxrank.Cuttlefish(target_macs=0.25)):
        plain = replace(policy, target_params=None, target_macs=None)
        assert "target" not in repr(plain) and repr(policy) != repr(plain)
        assert re.search(r"target_(params=0\.7|macs=0\.25)", repr(policy))
    assert eval(repr(POLICIES[0]), vars(fxrank)) == POLICIES[0]


def test_a_repr_of_ones_own_is_left_alone():
    @dataclass(frozen=True, kw_only=True)
    class Named(Own):
        def __repr__(self):
            return "mine"

    assert repr(Named(target_params=0.5)) == "mine"


def test_a_run_goes_on_only_with_the_same_target():
    policy = replace(SOON, target_params=0.7)
    model = SixLayers()
    session = attach(model, optimizer := sgd(model), policy)
    train(model, optimizer, 7)
    state = session.state_dict()
    again = SixLayers()
    assert attach(again, sgd(again), policy, state=state).plan == session.plan
    again = SixLayers()
    with pytest.raises(fxrank.CheckpointError, match="a run resumes with the policy it was started with"):
        attach(again, sgd(again), replace(policy, target_params=0.6), state=state)
