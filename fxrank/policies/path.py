"""R for a share of the model's outputs: from the dense model on, layers give up parameters in the order in which these are worth least.

On the lower convex hull of a layer's options each next one saves parameters at a higher price in lost energy. The steps of all layers
together, in the order of their price, pass through the solutions of the knapsack of `policies.budget` with its constraint relaxed
(Lagrange; Everett 1963), each inside the next. So one number says how far a model has gone, and a search finds how far it may go.
"""

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fxrank.policies.budget import Ladder, Option

Way = tuple[str, int]
"""The form and the rank of a pair."""
TRIES = 6
"""Points of a path that are measured, at most."""
NEAR = 0.85
"""One that loses so much of what may be lost is far enough."""
POWERS = 0.25, 4.0
"""Within which a model's loss is thought to follow those of its layers."""
FIRST = 5.0
"""The sum of the layers' own losses over the model's, where they have no weights: 5 to 20 on the networks of `benchmarks.decisions`."""


@dataclass(frozen=True)
class Path:
    """The steps of a model's layers, each a layer's name and what it becomes; after so many of them the sum of the layers' losses, and the
    share of their dense cost.
    """

    steps: tuple[tuple[str, Way], ...]
    losses: tuple[float, ...]
    costs: tuple[float, ...]

    @classmethod
    def of(cls, ladders: Mapping[str, Ladder], floor: float = 0.0) -> "Path":
        """The path of layers with these options, by name, as far as they keep that share of their dense cost, all together."""
        found = []
        for name, ladder in ladders.items():
            hull = _hull(ladder.some)
            for number, (before, after) in enumerate(itertools.pairwise(hull)):
                found.append((_price(before, after), name, number, before, after))
        dense = now = sum(ladder.options[-1].cost for ladder in ladders.values())
        steps, losses, costs = [], [0.0], [1.0]
        for _, name, _, before, after in sorted(found, key=lambda step: step[:3]):
            least = floor * dense - (now - before.cost)
            last = after.cost < least
            if last:  # as far as it may go, with a pair that is on no corner of the hull
                after = next((o for o in ladders[name].options if least <= o.cost), before)
            if after.rank is None or after.cost >= before.cost:
                break
            now += after.cost - before.cost
            steps.append((name, (after.layer.form, after.rank)))
            losses.append(losses[-1] + after.loss - before.loss)
            costs.append(now / dense)
            if last:
                break
        return cls(tuple(steps), tuple(losses), tuple(costs))

    def at(self, number: int) -> dict[str, Way]:
        """The pairs after so many steps, by name; layers that are not there are dense."""
        return dict(self.steps[:number])

    def until(self, lost: float) -> int:
        """The number of steps after which the sum of losses is at most so much."""
        return bisect_right(self.losses, lost) - 1


def _price(before: Option, after: Option) -> float:
    return (after.loss - before.loss) / (before.cost - after.cost)


def _hull(options: Sequence[Option]) -> list[Option]:
    """Those on the lower convex hull of loss over cost, from the dense layer to the cheapest pair."""
    hull: list[Option] = []
    for option in reversed(options):
        while len(hull) > 1 and _price(hull[-2], hull[-1]) >= _price(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def farthest(
    path: Path, lost: Callable[[Mapping[str, Way]], float], most: float, first: float = FIRST
) -> tuple[dict[str, Way], float]:
    """The pairs farthest along the path with which no more than `most` is lost, of those that `lost` was asked for, and what that is.

    What the model loses is taken for a power of the sum of its layers' losses, through the points next to the one that is looked for on both
    sides, or, while there are none on one of them, the two nearest; the first power where only one is known, or they contradict it, and a part
    of it, one over `first`, where none is.
    """
    low, at_low, high = 0, 0.0, len(path.steps) + 1
    aim = math.sqrt(NEAR) * most
    number = path.until(first * aim)
    known: list[tuple[float, float]] = []
    for _ in range(TRIES):
        if high - low <= 1:
            break
        room = max(1, (high - low) // 8)  # not step by step towards a point that is known
        number = min(max(number, low + (room if low else 1)), high - (room if high <= len(path.steps) else 1))
        found = lost(path.at(number))
        if found <= most:  # NaN is not
            low, at_low = number, found
            if found >= NEAR * most:
                break
        else:
            high = number
        if 0 < found < math.inf and path.losses[number] > 0:
            known.append((path.losses[number], found))
        number = path.until(_where(known, aim)) if known else (low + high) // 2
    return path.at(low), at_low


def _where(known: Sequence[tuple[float, float]], aim: float) -> float:
    """The sum of the layers' losses at which the model should lose so much, by some sums and what it lost there."""
    below = sorted(one for one in known if one[1] <= aim)[::-1]
    above = sorted(one for one in known if one[1] > aim)
    (near, at_near), *others = [*below[:1], *above[:1]] if below and above else below or above
    power = 1.0
    if others and (near - others[0][0]) * (at_near - others[0][1]) > 0:
        power = math.log(near / others[0][0]) / math.log(at_near / others[0][1])
    return float(near * (aim / at_near) ** min(max(power, POWERS[0]), POWERS[1]))
