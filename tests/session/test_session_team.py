"""A loop of one's own in several processes: `state_dict()` of one team, `attach(state=…)` in another."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import UNTIMED, mlp
from teams import team
from torch.nn.parallel import DistributedDataParallel

import fxrank

STEPS = 12
POLICY = fxrank.Cuttlefish(
    speedup_threshold=None, rank_metric="ratio", ratio=0.25, latest=0.5, epsilon=1e-9, round_to=1
)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(12, 12, generator=generator).double(), torch.randint(4, (12,), generator=generator)


def train(rank, size, path, first, last, policy=POLICY, late=False):
    """Steps `first` to `last`, from the states in `path` and back into it; `late` gives the session its own after it
    was attached.
    """
    torch.manual_seed(first)  # every process may begin with other weights
    model = mlp(first).double()
    given = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.Adam(given.parameters(), lr=0.01)
    saved = torch.load(path, weights_only=True) if first else None
    session = fxrank.LowRankSession.attach(
        given,
        optimizer,
        example_inputs=batch(0)[0][rank::size],
        total_steps=STEPS,
        policy=policy,
        state=None if saved is None or late else saved["session"],
    )
    if saved is not None:
        if late:
            session.load_state_dict(saved["session"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(first, last):
        x, y = (part[rank::size] for part in batch(step))
        optimizer.zero_grad()
        F.cross_entropy(given(x), y).backward()
        optimizer.step()
    state = {"session": session.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if rank == 0:
        torch.save(state, path)
    plan = None if session.plan is None else session.plan.to_json()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        session.finish()
    return {
        "plan": plan,
        "curves": session.scene.monitor.curves,
        "parameters": {name: p.detach().tolist() for name, p in model.named_parameters()},
    }


@pytest.mark.parametrize("cut", [3, 9], ids=["before the switch", "after it"])
@pytest.mark.parametrize(
    ("before", "now", "late"), [(2, 2, False), (2, 3, False), (2, 3, True), (3, 1, False), (1, 2, True)]
)
def test_a_session_goes_on_in_another_number_of_processes(before, now, late, cut, tmp_path):
    whole = train(0, 1, tmp_path / "alone.pt", 0, STEPS)
    team(train, before, tmp_path / "run.pt", 0, cut)
    found = team(train, now, tmp_path / "run.pt", cut, STEPS, POLICY, late)
    assert all(f == found[0] for f in found)
    assert fxrank.Plan.from_json(found[0]["plan"]).R == {"2": 4, "4": 4}
    assert fxrank.Plan.from_json(found[0]["plan"]).switch_step == fxrank.Plan.from_json(whole["plan"]).switch_step == 6
    for name, value in whole["parameters"].items():
        mine = torch.tensor(found[0]["parameters"][name], dtype=torch.float64)
        # float64, sums in another order
        torch.testing.assert_close(mine, torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_rank_curves_of_a_team_go_on_to_the_last_bit(tmp_path):
    whole = team(train, 2, tmp_path / "whole.pt", 0, STEPS, UNTIMED)
    team(train, 2, tmp_path / "run.pt", 0, 5, UNTIMED)
    assert team(train, 2, tmp_path / "run.pt", 5, STEPS, UNTIMED) == whole
