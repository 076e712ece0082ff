"""`auto_lowrank` with a target: the model keeps to it, the report says so, and a run goes on within it."""

from dataclasses import replace

import pytest
import torch
from autos import run
from nets import SOON, SixLayers

import fxrank
from fxrank.training.measure import parameter_count, planned_macs

POLICY = replace(SOON, target_params=0.7)


@pytest.mark.parametrize("policy", [POLICY, fxrank.Pufferfish(E=2, K=0, target_macs=0.5)], ids=["params", "macs"])
def test_the_model_keeps_to_its_target_and_the_report_says_it(policy):
    model = SixLayers()
    dense = parameter_count(model)
    result = run(model, policy=policy)
    budget, report = result.plan.budget, result.report
    macs = planned_macs(result.plan)
    share = parameter_count(result.model) / dense if budget.of == "params" else macs[1] / macs[0]
    assert budget.reached == pytest.approx(share)
    assert 0.99 * budget.target < share <= budget.target
    assert f"budget: target_{budget.of}={budget.target:g}, reached {share:.4f}" in str(report).splitlines()
    assert report.to_dict()["plan"]["budget"]["reached"] == budget.reached
    assert f"target_{budget.of}={budget.target:g}" in report.settings["policy"]
    assert "budget" not in str(run(SixLayers()).report)


def test_a_run_with_a_target_repeats_itself_and_its_plan():
    first, again = run(SixLayers(), policy=POLICY), run(SixLayers(), policy=POLICY)
    assert first.plan == again.plan
    as_planned = run(SixLayers(), policy=first.plan)
    for one, two, three in zip(*(r.model.parameters() for r in (first, again, as_planned)), strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_a_target_out_of_reach_leaves_the_model_alone():
    model = SixLayers()
    with pytest.raises(fxrank.BudgetError, match=r"target_params must be at least 0\.\d+ here"):
        run(model, policy=replace(SOON, target_params=0.05))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), SixLayers().parameters(), strict=True))
