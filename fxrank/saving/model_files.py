"""Save and load: safetensors for the numbers, `plan.json` for the architecture. No pickle anywhere.

The weights' metadata hold a digest, `sha256:<hex>`: of the plan as JSON with sorted keys and no spaces, and after it the
bytes of the weights' file, with zeros in the place of the digest itself. It tells files that belong together and are whole
from any others. It is in the weights and not in the plan so that saving again, with the same plan, and being killed
between the two files leaves a good folder. Files without one, of an earlier fxrank or another tool, are read as they are.

What is no tensor in a state dict (`get_extra_state`) is JSON in the metadata, `extra_state`.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fxrank.distributed.ddp import rewrap_all
from fxrank.passes.errors import CheckpointError, PlanMismatchError, RankError
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.names import load_own_state, own_name, own_state
from fxrank.passes.model.quantized import check_not_quantized
from fxrank.plan import Plan
from fxrank.saving.dense_twin import dense_twin
from fxrank.saving.plainfile import pack, unpack, unstorable
from fxrank.saving.shards import INDEX, PLAN_FILE, Shards
from fxrank.saving.unfilled import give_memory
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.plan_of import plan_of
from fxrank.switch.sites import sites
from fxrank.torch_private.dtensor import is_sharded, local, whole

WEIGHTS, PLAN, EXTRA = "model.safetensors", PLAN_FILE, "extra_state"
WRITER = {"format": "pt", "writer": "fxrank"}
ALGORITHM = "sha256:"
_BLANK = ALGORITHM + "0" * 64
Shapes = dict[str, tuple[int, ...] | None]
"""Of tensors; None for what is no tensor."""


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write `path/model.safetensors`, with a digest of both files, and `path/plan.json`. The model must be one that fxrank
    has rewritten (`plan_of`); shared tensors are stored once.

    A parameter with NaN or infinity is stored as it is, with a warning. Each file is written beside its place and moved into
    it, weights first. Of a model in shards (`fully_shard`) all processes must call; one weight at a time is gathered, and the
    first process writes. Raises, before anything is written,
    `ValueError` for a model without a plan, `TypeError` for one that is quantized or whose state dict holds what is neither a dense tensor nor plain
    data, and `PlanMismatchError` for one that `load` could not make from its plan.
    """
    model = uncompiled(model)
    plan = plan_of(model)
    check_not_quantized(model, "saving")
    extra = check_storable(model)
    check_loadable(model, plan)
    _warn_not_finite(model)
    writes = not is_sharded(model) or dist.get_rank() == 0
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    memory: set[int] = set()
    for name, value in own_state(model).items():
        if isinstance(value, Tensor) and id(value) not in seen:  # a shared parameter is stored once
            seen.add(id(value))
            tensor = whole(value.detach())
            if writes:
                tensor = tensor.contiguous().cpu()
                place = tensor.untyped_storage().data_ptr()  # of a view the one of what it is a part of
                tensors[name] = tensor.clone() if place in memory else tensor
                memory.add(place)
    if not writes:
        return
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        weights = Path(scratch) / WEIGHTS
        safetensors.torch.save_file(tensors, str(weights), metadata=WRITER | {"digest": _BLANK} | extra)
        plan.save(Path(scratch) / PLAN)
        _sign(weights, Path(scratch) / PLAN)
        shutil.copymode(Path(scratch) / PLAN, weights)  # safetensors writes what only its owner may read
        os.replace(weights, folder / WEIGHTS)
        os.replace(Path(scratch) / PLAN, folder / PLAN)


def _warn_not_finite(model: nn.Module) -> None:
    floats = ((n, local(p.detach())) for n, p in model.named_parameters() if p.is_floating_point())
    # torch asks no number of 8 bits
    names = [n for n, p in floats if not torch.isfinite(p.float() if p.dtype.itemsize < 2 else p).all()]
    if names:
        warnings.warn(
            f"a model should be finite to be of use; {names[0]!r} and {len(names) - 1} more parameters of the one that is saved hold NaN or infinity.",
            stacklevel=3,
        )


