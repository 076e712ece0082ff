"""What frameworks wrap around a model's forward and around an optimizer, and what is inside."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside wrappers that hand `step` on to it and show its `param_groups` as theirs (Accelerate's,
    Lightning's): the one whose step hooks are called.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer) and inner is not optimizer and inner.param_groups is optimizer.param_groups:
        return unwrapped(inner)
    return optimizer


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
