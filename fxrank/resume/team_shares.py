"""One checkpoint for a team of processes: what all have alike stands in it once, what is a process's own once for each.

The first process writes and reads the file, the others send it theirs and get theirs from it, so that a checkpoint is
one file, whole or not there, and the processes need no common disk. A process's own are its random numbers, its loss
module, sums and times, and every tensor of model and optimizer that is not the first one's to the last bit: buffers, of which
`DistributedDataParallel` sends round the first one's only before the next forward, or never, and parameters that it
was told to ignore.

The order in which a sum over processes is rounded depends, from three processes on, on where in a bucket a gradient
lies. A wrapper lays its buckets anew after its first iteration, so a fresh one would round its first sums in another
order than the one that was killed: the lay-out is in the checkpoint too, unless some gradients are sparse.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fxrank.distributed.ddp import rewrap
from fxrank.distributed.team import Team
from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.names import own_name
from fxrank.saving.plainfile import pack, unpack
from fxrank.torch_private.ddp import buckets, comm_hooks, laying, reduced

OWN: dict[str, type] = {
    "first_random": dict,
    "random": dict,
    "epoch_random": dict,
    "loss": dict,
    "totals": dict,
    "memory": dict,
    "seconds": list,
}
"""What each process has for itself; the first one's stands beside what all have alike."""
_DIFFERING: dict[str, type] = {"model": dict, "optimizer": dict}
Buckets = list[list[str]]


def sent(team: Team, device: torch.device, read: Callable[[], Any]) -> Any:
    """What `read` returns in the first process, in every process; tensors go one at a time, by way of `device`. If it
    raises there, all raise.
    """
    if team.size == 1:
        return read()
    held: dict[str, Tensor] = {}

    def packed() -> tuple[str, list[tuple[str, tuple[int, ...], torch.dtype]]]:
        text, tensors = pack(read())
        held.update(tensors)
        return text, [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]

    text, kinds = team.agree(packed)
    for name, shape, dtype in kinds:
        tensor = held.setdefault(name, torch.empty(shape, dtype=dtype))
        there = _bytes_of(tensor).to(device)  # bytes: a group may not know every dtype
        team.share([there])
        held[name] = there.cpu().view(dtype).reshape(shape)
    return unpack(text, held)


def differing(team: Team, model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, dict[Any, Any]]:
    """The entries of two states that are not the first process's: `{"model": {name: …}, "optimizer": {index: {key: …}}}`."""
    if team.size == 1:
        return {"model": {}, "optimizer": {}}
    mine = _marks(model, optimizer)
    theirs = team.agree(lambda: mine)
    others = {place for place, mark in mine.items() if theirs.get(place) != mark}
    state: dict[Any, dict[str, Any]] = {}
    for part, index, key in others:
        if part == "optimizer":
            state.setdefault(index, {})[key] = on_cpu(optimizer["state"][index][key])
    return {"model": {name: on_cpu(model[name]) for part, name, _ in others if part == "model"}, "optimizer": state}


def on_cpu(value: Any) -> Any:
    """A tensor as another process can take it."""
    return value.detach().cpu() if isinstance(value, Tensor) else value


def check_others(saved: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless every other process's own parts are whole, and fit those of the first."""
    if not all(isinstance(b, list) and all(isinstance(name, str) for name in b) for b in saved["buckets"] or ()):
        raise CheckpointError(
            f"buckets must be lists of parameters' names; got {saved['buckets']!r:.100}. Put a good copy in its place, or start afresh."
        )
    for rank, own in enumerate(saved["others"], 1):
        for name, kind in (OWN | _DIFFERING).items():
            if not isinstance(own, dict) or not isinstance(own.get(name), kind):
                raise CheckpointError(
                    f"a checkpoint of several processes must hold each one's own; process {rank} has no good {name!r}. Put a good copy in its place, or start afresh."
                )
        for name, value in own["model"].items():
            first = saved["model"].get(name)
            if getattr(value, "shape", None) != getattr(first, "shape", None):
                raise CheckpointError(
                    f"what is a process's own must be of the model; process {rank} has another {name!r} than the first. Put a good copy in its place, or start afresh."
                )


def share_of(saved: dict[str, Any], team: Team) -> dict[str, Any]:
    """The checkpoint as this process of a team of any size goes on from it.

    A process that was there before gets back its own; with another number of processes, tensors are the first one's in
    all, and the sums of the epoch are the first one's to go on with.
    """
    owns = [saved, *saved["others"]]
    own = owns[team.rank] if team.rank < len(owns) else saved
    part = saved | {name: own[name] for name in OWN}
    if team.size != len(owns):
        zero = {n: torch.zeros_like(v) if isinstance(v, Tensor) else 0 for n, v in saved["totals"].items()}
        part["totals"] = _sum(o["totals"] for o in owns) if team.is_first else zero
    elif team.rank:
        state = dict(saved["optimizer"]["state"])
        for index, entries in own["optimizer"].items():
            state[index] = state.get(index, {}) | entries
        part["model"] = saved["model"] | own["model"]
        part["optimizer"] = saved["optimizer"] | {"state": state}
    return part


def buckets_of(team: Team) -> Buckets | None:
    """The names of the parameters whose gradients the wrapper sends together, in order; None without a wrapper, and for
    sparse gradients, of which torch does not tell.
    """
    wrapper = team.wrapper
    found = None if wrapper is None else buckets(wrapper)
    if found is None:
        return None
    names = {id(parameter): own_name(name) for name, parameter in team.model.named_parameters()}
    return [[names[id(parameter)] for parameter in bucket] for bucket in found]


def lay_buckets(team: Team, wanted: Buckets | None) -> None:
    """Let the wrapper of a fresh process send its gradients in these buckets from the first iteration on."""
    wrapper = team.wrapper
    if wanted is None or wrapper is None or wanted == buckets_of(team):
        return
    number = {name: index for index, name in enumerate(_reduced(wrapper, team.model))}
    if sorted(name for bucket in wanted for name in bucket) != sorted(number):
        return  # other parameters are ignored now; the wrapper's own lay-out serves them
    indices = [[number[name] for name in bucket] for bucket in reversed(wanted)]
    with laying(wrapper, indices):
        rewrap(wrapper)


def hooks_with_memory(team: Team) -> list[str]:
    """Names of the wrapper's communication hooks that carry something from step to step."""
    hooks = [] if team.wrapper is None else comm_hooks(team.wrapper)
    return [hook.__name__ for hook, state in hooks if state is not None and not isinstance(state, dist.ProcessGroup)]


def _reduced(wrapper: DistributedDataParallel, model: nn.Module) -> list[str]:
    names = {id(parameter): own_name(name) for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in reduced(wrapper)]


def _marks(model: dict[str, Any], optimizer: dict[str, Any]) -> dict[tuple[str, Any, str], str]:
    entries = {("model", name, ""): value for name, value in model.items()}
    for index, state in optimizer["state"].items():
        entries |= {("optimizer", index, key): value for key, value in state.items()}
    return {place: _mark(value) for place, value in entries.items()}


def _mark(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return "refused"  # by the first process, when it writes
    numbers: Any = _bytes_of(value.detach().cpu()).numpy()
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(numbers).hexdigest()}"


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _sum(totals: Iterable[dict[str, Any]]) -> dict[str, Any]:
    first, *rest = totals
    result = dict(first)
    for other in rest:
        result = {name: result[name] + value for name, value in other.items()}
    return result
