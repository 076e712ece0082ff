"""From what was multiplied with parts of a weight to what is known of its matrices."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fxrank.passes.calibration.joint import JointProjection, Use
from fxrank.passes.calibration.moments import Lookups, Moments
from fxrank.passes.calibration.projection import ColumnProjection, Projection

Place = tuple[str, range, range]
"""Side, what is kept and what is summed of a `Reading`."""
NARROW = {"inputs": "outputs", "rows": "outputs of rows"}
"""What is known of a whole matrix by what its products give, instead of by what they take."""


@dataclass
class Parts:
    """What was multiplied with a weight outside of any layer's call: moments by place, why it is not all if something was `missed`, and
    whether its layer was `called` too.
    """

    moments: dict[Place, Moments | Lookups] = field(default_factory=dict)
    missed: str = ""
    called: bool = False

    @classmethod
    def added(cls, all_of_them: "Sequence[Parts]") -> "Parts":
        """What all of these saw together."""
        places = sorted({place for parts in all_of_them for place in parts.moments}, key=str)
        moments: dict[Place, Moments | Lookups] = {}
        for place in places:
            theirs = [parts.moments[place] for parts in all_of_them if place in parts.moments]
            products = [one for one in theirs if isinstance(one, Moments)]
            lookups = [one for one in theirs if isinstance(one, Lookups)]
            moments[place] = Moments.added(products) if products else Lookups.added(lookups)
        missed = next((parts.missed for parts in all_of_them if parts.missed), "")
        return cls(moments, missed, any(parts.called for parts in all_of_them))

    @property
    def is_mixed(self) -> bool:
        """Whether some of it was seen in a way that does not add up with the rest, so that all of it has to be seen anew in one way."""
        narrow = any(side in NARROW.values() for side, _, _ in self.moments)
        return not self.missed and (self.called or (narrow and len(self.moments) > 1))


def of_parts(parts: Parts, stack: Tensor, *, stacked: bool) -> tuple[Projection | JointProjection, int] | str:
    """What is known of the matrices of a weight, `stack` `(groups, rows, cols)`, that was multiplied with outside of its layers, and how
    many of them saw nothing; or why it is not enough.
    """
    if parts.missed:
        return parts.missed
    sides = {side for side, _, _ in parts.moments}
    if len(stack) == 1 and not stacked:
        if "outputs" in sides and len(sides) > 1:
            return "a convolution takes it for its kernel, and it is multiplied with otherwise too"
        return _of_one(parts.moments, stack), 0
    if len(sides) > 1:
        return "it is multiplied from both sides"
    (side,) = sides
    if side != "inputs" and not stacked:
        return "its rows are looked up" if side == "lookups" else "its blocks add up in the output"
    unit = 1 if stacked else stack.shape[1]
    summed = range(stack.shape[1 if side == "rows" else 2])
    of_groups: list[list[tuple[int, Tensor, Tensor]]] = [[] for _ in stack]
    for (_, kept, over), moments in parts.moments.items():
        assert isinstance(moments, Moments)
        if over != summed or len(kept) % unit or kept.start % unit or (kept.step != 1 and unit > 1):
            return "it is multiplied in other parts than those of its pair"
        whole = moments.of_groups()
        for number, group in enumerate(kept[::unit]):
            of_groups[group // unit].append(whole[number if stacked else 0])
    if not any(count for some in of_groups for count, _, _ in some):
        return "no batch reached it"
    joined = Moments.joined(of_groups)
    unseen = int((joined.second(centred=False).diagonal(dim1=1, dim2=2).sum(1) == 0).sum()) if stacked else 0
    return _closed(side, stack, joined), unseen


def _of_one(found: Mapping[Place, Moments | Lookups], stack: Tensor) -> Projection | JointProjection:
    """Of one matrix: in closed form where all of it is multiplied with the same vectors, and once."""
    side = next(side for side, _, _ in found)
    products = [moments for moments in found.values() if isinstance(moments, Moments)]
    _, rows, cols = stack.shape
    kept, summed = (rows, cols) if side == "inputs" else (cols, rows)
    once = Counter(place for _, of_place, _ in found for place in of_place) == Counter(range(kept))
    whole = once and all(place[0] == side and place[2] == range(summed) for place in found)
    alike = len(products) == len(found) and all(products[0].is_like(other) for other in products[1:])
    if (whole and alike) or (len(found) == 1 and side in ("outputs", *NARROW.values())):
        return _closed(side, stack, Moments.joined([products[0].of_groups()]))
    return JointProjection.of(stack, [_use(*place, moments) for place, moments in found.items()])


def _closed(side: str, stack: Tensor, moments: Moments) -> Projection:
    if side.endswith("rows"):
        return ColumnProjection(stack.mT, moments, "inputs" if side == "rows" else "outputs", False)
    return Projection(stack, moments, side, False)


def _use(side: str, kept: range, summed: range, moments: Moments | Lookups) -> Use:
    if isinstance(moments, Lookups):
        return Use(side, kept, summed, moments.shares, None, moments.count, len(summed))
    seen = moments.second(centred=False)[0]
    if side == "inputs":
        return Use(side, kept, summed, None, seen, moments.count, len(summed))
    return Use(side, summed, kept, seen, None, moments.count, len(summed))
