"""What the engine asks of a policy besides E, K and R: whether it switches at all, a plan known beforehand, and how the
training goes on.
"""

import dataclasses
import re

import pytest
import torch
from nets import SixLayers

import fxrank
from fxrank.plan import Training
from fxrank.policies.fixed import as_policy

OPTIONS = {"frobenius_decay": 0.01, "lr_scale": 0.5, "rewarmup": 0.1, "freeze": ("l2.bias",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare(fxrank.Policy):
    """No more than a policy must have."""

    def ready(self, clock, scene):
        return None

    def decide(self, scene):
        return []


def known():
    return fxrank.plan_of(fxrank.factorize(SixLayers(), torch.zeros(2, 12), rank=0.25))


def test_only_the_full_rank_twin_never_switches():
    policies = [fxrank.Cuttlefish(), fxrank.Pufferfish(E=1), fxrank.SpectralInit(), as_policy(known()), Bare()]
    assert all(policy.may_switch for policy in policies)
    assert not fxrank.FullRank().may_switch


def test_only_a_fixed_plan_is_known_beforehand():
    plan = known()
    assert as_policy(plan).known_plan is plan
    assert all(p.known_plan is None for p in (fxrank.Cuttlefish(), fxrank.Pufferfish(E=1), fxrank.FullRank(), Bare()))


def test_the_options_of_the_training_have_one_default_and_one_place():
    defaults = {field.name: field.default for field in dataclasses.fields(fxrank.Policy)}
    assert vars(Training()) == {name: defaults[name] for name in vars(Training())} == vars(Bare().training)
    assert vars(Bare(**OPTIONS).training) == OPTIONS
    assert as_policy(dataclasses.replace(known(), training=Training(**OPTIONS))).training == Training(**OPTIONS)


def test_a_policys_repr_is_what_checkpoints_of_earlier_versions_hold():
    assert repr(fxrank.Pufferfish(E=2)) == (
        "Pufferfish(frobenius_decay='auto', extra_bn=False, form='channel', lr_scale=1.0, rewarmup=0.0, freeze=(), E=2, K=1, ratio=0.25)"
    )


@pytest.mark.parametrize(
    ("option", "error", "text"),
    [
        ({"frobenius_decay": "own"}, ValueError, "frobenius_decay (or a number, or None) must be one of 'auto'"),
        ({"frobenius_decay": -1}, ValueError, "frobenius_decay must not be negative; got -1. None switches it off."),
        ({"lr_scale": 0.0}, ValueError, "lr_scale must be above 0; got 0.0. 1.0 keeps the schedule."),
        ({"rewarmup": 1.0}, ValueError, "rewarmup is a share of the run in [0, 1); got 1.0. 0 switches it off."),
        ({"freeze": "*.bias"}, TypeError, "freeze takes a tuple of globs of parameter names; got the string '*.bias'."),
    ],
)
def test_policy_and_training_refuse_alike(option, error, text):
    for make in (Bare, Training):
        with pytest.raises(error, match=re.escape(text)):
            make(**option)
