"""Where a run writes: tried before the training; at the end a failure costs the files' place and not the result."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from autos import run
from nets import batches, mlp
from places import PYTHONPATH

import fxrank
from fxrank import auto
from fxrank.saving.places import LOCK

FILES = ["model.safetensors", "plan.json", "report.json", "report.txt", "report.html", "ranks.png"]
SECOND = """
import sys, torch, fxrank
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
try:
    fxrank.auto_lowrank(model, [(torch.ones(4, 8), torch.ones(4, 8))], epochs=1, policy="full-rank", device="cpu", progress=False, output_dir=sys.argv[1])
except BlockingIOError as error:
    print(error)
"""


@pytest.mark.parametrize("name", [*FILES, "report.txt.partial", "checkpoint.safetensors.partial"])
def test_a_place_that_is_taken_is_refused_before_the_training(name, tmp_path):
    (tmp_path / name).mkdir()
    model, steps = mlp(), []

    def loss_fn(outputs, targets):
        steps.append(1)
        return F.cross_entropy(outputs, targets)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(IsADirectoryError, match=re.escape(f"{name} in it is a folder")):
        run(model, loss_fn=loss_fn, output_dir=tmp_path, resume=True)
    assert not steps and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_failure_at_the_end_returns_the_result_and_names_where_the_files_are(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    class Taken(list):  # the folder is lost in the middle
        def __iter__(self):
            if (folder / LOCK).exists() and not (folder / "plan.json").exists():
                (folder / "plan.json").mkdir()
            return super().__iter__()

    with pytest.warns(UserWarning, match=re.escape(f"could not be written to {folder} (IsADirectoryError")) as caught:
        result = run(mlp(), Taken(batches()), output_dir=folder)
    assert result.plan.R
    fallback = Path(re.search(r"they are in (\S+)\.", str(caught[0].message))[1])
    assert {p.name for p in fallback.iterdir()} >= {"model.safetensors", "plan.json", "report.json", "report.txt"}
    assert fxrank.plan_of(fxrank.load(mlp(), fallback)) == result.plan
    assert not list(folder.glob("*.partial"))


def test_a_result_that_can_be_written_nowhere_is_returned(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(auto, "save", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="nor to a temporary folder .* The result that is returned has them"):
        assert run(mlp(), output_dir=tmp_path / "run").plan.R


def test_report_files_are_not_written_through_links(tmp_path):
    theirs = tmp_path / "theirs"
    folder = tmp_path / "run"
    folder.mkdir()
    theirs.write_text("theirs")
    for name in FILES:
        (folder / name).symlink_to(theirs)
    run(mlp(), output_dir=folder)
    assert theirs.read_text() == "theirs"
    assert not any((folder / name).is_symlink() for name in FILES[:4])


def test_a_second_run_in_the_folder_is_refused_and_the_first_one_ends(tmp_path):
    said = []

    class Loader(list):
        def __iter__(self):
            if (tmp_path / LOCK).exists() and not said:
                command = [sys.executable, "-c", SECOND, str(tmp_path)]
                environment = os.environ | {"PYTHONPATH": PYTHONPATH}
                said.append(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
            return super().__iter__()

    result = run(mlp(), Loader(batches()), output_dir=tmp_path, resume=True)
    assert f"{tmp_path} is in use by process {os.getpid()} on " in said[0]
    assert result.plan.R and not (tmp_path / LOCK).exists()


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path):
    def loss_fn(outputs, targets):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(mlp(), loss_fn=loss_fn, output_dir=tmp_path)
    assert not any(tmp_path.iterdir())
