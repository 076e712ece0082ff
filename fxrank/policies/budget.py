"""R under a budget: the ranks of all layers together, so that least is lost for what may be spent.

Each layer has options: dense, with nothing lost, or a pair of some rank, at what it costs and with the share of the layer's energy that
it leaves out. Choosing one for each within a sum of costs is a multiple-choice knapsack. Its relaxation keeps, of every layer, the
options on the lower convex hull of (cost, loss), and buys the steps between them in order of loss saved per cost; what the last step
leaves unspent goes to single ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush

import numpy as np
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import BudgetError
from fxrank.plan import Budget


@dataclass(frozen=True)
class Ladder:
    """The options of one layer. `sigma` `(groups, full_rank)` descending: singular values, or what stands for them in calibration;
    `cost` of a pair by its rank, and `dense` that of the layer as it is. `multiple`: ranks are multiples of it, where they can be.
    """

    sigma: Tensor
    cost: Callable[[int], float]
    dense: float
    multiple: int = 1

    @cached_property
    def options(self) -> list[tuple[float, float, int | None]]:
        """`(cost, loss, rank)` in order of cost, loss in [0, 1]; rank None is the dense layer. No pair costs as much as that."""
        energies = self.sigma.double().square().sum(0).numpy()
        total = float(energies.sum())
        tails = 1 - np.cumsum(energies) / total if total > 0 else np.zeros(len(energies))
        ranks = [r for r in range(1, len(energies) + 1) if r % self.multiple == 0 or len(energies) < self.multiple]
        pairs = [(self.cost(r), max(0.0, float(tails[r - 1])), r) for r in ranks]
        return [*((c, loss, r) for c, loss, r in pairs if c < self.dense), (self.dense, 0.0, None)]

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
        (cost_a, loss_a, _), (cost_b, loss_b, _) = self.options[a], self.options[b]
        return (loss_a - loss_b) / max(cost_b - cost_a, 1e-300)


def ranks_within(
    budget: Budget, layers: Sequence[Layer], model: nn.Module, sigmas: Mapping[str, Tensor]
) -> tuple[dict[str, int | None], Budget]:
    """The rank of each layer in `sigmas`, None for dense, so that the model keeps to the budget's target, and the budget with the
    share that they reach. All that no rank changes, other layers, biases and normalizations, counts as it is.

    Raises `BudgetError` with the least share that ranks can reach.
    """
    open_layers = [layer for layer in layers if layer.name in sigmas]
    of_params = budget.of == "params"
    ladders = {
        layer.name: Ladder(
            sigmas[layer.name],
            layer.pair_parameters if of_params else layer.pair_macs,
            layer.parameters if of_params else layer.macs,
        )
        for layer in open_layers
    }
    total = sum(p.numel() for p in model.parameters()) if of_params else sum(layer.macs for layer in layers)
    fixed = total - sum(ladder.dense for ladder in ladders.values())
    least = fixed + sum(ladder.options[0][0] for ladder in ladders.values())
    if least > budget.target * total:
        raise BudgetError(
            f"target_{budget.of} must be at least {least / total:.4f} here, where each of {len(ladders)} layers has rank 1; got {budget.target:g}. "
            "Raise it, or let more layers be factorized: include='*' takes in the first, the last and the tables too."
        )
    ranks = allocate(ladders, budget.target * total - fixed)
    spent = fixed + sum(
        ladder.dense if ranks[name] is None else ladder.cost(ranks[name] or 0) for name, ladder in ladders.items()
    )
    return ranks, replace(budget, reached=spent / total)


def allocate(ladders: Mapping[str, Ladder], budget: float) -> dict[str, int | None]:
    """The rank of each layer, None for dense, with a sum of costs of at most `budget` and the least sum of losses that the relaxation
    finds. The budget pays for the cheapest option of each.
    """
    chosen = {name: ladder.hull[0] for name, ladder in ladders.items()}
    spent = sum(ladder.options[chosen[name]][0] for name, ladder in ladders.items())
    steps = [
        (-ladder.slope(a, b), number, step, name, b)
        for number, (name, ladder) in enumerate(ladders.items())
        for step, (a, b) in enumerate(zip(ladder.hull, ladder.hull[1:], strict=False))
    ]
    stopped: set[str] = set()
    for _, _, _, name, target in sorted(steps):
        more = ladders[name].options[target][0] - ladders[name].options[chosen[name]][0]
        if name in stopped or spent + more > budget:
            stopped.add(name)  # what comes after this step is dearer still
            continue
        chosen[name], spent = target, spent + more
    return _with_rest(ladders, chosen, budget - spent)


def _with_rest(ladders: Mapping[str, Ladder], chosen: dict[str, int], rest: float) -> dict[str, int | None]:
    """Single ranks for what is left, the ones that save most first."""

    def next_step(name: str) -> tuple[float, str] | None:
        ladder, now = ladders[name], chosen[name]
        return (-ladder.slope(now, now + 1), name) if now + 1 < len(ladder.options) else None

    heap = [step for name in ladders if (step := next_step(name)) is not None]
    heapify(heap)
    while heap:
        _, name = heappop(heap)
        options = ladders[name].options
        more = options[chosen[name] + 1][0] - options[chosen[name]][0]
        if more > rest:
            continue
        chosen[name] += 1
        rest -= more
        if (step := next_step(name)) is not None:
            heappush(heap, step)
    return {name: ladder.options[chosen[name]][2] for name, ladder in ladders.items()}
