"""Places to write to: whole files or none, nothing through a link, one run at a time."""

import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from places import PYTHONPATH

from fxrank.saving.places import LOCK, held, put, try_places

HOLDER = """
import sys, time
from pathlib import Path
from fxrank.saving.places import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": PYTHONPATH})
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def failing(partial):
    partial.write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupted(partial):
    partial.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("write", "error"), [(failing, OSError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("before", [None, "whole"])
def test_a_writing_that_fails_leaves_what_was_there(write, error, before, tmp_path):
    place = tmp_path / "file"
    if before is not None:
        place.write_text(before)
    with pytest.raises(error):
        put(place, write)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([] if before is None else [("file", before)])


@pytest.mark.parametrize("name", ["file", "file.partial"])
def test_nothing_is_written_through_a_link(name, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / name).symlink_to(theirs)
    put(folder / "file", lambda partial: partial.write_text("mine"))
    assert theirs.read_text() == "theirs"
    assert {p.name: (p.read_text(), p.is_symlink()) for p in folder.iterdir()} == {"file": ("mine", False)}


def test_places_are_tried_and_left_as_they_are(tmp_path):
    try_places(tmp_path / "a" / "b", ["file"])
    (tmp_path / "a" / "b" / "file").write_text("old")
    try_places(tmp_path / "a" / "b", ["file"])
    assert [(p.name, p.read_text()) for p in (tmp_path / "a" / "b").iterdir()] == [("file", "old")]


@pytest.mark.parametrize("name", ["file", "file.partial"])
def test_a_folder_in_the_place_of_a_file(name, tmp_path):
    (tmp_path / name).mkdir()
    message = f"{tmp_path} is not: {name} in it is a folder. Change that, or pass another"
    with pytest.raises(IsADirectoryError, match=re.escape(message)):
        try_places(tmp_path, ["file"])


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="output_dir must be a folder that can be written"):
        try_places(tmp_path / "file", [])


def test_a_folder_that_is_held_names_the_process(holder, tmp_path):
    message = f"{tmp_path} is in use by process {holder.pid} on "
    with pytest.raises(BlockingIOError, match=re.escape(message)), held(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()  # theirs


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with held(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
        assert str(holder.pid) not in (tmp_path / LOCK).read_text().split()
    assert not any(tmp_path.iterdir())


def test_one_process_does_not_hold_a_folder_twice(tmp_path):
    found = []

    def second():
        try:
            with held(tmp_path / ".." / tmp_path.name):
                pass
        except BlockingIOError as error:
            found.append(str(error))

    with held(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert f"in use by process {os.getpid()}, this very one," in found[0]
    with held(tmp_path), held(Path(tmp_path.parent)):
        pass
    assert not any(tmp_path.iterdir())


def test_a_child_does_not_hold_what_its_parent_held(tmp_path):
    """As the workers of a loader, which may outlive a process that was killed."""
    program = f"""
import os, signal, time
from pathlib import Path
from fxrank.saving.places import held
with held(Path({str(tmp_path)!r})):
    if os.fork():
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(1)
    time.sleep(20)
"""
    process = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": PYTHONPATH})
    assert process.wait() == -9
    with held(tmp_path):
        pass
