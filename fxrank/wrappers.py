"""What frameworks wrap around a model's forward and around an optimizer, and what is inside; what a user wraps around a whole
step; and the one wrapping that cannot be looked through, a CUDA graph, which goes on with the memory of the weights that it was
captured with.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from fxrank.torch_private.kernels import inside_backward

_INSIDE = ("optimizer", "base_optimizer", "_base_optimizer", "optim")
"""Where wrappers keep the optimizer inside: Accelerate and Lightning; sharpness-aware ones; timm's Lookahead; torch's
PostLocalSGDOptimizer.
"""

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")

P = ParamSpec("P")
T = TypeVar("T")


def outside_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """The function, as if it were called outside of any autocast: what is computed of weights keeps their precision."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, _AUTOCAST):
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return called


def autocast_as_now() -> Callable[[], AbstractContextManager[None]]:
    """How to be, at any later time, under the autocast that is on now, if one is."""
    on = [(device, torch.get_autocast_dtype(device)) for device in filter(torch.is_autocast_enabled, _AUTOCAST)]

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for device, dtype in on:  # what is cast without gradients must not be met by a call that needs them
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            yield

    return again


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside wrappers that hand `step` on to it and show its parameters as theirs: the one whose step
    hooks are called, and which holds the state.
    """
    for name in _INSIDE:
        inner = getattr(optimizer, name, None)
        if isinstance(inner, Optimizer) and inner is not optimizer and _lists(inner) == _lists(optimizer):
            return unwrapped(inner)
    return optimizer


def _lists(optimizer: Optimizer) -> list[int]:
    """The lists of parameters by identity: they are shared still where one of both has loaded a state, and with it other groups."""
    return [id(group["params"]) for group in optimizer.param_groups]


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model's forward is its own, without the autocast that Accelerate puts around it in mixed precision,
    under which the parts of a model cannot be run apart.
    """
    own, wrapped = getattr(model, "_original_forward", None), model.__dict__.get("forward")
    if own is None or wrapped is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


def check_not_graphed(model: nn.Module) -> None:
    """Raise `TypeError` if a forward in the model is what `torch.cuda.make_graphed_callables` put there."""
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if getattr(forward, "__qualname__", "").startswith("make_graphed_callables."):
            where = f"{name!r}" if name else f"the whole {type(module).__name__}"
            raise TypeError(
                f"a CUDA graph goes on with the weights that it was captured with, so they cannot be replaced; {where} is a graphed callable. "
                "Train eagerly, or with torch.compile(mode='reduce-overhead'), and graph the model after the switch."
            )


def check_not_captured() -> None:
    """Raise `RuntimeError` while a CUDA graph is being captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph of an optimizer step would repeat it without the session, which counts steps and makes the switch; this step is being "
            "captured. Step eagerly, or with torch.compile(mode='reduce-overhead'), and capture after session.finish()."
        )


def check_outside_backward() -> None:
    """Raise `RuntimeError` in the middle of a backward pass."""
    if inside_backward():
        raise RuntimeError(
            "a switch replaces parameters, which must not happen while gradients are on their way to them; this optimizer steps inside backward(), "
            "from a hook. Step after it."
        )
