"""A `DistributedDataParallel` whose parameters are replaced.

The wrapper stays the user's object: its reducer, which knows parameters that are gone, is made anew with the wrapper's own
options, and its communication hooks move over. Torch has no public call for that, so this file uses what its wrapper keeps inside.
"""

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxrank.passes.model.names import own_name


def wrapper_around(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper of a model, or of a whole that it is a part of, where it was given without, as frameworks do; None if it
    has none (yet). One of a list of its parameters, as `replicate` makes it, counts too.
    """
    ours = {id(p) for p in model.parameters()}
    for wrapper in _wrappers():
        inside = wrapper.__dict__.get("_modules", {}).get("module")
        if isinstance(inside, nn.ParameterList) and ours.intersection(map(id, inside)):
            return wrapper
        if inside is not None and any(module is model for module in inside.modules()):
            return wrapper
    return None


def rewrap_all(gone: Iterable[nn.Parameter], keep_hooks: bool = True) -> int:
    """`rewrap` every wrapper that averaged the gradient of one of the parameters that are gone: one made again, or one around
    another whole with the same layers, among them. Returns how many.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    ours = {id(p) for p in gone}
    wrappers = [w for w in _wrappers() if ours.intersection(map(id, w.__dict__.get("_module_parameters", ())))]
    for wrapper in wrappers:
        rewrap(wrapper, keep_hooks)
    return len(wrappers)


def _wrappers() -> Iterator[DistributedDataParallel]:
    return (thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel))


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raise `TypeError` for options that outlive the wrapper's parameters, and for a wrapper of parameters alone."""
    if isinstance(wrapper.module, nn.ParameterList):
        raise TypeError(
            f"DistributedDataParallel must hold the model to take its new parameters; one of replicate() holds a list of {len(wrapper.module)} "
            "of the old ones. Wrap the model in DistributedDataParallel, or shard it with fully_shard."
        )
    for option, value, way_out in (
        ("delay_all_reduce_named_params", wrapper._delay_all_reduce_params, "Leave it out"),
        ("mixed_precision", wrapper.mixed_precision, "Use torch.autocast"),
        ("optimize_ddp='python_reducer'", getattr(wrapper, "_use_python_reducer", False), "Use the default reducer"),
    ):
        if value:
            raise TypeError(
                f"DistributedDataParallel must be able to take new parameters; with {option} it keeps hooks on the old ones. {way_out}."
            )


def check_not_joined(wrapper: DistributedDataParallel) -> None:
    """Raise `RuntimeError` inside `with wrapper.join()`, where a process that has left no longer answers."""
    from torch.distributed.algorithms.join import Join

    # the mark stays on the wrapper after the block; what made it does not
    if wrapper._join_config.enable and any(
        type(thing) is Join and thing._enable and wrapper in thing._joinables for thing in gc.get_objects()
    ):
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
    wrapper._module_parameters = [
        p for name, p in wrapper.module.named_parameters() if name not in wrapper.parameters_to_ignore
    ]
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    static, wrapper.static_graph = wrapper.static_graph, False
    wrapper._ddp_init_helper(parameters, sparse, names, static)
    wrapper._has_rebuilt_buckets = False
    if static:  # its first iteration is special, and comes again
        wrapper._set_static_graph()
        _synchronise_first(wrapper)
    hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
    for hook, state in hooks if keep_hooks else ():
        _restart(state)
        wrapper.register_comm_hook(state, hook)


def _synchronise_first(wrapper: DistributedDataParallel) -> None:
    """Let the first backward average the gradients inside `no_sync` too: torch records a static graph in it, and fails if it
    does not. What is averaged once more with the rest stays the same.
    """
    asked = True

    def before(*_: Any) -> None:
        nonlocal asked
        asked = wrapper.require_backward_grad_sync
        if not wrapper._static_graph_delay_allreduce_enqueued:  # set by that backward
            wrapper.require_backward_grad_sync = asked or torch.is_grad_enabled()
            return
        for handle in handles:
            handle.remove()

    def after(*_: Any) -> None:
        wrapper.require_backward_grad_sync = asked

    handles = [
        wrapper.register_forward_pre_hook(before),
        wrapper.register_forward_hook(after, prepend=True, always_call=True),
    ]


def _restart(state: Any) -> None:
    if hasattr(state, "start_powerSGD_iter"):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        state.start_powerSGD_iter = max(state.start_powerSGD_iter, state.iter + 2)
