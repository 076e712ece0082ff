"""Policies by name, and what each does to a run: Pufferfish, spectral initialization, a given plan, full rank, one's own."""

import dataclasses
import functools
import re

import pytest
import torch
from nets import SOON, ConvNet, SixLayers, attach, images, mlp, sgd, train, vectors
from torch import nn

import fxrank
from fxrank.passes.spectra import exact
from fxrank.policies.fixed import POLICIES, as_policy

X = vectors()[0]
NAMES = ", ".join(map(repr, sorted(POLICIES)))
attached = functools.partial(attach, total_steps=20, steps_per_epoch=10)


# -- names and options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"E": -1}, "E and K must not be negative; got E=-1, K=1."),
        ({"E": 0, "K": -2}, "E and K must not be negative; got E=0, K=-2."),
        ({"E": 0, "ratio": 0}, "ratio must be above 0 and at most 1; got 0."),
        ({"E": 0, "ratio": 2}, "ratio must be above 0 and at most 1; got 2."),
        ({"E": 0, "lr_scale": -1}, "lr_scale must be above 0; got -1. 1.0 keeps the schedule."),
    ],
)
def test_bad_options_of_pufferfish(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        fxrank.Pufferfish(**options)


def test_policies_by_name():
    assert as_policy(None) == fxrank.Cuttlefish()
    assert as_policy("cuttlefish") == fxrank.Cuttlefish()
    assert as_policy("cuttlefish-paper") == fxrank.Cuttlefish.paper()
    assert as_policy("cuttlefish-reference") == fxrank.Cuttlefish.reference()
    assert as_policy("spectral-init") == fxrank.SpectralInit()
    assert as_policy("full-rank") == fxrank.FullRank()
    policy = fxrank.Pufferfish(E=3)
    assert as_policy(policy) is policy
    plan = fxrank.Plan("by hand", ())
    assert as_policy(plan) == fxrank.FixedPlan(given=plan)
    with pytest.raises(
        ValueError, match=re.escape(f"policy must be one of {NAMES}; got 'cuttlefisch'. Did you mean 'cuttlefish'?")
    ):
        as_policy("cuttlefisch")
    with pytest.raises(
        ValueError,
        match=re.escape(
            "the policy 'pufferfish' needs an E of yours, so it has no name alone; pass fxrank.Pufferfish(E=…"
        ),
    ):
        as_policy("pufferfish")
    with pytest.raises(
        TypeError, match=re.escape("policy must be a fxrank policy, a Plan or a name; got int. Valid names: ")
    ):
        as_policy(3)


def test_policies_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fxrank.Cuttlefish().epsilon = 1.0


# -- in a run


def test_pufferfish():
    model = SixLayers()
    optimizer = sgd(model)
    session = attached(model, optimizer, fxrank.Pufferfish(E=1.5, K=2, ratio=0.25))
    train(model, optimizer, 14)
    assert session.plan is None
    assert session.scene.monitor is None
    train(model, optimizer, 1)
    plan = session.plan
    assert (plan.switch_step, plan.E, plan.K, plan.note) == (15, 1.5, 2, "E = 1.5 epochs as given")
    assert plan.R == {"l2": 4, "l3": 8, "l4": 8}
    assert plan.layer("l1").reason == "among the first K = 2 layers"
    assert plan.layer("l2").reason == "0.25 of full rank as given"
    assert session.finish() is plan


def test_pufferfish_makes_no_layer_larger():
    model = mlp()
    with pytest.warns(
        fxrank.NothingFactorizedWarning, match=re.escape("rank 8 of 16 would not save anything: break-even is 8.0")
    ):
        attached(model, sgd(model), fxrank.Pufferfish(E=0, ratio=0.5)).finish()


def test_spectral_init_starts_low_rank():
    model = SixLayers()
    session = attached(model, sgd(model), "spectral-init")
    assert session.phase == "low-rank"
    assert (session.plan.E, session.plan.switch_step) == (0.0, 0)
    assert session.plan.R == {"l1": 4, "l2": 4, "l3": 8, "l4": 8}
    with pytest.raises(TypeError, match="unexpected keyword argument 'E'"):
        fxrank.SpectralInit(E=3)


def test_extra_bn_only_between_convolutions():
    model, (x, _) = ConvNet(), images()
    session = attached(model, sgd(model), fxrank.SpectralInit(extra_bn=True), x=x)
    assert isinstance(model.conv2.norm, nn.BatchNorm2d)
    assert model.conv2.norm.num_features == model.conv2.groups * session.plan.R["conv2"]
    assert [d.extra_bn for d in session.plan.layers] == [False, True, True, False]
    linear = SixLayers()
    assert not any(d.extra_bn for d in attached(linear, sgd(linear), fxrank.SpectralInit(extra_bn=True)).plan.layers)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frobenius_decay": None},
        {"frobenius_decay": 0.3},
        {"lr_scale": 0.5, "rewarmup": 0.2},
        {"freeze": ("l0.*",), "extra_bn": True},
    ],
    ids=repr,
)
def test_a_fixed_plan_repeats_a_run_exactly(options, tmp_path):
    def run(policy):
        model = SixLayers()
        optimizer = sgd(model)
        session = attached(model, optimizer, policy)
        losses = train(model, optimizer, 20)
        return session.finish(), losses, model.state_dict()

    policy = fxrank.Cuttlefish(speedup_threshold=None, latest=0.35, xi=1.0, rank_metric="energy", share=0.6, **options)
    plan, losses, state = run(policy)
    assert plan.switch_step == 7
    assert plan.R
    plan.save(tmp_path / "plan.json")
    again, losses_again, state_again = run(fxrank.Plan.load(tmp_path / "plan.json"))
    assert losses_again == losses
    assert list(state) == list(state_again)
    assert all(torch.equal(state[k], state_again[k]) for k in state)
    assert again.layers == plan.layers
    assert (again.switch_step, again.policy, again.note) == (7, "FixedPlan", "as planned")