def check_loadable(model: nn.Module, plan: Plan) -> None:
    """Raise `PlanMismatchError` unless the plan makes of the dense model what the state dict holds: what `load` will do."""
    stored: Shapes = {}
    same: dict[str, object] = {}
    for name, value in own_state(model).items():
        stored[name] = tuple(value.shape) if isinstance(value, Tensor) else None
        same[name] = id(value) if isinstance(value, Tensor) else name
    try:
        check_names(dense_twin(model), plan, stored, same)
    except (PlanMismatchError, RankError) as error:
        raise PlanMismatchError(
            f"what is saved must be what load makes of the model's plan; here it is not: {error} Pairs that were put in or taken out by hand are in no plan: "
            "rewrite with fxrank.factorize, or save fxrank.merge(model).state_dict()."
        ) from error


def check_storable(model: nn.Module) -> dict[str, str]:
    """The metadata for what is no tensor in a model's state dict (`get_extra_state`). Raises `TypeError` for what a
    checkpoint can not hold.
    """
    fix = "Give it another form, or keep it out of the state dict (persistent=False)"
    extra = {}
    for name, value in own_state(model).items():
        if not isinstance(value, Tensor):
            extra[name] = value
        elif (found := unstorable(value)) is not None:
            raise TypeError(f"a checkpoint holds dense tensors with numbers; {name!r} is {found}. {fix}.")
    text, tensors = pack(extra)
    if tensors:
        raise TypeError(
            f"beside tensors a checkpoint holds plain data; the state {next(iter(extra))!r} has tensors inside. {fix}."
        )
    return {EXTRA: text} if extra else {}


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Turn a freshly built dense `model` into the saved one, in place, and return it. A compiled
    one stays compiled, and one in `DistributedDataParallel` averages the gradients of its factors.

    The weights may lie in several files with an index (`model.safetensors.index.json`). Strict: all files must be as they were saved, and plan, names, shapes must fit; the first mismatch is named and
    nothing is changed. Devices and dtypes stay the model's own. Raises `CheckpointError` for a missing, damaged or foreign
    file and for files of two saves, `PlanMismatchError` for a plan of another model, `ValueError` for a model on the meta
    device, `TypeError` for one in shards.
    """
    state = own_state(uncompiled(model))
    if meta := [name for name, value in state.items() if getattr(value, "is_meta", False)]:
        raise ValueError(
            f"a model to load into must have memory; {meta[0]!r} is on the meta device. Build it on a real one, or move it with model.to_empty(device=…) first."
        )
    return fill(model, path)


def fill(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """As `load`, for a model that may be `unfilled`: its tensors get memory when they are the small ones."""
    folder = Path(path)
    sharded = (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file()
    for name in (PLAN, INDEX if sharded else WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"a checkpoint is a folder with {PLAN} and {WEIGHTS}; {name} is missing in {folder}. Pass what fxrank.save wrote."
            )
    try:
        plan = Plan.from_json((folder / PLAN).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{PLAN} must be UTF-8 JSON; {error}.") from error
    stored, state, extra = _read_shards(folder) if sharded else _read_weights(folder)
    inner = uncompiled(model)
    if is_sharded(inner):
        raise TypeError(
            f"a file is loaded into a whole model; this {type(inner).__name__} is in shards. Load it into a freshly built one, and shard that."
        )
    aliases = check_names(inner, plan, stored | dict.fromkeys(extra))
    replacements = apply_plan(inner, plan, split=False)
    give_memory(inner)
    rewrap_all(p for r in replacements for p in r.parameters)
    load_own_state(inner, state | extra | {name: state[same] for name, same in aliases.items()})
    return model


def _read_weights(folder: Path) -> tuple[Shapes, dict[str, Tensor], dict[str, Any]]:
    """Shapes, numbers, and what is no tensor."""
    try:
        with safe_open(str(folder / WEIGHTS), "pt") as file:
            stored: Shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        check_digest(folder, metadata)
        extra = dict(unpack(metadata[EXTRA], {})) if EXTRA in metadata else {}
        state = safetensors.torch.load_file(str(folder / WEIGHTS))
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{WEIGHTS} in {folder} must be a whole safetensors file; {error}. Save the model again."
        ) from error
    return stored, state, extra


def _read_shards(folder: Path) -> tuple[Shapes, dict[str, Tensor], dict[str, Any]]:
    """The same of a model in several files."""
    shards = Shards(folder)
    shards.check_digest()
    return dict(shards.shapes), {name: shards.read(name) for name in shards.shapes}, {}


def check_digest(folder: Path, metadata: Mapping[str, str]) -> None:
    """Raise `CheckpointError` unless both files of `folder` are those that `save` wrote together. `metadata` are the
    weights' own.
    """
    claimed = metadata.get("digest")
    if claimed is None and (metadata.get("writer") != WRITER["writer"] or metadata.keys() <= WRITER.keys()):
        return  # of an earlier fxrank, or of another tool; a digest whose name is damaged is neither
    if claimed is not None and not claimed.startswith(ALGORITHM):
        raise CheckpointError(
            f"the digest of {WEIGHTS} must be one of {ALGORITHM.rstrip(':')}; {folder} has {claimed!r}. Install the fxrank that wrote it, or save the model again."
        )
    found = ALGORITHM + _digest(folder / WEIGHTS, folder / PLAN, claimed or _BLANK)
    if found != claimed:
        raise CheckpointError(
            f"{WEIGHTS} and {PLAN} must be as they were saved together; in {folder} they have the digest {found}, saved was {claimed}. "
            "One of them is damaged, edited or of another save: put a good copy of both in their place, or save the model again."
        )


def _sign(weights: Path, plan: Path) -> None:
    """Put the digest in its place in the weights' header."""
    digest = _digest(weights, plan, _BLANK)
    with weights.open("rb+") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8 + header.index(_BLANK.encode()) + len(ALGORITHM))
        file.write(digest.encode())


