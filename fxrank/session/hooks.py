"""The session's hooks on its optimizers. An ordinary loop calls nothing else."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fxrank.switch.later_steps import FactorRegime
from fxrank.switch.step_hooks import is_outermost
from fxrank.torch_private.steps import call_first


class StepHooks:
    """What comes before and after every `optimizer.step()` of one session.

    `regimes`, empty before the switch, are what the factors need in each step of their optimizer. `trained`, empty after it, are
    the parameters of each optimizer that required gradients when it stepped last: outside of its step a loop may have turned
    them off for a moment.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        """In the order in which they step: a step of the training is over with the last one's."""
        self.regimes: dict[Optimizer, FactorRegime] = {}
        self.trained: dict[Optimizer, list[nn.Parameter]] = {}
        self._optimizers = tuple(optimizers)
        self._before: list[RemovableHandle] = []
        self._after: dict[Optimizer, RemovableHandle] = {}

    def put_on(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call `before` ahead of each optimizer's step, and `after` when the last optimizer has stepped."""

        def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            before()
            if not self.regimes and is_outermost(optimizer):
                held = (p for group in optimizer.param_groups for p in group["params"])
                self.trained[optimizer] = [p for p in held if p.requires_grad]
            return self._begin(optimizer, args, kwargs)

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            if is_outermost(optimizer):
                if (regime := self.regimes.get(optimizer)) is not None:
                    regime.after_step()
                if optimizer is self._optimizers[-1]:
                    after()

        # A user's compiled step calls them as they are: to compile what they do would take minutes, and again at each change.
        first, last = map(torch.compiler.disable, (before_step, after_step))
        self._before = [o.register_step_pre_hook(first) for o in self._optimizers]
        self._after = {o: o.register_step_post_hook(last) for o in self._optimizers}

    def take_off(self) -> None:
        """Remove the hooks; what a step that raised has left of its regime is put right."""
        for handle in (*self._before, *self._after.values()):
            handle.remove()
        self._before, self._after, self.trained = [], {}, {}
        for regime in self.regimes.values():
            regime.after_step()

    def _begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of the step if they change: a closure makes its gradients inside."""
        regime = self.regimes.get(optimizer)
        if regime is None or not is_outermost(optimizer):
            return None
        # The first of all: a user's hook, one that steps a scheduler say, finds the learning rate as scheduled.
        call_first(optimizer, self._after[optimizer])
        if len(args) > 1 and callable(args[1]):
            return (args[0], regime.before_step(args[1]), *args[2:]), kwargs
        if callable(kwargs.get("closure")):
            return args, kwargs | {"closure": regime.before_step(kwargs["closure"])}
        regime.before_step()
        return None
