"""A `DistributedDataParallel` whose parameters are replaced.

The wrapper stays the user's object: its reducer, which knows parameters that are gone, is made anew with the wrapper's own
options, and its communication hooks move over.
"""

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxrank.passes.model.names import own_name
from fxrank.torch_private.ddp import (
    averaged,
    comm_hooks,
    delays_all_reduce,
    forget_comm_hooks,
    inside,
    is_joined,
    reduce_anew,
    reduces_in_python,
    wrappers,
)


def wrapper_around(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper of a model, or of a whole that it is a part of, where it was given without, as frameworks do; None if it
    has none (yet). One of a list of its parameters, as `replicate` makes it, counts too.
    """
    ours = {id(p) for p in model.parameters()}
    for wrapper in wrappers():
        whole = inside(wrapper)
        if isinstance(whole, nn.ParameterList) and ours.intersection(map(id, whole)):
            return wrapper
        if whole is not None and any(module is model for module in whole.modules()):
            return wrapper
    return None


def rewrap_all(gone: Iterable[nn.Parameter], keep_hooks: bool = True) -> int:
    """`rewrap` every wrapper that averaged the gradient of one of the parameters that are gone: one made again, or one around
    another whole with the same layers, among them. Returns how many.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    ours = {id(p) for p in gone}
    found = [wrapper for wrapper in wrappers() if ours.intersection(map(id, averaged(wrapper)))]
    for wrapper in found:
        rewrap(wrapper, keep_hooks)
    return len(found)


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raise `TypeError` for options that outlive the wrapper's parameters, and for a wrapper of parameters alone."""
    if isinstance(wrapper.module, nn.ParameterList):
        raise TypeError(
            f"DistributedDataParallel must hold the model to take its new parameters; one of replicate() holds a list of {len(wrapper.module)} "
            "of the old ones. Wrap the model in DistributedDataParallel, or shard it with fully_shard."
        )
    for option, value, way_out in (
        ("delay_all_reduce_named_params", delays_all_reduce(wrapper), "Leave it out"),
        ("mixed_precision", wrapper.mixed_precision, "Use torch.autocast"),
        ("optimize_ddp='python_reducer'", reduces_in_python(wrapper), "Use the default reducer"),
    ):
        if value:
            raise TypeError(
                f"DistributedDataParallel must be able to take new parameters; with {option} it keeps hooks on the old ones. {way_out}."
            )


def check_not_joined(wrapper: DistributedDataParallel) -> None:
    """Raise `RuntimeError` inside `with wrapper.join()`, where a process that has left no longer answers."""
    if is_joined(wrapper):
        raise RuntimeError(
            "all processes must take part in the rank samples and the switch; inside DistributedDataParallel.join() some may have left. Give all "
            "equally many batches (DistributedSampler, drop_last) until the switch is made, and join() after it."
        )


def ignored_paths(wrapper: DistributedDataParallel, model: nn.Module) -> frozenset[str]:
    """Paths in `model` of the modules and parameters that the wrapper was told to leave alone, and of all around them."""
    ignored = {
        id(p)
        for name, p in wrapper.module.named_parameters(remove_duplicate=False)
        if name in wrapper.parameters_to_ignore
    }
    paths = set()
    for name, parameter in model.named_parameters(remove_duplicate=False) if ignored else ():
        while name and id(parameter) in ignored:
            paths.add(own_name(name))
            name = name.rpartition(".")[0]
    return frozenset(paths)


def rewrap(wrapper: DistributedDataParallel, keep_hooks: bool = True) -> None:
    """Let the wrapper average the gradients of the parameters that its module has now.

    Same object, same options; modules' hooks and modes are untouched. `keep_hooks=False` drops the communication
    hooks: gradients are then averaged as they are. PowerSGD's memory, which has the shapes of the old buckets, is
    emptied, and it starts again after the two plain iterations that a new reducer needs (Vogels et al. 2019).
    """
    reduce_anew(wrapper)
    hooks = comm_hooks(wrapper)
    forget_comm_hooks(wrapper)
    for hook, state in hooks if keep_hooks else ():
        _restart(state)
        wrapper.register_comm_hook(state, hook)


def _restart(state: Any) -> None:
    if hasattr(state, "start_powerSGD_iter"):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        state.start_powerSGD_iter = max(state.start_powerSGD_iter, state.iter + 2)
