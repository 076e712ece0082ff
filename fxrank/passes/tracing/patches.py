"""What of Python and torch is replaced while a trace is on.

It knows torch's inside; tried on torch 2.8.0 and 2.14.1.
"""

import builtins
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, is_grad_enabled, overrides
from torch.autograd import Function, grad_mode
from torch.fx import _symbolic_trace
from torch.nn.modules import transformer
from torch.utils import checkpoint

from fxrank.passes.tracing.gradients import applied_as_node
from fxrank.passes.tracing.one_thread import Patches, tracing_here, turn, with_globals
from fxrank.passes.tracing.proxies import ValueProxy
from fxrank.torch_private import pytree

_FACTORIES = (
    "arange",
    "empty",
    "eye",
    "finfo",
    "full",
    "iinfo",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
)
"""Functions that take sizes or a dtype and no tensor, so that torch does not ask a proxy among their arguments."""


@contextmanager
def python_asks_the_values(tracer: Any) -> Iterator[Patches]:
    """While tracing, `isinstance(proxy, …)` is answered for the proxy's value, a factory function with a proxy among its
    sizes and an `autograd.Function` with one among its arguments become nodes, torch's Transformer does not look into its mask,
    checkpointed functions are just called, and torch keeps silent about errors that the tracer handles. Other threads see nothing of it.

    A proxy that lies about its `__class__` instead would crash: torch's C++ code believes it.
    """

    def heard(record: object) -> bool:
        return not tracing_here()

    log = logging.getLogger("torch._subclasses.fake_tensor")
    with turn(), Patches() as patches:
        for fill in _CACHED_FOR_GOOD:
            fill()
        tracer.isinstance = (builtins.isinstance, _of_value(builtins.isinstance))
        # No other thread has a proxy, and it is called far too often to ask for the thread.
        patches.replace(vars(builtins), "isinstance", tracer.isinstance[1])
        for name in _FACTORIES:
            patches.patch(vars(torch), name, _node_of(getattr(torch, name), tracer))
        patches.patch(vars(transformer), "_detect_is_causal_mask", _hint(transformer._detect_is_causal_mask))
        patches.replace(Function, "apply", applied_as_node(tracer))
        patches.patch(vars(torch), "is_grad_enabled", _noted(tracer))
        patches.replace(vars(checkpoint), "CheckpointFunction", _PlainCall)
        for name in _CHECKPOINT_GENERATORS:
            if hasattr(checkpoint, name):
                patches.patch(vars(checkpoint), name, _plain_generator)
        if hasattr(_symbolic_trace, "_is_fx_tracing_flag"):
            patches.replace(vars(_symbolic_trace), "_is_fx_tracing_flag", _Flag())
        log.addFilter(heard)
        try:
            yield patches
        finally:
            log.removeFilter(heard)


def graph_by_fx(tracer: fx.Tracer, root: Any, concrete_args: Any, patches: Patches) -> fx.Graph:
    """What `fx.Tracer.trace` does, but its patches are of this thread only, and functions that a library has made opaque with
    `fx.wrap` are gone through: weights may be used in them.
    """
    wrapped = with_globals(_symbolic_trace._patch_wrapped_functions, _wrapped_fns_to_patch={})
    plain = inspect.unwrap(fx.Tracer.trace)  # where the compiler is in use, it keeps itself out of that function
    trace = with_globals(
        plain,
        _new_patcher=lambda: nullcontext(patches),
        _patch_wrapped_functions=wrapped,
        _autowrap_check=_autowrap_check,
    )
    if plain is not fx.Tracer.trace:
        trace = torch.compiler.disable(trace)
    graph: fx.Graph = trace(tracer, root, concrete_args)
    return graph


def _autowrap_check(patches: Patches, namespace: dict[str, Any], functions: set[int]) -> None:
    """What fx does in the function of this name, on a copy of the names: another thread may import while they are walked."""
    if patches.visit_once(namespace):
        for name, value in list(namespace.items()):
            if id(value) in functions and not name.startswith("_"):
                patches.patch(namespace, name, _symbolic_trace._create_wrapped_func(value))


def _of_value(is_instance: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    def of_value(thing: Any, kinds: Any) -> bool:
        if is_instance(thing, kinds):
            return True
        return type(thing) is ValueProxy and "val" in thing.node.meta and is_instance(thing._value, kinds)

    return of_value


def _node_of(factory: Callable[..., Any], tracer: Any) -> Callable[..., Any]:
    def node_of(*args: Any, **kwargs: Any) -> Any:
        if any(issubclass(type(leaf), fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", factory, args, kwargs)
        return factory(*args, **kwargs)

    return node_of


def _hint(detect: Callable[..., bool]) -> Callable[..., bool]:
    def hint(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        # The answer lets attention skip the mask for a faster kernel; without it the mask does the same.
        return bool(is_causal) if issubclass(type(mask), fx.Proxy) else detect(mask, is_causal, size)

    return hint


def _noted(tracer: Any) -> Callable[[], bool]:
    """`torch.is_grad_enabled` that tells the tracer who asks, but for torch's own `no_grad` and the like."""

    def noted() -> bool:
        asking = inspect.currentframe()
        for _ in range(2):  # past the stand-in; and a frame that held itself would hold the trace
            asking = None if asking is None else asking.f_back
        if asking is None or asking.f_globals is not vars(grad_mode):
            tracer.asked_gradients = True
        return is_grad_enabled()

    return noted


_CACHED_FOR_GOOD = (
    overrides.get_ignored_functions,
    overrides.get_testing_overrides,
    overrides.get_overridable_functions,
)
"""Torch makes these lists of its functions once. Made in the middle of a trace, they would hold what stands in their place,
and with it the tracer and every dense weight, to the end of the process.
"""


_CHECKPOINT_GENERATORS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)


_CheckpointFunction: Any = checkpoint.CheckpointFunction  # the name is patched


class _PlainCall(checkpoint.CheckpointFunction):
    """Activation checkpointing while tracing: the function is just called, so that its layers are in the graph. This kind has
    gradients only if one of its arguments requires one.
    """

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        if tracing_here():
            needed = any(isinstance(a, Tensor) and a.requires_grad for a in args)
            with torch.set_grad_enabled(needed and is_grad_enabled()):
                return function(*args)
        return _CheckpointFunction.apply(function, preserve_rng_state, *args)


@contextmanager
def checkpoints_just_called() -> Iterator[None]:
    """Meanwhile checkpointed functions of the reentrant kind, behind which no gradient can be followed, are just called."""
    with Patches() as patches:
        patches.replace(vars(checkpoint), "CheckpointFunction", _PlainCall)
        yield


def _plain_generator(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _Flag:
    """In torch 2.8, whether the process traces: this thread does, others do not."""

    def __bool__(self) -> bool:
        return tracing_here()
