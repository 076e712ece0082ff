"""Ranks under a target, by what the whole model loses with each layer's pair."""

from unittest.mock import patch

import pytest
import torch
from nets import vectors
from outputs import Muted, Narrow
from torch import nn

import fxrank
from fxrank.policies.outputs import NUMBERS, WEIGHED, Outputs

LOADER = [vectors(200, seed) for seed in range(3)]
X = LOADER[0][0]


def own_losses(self, alone):
    return {}


def ranks(model, loader=LOADER, **options):
    options = {"target_params": 0.6} | options
    small = fxrank.factorize(model.eval(), X, calibration=loader, recalibrate=False, **options)
    return fxrank.plan_of(small), small


def lost(small, model):
    with torch.no_grad():
        return float(sum((small(x) - model(x)).square().sum() for x, _ in LOADER))


@pytest.mark.parametrize("target", ["target_params", "target_macs"])
def test_ranks_go_where_the_model_hears_them(target):
    model = Muted()
    asked = {"target_params": None} | {target: 0.6}
    plan, small = ranks(model, **asked)
    with patch.object(Outputs, "weights", own_losses):
        alike, other = ranks(model, **asked)
    assert abs(alike.R["loud"] - alike.R["muted"]) <= 2
    assert plan.R["loud"] == 12 and plan.R["muted"] <= 4  # behind twelve inputs no more are needed
    assert lost(small, model) < 0.2 * lost(other, model)


def test_the_unit_of_the_outputs_does_not_matter():
    assert ranks(Muted(1e-4, 1e-6))[0].R == ranks(Muted())[0].R


def weights_of(model, **options):
    """What the layers were weighed with at first."""
    found = []
    real = Outputs.weights
    with patch.object(Outputs, "weights", lambda self, *asked: found.append(real(self, *asked)) or found[-1]):
        ranks(model, **options)
    return found[0]


def test_a_weight_is_what_the_model_loses_for_what_the_layer_loses():
    """Of a layer whose outputs are the model's: one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 32))
    assert weights_of(model, loader=LOADER[:1], include="1")["1"] == pytest.approx(1.0, rel=1e-3)


def test_a_layer_that_loses_nothing_the_second_time_keeps_its_weight():
    """Loud is at 12 of its 12 directions then; the median would be what muted counts."""
    found = []
    real = Outputs.weights
    with patch.object(Outputs, "weights", lambda self, *asked: found.append(real(self, *asked)) or found[-1]):
        ranks(Muted())
    assert found[1]["loud"] == found[0]["loud"] > 1000 * found[1]["muted"]


@pytest.mark.parametrize(("rows", "calls"), [(NUMBERS // 4, 1), (NUMBERS // 4 - 1, 2), (10, WEIGHED)])
def test_few_calls_do(rows, calls):
    counts = []
    real = Outputs.lost

    def counting(self, plan, factors):
        counts.append(self.number)
        return real(self, plan, factors)

    with patch.object(Outputs, "lost", counting):
        ranks(Muted(), loader=[vectors(rows, seed) for seed in range(WEIGHED + 3)])
    assert (
        set(counts[:-2]) == {calls} and counts[-2:] == [WEIGHED + 3] * 2
    )  # of both ways the better is looked for on all


def test_a_layer_that_loses_nothing_tells_nothing():
    """Behind three directions a pair of eight loses what is rounded, and of what the model loses with it nothing follows."""
    assert weights_of(Narrow(), target_params=0.9) == {}
    assert weights_of(Muted(), target_params=0.6) != {}


class Silent(Muted):
    """What a model gives that cannot be compared: one number."""

    def forward(self, x):
        return super().forward(x).square().mean()


def test_where_outputs_cannot_be_compared_the_layers_own_losses_choose():
    plan, _ = ranks(Silent())
    assert (
        "ranks by what the layers themselves lose, as what the model loses cannot be measured: it must give"
        in plan.note
    )
    with patch.object(Outputs, "weights", own_losses):
        alike, _ = ranks(Silent())
    assert plan.R == alike.R


def test_where_a_copy_does_not_fit_the_layers_own_losses_choose():
    def full(self, plan, factors):
        raise torch.OutOfMemoryError("Tried to allocate\nmore than there is")

    with patch.object(Outputs, "lost", full):
        plan, _ = ranks(Muted())
    assert plan.note.endswith("as what the model loses cannot be measured: Tried to allocate")
    assert plan.R


def test_without_data_nothing_is_tried():
    def never(self, alone):
        raise AssertionError

    with patch.object(Outputs, "weights", never):
        small = fxrank.factorize(Muted(), X, target_params=0.6)
    assert fxrank.plan_of(small).R
