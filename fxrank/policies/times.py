"""R under a budget of time: layers are timed, ranks chosen by what they cost, and the whole model is timed with them.

Milliseconds of a layer alone are not those that it takes in the model: what they are wrong by is one factor, which the first
measurement of the whole tells. What the rest of the model takes does not change, so that a choice is predicted to take what the dense
model takes, less what its layers save.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.stacks import stacks
from fxrank.passes.errors import BudgetError
from fxrank.passes.model.calls import Example
from fxrank.passes.profiling.clock import Share, Stopwatch, Times
from fxrank.passes.profiling.timing import Profiler
from fxrank.passes.profiling.whole import BUDGET_MS, LEAST, compare
from fxrank.passes.rewriting.install import pairs_in
from fxrank.plan import Budget, Plan
from fxrank.policies.budget import Costs, CostsOf, Forms, Option, allocate, ladders_of
from fxrank.switch.apply_plan import Factors, apply_plan

TIMED = 6
"""So many ranks of a layer in a form are timed; between them lie straight lines."""
MISSED = 0.05
"""A target that is missed by more than this share of it is tried for once more."""
MULTIPLES = 8, 16
"""Of ranks that a device may be faster at."""
TIE = 1.02
"""Pairs that take no more than so many times the fastest one's time are as fast."""
LEAST_OPEN = 4
"""Ranks are multiples of 16, or of the next lower power of two that leaves so many."""


def open_ranks(layer: Layer, on_cuda: bool) -> range:
    """The ranks of a layer that may be worth their time: below break-even, and multiples of what the device multiplies at once.

    On a GPU these are 8 numbers, 16 of half precision. On a CPU, with vectors of 16 floats, rank 33 took a fifth longer than 32, and 31 as
    long (measured with AVX-512, linear and convolution).
    """
    most = min(layer.full_rank, int(np.ceil(layer.break_even_rank)) - 1)
    multiple = 8 if on_cuda and layer.dtype.itemsize > 2 else 16
    while multiple > 1 and most // multiple < LEAST_OPEN:
        multiple //= 2
    return range(multiple, most + 1, multiple)


@dataclass(frozen=True)
class Rounding:
    """Which rank a pair gets for the sake of the device: rounded up to a multiple of `to`, below break-even, or, if that is `"auto"`, the fastest
    of it and the next multiples of 8 and 16. Ranks `as_chosen` keep as much as is asked for: the smallest of those that take as long.

    A CPU takes about as long for the next multiple of 8, so that no other is faster there. (AVX-512, one thread, of the dense layer's time: a
    convolution of 96 channels at rank 17, 24, 25 and 32: 0.47, 0.48, 0.49, 0.50, at 33: 0.65; a linear layer of 384: 0.34, 0.35, 0.36, 0.35,
    and 0.40.) So the rank as chosen is timed at that one, which layers of a stack share.
    """

    to: int | str
    as_chosen: bool

    def timed(self, layer: Layer, rank: int, profiler: Profiler) -> list[int]:
        """The ranks to time, ascending."""
        if self._stays(profiler):
            return self._multiples(layer, rank, MULTIPLES[:1]) or [rank]
        if isinstance(self.to, str):
            return sorted({rank, *self._multiples(layer, rank, MULTIPLES)})
        return self._multiples(layer, rank, (self.to,)) or [rank]

    def rounded(self, layer: Layer, rank: int, profiler: Profiler | None) -> tuple[int, int, float | None]:
        """The rank, the one that was timed for it, and how many times as fast as the layer a pair of that is; without a profiler it is None, and
        only a number is rounded to.
        """
        if profiler is None:
            multiples = [] if isinstance(self.to, str) else self._multiples(layer, rank, (self.to,))
            rank = (multiples or [rank])[0]
            return rank, rank, None
        choices = self.timed(layer, rank, profiler)
        dense, *pairs = profiler.times_ms(layer, choices)
        tied = [i for i, t in enumerate(pairs) if t <= TIE * min(pairs)]
        best = min(tied) if self.as_chosen else max(tied)  # a larger rank costs no time and keeps more
        return rank if self._stays(profiler) else choices[best], choices[best], dense / pairs[best]

    def _stays(self, profiler: Profiler) -> bool:
        return self.as_chosen and isinstance(self.to, str) and profiler.on_cpu

    def _multiples(self, layer: Layer, rank: int, of: Sequence[int]) -> list[int]:
        limit = min(layer.full_rank, layer.break_even_rank)
        return sorted({r for r in (-(-rank // m) * m for m in of) if r < limit})


def timed_ranks(ranks: Sequence[int]) -> list[int]:
    """Those to time, evenly spaced, first and last among them."""
    if not ranks:
        return []
    places = np.unique(np.linspace(0, len(ranks) - 1, TIMED).round().astype(int))
    return [ranks[place] for place in places]


def interpolated(timed: Sequence[int], pair_ms: Sequence[float], ranks: Sequence[int]) -> dict[int, float]:
    """Milliseconds at all ranks, from those at some: the nearest that never fall with the rank, and straight lines between."""
    rising = isotonic_regression(pair_ms).x
    return {rank: float(ms) for rank, ms in zip(ranks, np.interp(ranks, timed, rising), strict=True)}


class Trials:
    """Layers of a model, and whole copies of it, timed with `backward` or the forward alone. `copied` makes a copy of the dense model;
    the rest is as of `whole.compare`.
    """

    def __init__(
        self,
        copied: Callable[[], nn.Module],
        example: Example,
        *,
        backward: bool,
        amp: torch.dtype | None = None,
        least: int = LEAST,
        budget_ms: float = BUDGET_MS,
    ) -> None:
        self._copied, self._example = copied, example
        self._backward, self._amp = backward, amp
        self._least, self._budget_ms = least, budget_ms

    @cached_property
    def _dense(self) -> nn.Module:
        return self._copied()

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self._dense.parameters()), torch.device("cpu"))

    @property
    def device(self) -> str:
        """What is measured on, in words."""
        cuda = self._device.type == "cuda"
        threads = f"cpu, {torch.get_num_threads()} threads"
        return torch.cuda.get_device_name(self._device) if cuda else threads

    def costs(self, variants: Sequence[Layer]) -> CostsOf:
        """The milliseconds of layers, each in all its forms, its own first: those of a stack are timed once. Other forms are compared
        with the layer as it was timed beside them.
        """
        found: dict[tuple[str, str], Costs] = {}
        own: dict[str, float] = {}
        profiler = Profiler(self._dense, self._device, backward=self._backward)
        for stack in stacks(variants):
            ranks = open_ranks(stack.sample, self._device.type == "cuda")
            timed = timed_ranks(ranks)
            dense_ms, *pair_ms = profiler.times_ms(stack.sample, timed)
            by_rank = interpolated(timed, pair_ms, ranks) if timed else {}
            for layer in stack.layers:
                uses = 1 if layer.made else max(1, len(layer.nodes))
                once = own.setdefault(layer.name, uses * dense_ms) / dense_ms
                found[layer.name, layer.form] = Costs(own[layer.name], {r: once * ms for r, ms in by_rank.items()})
        return lambda layer: found[layer.name, layer.form]

    def dense_ms(self) -> float:
        """Of one call of the dense model, the median."""
        return self._timed(self._dense).ms[0]

    def share(self, plan: Plan, factors: Factors) -> Share:
        """What a copy with the plan's pairs takes of the dense model's time."""
        return self.times(plan, factors).shares[1]

    def times(self, plan: Plan, factors: Factors | None = None) -> Times:
        """Of the dense model, and of a copy with the plan's pairs, of random numbers if there are no factors."""
        small = self._copied()
        apply_plan(small, plan, example=self._example, split=factors is not None, factors=dict(factors or {}))
        if factors is None:
            with torch.random.fork_rng():
                for pair in pairs_in(small).values():
                    for weight in (pair.u.weight, pair.v.weight):
                        nn.init.normal_(weight, std=max(1, weight[0].numel()) ** -0.5)
        return self._timed(self._dense, small)

    def _timed(self, *models: nn.Module) -> Times:
        return compare(
            models,
            self._example,
            Stopwatch(self._device),
            backward=self._backward,
            amp=self._amp,
            least=self._least,
            budget_ms=self._budget_ms,
        )


def ranks_within_time(
    budget: Budget,
    forms: Mapping[str, Forms],
    costs: CostsOf,
    dense_ms: float,
    measure: Callable[[dict[str, Option]], Share],
    device: str,
    weights: Mapping[str, float] | None = None,
) -> tuple[dict[str, Option], Budget, str]:
    """The option of each layer in `forms` with which the model takes the budget's share of `dense_ms`, the budget with the share that was
    measured, and what the plan should say. `measure` times the whole model with such options against the dense one. If they miss
    the target by more than `MISSED`, what layers save is scaled to what the model saved, and they are chosen once more.

    Raises `BudgetError` with the least share if all layers at their fastest take more.
    """
    tried: list[tuple[float, dict[str, Option], Share, bool]] = []
    scale = 1.0
    for _ in range(2):
        ladders = ladders_of(forms, _scaled(costs, scale), weights)
        dense = sum(ladder.options[-1].cost for ladder in ladders.values())
        fastest = {name: ladder.options[0] for name, ladder in ladders.items()}
        least = sum(option.cost for option in fastest.values())
        room = max(least, budget.target * dense_ms - (dense_ms - dense))
        chosen = fastest if room == least else allocate(ladders, room)
        if any(_same(chosen, before) for _, before, _, _ in tried):
            break
        share = measure(chosen)
        missed = share.median / budget.target - 1
        tried.append((abs(missed), chosen, share, _same(chosen, fastest)))
        predicted = dense - sum(option.cost for option in chosen.values())
        if abs(missed) <= MISSED or predicted <= 0:
            break
        scale *= float(np.clip((1 - share.median) * dense_ms / predicted, 0.1, 10.0))
    miss, chosen, share, at_fastest = min(tried, key=lambda one: one[0])
    if at_fastest and share.median > (1 + MISSED) * budget.target:
        raise BudgetError(
            f"target_{budget.of} must be at least {share.median:.3f} (± {share.spread:.3f}) here, on {device}, where each of {len(forms)} layers is as "
            f"fast as it gets; got {budget.target:g}. Raise it, or let more layers be factorized: include='*' takes in the first, the last and the tables too."
        )
    note = ""
    if miss > MISSED:
        note = f"target_{budget.of}={budget.target:g} is missed: {share.median:.3f} ± {share.spread:.3f} was measured"
    reached = replace(budget, reached=share.median, spread=share.spread, device=device)
    return chosen, reached, note


def _scaled(costs: CostsOf, scale: float) -> CostsOf:
    def scaled(layer: Layer) -> Costs:
        dense, pairs = costs(layer)
        return Costs(scale * dense, {rank: scale * ms for rank, ms in pairs.items()})

    return scaled


def _same(one: Mapping[str, Option], other: Mapping[str, Option]) -> bool:
    return {n: (o.layer.form, o.rank) for n, o in one.items()} == {n: (o.layer.form, o.rank) for n, o in other.items()}
