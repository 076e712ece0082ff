"""Nested plain data and tensors in one file: safetensors for the numbers, JSON for the rest. Nothing in it can run.

A file appears whole or not at all: it is written beside its place, flushed to the disk, and moved into it. A digest
over everything that is read back tells a damaged file from a good one.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxrank.passes.errors import CheckpointError
from fxrank.saving.places import put

FORMAT, VERSION = "fxrank-checkpoint", 1
_SCALARS = (bool, int, float, str, type(None))
_PLAIN = frozenset(_SCALARS)


def write_plain(path: str | os.PathLike[str], tree: Any, before: Callable[[], None] = lambda: None) -> None:
    """Write `tree` to `path`: dicts, lists, tuples and Counters of numbers, strings, None, arrays and dense tensors, which
    are copied to the CPU. Tensors that are one in memory are stored once. `before` is called when all of it can be stored, and
    nothing is written yet.

    A process that is killed, or a disk that fills up, leaves the file that was there before. Raises `TypeError` that
    names the first value of another type, before anything is written; `OSError`.
    """
    place = Path(path)
    text, tensors = pack(tree)
    header = {"format": FORMAT, "version": str(VERSION), "digest": _digest(text, tensors), "tree": text}
    before()
    try:
        put(place, lambda partial: safetensors.torch.save_file(tensors, str(partial), metadata=header), durable=True)
    except SafetensorError as error:  # a full disk among others
        raise OSError(
            f"a checkpoint must be writable; {place} is not: {error}. Make room or pass another folder."
        ) from error


def read_plain(path: str | os.PathLike[str]) -> Any:
    """What `write_plain` wrote, tensors on the CPU. Raises `CheckpointError` for a file that is damaged, cut off,
    foreign, or of a newer fxrank.
    """
    fix = "Delete it to start afresh, or put a good copy in its place"
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"a checkpoint must be a file that a resumable run wrote; {path} is not. {fix}.")
            if header.get("version") != str(VERSION):
                raise CheckpointError(
                    f"this fxrank reads checkpoints of version {VERSION}; {path} has version {header.get('version')!r}. Install the fxrank that wrote it."
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        text = header["tree"]
        if header["digest"] != _digest(text, tensors):
            raise CheckpointError(f"a checkpoint must be as it was written; {path} is damaged. {fix}.")
        return unpack(text, tensors)
    except CheckpointError:
        raise
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"a checkpoint must be a whole file; {path} is not: {error}. {fix}.") from error


def pack(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """The text and the tensors (copied to the CPU, contiguous) that a file holds `tree` in; `TypeError` as in `write_plain`."""
    tensors: dict[str, Tensor] = {}
    return json.dumps(_packed(tree, tensors, {}, "")), tensors


def unpack(text: str, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `pack`."""
    return _unpacked(json.loads(text), tensors)


def unstorable(value: Any) -> str | None:
    """What a tensor is that safetensors cannot hold; None for one that it can."""
    if value.layout is not torch.strided:
        return f"a {value.layout} tensor"
    if value.is_meta:
        return "a tensor on the meta device"
    return None if _has_name(value.dtype) else f"a {value.dtype} tensor"


@cache
def _has_name(dtype: torch.dtype) -> bool:
    """Whether safetensors knows a dtype."""
    try:
        safetensors.torch.save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, RuntimeError, SafetensorError):  # or one that torch can not make like this
        return False
    return True


def _packed(value: Any, tensors: dict[str, Tensor], known: dict[Any, str], where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        # Not among the known: the copy is gone after this, and the next one may lie where it lay.
        return {"array": _packed_tensor(torch.from_numpy(value.copy()), tensors, {}, where)}
    if isinstance(value, Tensor):
        return _packed_tensor(value, tensors, known, where)
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        if not _all_plain(value):
            for key in value:
                if not isinstance(key, _SCALARS):
                    raise _not_plain(where, key)
        return {
            kind: [
                [k, v if type(v) in _PLAIN else _packed(v, tensors, known, f"{where}[{k!r}]")] for k, v in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        if _all_plain(value):
            items = list(value)
        else:
            items = [_packed(v, tensors, known, f"{where}[{i}]") for i, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise _not_plain(where, value)


def _all_plain(values: Iterable[Any]) -> bool:
    """Whether all are scalars of the very types: curves and histories, which grow with a run, are then not gone through one
    by one at each writing.
    """
    return _PLAIN.issuperset(map(type, values))


def _packed_tensor(value: Tensor, tensors: dict[str, Tensor], known: dict[Any, str], where: str) -> Any:
    if unstorable(value) is not None:
        raise _not_plain(where, value)
    value = value.detach()
    # Dimensions from the longest stride to the shortest: the numbers come back in the same order in memory.
    strides = value.stride()
    order = sorted(range(value.ndim), key=lambda d: -strides[d])
    key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
    name = known.get(key) if value.numel() else None
    if name is None:
        name = known[key] = str(len(tensors))
        tensors[name] = value.permute(order).contiguous().cpu().clone()
    return {"tensor": name, "order": order}


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].permute([value["order"].index(d) for d in range(len(value["order"]))])
    if "array" in value:
        return _unpacked(value["array"], tensors).numpy()
    if "tuple" in value:
        return tuple(_unpacked(v, tensors) for v in value["tuple"])
    kind = Counter if "counter" in value else dict
    return kind({k: _unpacked(v, tensors) for k, v in value["counter" if "counter" in value else "dict"]})


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        bytes_of: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(bytes_of)
    return digest.hexdigest()


def _not_plain(where: str, value: Any) -> TypeError:
    found = unstorable(value) if isinstance(value, Tensor) else type(value).__name__
    return TypeError(
        f"a checkpoint holds numbers, strings, lists, dicts and dense tensors; its entry {where or 'itself'} is or has as a key {found}. "
        "Give what it belongs to a state_dict of plain data, or train without resume=True."
    )
