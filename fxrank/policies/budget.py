"""R under a budget: forms and ranks of all layers together, so that least is lost for what may be spent.

Each layer has options: dense, with nothing lost, or a pair in some form and of some rank, at what it costs and with the share of the
layer's energy that it leaves out. Choosing one for each within a sum of costs is a multiple-choice knapsack, an integer program that
scipy solves by branch and bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import BudgetError
from fxrank.plan import Budget

RANKS = 96
"""Of one layer in one form this many ranks are looked at, evenly spaced: the time for the solver grows with them."""
GAP, SECONDS = 1e-3, 20.0
"""How far, relative, the sum of losses may be from the least, and when the solver must answer with the best that it has."""


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
        step = -(-len(tails) // RANKS)
        ranks = sorted({1, *range(step, len(tails) + 1, step)})
        return [Option(cost(r), max(0.0, float(tails[r - 1])), layer, r) for r in ranks]


def allocate(ladders: Mapping[str, Ladder], budget: float) -> dict[str, Option]:
    """An option for each layer, with a sum of costs of at most `budget` and the least sum of losses (to `GAP`). The budget pays for the
    cheapest of each.
    """
    options = [(number, option) for number, ladder in enumerate(ladders.values()) for option in ladder.options]
    if not options:
        return {}
    owners = [number for number, _ in options]
    scale = max(budget, 1.0)
    one_each = sparse.csr_array((np.ones(len(options)), (owners, range(len(options)))))
    cost = sparse.csr_array(np.array([[option.cost / scale for _, option in options]]))
    found = milp(
        np.array([option.loss for _, option in options]),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost, -np.inf, budget / scale)],
        integrality=np.ones(len(options)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )
    picked = [ladder.options[0] for ladder in ladders.values()]  # if not even one way was found in time
    for i in [] if found.x is None else np.flatnonzero(found.x > 0.5):
        picked[options[i][0]] = options[i][1]
    return _with_rest(dict(zip(ladders, picked, strict=True)), ladders, budget)


def _with_rest(chosen: dict[str, Option], ladders: Mapping[str, Ladder], budget: float) -> dict[str, Option]:
    """With what `GAP` has left of the budget spent: calibration may see no loss where other data would."""
    rest = budget - sum(option.cost for option in chosen.values())
    while True:
        steps = [
            ((now.loss - option.loss) / (option.cost - now.cost), name, option)
            for name, now in chosen.items()
            for option in ladders[name].options
            if now.cost < option.cost <= now.cost + rest
        ]
        if not steps:
            return chosen
        _, name, option = max(steps, key=lambda step: step[:2])
        rest -= option.cost - chosen[name].cost
        chosen[name] = option