def test_a_plan_without_a_step_is_applied_at_once():
    model = SixLayers()
    plan = fxrank.plan_of(fxrank.factorize(SixLayers(), X, rank=0.25))
    session = attached(model, sgd(model), plan)
    assert session.plan.R == plan.R
    assert session.plan.switch_step == 0


def test_a_plan_without_any_pair_ends_as_it_was():
    model = SixLayers()
    (first, *rest) = fxrank.plan_of(fxrank.factorize(SixLayers(), X, rank=0.25)).layers
    layers = [dataclasses.replace(layer, rank=None, reason=f"{layer.name} was kept") for layer in (first, *rest)]
    plan = fxrank.Plan("Cuttlefish", tuple(layers), switch_step=5, switch_epoch=0.5, note="it saved nothing")
    optimizer = sgd(model)
    session = attached(model, optimizer, plan)
    train(model, optimizer, 20)
    with pytest.warns(fxrank.NothingFactorizedWarning, match=re.escape("nothing was factorized (it saved nothing)")):
        assert session.finish() == plan


def test_a_plan_of_another_model_is_refused_at_the_start():
    plan = fxrank.plan_of(fxrank.factorize(SixLayers(), X, rank=0.25))
    late = dataclasses.replace(plan, switch_step=15)
    model = mlp()
    optimizer = sgd(model)
    message = (
        "every layer of a plan must exist in the model; Sequential has no 'l1'. Use the plan of this very architecture."
    )
    with pytest.raises(fxrank.PlanMismatchError, match=re.escape(message)):
        attached(model, optimizer, late)
    assert not optimizer._optimizer_step_post_hooks


def test_full_rank_never_switches():
    model = SixLayers()
    optimizer = sgd(model)
    session = attached(model, optimizer, "full-rank")
    train(model, optimizer, 20)
    plan = session.finish()  # no warning: this is what was asked for
    assert plan.R == {}
    assert plan.note == "full rank as asked"
    assert plan.layer("l2").reason == "policy FullRank keeps every layer dense"
    assert type(model.l2) is nn.Linear


def test_full_rank_takes_models_without_anything_to_factorize():
    model = nn.Sequential(nn.Linear(12, 4))
    plan = attached(model, sgd(model), fxrank.FullRank()).finish()
    assert [d.name for d in plan.layers] == ["0"]


class Alternating(fxrank.Policy):
    """A policy of somebody else's: every second layer at rank 1 after three steps."""

    def ready(self, clock, scene):
        return "three steps" if clock.step == 3 else None

    def decide(self, scene):
        from fxrank.decisions import keep, take

        return [
            take(layer, 1, "even") if layer.reason is None and i % 2 == 0 else keep(layer, layer.reason or "odd")
            for i, layer in enumerate(scene.layers)
        ]


def test_a_policy_of_ones_own():
    model = SixLayers()
    optimizer = sgd(model)
    session = attached(model, optimizer, Alternating())
    train(model, optimizer, 5)
    assert session.finish().R == {"l2": 1, "l4": 1}
    assert session.plan.policy == "Alternating"
    assert session.plan.switch_step == 3


@pytest.mark.parametrize(
    "policy",
    [
        SOON,
        dataclasses.replace(SOON, form="spatial"),
        dataclasses.replace(SOON, form="gauge"),
        fxrank.Pufferfish(E=1, K=0, ratio=0.25),
        fxrank.Pufferfish(E=1, K=0, ratio=0.25, form="spatial"),
    ],
    ids=["Cuttlefish", "Cuttlefish spatial", "Cuttlefish gauge", "Pufferfish", "Pufferfish spatial"],
)
def test_each_weight_is_decomposed_once(policy, monkeypatch):
    """When its rank is decided; the factors wait for the switch."""
    shapes = []
    real = exact.decompose

    def counted(stack):
        shapes.append(tuple(stack.shape))
        return real(stack)

    monkeypatch.setattr(exact, "decompose", counted)
    model = ConvNet()
    optimizer = sgd(model)
    with attach(model, optimizer, policy, images()[0], total_steps=4, steps_per_epoch=1) as session:
        train(model, optimizer, 4, images())
    assert set(session.plan.R) == {"conv2", "conv3"} and len(shapes) == 2
    assert not session.scene.factors  # they have been taken
