"""Inside one `optimizer.step()`: which of several calls of the step hooks is the outermost, and the learning rates that are
scaled while it lasts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxrank.torch_private.steps import steps_running


def is_outermost(optimizer: Optimizer) -> bool:
    """Whether a hook that is being called belongs to the step that the user called, and not to one inside it, nor to one
    that only makes the optimizer's state.

    A class whose `step` calls `super().step()` has its hooks called for both, if an optimizer of the parent class was built
    somewhere. `torch.distributed.checkpoint` steps an optimizer without state, with zeros for gradients and learning rates,
    when its state is asked for or loaded.
    """
    running = steps_running(optimizer)
    return running is not None and running <= 1


class _Scaled(NamedTuple):
    scheduled: list[tuple[dict[str, Any], Any]]
    """Groups and their own learning rates. The groups themselves: a loaded state brings others, with theirs."""
    holders: set[int]
    handle: RemovableHandle


_SCALED: WeakKeyDictionary[Optimizer, _Scaled] = WeakKeyDictionary()
"""One place for all sessions on an optimizer: the last to leave restores what the first has found."""


def scale_lr(optimizer: Optimizer, holder: object, factor: Callable[[], float]) -> None:
    """Multiply the learning rates until this holder and all others have called `unscale_lr`; once for each holder. A state
    dict taken meanwhile, after a step that raised, has the scheduled ones.
    """
    scaled = _SCALED.get(optimizer)
    times = 1.0 if scaled is not None and id(holder) in scaled.holders else factor()
    if times == 1.0:
        return
    if scaled is None:
        groups = [group for group in optimizer.param_groups if isinstance(group.get("lr"), (int, float, Tensor))]
        handle = optimizer.register_state_dict_pre_hook(restore_lr)
        scaled = _SCALED[optimizer] = _Scaled([(group, group["lr"]) for group in groups], set(), handle)
    scaled.holders.add(id(holder))
    for group, _ in scaled.scheduled:
        group["lr"] = group["lr"] * times


def unscale_lr(optimizer: Optimizer, holder: object) -> None:
    """Take a holder's scaling away. The scheduled learning rates are back with the last one."""
    scaled = _SCALED.get(optimizer)
    if scaled is not None:
        scaled.holders.discard(id(holder))
        if not scaled.holders:
            restore_lr(optimizer)


def restore_after_failure(optimizer: Optimizer, holder: object) -> None:
    """At the beginning of a step: whoever still holds a scaling is left from one that raised, and so are all others."""
    scaled = _SCALED.get(optimizer)
    if scaled is not None and id(holder) in scaled.holders:
        restore_lr(optimizer)


def restore_lr(optimizer: Optimizer) -> None:
    """The scheduled learning rates, whoever has scaled them."""
    scaled = _SCALED.pop(optimizer, None)
    if scaled is not None:
        scaled.handle.remove()
        for group, lr in scaled.scheduled:
            group["lr"] = lr
