"""Whether what a session was told is so: that its optimizers are those that step the model, and how long the training is.

It is said as soon as it is known: by the steps of other optimizers, by steps beyond the last one, and at the end of the process.
"""

import atexit
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakMethod, WeakSet, finalize

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxrank.policies.base import Policy
from fxrank.policies.scene import Clock
from fxrank.wrappers import unwrapped


class Told(Protocol):
    """What a session was told; the session imports this file."""

    clock: Clock
    policy: Policy
    plan: Any
    notes: list[str]
    team: Any


class StepsElsewhere:
    """Notices an optimizer that steps parameters of the session's own ones, while these do not step: one that the user has built
    anew, say.
    """

    def __init__(self, optimizers: Sequence[Optimizer], say: Callable[[str], None]) -> None:
        """`say`, a bound method, is called once at most."""
        self._optimizers, self._say = tuple(optimizers), WeakMethod(say)
        self._steps = 0

    def watch(self) -> Callable[[], None]:
        """Look at all steps from here on. Returns what ends it; it ends with this object as well."""
        see = WeakMethod(self._see)

        def after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling():  # nothing of it is to be in a user's compiled step
                return
            if (method := see()) is not None:
                method(optimizer)

        handle = register_optimizer_step_post_hook(after_any_step)
        ending = finalize(self, handle.remove)
        ending.atexit = False
        return ending

    def _see(self, optimizer: Optimizer) -> None:
        inside = unwrapped(optimizer)
        if any(own in (optimizer, inside) for own in self._optimizers):
            self._steps = 0
            return
        if self._steps > 1 or not self._shares(optimizer):
            return
        self._steps += 1
        if self._steps == 2 and (say := self._say()) is not None:  # one between two of its own may belong to a wrapper
            own, other = type(self._optimizers[-1]).__name__, type(optimizer).__name__
            say(
                f"the optimizer of a session must be the one that steps the model; the {own} that it was given does not step any more, and another one, {other}, "
                "with parameters of it does, which is not counted and will not get factors. Attach to the optimizer that you step."
            )

    def _shares(self, optimizer: Optimizer) -> bool:
        own = {id(p) for o in self._optimizers for group in o.param_groups for p in group["params"]}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


def check_length(clock: Clock) -> str | None:
    """What is to be said if the training goes on beyond its end, by a tenth."""
    if clock.step == clock.total_steps + max(1, clock.total_steps // 10) + 1:
        return (
            f"total_steps must be the number of optimizer steps of the whole training, by which the switch and the learning rates after it are timed; this "
            f"one goes on after {clock.step - 1}, and was to have {clock.total_steps}. Count the steps of all epochs."
        )
    return None


_UNFINISHED: "WeakSet[Told]" = WeakSet()
"""Sessions that have begun, and neither finished nor been detached."""


def expect_end(session: Told) -> None:
    """Say at the end of the process if the training has ended long before it was to."""
    _UNFINISHED.add(session)


def has_ended(session: Told) -> None:
    """The session has an end of its own."""
    _UNFINISHED.discard(session)


@atexit.register
def _say_unfinished() -> None:
    for session in list(_UNFINISHED):
        clock = session.clock
        if (
            session.plan is None
            and session.policy.may_switch
            and 0 < clock.step < 0.9 * clock.total_steps
            and session.team.is_first
        ):
            warnings.warn(
                f"a session that has not switched must be told the length of the training; this one ended after {clock.step} steps, and was to have "
                f"{clock.total_steps}. The model is full-rank. Count the optimizer steps of all epochs, and call session.finish() at the end.",
                stacklevel=1,
            )
