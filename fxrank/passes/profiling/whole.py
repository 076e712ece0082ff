"""How long whole models take, one against the other: what a budget of time is measured by.

The models are copies that nothing else uses: their modes, gradients and statistics are changed here.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fxrank.passes.model.calls import Example, call_arguments
from fxrank.passes.model.restored import randoms_put_back
from fxrank.passes.profiling import clock
from fxrank.passes.profiling.clock import Stopwatch, Times
from fxrank.passes.profiling.timing import autocast
from fxrank.torch_private import pytree

ROUNDS, LEAST, BUDGET_MS = 201, 7, 3000.0
"""Rounds of a comparison, of which each times every model once; how many are made in any case; and milliseconds for the others."""


def compare(
    models: Sequence[nn.Module],
    example: Example,
    watch: Stopwatch,
    *,
    backward: bool,
    least: int = LEAST,
    budget_ms: float = BUDGET_MS,
    amp: torch.dtype | None = None,
) -> Times:
    """How long a call of each model takes: forward and backward in training mode, or the forward alone in evaluation mode; under autocast
    to `amp`, if that is given; at least so many rounds, and more within `budget_ms`. Random numbers are put back.

    Raises `ValueError` where a backward is asked for and no output has gradients.
    """
    drawn = torch.random.fork_rng()
    with drawn, randoms_put_back(nn.ModuleList(models)), torch.inference_mode(False), torch.enable_grad():
        steps = [_step(model, example, backward, amp) for model in models]
        return clock.compare(steps, watch, ROUNDS, budget_ms, least)


def _step(model: nn.Module, example: Example, backward: bool, amp: torch.dtype | None) -> Callable[[], None]:
    model.train(backward)
    inputs = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x), example)
    args, kwargs = call_arguments(model, inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if not backward:

        def forward() -> None:
            with torch.no_grad(), autocast(device, amp):
                model(*args, **kwargs)

        return forward

    def trained() -> list[Tensor]:
        with autocast(device, amp):
            outputs = model(*args, **kwargs)
        return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]

    gradients: list[Tensor] = []

    def step() -> None:
        model.zero_grad(set_to_none=True)
        outputs = trained()
        if not gradients:  # in the first round, which is not counted
            gradients.extend(torch.randn_like(out) for out in outputs)
        if not outputs:
            raise ValueError(
                f"a training step needs outputs with gradients to be timed; those of {type(model).__name__} have none. Unfreeze what is trained, or "
                "give target_latency."
            )
        torch.autograd.backward(outputs, gradients)

    return step
