"""Calibration in several processes, each with its own part of the data."""

import torch
from teams import team
from torch import nn

import fxrank
from fxrank.passes.profiling.clock import Share


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)
        self.gru, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.gru(self.norm(self.conv(x)).mT)[0])


class Tied(nn.Module):
    """A table that is the head too, and a layer that is called and read."""

    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        x = self.inner(self.table(tokens))
        return torch.tanh(x @ self.inner.weight) @ self.table.weight.T


def run_tied(rank, size):
    torch.manual_seed(0)
    model, tokens = Tied().double().eval(), torch.arange(96).reshape(8, 12) ** 2 % 20
    mine = list(tokens[rank::size].split(2))
    small = fxrank.factorize(model, mine[0], 2, include="*", calibration=mine)
    plan = fxrank.plan_of(small)
    return plan.to_json(), {name: t.tolist() for name, t in fxrank.merge(small).state_dict().items()}


def test_lookups_and_products_of_all_processes_add_up():
    (_, one), found = run_tied(0, 1), team(run_tied, 2)
    assert found[0][0] == found[1][0] and "weight alone" not in found[0][0]
    for _, state in found:
        for name, value in one.items():
            # Rounds end where they gain little: sums in another order may end one elsewhere.
            torch.testing.assert_close(torch.tensor(state[name]), torch.tensor(value), rtol=1e-6, atol=1e-6)


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


def alone_in_a_group(rank, size):
    if rank:
        return None  # and ends, which the other one is told; else it would wait as long as the group's timeout says
    try:
        fxrank.factorize(Net().double(), batches()[0][0], 2, include="*", calibration=batches())
    except RuntimeError as error:
        return str(error)


def test_a_process_that_calls_it_alone_is_told_so():
    said, _ = team(alone_in_a_group, 2)
    assert said == (
        "where torch.distributed is initialized every process of the group makes this call; not all 2 did. Make it in all of them, or before "
        "init_process_group(), or after destroy_process_group()."
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


def run_kept(rank, size):
    torch.manual_seed(0)
    model = Net().double().eval()
    mine = batches()[rank::size]
    small = fxrank.factorize(model, mine[0][0], include="*", keep=0.9, calibration=mine)
    plan = fxrank.plan_of(small)
    return plan.R, plan.note.partition(" in ")[0]


def test_what_all_processes_give_is_kept():
    one = run_kept(0, 1)
    assert one[0]
    assert team(run_kept, 2) == [one, one]
