"""Calibration in several processes, each with its own part of the data."""

import torch
from teams import team
from torch import nn

import fxrank
from fxrank.passes.profiling.whole import Share


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)
        self.gru, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.gru(self.norm(self.conv(x)).mT)[0])


def batches(bad=False):
    torch.manual_seed(1)
    found = [(torch.randn(3, 4, 9, dtype=torch.float64) + i, None) for i in range(4)]
    if bad:
        found[1][0][0] = float("nan")
    return found


def run(rank, size, bad):
    torch.manual_seed(0)
    model = Net().double().eval()
    mine = batches(bad)[rank::size]
    try:
        small = fxrank.factorize(model, mine[0][0], 2, include="*", calibration=mine)
    except fxrank.CalibrationError as error:
        return str(error)
    return {name: t.tolist() for name, t in fxrank.merge(small).state_dict().items()}


def test_two_processes_find_the_factors_of_one_with_all_data():
    one = run(0, 1, False)
    for found in team(run, 2, False):
        for name, value in one.items():
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=1e-9, atol=1e-9)


def test_where_one_process_fails_all_do():
    first, second = team(run, 2, True)
    assert "the outputs of 'conv' hold" in second
    assert first.startswith(
        "all processes must get through their calibration data; process 1 did not: CalibrationError"
    )


def forms_and_ranks(rank, size):
    torch.manual_seed(0)
    model = Net().double().eval()
    mine = batches()[rank::size]
    counted, solved = [], fxrank.fitting.ranks_within_time

    def each_its_own(budget, forms, costs, dense_ms, measure, *more):
        counted.append(rank)
        return solved(budget, forms, costs, dense_ms, lambda ways: Share(0.8 + rank, 0.0), *more)

    fxrank.fitting.ranks_within_time = each_its_own
    options = {"include": "*", "calibration": mine}
    small = fxrank.factorize(model, mine[0][0], target_latency=0.8, **options)
    plan = fxrank.plan_of(small)
    return counted, plan.to_json(), {name: t.tolist() for name, t in small.state_dict().items()}


def test_all_processes_have_the_plan_of_the_first_ones_clock():
    (first, plan, state), (second, other, others) = team(forms_and_ranks, 2)
    assert (first, second) == ([0], [])
    assert plan == other and '"reached": 0.8' in plan
    for name, value in state.items():
        torch.testing.assert_close(torch.tensor(others[name]), torch.tensor(value), rtol=1e-9, atol=1e-9)
