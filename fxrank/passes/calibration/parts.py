"""From what was multiplied with parts of a weight to what is known of its matrices."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fxrank.passes.calibration.moments import Moments
from fxrank.passes.calibration.projection import ColumnProjection, Projection


@dataclass
class Parts:
    """What was multiplied with a weight outside of any layer's call: moments by side, start and length of a `Reading`, why it is not all if
    something was `missed`, and whether its layer was `called` too.
    """

    moments: dict[tuple[str, int, int], Moments] = field(default_factory=dict)
    missed: str = ""
    called: bool = False

    @classmethod
    def added(cls, all_of_them: "Sequence[Parts]") -> "Parts":
        """What all of these saw together."""
        places = sorted({place for parts in all_of_them for place in parts.moments})
        moments = {
            place: Moments.added([parts.moments[place] for parts in all_of_them if place in parts.moments])
            for place in places
        }
        missed = next((parts.missed for parts in all_of_them if parts.missed), "")
        return cls(moments, missed, any(parts.called for parts in all_of_them))


def of_parts(parts: Parts, stack: Tensor, *, stacked: bool) -> tuple[Projection, int] | str:
    """What is known of the matrices of a weight, `stack` `(groups, rows, cols)`, that was multiplied with outside of its layers, and how
    many of them saw nothing; or why it is not enough.
    """
    if parts.missed or parts.called:
        return parts.missed or "its layer is called, and its weight multiplied with outside of it too"
    sides = {side for side, _, _ in parts.moments}
    if len(sides) > 1:
        return "it is multiplied from both sides"
    side, groups, unit = sides.pop(), len(stack), 1 if stacked else stack.shape[1]
    if side == "outputs" or (groups == 1 and not stacked):
        first, *others = parts.moments.values()
        if any(not first.is_like(other) for other in others):
            return "parts of it are multiplied with different inputs, which one subspace does not serve in closed form"
        of_groups = [first.of_groups()]
    elif side == "rows" and not stacked:
        return "its blocks add up in the output"
    elif any(start % unit or length % unit for _, start, length in parts.moments):
        return "it is multiplied in other parts than those of its pair"
    else:
        of_groups = [[] for _ in range(groups)]
        for (_, start, length), moments in parts.moments.items():
            whole = moments.of_groups()
            for group in range(start // unit, (start + length) // unit):
                of_groups[group].append(whole[group - start // unit if stacked else 0])
    if not any(count for some in of_groups for count, _, _ in some):
        return "no batch reached it"
    joined = Moments.joined(of_groups)
    unseen = int((joined.second(centred=False).diagonal(dim1=1, dim2=2).sum(1) == 0).sum()) if stacked else 0
    if side == "rows":
        return ColumnProjection(stack.mT, joined, "inputs", False), unseen
    return Projection(stack, joined, side, False), unseen
