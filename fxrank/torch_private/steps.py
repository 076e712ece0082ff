"""What torch puts around `optimizer.step()`.

Its hooks do not say which of nested calls they belong to, and cannot be ordered. Tried on torch 2.8.0 and 2.14.1.
"""

import sys
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_HOOKED = Optimizer.profile_hook_step(lambda: None).__code__
"""What torch puts around the `step` of every class that was ever built; it calls the hooks."""
_MAKES_STATE = "_init_optim_state"
"""The function of `torch.distributed.checkpoint.state_dict` that steps to make the optimizer's state."""


def steps_running(optimizer: Optimizer) -> int | None:
    """How many of the calls that are running are hooked steps of this optimizer, 0 where torch.compile has made other frames
    of them; None inside a step that only makes its state. Frames tell it without a count, which a step that raises would
    leave wrong.
    """
    found, frame = 0, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == _MAKES_STATE:
            return None
        found += frame.f_code is _HOOKED and frame.f_locals.get("self") is optimizer
    return found


def takes_hooks(optimizer: Optimizer) -> bool:
    """Whether it has called `Optimizer.__init__`, which makes what hooks are registered in."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")


def call_first(optimizer: Optimizer, handle: RemovableHandle) -> None:
    """Let the step post-hook of this handle be called before all others, also those registered earlier."""
    hooks: Any = optimizer._optimizer_step_post_hooks
    hooks.move_to_end(handle.id, last=False)
