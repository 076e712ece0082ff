"""What a run only adds to, its history and its rank curves, in a file of its own beside the checkpoint.

Each checkpoint adds one line with what is new, and then counts how much of the file is its own, with a digest over it: what it costs does not
grow with the epochs. The line reaches the disk first. Killed in between, a run leaves a line that no checkpoint counts, and the next
one to be written takes its place. Checkpoints of an earlier fxrank hold all of it themselves, and are read as before.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fxrank.passes.errors import CheckpointError
from fxrank.saving.places import put
from fxrank.saving.plainfile import pack, read_plain, unpack

GROWN = "checkpoint.grown.jsonl"
_COUNT = "grown"
"""Where a checkpoint counts what it has there."""
Lists = dict[str, list[Any]]


class Grown:
    """The file of one run. A run that begins makes it anew; one that goes on does so once, of what its checkpoint counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = False
        self._start(b"", {})

    def _start(self, content: bytes, lengths: dict[str, int]) -> None:
        self._content, self._bytes, self._digest = content, len(content), hashlib.sha256(content)
        self._lengths = lengths

    def read(self, checkpoint: Path) -> Any:
        """The whole tree of the checkpoint. Raises `CheckpointError` for either file if it is damaged, foreign or cut off."""
        tree, content = _whole(checkpoint, self._path)
        self._begun = False
        self._start(content, {name: len(values) for name, values in _lists(tree).items()} if content else {})
        return tree

    def counted(self, tree: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        """The tree with counts in the place of what grows, and what adds the new of it to the file, before it is counted there;
        that raises `OSError`.
        """
        lists = _lists(tree)
        new = {}
        for name, values in lists.items():
            known = self._lengths.get(name, 0)
            start = known if known <= len(values) else 0  # one that was begun anew
            if values[start:]:
                new[name] = [start, values[start:]]
        line = f"{pack(new)[0]}\n".encode() if new else b""
        digest = self._digest.copy()
        digest.update(line)

        def add() -> None:
            if not self._begun:
                put(self._path, lambda partial: partial.write_bytes(self._content + line), durable=True)
                self._begun, self._content = True, b""
            elif line:
                self._append(line)
            self._bytes, self._digest = self._bytes + len(line), digest
            self._lengths = {name: len(values) for name, values in lists.items()}

        count = {"bytes": self._bytes + len(line), "digest": digest.hexdigest()}
        return _with(tree, {name: [] for name in lists}) | {_COUNT: count}, add

    def _append(self, line: bytes) -> None:
        """Behind what is counted; what a writing that failed has left there goes."""
        descriptor = os.open(self._path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "wb") as file:
            os.ftruncate(descriptor, self._bytes)
            file.seek(self._bytes)
            file.write(line)
            file.flush()
            os.fsync(descriptor)


def read_whole(checkpoint: Path) -> Any:
    """The tree of a checkpoint with what stands beside it; `CheckpointError` as `Grown.read`."""
    return _whole(checkpoint, checkpoint.with_name(GROWN))[0]


def _whole(checkpoint: Path, path: Path) -> tuple[Any, bytes]:
    tree = read_plain(checkpoint)
    if not isinstance(tree, dict) or _COUNT not in tree:
        return tree, b""
    count = tree.pop(_COUNT)
    fix = f"Put the {GROWN} of this very run in its place, or start afresh"
    try:
        with path.open("rb") as file:
            content = file.read(count["bytes"])
        if len(content) != count["bytes"] or hashlib.sha256(content).hexdigest() != count["digest"]:
            raise CheckpointError(
                f"what a checkpoint counts beside it must be as it was written; {path} is damaged. {fix}."
            )
        lists = _lists(tree)
        for line in content.decode().splitlines():
            for name, (start, values) in unpack(line, {}).items():
                if name in lists:  # else it is no more, as the rank curves of some policies
                    lists[name][start:] = values
        return _with(tree, lists), content
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"a checkpoint must have what it counts beside it; {path} is not that: {type(error).__name__}: {error}. {fix}."
        ) from error


def _lists(tree: dict[str, Any]) -> Lists:
    """What grows in a checkpoint's tree, by name."""
    monitor = tree["session"]["monitor"]
    if monitor is None:
        return {"history": tree["history"]}
    curves = {json.dumps(["curve", name]): values for name, values in monitor["curves"].items()}
    return {"history": tree["history"], "steps": monitor["steps"], **curves}


def _with(tree: dict[str, Any], lists: Lists) -> dict[str, Any]:
    """The tree with other lists in their places."""
    session, monitor = tree["session"], tree["session"]["monitor"]
    if monitor is not None:
        curves = {name: lists[json.dumps(["curve", name])] for name in monitor["curves"]}
        session = session | {"monitor": monitor | {"steps": lists["steps"], "curves": curves}}
    return tree | {"history": lists["history"], "session": session}
