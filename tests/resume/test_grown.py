"""What grows with the epochs lies beside the checkpoint, is counted there, and is written first."""

import shutil

import pytest
from interrupted import EPOCHS, Killed, run

import fxrank
from fxrank.resume import keeper
from fxrank.resume.grown import GROWN, Grown, read_whole
from fxrank.saving.plainfile import pack, read_plain, write_plain

CHECKPOINT, BEFORE = "checkpoint.safetensors", "checkpoint.before.safetensors"
MEASURED = ("step_ms", "seconds")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is not broken off."""
    return numbers(run(tmp_path_factory.mktemp("whole")))


def numbers(result):
    history = [{name: value for name, value in row.items() if name not in MEASURED} for row in result.history]
    return history, {name: value.tolist() for name, value in result.model.state_dict().items()}


def broken(folder, die=18):
    with pytest.raises(Killed):
        run(folder, die=die)
    return folder / GROWN


def row(epoch):
    return {"epoch": epoch, "phase": "full-rank", "loss": 0.5 + epoch, "lr": (0.1,), "stable_ranks": {"a": 1.5}}


def tree(epochs):
    curves = {"a": [1.5 * i for i in range(epochs)], "b": [0.1] * epochs}
    monitor = {"steps": list(range(epochs)), "curves": curves, "settled": []}
    return {"epoch": epochs, "history": [row(i) for i in range(epochs)], "session": {"monitor": monitor, "clock": [1]}}


def written(grown, path, epochs):
    counted, add = grown.counted(tree(epochs))
    write_plain(path, counted, add)
    return len(pack(counted | {"epoch": 0, "grown": counted["grown"] | {"bytes": 0}})[0])


def test_a_checkpoint_of_a_thousand_epochs_is_as_large_as_one_of_ten(tmp_path):
    path, grown = tmp_path / CHECKPOINT, Grown(tmp_path / GROWN)
    sizes, added, before = set(), set(), 0
    for epochs in range(10, 1000, 10):
        sizes.add(written(grown, path, epochs))
        size = (tmp_path / GROWN).stat().st_size
        added.add((size - before) // 1000)
        before = size
    assert len(sizes) == 1
    assert max(added) <= 2  # thousands of bytes for ten rows, whatever came before
    assert read_whole(path) == tree(990)
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_writes_no_history_into_its_checkpoint(tmp_path):
    broken(tmp_path)
    bare = read_plain(tmp_path / CHECKPOINT)
    monitor = bare["session"]["monitor"]
    assert (bare["history"], monitor["steps"], *monitor["curves"].values()) == ([], [], *[[]] * len(monitor["curves"]))
    filled = read_whole(tmp_path / CHECKPOINT)
    assert len(filled["history"]) == filled["epoch"] > 0
    assert filled["session"]["monitor"]["steps"]


@pytest.mark.parametrize("write", range(3, 9))
def test_killed_between_the_two_writes_a_run_goes_on_to_the_same_numbers(whole, write, tmp_path, monkeypatch):
    count = 0

    def killed(path, tree, before):
        nonlocal count
        count += 1
        if count == write:
            before()
            raise Killed
        write_plain(path, tree, before)

    monkeypatch.setattr(keeper, "write_plain", killed)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.setattr(keeper, "write_plain", write_plain)
    assert numbers(run(tmp_path)) == whole


@pytest.mark.parametrize("tail", [b'{"dict": [["hist', b"\0" * 5000, b"\n\n"], ids=["half a line", "zeros", "lines"])
def test_what_a_checkpoint_does_not_count_is_nothing(whole, tail, tmp_path):
    file = broken(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content + tail)
    assert numbers(run(tmp_path)) == whole
    assert file.read_bytes().startswith(content)
    assert len(read_whole(tmp_path / CHECKPOINT)["history"]) == EPOCHS


def test_the_checkpoint_before_counts_its_part_of_the_same_file(whole, tmp_path):
    broken(tmp_path)
    shutil.copy(tmp_path / BEFORE, tmp_path / CHECKPOINT)
    assert numbers(run(tmp_path)) == whole


def test_a_checkpoint_that_holds_all_itself_goes_on(whole, tmp_path):
    file = broken(tmp_path)
    write_plain(tmp_path / CHECKPOINT, read_whole(tmp_path / CHECKPOINT))
    file.unlink()
    assert numbers(run(tmp_path)) == whole
    assert "grown" in read_plain(tmp_path / CHECKPOINT)


def test_what_a_failed_writing_has_left_is_written_over(tmp_path, monkeypatch):
    path, grown = tmp_path / CHECKPOINT, Grown(tmp_path / GROWN)
    written(grown, path, 2)
    with (tmp_path / GROWN).open("ab") as file:
        file.write(b"half a li")  # the disk was full
    assert read_whole(path) == tree(2)
    written(grown, path, 3)
    assert read_whole(path) == tree(3)


DAMAGED = {
    "missing": lambda file: file.unlink(),
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "a byte": lambda file: file.write_bytes(file.read_bytes().replace(b"1", b"2", 1)),
    "of another run": lambda file: file.write_bytes(file.read_bytes()[::-1]),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_whole(damage, tmp_path):
    file = broken(tmp_path)
    DAMAGED[damage](file)
    content = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises((fxrank.CheckpointError, OSError), match=GROWN):
        run(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == content


CRAFTED = {
    "bytes that are text": {"bytes": "9", "digest": ""},
    "fewer than none": {"bytes": -1, "digest": ""},
    "no digest": {"bytes": 0},
    "a list": [3],
    "nothing": None,
}


@pytest.mark.parametrize("count", CRAFTED)
def test_a_crafted_count_is_refused(count, tmp_path):
    broken(tmp_path)
    bare = read_plain(tmp_path / CHECKPOINT)
    write_plain(tmp_path / CHECKPOINT, bare | {"grown": CRAFTED[count]})
    with pytest.raises(fxrank.CheckpointError, match=GROWN):
        run(tmp_path)


def test_nothing_is_written_through_a_link(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / GROWN).symlink_to(mine)
    run(folder)
    assert mine.read_text() == "mine"
    assert not (folder / GROWN).is_symlink()

    path, grown = tmp_path / CHECKPOINT, Grown(tmp_path / GROWN)
    written(grown, path, 2)
    (tmp_path / GROWN).unlink()
    (tmp_path / GROWN).symlink_to(mine)
    with pytest.raises(OSError, match=GROWN):
        written(grown, path, 3)
    assert mine.read_text() == "mine"


def test_a_curve_that_begins_anew_takes_the_place_of_the_old_one(tmp_path):
    path, grown = tmp_path / CHECKPOINT, Grown(tmp_path / GROWN)
    for epochs in (5, 3, 4):
        written(grown, path, epochs)
        assert read_whole(path) == tree(epochs)
    without = tree(6)
    without["session"]["monitor"] = None
    counted, add = grown.counted(without)
    write_plain(path, counted, add)
    assert read_whole(path) == without
