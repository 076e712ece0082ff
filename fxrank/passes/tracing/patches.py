"""What of Python and torch is replaced while a trace is on."""

import builtins
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, overrides
from torch.fx import _symbolic_trace
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from fxrank.passes.tracing.proxies import ValueProxy

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
def python_asks_the_values(tracer: Any) -> Iterator[None]:
    """While tracing, `isinstance(proxy, …)` is answered for the proxy's value, a factory function with a proxy among its
    sizes becomes a node, torch's Transformer does not look into its mask, checkpointed functions are just called, and
    functions that a library has made opaque with `fx.wrap` are gone through: weights may be used in them.

    A proxy that lies about its `__class__` instead would crash: torch's C++ code believes it.
    """
    is_instance = builtins.isinstance

    def of_value(thing: Any, kinds: Any) -> bool:
        if is_instance(thing, kinds):
            return True
        return type(thing) is ValueProxy and "val" in thing.node.meta and is_instance(thing._value, kinds)

    def node_of(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if any(issubclass(type(leaf), fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", factory, args, kwargs)
            return factory(*args, **kwargs)

        return wrapper

    detect = transformer._detect_is_causal_mask

    def hint(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        # The answer lets attention skip the mask for a faster kernel; without it the mask does the same.
        return bool(is_causal) if issubclass(type(mask), fx.Proxy) else detect(mask, is_causal, size)

    for fill in _CACHED_FOR_GOOD:
        fill()
    replaced: list[tuple[Any, str, Any]] = [(torch, name, node_of(getattr(torch, name))) for name in _FACTORIES]
    tracer.isinstance = (is_instance, of_value)
    replaced += [(builtins, "isinstance", of_value), (transformer, "_detect_is_causal_mask", hint)]
    replaced += [(checkpoint, "CheckpointFunction", _PlainCall)]
    replaced += [(checkpoint, name, _plain_generator) for name in _CHECKPOINT_GENERATORS if hasattr(checkpoint, name)]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    log, was_disabled = logging.getLogger("torch._subclasses.fake_tensor"), False
    opaque = dict(_symbolic_trace._wrapped_fns_to_patch)
    try:
        was_disabled, log.disabled = log.disabled, True  # it logs errors that the tracer handles
        _symbolic_trace._wrapped_fns_to_patch.clear()
        for owner, name, function in replaced:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
        _symbolic_trace._wrapped_fns_to_patch.update(opaque)
        log.disabled = was_disabled


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


class _PlainCall:
    """Activation checkpointing while tracing: the function is just called, so that its layers are in the graph."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _plain_generator(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield
