"""R under a budget: forms and ranks of all layers together, so that least is lost for what may be spent.

Each layer has options: dense, with nothing lost, or a pair in some form and of some rank, at what it costs and with the share of the
layer's energy that it leaves out. Choosing one for each within a sum of costs is a multiple-choice knapsack, an integer program that
scipy solves by branch and bound.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import BudgetError
from fxrank.plan import Budget

RANKS = 96
"""Of so many options of one layer in one form, evenly spaced, the best is looked for first, and then among all between their neighbours:
the time for the solver grows with them.
"""
GAP, SECONDS = 1e-3, 20.0
"""How far, relative, the sum of losses may be from the least, and when the solver must answer with the best that it has."""
NEAR = 0.01
"""No more than this share of a budget of parameters or multiply-adds is left, or the plan's note says why."""


class Option(NamedTuple):
    """What a layer may become: a pair of `rank` in the form of `layer`, dense if there is none; `loss` is in [0, 1], times the layer's
    weight.
    """

    cost: float
    loss: float
    layer: Layer
    rank: int | None


Forms = Sequence[tuple[Layer, Tensor]]
"""A layer in each form that it may take, with its `sigma` there, `(groups, full_rank)` descending: singular values, or the root mean
squares of its output along its principal directions, which stand for them in calibration.
"""


class Costs(NamedTuple):
    """What a layer costs in one form: dense, and as a pair, by rank. A rank that is not there is no option."""

    dense: float
    pairs: Mapping[int, float]


CostsOf = Callable[[Layer], Costs]
Extra = Callable[[Layer, int], int]
"""Parameters that come with a pair of a rank beside its factors: of a normalization, of a bias."""


def counted(of: str, extra: Extra = lambda layer, rank: 0, most: int | None = None) -> CostsOf:
    """What a layer costs in `"params"` or in `"macs"`, at every rank up to the most that is asked for."""

    def costs(layer: Layer) -> Costs:
        ranks = range(1, (most or layer.full_rank) + 1)
        if of == "macs":
            return Costs(layer.macs, {r: layer.pair_macs(r) for r in ranks})
        return Costs(layer.parameters, {r: layer.pair_parameters(r) + extra(layer, r) for r in ranks})

    return costs


def norm_parameters(extra_bn: bool) -> Extra:
    """What the BatchNorm between two factors has, if there is to be one."""
    return lambda layer, rank: 2 * layer.groups * rank if extra_bn and layer.takes_norm else 0


def asked_budget(rank: object = None, keep: float | None = None, **targets: float | None) -> Budget | None:
    """What a user asks for in arguments `target_…`, of which one at most is not None, and none beside a rank or a share to `keep`. Raises
    `ValueError`, or `TypeError` for what is no number.
    """
    asked = {of: target for of, target in targets.items() if target is not None}
    given = [f"target_{of}={target}" for of, target in asked.items()]
    given += ([] if keep is None else [f"keep={keep}"]) + ([] if rank is None else ["rank="])
    if len(given) > 1:
        raise ValueError(
            f"ranks are given, or chosen for one target, or to keep a share; got {' and '.join(given)}. Leave all but one out."
        )
    for of, target in asked.items():
        if isinstance(target, bool) or not isinstance(target, Real):
            raise TypeError(f"target_{of} is a number in (0, 1]; got {type(target).__name__}.")
        return Budget(of, float(target), 0.0)
    return None


def ranks_within(
    budget: Budget,
    layers: Sequence[Layer],
    model: nn.Module,
    forms: Mapping[str, Forms],
    *,
    extra: Extra = lambda layer, rank: 0,
    weights: Mapping[str, float] | None = None,
) -> tuple[dict[str, Option], Budget]:
    """The option of each layer in `forms` with which the model keeps to the budget's target, of parameters or multiply-adds, and the
    budget with the share that they reach. All that no rank changes, other layers, biases and normalizations, counts as it is. `weights`
    multiply the loss of a layer by name, 1 where there is none.

    Raises `BudgetError` with the least share that can be reached.
    """
    fixed, total = check_reach(budget, layers, model, {n: [a for a, _ in f] for n, f in forms.items()}, extra)
    ladders = ladders_of(forms, counted(budget.of, extra), weights)
    chosen = allocate(ladders, budget.target * total - fixed, NEAR * budget.target * total)
    spent = fixed + _sum(chosen)
    return chosen, replace(budget, reached=spent / total)


def check_reach(
    budget: Budget,
    layers: Sequence[Layer],
    model: nn.Module,
    forms: Mapping[str, Sequence[Layer]],
    extra: Extra = lambda layer, rank: 0,
) -> tuple[int, int]:
    """What the model costs without the layers in `forms`, and with them, dense. Raises `BudgetError` as `ranks_within`."""
    total = sum(p.numel() for p in model.parameters()) if budget.of == "params" else sum(a.macs for a in layers)
    costs = [[counted(budget.of, extra, most=1)(layer) for layer in of_layer] for of_layer in forms.values()]
    fixed = total - sum(of_layer[0].dense for of_layer in costs)
    least = fixed + sum(min(c for one in of_layer for c in (one.dense, *one.pairs.values())) for of_layer in costs)
    if least > budget.target * total:
        raise BudgetError(
            f"target_{budget.of} must be at least {least / total:.4f} here, where each of {len(forms)} layers has rank 1; got {budget.target:g}. "
            "Raise it, or let more layers be factorized: include='*' takes in the first, the last and the tables too."
        )
    return int(fixed), total


def why_unspent(budget: Budget) -> str:
    """What a plan should say of a budget of which more than `NEAR` is left; nothing if it is spent."""
    if budget.reached >= (1 - NEAR) * budget.target:
        return ""
    return f"target_{budget.of}={budget.target:g} is kept to with {budget.reached:.4f}: no ranks that are worth their cost come nearer"


