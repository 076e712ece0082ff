"""Weights in several safetensors files with an index, as Transformers has them for large models: read, and written, a tensor at a time.

The index is `{"metadata": …, "weight_map": {name: file}}`. One that fxrank wrote has in its metadata the digest of the plan's values, the
map, and the digests of the files, which tells files that belong together and are whole from any others.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxrank.passes.errors import CheckpointError
from fxrank.plan import Plan

INDEX = "model.safetensors.index.json"
PLAN_FILE = "plan.json"
_ALGORITHM = "sha256:"


@dataclass(frozen=True)
class Shards:
    """The tensors in a folder, of which nothing is kept in memory. Raises `CheckpointError`, with the file, for what is damaged or missing."""

    folder: Path

    @cached_property
    def index(self) -> dict[str, Any]:
        """The index, checked."""
        try:
            found = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
            files = found["weight_map"]
            right = bool(files) and all(isinstance(f, str) and f == Path(f).name for f in files.values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            right = False
        if not right:
            raise CheckpointError(
                f"{INDEX} must be an object whose weight_map has a file of the folder by each tensor's name; the one in {self.folder} is not. Save the "
                "model again."
            )
        if missing := sorted({f for f in files.values() if not (self.folder / f).is_file()}):
            raise CheckpointError(
                f"every file that {INDEX} names must be there; {missing[0]!r} is missing in {self.folder}. Copy the whole folder."
            )
        return dict(found)

    @property
    def files(self) -> dict[str, str]:
        """The file of each tensor, by the tensor's name."""
        return dict(self.index["weight_map"])

    @property
    def largest(self) -> int:
        """Bytes of the largest file."""
        return max((self.folder / file).stat().st_size for file in self.files.values())

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name, those of one file after the other."""
        found: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self.files.values())):
            with _opened(self.folder / file) as tensors:
                found |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118 (not a mapping)
        if lost := sorted(self.files.keys() ^ found.keys()):
            raise CheckpointError(
                f"{INDEX} must name the tensors that are in its files; {lost[0]!r} is only in one of them in {self.folder}. Save the model again."
            )
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own: the file is closed again."""
        with _opened(self.folder / self.files[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor.clone()

    def check_digest(self) -> None:
        """Raise `CheckpointError` unless the files are those that fxrank wrote together, if it did."""
        claimed = (self.index.get("metadata") or {}).get("digest")
        if claimed is None:
            return
        found = _digest(self.folder, self.files)
        if found != claimed:
            raise CheckpointError(
                f"{INDEX}, its files and {PLAN_FILE} must be as they were saved together; in {self.folder} they have the digest {found}, saved was "
                f"{claimed}. One of them is damaged, edited or of another save: put good copies in their place, or save the model again."
            )


class ShardWriter:
    """Writes tensors as they come, into files of at most `limit` bytes, or one tensor, which get their names when all went well; in a `with` block
    that is left with an error nothing stays. Raises `CheckpointError` for a folder that holds weights already.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        self._folder, self._limit = Path(folder), limit
        check_empty(self._folder)
        self._waiting: dict[str, Tensor] = {}
        self._bytes = self._total = 0
        self._parts: list[tuple[Path, list[str]]] = []
        self._placed: list[Path] = []

    def __enter__(self) -> "ShardWriter":
        self._new = not self._folder.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory(dir=self._folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._scratch.cleanup()
        if kind is not None:
            for path in self._placed:
                path.unlink(missing_ok=True)
            if self._new:
                self._folder.rmdir()

    def add(self, name: str, tensor: Tensor) -> None:
        """The next tensor; it is held until its file is full."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > self._limit:
            self._write()
        self._waiting[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _write(self) -> None:
        part = Path(self._scratch.name) / f"{len(self._parts)}.safetensors"
        safetensors.torch.save_file(self._waiting, str(part), metadata={"format": "pt"})
        self._parts.append((part, list(self._waiting)))
        self._waiting, self._bytes = {}, 0

    def finish(self, plan: Plan) -> None:
        """Write what is left, the plan, and, last of all, the index."""
        if self._waiting:
            self._write()
        plan.save(Path(self._scratch.name) / PLAN_FILE)
        mode = (Path(self._scratch.name) / PLAN_FILE).stat().st_mode
        files: dict[str, str] = {}
        for number, (part, names) in enumerate(self._parts, 1):
            file = f"model-{number:05}-of-{len(self._parts):05}.safetensors"
            part.chmod(mode)  # safetensors writes what only its owner may read
            self._place(part, file)
            files |= dict.fromkeys(names, file)
        self._place(Path(self._scratch.name) / PLAN_FILE, PLAN_FILE)
        metadata = {"format": "pt", "writer": "fxrank", "total_size": self._total}
        index = {"metadata": metadata | {"digest": _digest(self._folder, files)}, "weight_map": files}
        written = Path(self._scratch.name) / INDEX
        written.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        self._place(written, INDEX)

    def _place(self, written: Path, name: str) -> None:
        os.replace(written, self._folder / name)
        self._placed.append(self._folder / name)


def check_empty(folder: Path) -> None:
    """Raise `CheckpointError` for a folder with weights in it."""
    if held := sorted(p.name for p in folder.glob("*.safetensors*")):
        raise CheckpointError(
            f"the folder to write into must hold no weights yet; {folder} has {held[0]}. Name another, or remove them."
        )


def _digest(folder: Path, files: dict[str, str]) -> str:
    values = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps([values, files], sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(set(files.values())):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return _ALGORITHM + digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """`safe_open`, with our error."""
    try:
        file = safe_open(str(path), "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path.name} in {path.parent} must be a whole safetensors file; {error}. Save the model again."
        ) from error
    with file as tensors:
        yield tensors
