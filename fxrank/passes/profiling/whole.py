"""How long whole models take, one against the other: what a budget of time is measured by.

The models are copies that nothing else uses: their modes, gradients and statistics are changed here.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fxrank.passes.model.calls import Example, call_arguments
from fxrank.passes.model.restored import randoms_put_back
from fxrank.passes.profiling.timing import Stopwatch, interleaved
from fxrank.torch_private import pytree

ROUNDS, LEAST, BUDGET_MS = 201, 7, 3000.0
"""Rounds of a comparison, of which each times every model once; how many are made in any case; and milliseconds for the others."""


class Share(NamedTuple):
    """Of the milliseconds of one model, what another takes: the median over rounds, and half the distance between their quartiles."""

    median: float
    spread: float


def compare(models: Sequence[nn.Module], example: Example, watch: Stopwatch, *, backward: bool) -> list[list[float]]:
    """The milliseconds of one call of each model in each round: forward and backward in training mode, or the forward alone in evaluation
    mode. Random numbers are put back.

    Raises `ValueError` where a backward is asked for and no output has gradients.
    """
    drawn = torch.random.fork_rng()
    with drawn, randoms_put_back(nn.ModuleList(models)), torch.inference_mode(False), torch.enable_grad():
        steps = [_step(model, example, backward) for model in models]
        return interleaved(steps, watch, ROUNDS, BUDGET_MS, LEAST)


def share_of(dense_ms: Sequence[float], small_ms: Sequence[float]) -> Share:
    """What the second takes of the first, round by round, as a clock that drifts hits both alike."""
    shares = [small / dense for dense, small in zip(dense_ms, small_ms, strict=True)]
    low, _, high = statistics.quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else shares * 3
    return Share(statistics.median(shares), (high - low) / 2)


def _step(model: nn.Module, example: Example, backward: bool) -> Callable[[], None]:
    model.train(backward)
    inputs = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x), example)
    args, kwargs = call_arguments(model, inputs)
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                model(*args, **kwargs)

        return forward

    def trained() -> list[Tensor]:
        return [x for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor) and x.requires_grad]

    gradients: list[Any] = [torch.randn_like(out) for out in trained()]
    if not gradients:
        raise ValueError(
            f"a training step needs outputs with gradients to be timed; those of {type(model).__name__} have none. Unfreeze what is trained, or "
            "give target_latency."
        )

    def step() -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(trained(), gradients)

    return step