def _digest(weights: Path, plan: Path, claimed: str) -> str:
    """Of both files; see the module. Spaces and line ends of the plan may change on the way, its values may not."""
    values = json.loads(plan.read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode())
    with weights.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest.update(length + header.replace(claimed.encode(), _BLANK.encode(), 1))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_names(
    model: nn.Module, plan: Plan, stored: Shapes, memory: Mapping[str, object] | None = None
) -> dict[str, str]:
    """Compare what the file holds with what the rewritten model will ask for, before the model is touched. Of
    tensors that the model shares, the file holds one: returns its name by the names of the others. `memory` tells which
    names have the same tensor in a file that has it under all of them.
    """
    dense = own_state(model)
    expected: Shapes = {n: tuple(v.shape) if isinstance(v, Tensor) else None for n, v in dense.items()}
    identity: dict[str, object] = {n: id(v) if isinstance(v, Tensor) else n for n, v in dense.items()}
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(own_name(path))
    inside: dict[str, list[str]] = {}
    for name in dense:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            inside.setdefault(".".join(parts[:end]), []).append(name)
    for site in sites(model, plan):
        for place in site.places:
            pair = site.pair_at(place)
            for path in [f"{p}.{place.attribute}".strip(".") for p in paths[id(place.owner)]]:
                for name in inside.get(path, ()):
                    expected.pop(name, None)
                for name, value in pair.state_dict().items():
                    if name != "v.bias":
                        expected[f"{path}.{name}"] = tuple(value.shape)
                        identity[f"{path}.{name}"] = (id(place.owner) if name.startswith("norm.") else site.name, name)
                if pair.bias is not None:
                    expected[f"{path}.v.bias"] = tuple(pair.bias.shape)
                    own = getattr(place.dense, "bias", None)  # that which is gained is nobody else's
                    identity[f"{path}.v.bias"] = (id(place.owner), "v.bias") if own is None else id(own)
    for name, shape in stored.items():
        if name not in expected:
            raise PlanMismatchError(
                f"every stored tensor must have a place in the model; {name!r} has none. Build the architecture that was saved."
            )
        if shape != expected[name]:
            raise PlanMismatchError(
                f"stored shapes must fit the model; {name!r} is {shape} in the file and {expected[name]} in the model."
            )
    aliases: dict[str, str] = {}
    same: dict[object, list[str]] = {}
    for name in expected:
        same.setdefault(identity[name], []).append(name)
    for names in same.values():
        held = [name for name in names if name in stored]
        if not held:
            raise PlanMismatchError(
                f"every tensor of the model must be stored; {names[0]!r} is not in the file. Build the architecture that was saved."
            )
        if len({(memory or {}).get(name, name) for name in held}) > 1:
            raise PlanMismatchError(
                f"a tensor that the model shares must be stored once; the file holds {held[0]!r} and {held[1]!r} apart. Build the architecture that was saved."
            )
        aliases |= {name: held[0] for name in names if name != held[0]}
    return aliases
