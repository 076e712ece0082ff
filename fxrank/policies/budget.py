"""R under a budget: forms and ranks of all layers together, so that least is lost for what may be spent.

Each layer has options: dense, with nothing lost, or a pair in some form and of some rank, at what it costs and with the share of the
layer's energy that it leaves out. Choosing one for each within a sum of costs is a multiple-choice knapsack. Its relaxation keeps, of
every layer, the options on the lower convex hull of (cost, loss), and buys the steps between them in order of loss saved per cost;
from the first that cannot be paid in full, what is left goes to single ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import BudgetError
from fxrank.plan import Budget


class Option(NamedTuple):
    """What a layer may become: a pair of `rank` in the form of `layer`, dense if there is none; `loss` is in [0, 1]."""

    cost: float
    loss: float
    layer: Layer
    rank: int | None


Forms = Sequence[tuple[Layer, Tensor]]
"""A layer in each form that it may take, with its `sigma` there, `(groups, full_rank)` descending: singular values, or the root mean
squares of its output along its principal directions, which stand for them in calibration.
"""


def ranks_within(
    budget: Budget, layers: Sequence[Layer], model: nn.Module, forms: Mapping[str, Forms]
) -> tuple[dict[str, Option], Budget]:
    """The option of each layer in `forms` with which the model keeps to the budget's target, and the budget with the share that they
    reach. All that no rank changes, other layers, biases and normalizations, counts as it is.

    Raises `BudgetError` with the least share that can be reached.
    """
    total = sum(p.numel() for p in model.parameters()) if budget.of == "params" else sum(a.macs for a in layers)
    ladders = {name: Ladder(of_layer, budget.of) for name, of_layer in forms.items()}
    fixed = total - sum(ladder.options[-1].cost for ladder in ladders.values())
    least = fixed + sum(ladder.options[0].cost for ladder in ladders.values())
    if least > budget.target * total:
        raise BudgetError(
            f"target_{budget.of} must be at least {least / total:.4f} here, where each of {len(ladders)} layers has rank 1; got {budget.target:g}. "
            "Raise it, or let more layers be factorized: include='*' takes in the first, the last and the tables too."
        )
    chosen = allocate(ladders, budget.target * total - fixed)
    spent = fixed + sum(option.cost for option in chosen.values())
    return chosen, replace(budget, reached=spent / total)


@dataclass(frozen=True)
class Ladder:
    """The options of one layer, whose pairs cost what `of` counts: `"params"` or `"macs"`."""

    forms: Forms
    of: str

    @cached_property
    def options(self) -> list[Option]:
        """In order of rising cost and falling loss; the last is the dense layer, and no pair costs as much."""
        dense = self.forms[0][0]
        last = Option(dense.parameters if self.of == "params" else dense.macs, 0.0, dense, None)
        found = [
            option for layer, sigma in self.forms for option in self._pairs(layer, sigma) if option.cost < last.cost
        ]
        kept: list[Option] = []
        for option in sorted(found, key=lambda o: o[:2]):
            if not kept or option.loss < kept[-1].loss:
                kept.append(option)
        return [*(option for option in kept if option.loss > 0 or option is kept[-1]), last]

    def _pairs(self, layer: Layer, sigma: Tensor) -> list[Option]:
        energies = sigma.double().square().sum(0).numpy()
        total = float(energies.sum())
        tails = 1 - np.cumsum(energies) / total if total > 0 else np.zeros(len(energies))
        cost = layer.pair_parameters if self.of == "params" else layer.pair_macs
        return [Option(cost(r), max(0.0, float(tail)), layer, r) for r, tail in enumerate(tails, 1)]

    @cached_property
    def hull(self) -> list[int]:
        """Indices of the options on the lower convex hull, from the cheapest to the dense one."""
        kept: list[int] = []
        for i in range(len(self.options)):
            while len(kept) > 1 and self.slope(kept[-2], kept[-1]) <= self.slope(kept[-1], i):
                kept.pop()
            kept.append(i)
        return kept

    def slope(self, a: int, b: int) -> float:
        """Loss saved per cost from one option to a dearer one."""
        return (self.options[a].loss - self.options[b].loss) / max(self.options[b].cost - self.options[a].cost, 1e-300)


def allocate(ladders: Mapping[str, Ladder], budget: float) -> dict[str, Option]:
    """An option for each layer, with a sum of costs of at most `budget` and the least sum of losses that the relaxation finds. The
    budget pays for the cheapest of each.
    """
    chosen = {name: ladder.hull[0] for name, ladder in ladders.items()}
    rest = budget - sum(ladder.options[chosen[name]].cost for name, ladder in ladders.items())
    steps = [
        (-ladder.slope(a, b), number, step, name, b)
        for number, (name, ladder) in enumerate(ladders.items())
        for step, (a, b) in enumerate(zip(ladder.hull, ladder.hull[1:], strict=False))
    ]
    for _, _, _, name, target in sorted(steps):
        options = ladders[name].options
        more = options[target].cost - options[chosen[name]].cost
        if more > rest:
            break
        chosen[name], rest = target, rest - more
    _spend(rest, ladders, chosen)
    return {name: ladder.options[chosen[name]] for name, ladder in ladders.items()}


def _spend(rest: float, ladders: Mapping[str, Ladder], chosen: dict[str, int]) -> None:
    """Single ranks for what is left, the ones that save most first."""

    def next_step(name: str) -> tuple[float, str] | None:
        ladder, now = ladders[name], chosen[name]
        return (-ladder.slope(now, now + 1), name) if now + 1 < len(ladder.options) else None

    heap = [step for name in ladders if (step := next_step(name)) is not None]
    heapify(heap)
    while heap:
        _, name = heappop(heap)
        options = ladders[name].options
        more = options[chosen[name] + 1].cost - options[chosen[name]].cost
        if more > rest:
            continue
        chosen[name] += 1
        rest -= more
        if (step := next_step(name)) is not None:
            heappush(heap, step)
