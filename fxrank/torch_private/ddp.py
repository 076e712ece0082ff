"""What a `DistributedDataParallel` keeps inside: the parameters that it averages, its reducer, buckets and communication hooks.

Torch has no public call that lets a wrapper take other parameters. Tried on torch 2.8.0 and 2.14.1.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def wrappers() -> Iterator[DistributedDataParallel]:
    """Every wrapper of this process, also one that is being built: a module does not know what is around it."""
    return (thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel))


def inside(wrapper: DistributedDataParallel) -> nn.Module | None:
    """What is wrapped; None in a wrapper that is not built yet."""
    module: nn.Module | None = wrapper.__dict__.get("_modules", {}).get("module")
    return module


def averaged(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters whose gradients the wrapper averages; none in one that is not built yet."""
    return list(wrapper.__dict__.get("_module_parameters", ()))


def delays_all_reduce(wrapper: DistributedDataParallel) -> bool:
    """Whether it was given `delay_all_reduce_named_params`."""
    return bool(wrapper._delay_all_reduce_params)


def reduces_in_python(wrapper: DistributedDataParallel) -> bool:
    """Whether `torch._dynamo.config.optimize_ddp` is `python_reducer`, which hooks each parameter."""
    return getattr(wrapper, "_use_python_reducer", False)


def is_joined(wrapper: DistributedDataParallel) -> bool:
    """Whether this is inside of `with wrapper.join()`. The mark stays on the wrapper after the block; what made it does not."""
    from torch.distributed.algorithms.join import Join

    return wrapper._join_config.enable and any(
        type(thing) is Join and thing._enable and wrapper in thing._joinables for thing in gc.get_objects()
    )


def reduce_anew(wrapper: DistributedDataParallel) -> None:
    """Make the reducer again, for the parameters that the module has now, with the wrapper's own options."""
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


def comm_hooks(wrapper: DistributedDataParallel) -> list[tuple[Any, Any]]:
    """The communication hooks that were registered, each with its state: torch gives them out nowhere."""
    return list(wrapper._comm_hooks)


def forget_comm_hooks(wrapper: DistributedDataParallel) -> None:
    """Let others be registered: a reducer made again has none, and the wrapper's list would refuse one."""
    wrapper._comm_hooks = []


def reduced(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters in the order in which the reducer numbers them."""
    return list(wrapper._build_params_for_reducer()[0])


def buckets(wrapper: DistributedDataParallel) -> list[list[Tensor]] | None:
    """The parameters whose gradients are sent together, in order; None for sparse gradients, of which torch does not tell.

    The next forward would lay them anew, in the order in which the gradients came. All processes do it here, and there
    nothing is left to do.
    """
    if any(wrapper._build_params_for_reducer()[1]):
        return None
    if wrapper.reducer._rebuild_buckets():
        wrapper._has_rebuilt_buckets = True
    return [bucket.parameters() for bucket in wrapper.reducer._get_zeros_like_grad_buckets()]


@contextmanager
def laying(wrapper: DistributedDataParallel, indices: list[list[int]]) -> Iterator[None]:
    """Meanwhile a reducer that is made lays these buckets, of parameters by number, the last sent first: torch sizes them by
    one function, and takes no other lay-out.
    """
    engine: Any = dist
    divide = engine._compute_bucket_assignment_by_size
    engine._compute_bucket_assignment_by_size = lambda *_: (indices, [wrapper.bucket_bytes_cap] * len(indices))
    try:
        yield
    finally:
        engine._compute_bucket_assignment_by_size = divide
