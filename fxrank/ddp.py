"""A `DistributedDataParallel` whose parameters are replaced.

The wrapper stays the user's object: its reducer, which knows parameters that are gone, is made anew with the wrapper's own
options, and its communication hooks move over. Torch has no public call for that, so this file uses what its wrapper keeps inside.
"""

import gc
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def wrapper_around(model: nn.Module) -> DistributedDataParallel | None:
    """The wrapper of a model, or of a whole that it is a part of, where it was given without, as frameworks do; None if it
    has none (yet).
    """
    for thing in gc.get_objects():
        if issubclass(type(thing), DistributedDataParallel):
            inside = thing.__dict__.get("_modules", {}).get("module")
            if inside is not None and any(module is model for module in inside.modules()):
                return thing  # type: ignore[no-any-return]
    return None


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raise `TypeError` for options that outlive the wrapper's parameters."""
    for option, value, way_out in (
        ("delay_all_reduce_named_params", wrapper._delay_all_reduce_params, "Leave it out"),
        ("mixed_precision", wrapper.mixed_precision, "Use torch.autocast"),
        ("optimize_ddp='python_reducer'", getattr(wrapper, "_use_python_reducer", False), "Use the default reducer"),
    ):
        if value:
            raise TypeError(
                f"DistributedDataParallel must be able to take new parameters; with {option} it keeps hooks on the old ones. {way_out}."
            )


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
    hooks, wrapper._comm_hooks = wrapper._comm_hooks, []
    for hook, state in hooks if keep_hooks else ():
        _restart(state)
        wrapper.register_comm_hook(state, hook)


def _restart(state: Any) -> None:
    if hasattr(state, "start_powerSGD_iter"):
        for memory in (state.error_dict, state.p_memory_dict, state.q_memory_dict):
            memory.clear()
        state.start_powerSGD_iter = max(state.start_powerSGD_iter, state.iter + 2)
