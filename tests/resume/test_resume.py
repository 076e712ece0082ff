"""Killed at any moment, resumed to the same result: real processes, killed by SIGKILL."""

import random

import pytest
from killing import Runs, moment, results, spans

from fxrank.resume.grown import read_whole


@pytest.fixture(scope="module")
def runs():
    server = Runs()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The uninterrupted run: what it left, and at which events the switch was made and checkpoints were written."""
    folder = tmp_path_factory.mktemp("whole")
    assert runs(folder, event=0) == 0
    events, total = spans(folder)
    assert len(events["_switch"]) == 1
    # the start, 5 epochs, the switch, every third step of 40
    assert len(events["write_plain"]) == 1 + 5 + 1 + 13
    return results(folder), events, total


def finishes_alike(runs, whole, folder):
    assert runs(folder) == 0
    assert results(folder) == whole[0]
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("kind", ["before", "inside", "after", "anywhere"])
def test_a_killed_run_goes_on_to_the_same_result(kind, runs, whole, tmp_path):
    event = moment(*whole[1:], kind, random.Random(kind))
    assert runs(tmp_path, event=event) == -9
    assert not (tmp_path / "history.json").exists()
    finishes_alike(runs, whole, tmp_path)


@pytest.fixture(scope="module")
def whole_with_data(runs, tmp_path_factory):
    """The same run, with factors that know the data."""
    folder = tmp_path_factory.mktemp("data")
    assert runs(folder, event=0, factors="data") == 0
    return results(folder), *spans(folder)


@pytest.mark.parametrize("kind", ["before", "inside", "after"])
def test_factors_of_the_data_are_the_same_whatever_was_killed(kind, runs, whole, whole_with_data, tmp_path):
    plain, ours = (ends[0][1]["plan.json"] for ends in (whole, whole_with_data))
    assert '"output_error": 0.' in ours and '"output_error": 0.' not in plain
    event = moment(*whole_with_data[1:], kind, random.Random(kind))
    assert runs(tmp_path, event=event, factors="data") == -9
    assert runs(tmp_path, factors="data") == 0
    assert results(tmp_path) == whole_with_data[0]


def test_a_run_that_is_killed_again_and_again(runs, whole, tmp_path):
    chance = random.Random(5)
    deaths = 0
    # Late enough for each to get beyond its start, whose share of the events is large: writing takes few.
    while runs(tmp_path, event=chance.randint(whole[2] // 2, 2 * whole[2] // 3)) == -9:
        deaths += 1
        assert deaths < 50
    assert deaths >= 2
    finishes_alike(runs, whole, tmp_path)


def test_a_kill_inside_the_writing_leaves_the_last_checkpoint(runs, whole, tmp_path):
    first, last = whole[1]["write_plain"][-4]
    seen = set()
    for share in (0.1, 0.7, 0.98):
        folder = tmp_path / str(share)
        folder.mkdir()
        assert runs(folder, event=round(first + share * (last - first))) == -9
        saved = read_whole(folder / "checkpoint.safetensors")
        seen.add((saved["epoch"], saved["taken"]))
    assert len(seen) in (1, 2)  # the one before, or, at the very end, the new one
    finishes_alike(runs, whole, folder)


@pytest.mark.kills
@pytest.mark.parametrize("seed", range(60))
def test_kills_around_the_switch(seed, runs, whole, tmp_path):
    event = moment(*whole[1:], ("before", "inside", "after", "write")[seed % 4], random.Random(seed))
    assert runs(tmp_path, event=event) == -9
    finishes_alike(runs, whole, tmp_path)


@pytest.mark.kills
@pytest.mark.parametrize("seed", range(20))
def test_kills_by_the_clock(seed, runs, whole, tmp_path):
    code = runs(tmp_path, after_ms=random.Random(seed).uniform(50, 2000))
    assert code in (-9, 0)  # a fast machine may have finished
    finishes_alike(runs, whole, tmp_path)


def test_a_finished_run_returns_its_result_at_once(runs, whole, tmp_path):
    assert runs(tmp_path) == 0
    (tmp_path / "model.safetensors").unlink()
    finishes_alike(runs, whole, tmp_path)
