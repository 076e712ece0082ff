"""Several processes, killed at any moment, resumed to the same result: real groups on gloo, killed by SIGKILL."""

import functools
import json
import os
import random
import subprocess
import sys

import pytest
from killing import Runs, moment, results, spans
from places import PYTHONPATH
from safetensors.torch import load_file

from fxrank.resume.grown import read_whole

TEAMS = {
    "2": {"size": 2},
    "3": {"size": 3},  # sums are rounded in the order of the buckets
    "2, buffers of their own": {"size": 2, "ddp": {"broadcast_buffers": False}},
    "2, small buckets": {"size": 2, "ddp": {"bucket_cap_mb": 0.001, "static_graph": True}},
}


@pytest.fixture(scope="module")
def runs():
    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The uninterrupted run of a team, made once: what it left, and when the switch and the checkpoints were."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp("whole")
        team = TEAMS[name]
        assert runs(folder, event=0, **team) == [0] * team["size"]
        events, total = spans(folder)
        assert len(events["write_plain"]) == 1 + 5 + 1 + 13  # of the first process
        return results(folder), events, total

    return make


def ends_of(folder, size):
    names = ["history.json", *(f"history{rank}.json" for rank in range(1, size))]
    return [json.loads((folder / name).read_text()) for name in names]


def finishes_alike(runs, whole, name, folder):
    assert runs(folder, **TEAMS[name]) == [0] * TEAMS[name]["size"]
    assert results(folder) == whole(name)[0]
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "kind"), [("3", "inside"), pytest.param("2, buffers of their own", "after", marks=pytest.mark.slow)]
)
def test_a_killed_team_goes_on_to_the_same_result(name, kind, runs, whole, tmp_path):
    _, events, total = whole(name)
    event = moment(events, total, kind, random.Random(kind))
    assert runs(tmp_path, event=event, **TEAMS[name]) == [-9] * TEAMS[name]["size"]
    finishes_alike(runs, whole, name, tmp_path)
    ends = ends_of(tmp_path, TEAMS[name]["size"])
    assert len({end["parameters"] for end in ends}) == 1
    alike = "ddp" not in TEAMS[name]  # else running means are each process's own
    assert len({end["state"] for end in ends}) == (1 if alike else len(ends))


@pytest.mark.kills
def test_a_team_that_is_killed_again_and_again(runs, whole, tmp_path):
    chance, total = random.Random(3), whole("3")[2]
    for rank in (2, 1, 0):
        codes = runs(tmp_path, event=chance.randint(total // 9, total // 6), rank=rank, **TEAMS["3"])
        assert codes == [-9] * 3
    finishes_alike(runs, whole, "3", tmp_path)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_process_dies_and_the_others_fail(rank, runs, whole, tmp_path):
    # The first process has more to do, and so more events.
    codes = runs(tmp_path, event=whole("2")[2] // (5 if rank else 3), rank=rank, alone=True, size=2)
    assert (codes[rank], codes[1 - rank]) == (-9, 1)
    assert "by peer" in (tmp_path / f"error{1 - rank}.txt").read_text()
    finishes_alike(runs, whole, "2", tmp_path)


def test_only_the_first_process_writes(runs, whole, tmp_path):
    _, events, _ = whole("2")
    first, last = events["write_plain"][3]  # the end of the epoch; before it are 6 steps
    assert runs(tmp_path, event=(first + last) // 2, size=2) == [-9, -9]
    assert {path.name for path in tmp_path.iterdir()} <= {
        *("checkpoint.safetensors", "checkpoint.safetensors.partial", "run.lock", "checkpoint.before.safetensors"),
        *("checkpoint.grown.jsonl", "checkpoint.grown.jsonl.partial"),
    }
    saved = read_whole(tmp_path / "checkpoint.safetensors")
    (other,) = saved["others"]
    buffers = {name for name in saved["model"] if "running_" in name}
    assert set(other["model"]) == buffers and not other["optimizer"]  # parameters and momentum are alike
    assert runs(tmp_path, size=2) == [0, 0]


@pytest.mark.slow
def test_the_command_comes_back_by_itself_under_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max_restarts", "1"]
    command = [*torchrun, "-m", "fxrank", "train", "--model", "mortal:network", "--policy", "spectral-init", "--quiet"]
    found = []
    for data in ("digits", "mortal:loaders"):
        folder = tmp_path / data.partition(":")[0]
        options = ["--data", data, "--epochs", "1", "--resume", "--checkpoint-every", "4", "--output", str(folder)]
        done = subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("exitcode: -9" in done.stderr) == (data != "digits")
        found.append({name: value.tolist() for name, value in load_file(folder / "model.safetensors").items()})
    assert found[0] == found[1]


@pytest.mark.kills
@pytest.mark.parametrize("name", TEAMS)
@pytest.mark.parametrize("seed", range(16))
def test_kills_around_the_switch(seed, name, runs, whole, tmp_path):
    _, events, total = whole(name)
    size = TEAMS[name]["size"]
    event = moment(events, total, ("before", "inside", "after", "write")[seed % 4], random.Random(seed))
    assert runs(tmp_path, event=event, **TEAMS[name]) == [-9] * size
    finishes_alike(runs, whole, name, tmp_path)


@pytest.mark.kills
@pytest.mark.parametrize("seed", range(12))
def test_kills_of_one_process_or_by_the_clock(seed, runs, whole, tmp_path):
    chance, team = random.Random(seed), TEAMS["3"]
    if seed % 2:
        codes = runs(tmp_path, after_ms=chance.uniform(50, 4000), **team)
        assert set(codes) <= {-9, 0}
    else:
        codes = runs(tmp_path, event=chance.randint(1, whole("3")[2]), rank=seed % 3, alone=True, **team)
        assert codes[seed % 3] in (-9, 0)  # another process may have fewer events
    finishes_alike(runs, whole, "3", tmp_path)
