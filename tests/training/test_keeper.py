"""The keeper that keeps nothing, through which the loop deals its batches; and one team for the whole run."""

import inspect

import torch
from autos import run
from nets import batches, mlp

import fxrank
from fxrank.auto import train_lowrank
from fxrank.cli.main import main
from fxrank.distributed.team import Team
from fxrank.resume.keeper import FileKeeper
from fxrank.training.keeper import Keeper
from fxrank.training.options import RunOptions
from fxrank.training.progress import Totals
from fxrank.training.run_state import RunState


def test_one_that_keeps_nothing_deals_the_loaders_batches():
    loader = batches()
    options = RunOptions.of(mlp(), loader)
    keeper = Keeper(options, Team.of(options.model))
    state = RunState(Totals(torch.device("cpu")), taken=2)
    first = keeper.first_batch()
    assert first is loader[0] and keeper.first_batch_again(first) is first
    assert keeper.read() is None and keeper.batches(state) is loader
    assert not any(keeper.due(step, switched=switched) for step in (0, 1, 4) for switched in (False, True))


def test_the_one_that_writes_answers_the_same_questions():
    asked = {name: f for name, f in vars(Keeper).items() if inspect.isfunction(f)}
    assert issubclass(FileKeeper, Keeper) and asked.keys() <= vars(FileKeeper).keys()
    for name, function in asked.items():
        assert [*inspect.signature(getattr(FileKeeper, name)).parameters] == [*inspect.signature(function).parameters]


def test_a_run_without_resume_writes_no_checkpoint(tmp_path):
    run(mlp(), output_dir=tmp_path / "plain")
    run(mlp(), output_dir=tmp_path / "kept", resume=True)
    plain, kept = ({p.name for p in (tmp_path / name).iterdir()} for name in ("plain", "kept"))
    assert kept - plain == {"checkpoint.safetensors", "checkpoint.grown.jsonl"}


class Counted:
    def __init__(self, monkeypatch):
        self.teams, make = [], Team.of

        def of(cls, *args):
            self.teams.append(make(*args))
            return self.teams[-1]

        monkeypatch.setattr(Team, "of", classmethod(of))


def test_a_run_has_one_team(monkeypatch, tmp_path):
    counted = Counted(monkeypatch)
    run(mlp(), output_dir=tmp_path, resume=True)
    assert len(counted.teams) == 1
    options = RunOptions.of(mlp(), batches(), epochs=1, policy="full-rank", progress=False, device="cpu")
    assert train_lowrank(options, Team.of(options.model)).plan.R == {}
    assert len(counted.teams) == 2


def test_the_command_has_one_team(monkeypatch, tmp_path, capsys):
    counted = Counted(monkeypatch)
    options = ["--data", "digits", "--epochs", "1", "--policy", "full-rank", "--device", "cpu", "--quiet"]
    assert main(["train", "--model", "digits", *options, "--output", str(tmp_path)]) == 0
    assert len(counted.teams) == 1 and "policy FullRank: no switch" in capsys.readouterr().out


def test_a_loop_of_ones_own_has_one_team(monkeypatch):
    counted, model = Counted(monkeypatch), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=batches()[0][0], total_steps=4)
    assert counted.teams == [session.team]