def ladders_of(
    forms: Mapping[str, Forms], costs: CostsOf, weights: Mapping[str, float] | None = None
) -> dict[str, "Ladder"]:
    """One for each layer, by name."""
    return {name: Ladder(of_layer, costs, (weights or {}).get(name, 1.0)) for name, of_layer in forms.items()}


@dataclass(frozen=True)
class Ladder:
    """The options of one layer, at what they cost, with the losses times `weight`."""

    forms: Forms
    costs: CostsOf
    weight: float = 1.0

    @cached_property
    def options(self) -> list[Option]:
        """In order of rising cost and falling loss; the last is the dense layer, and no pair costs as much."""
        dense = self.forms[0][0]
        last = Option(self.costs(dense).dense, 0.0, dense, None)
        found = [
            option for layer, sigma in self.forms for option in self._pairs(layer, sigma) if option.cost < last.cost
        ]
        kept: list[Option] = []
        for option in sorted(found, key=lambda o: o[:2]):
            if not kept or option.loss < kept[-1].loss:
                kept.append(option)
        return [*(option for option in kept if option.loss > 0 or option is kept[-1]), last]

    @property
    def some(self) -> list[Option]:
        """Evenly spaced, the cheapest and the dense layer among them."""
        *pairs, dense = self.options
        return [*pairs[:: -(-len(pairs) // (RANKS * len(self.forms))) or 1], dense]

    def near(self, chosen: Option) -> list[Option]:
        """All between the neighbours of one of `some`."""
        costs = [option.cost for option in self.some]
        place = costs.index(chosen.cost)
        low, high = costs[max(0, place - 1)], costs[min(place + 1, len(costs) - 1)]
        return [option for option in self.options if low <= option.cost <= high]

    def _pairs(self, layer: Layer, sigma: Tensor) -> list[Option]:
        energies = sigma.double().square().sum(0).numpy()
        total = float(energies.sum())
        tails = 1 - np.cumsum(energies) / total if total > 0 else np.zeros(len(energies))
        lost = self.weight * np.maximum(0.0, tails)
        return [Option(cost, float(lost[r - 1]), layer, r) for r, cost in self.costs(layer).pairs.items()]


def allocate(ladders: Mapping[str, Ladder], budget: float, left: float = math.inf) -> dict[str, Option]:
    """An option for each layer, with a sum of costs of at most `budget` and the least sum of losses (to `GAP`). The budget pays for the
    cheapest of each. Where more than `left` of it would remain, as one rank is much of a small model, it is the least of those that leave
    no more, if there are any.
    """
    if not ladders:
        return {}
    some = {name: ladder.some for name, ladder in ladders.items()}
    cheapest = {name: of_layer[0] for name, of_layer in some.items()}
    chosen = _solved(some, budget) or cheapest
    if any(len(some[name]) < len(ladder.options) for name, ladder in ladders.items()):
        chosen = _solved({name: ladder.near(chosen[name]) for name, ladder in ladders.items()}, budget) or chosen
    chosen = _with_rest(chosen, ladders, budget)
    if budget - _sum(chosen) > left:
        chosen = _solved({n: ladder.options for n, ladder in ladders.items()}, budget, budget - left) or chosen
    return chosen


def _sum(chosen: Mapping[str, Option]) -> float:
    return sum(option.cost for option in chosen.values())


def _solved(
    choices: Mapping[str, Sequence[Option]], budget: float, at_least: float = -math.inf
) -> dict[str, Option] | None:
    """One of the choices for each layer; None if no way was found in time."""
    options = [(number, option) for number, of_layer in enumerate(choices.values()) for option in of_layer]
    owners = [number for number, _ in options]
    scale = max(abs(budget), 1.0)
    worst = max(option.loss for _, option in options) or 1.0  # the solver also stops at what is small in itself
    one_each = sparse.csr_array((np.ones(len(options)), (owners, range(len(options)))))
    cost = sparse.csr_array(np.array([[option.cost / scale for _, option in options]]))
    for room in (1.0, 1 - 1e-5):  # the solver takes a little more for as much
        found = milp(
            np.array([option.loss / worst for _, option in options]),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(cost, at_least / scale, room * budget / scale),
            ],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
        picked = {} if found.x is None else {options[i][0]: options[i][1] for i in np.flatnonzero(found.x > 0.5)}
        chosen = {name: picked[number] for number, name in enumerate(choices) if number in picked}
        if len(chosen) == len(choices) and _sum(chosen) <= budget:
            return chosen
    return None


def _with_rest(chosen: dict[str, Option], ladders: Mapping[str, Ladder], budget: float) -> dict[str, Option]:
    """With what `GAP` has left of the budget spent: calibration may see no loss where other data would."""
    rest = budget - _sum(chosen)
    costs = {name: np.array([option.cost for option in ladder.options]) for name, ladder in ladders.items()}
    losses = {name: np.array([option.loss for option in ladder.options]) for name, ladder in ladders.items()}
    while True:
        best: tuple[float, str, int] | None = None
        for name, now in chosen.items():
            low, high = np.searchsorted(costs[name], [now.cost, now.cost + rest], side="right")
            if low < high:
                gains = (now.loss - losses[name][low:high]) / (costs[name][low:high] - now.cost)
                step = float(gains.max()), name, int(low + gains.argmax())
                best = step if best is None or step[:2] > best[:2] else best
        if best is None:
            return chosen
        _, name, number = best
        option = ladders[name].options[number]
        rest -= option.cost - chosen[name].cost
        chosen[name] = option
