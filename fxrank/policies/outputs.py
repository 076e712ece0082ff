"""How far a model with pairs is from the dense one, in what both give on the same calls: what R for a share of the outputs is measured by.

And what the losses of single layers are weighed by, under a budget too: a layer may lose much of its own outputs that the model does without,
behind a residual or a softmax say, and little that it needs. LEMS (ICML 2026) measures this by KL; here it is the mean square, which is there for
every model.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxrank.passes.calibration.collect import evaluating
from fxrank.passes.calibration.processes import OfAll, together
from fxrank.passes.model.calls import Call, Example
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.pairs.parameter import RawWeight
from fxrank.plan import Plan
from fxrank.switch.apply_plan import Factors, apply_plan
from fxrank.torch_private import pytree

KEPT_BYTES = 2**28
"""Of the dense model's outputs, and at least one call's."""
LARGE, MASKED = 1e3, 100.0
"""Numbers larger than the first, and so many times as large as is usual for those below it, stand for something that is masked, and are
not compared.
"""
SAMPLE = 2**16
"""Numbers of an output that say what is usual there."""
WEIGHED, NUMBERS = 4, 1000
"""Calls on which each layer's pair is tried by itself: as many as give so many numbers, and no more than these."""
NOTHING = 1e-9
"""A layer that loses less tells nothing of what the model loses with it but how it rounds."""
WIDEST = 1e4
"""No layer's weight is so many times, or so small a part of, the median of all."""


class Alone(NamedTuple):
    """A layer, a plan of its pair and no other, with the factors, and the share of its own energy that this pair leaves out."""

    name: str
    plan: Plan
    factors: Factors
    lost: float


@dataclass
class Outputs:
    """What a model gives on some calls, and how far copies with pairs are from it.

    `copied` makes a copy of the dense `model`, `calls` the calls, anew each time; `settle` is done to a copy with its pairs, in all processes
    alike. With `by_batch`, BatchNorms that are being trained take the statistics of each call. In several processes each has its own calls; what
    is done in one of them alone, and may fail, fails in all of them.
    """

    model: nn.Module
    copied: Callable[[], nn.Module]
    calls: Callable[[], Generator[Call]]
    of_all: OfAll
    example: Example
    by_batch: bool = False
    settle: Callable[[nn.Module], object] | None = None
    few: bool = False
    """Whether the first calls do (see `WEIGHED`)."""
    _wanted: list[list["_Output"]] = field(default_factory=list, init=False)
    _energies: list[float] = field(default_factory=list, init=False)
    """Of each place among the outputs, over all calls and processes: the sum of squares about the mean."""

    @property
    def number(self) -> int:
        """Of calls of which outputs are compared."""
        return len(self._wanted)

    def see_dense(self) -> None:
        """Keep what the dense model gives, a copy that is settled if pairs are. Raises `ValueError` where it cannot be compared."""
        dense = self.model if self.settle is None else self._settled(lambda twin: None)
        self._run(dense, lambda _, outputs: self._wanted.append([_Output.of(one) for one in outputs]), ())
        places = self.of_all([[one.moments() for one in of_call] for of_call in self._wanted])
        by_place = zip(*(of_call for theirs in places for of_call in theirs), strict=True)
        self._energies = [_about_the_mean(moments) for moments in by_place]

    def lost(self, plan: Plan, factors: Factors) -> float:
        """The share of the mean square of the outputs, about their mean, that the plan's pairs lose; of several outputs the largest.
        Raises `ValueError` where a copy does not compute with its pairs.
        """
        twin = self._settled(lambda twin: apply_plan(twin, plan, example=self.example, factors=factors))
        squares = [0.0] * len(self._energies)

        def compare(number: int, outputs: list[Tensor]) -> None:
            for place, (wanted, got) in enumerate(zip(self._wanted[number], outputs, strict=True)):
                squares[place] += wanted.off(got)

        self._run(twin, compare, [dense_at(self.model, name) for name in plan.R])
        totals = [sum(of_place) for of_place in zip(*self.of_all(squares), strict=True)]
        if not any(totals) and plan.R:
            raise ValueError("a copy of it computes without its own pairs.")
        return float(max(off / energy for off, energy in zip(totals, self._energies, strict=True)))

    def weights(self, alone: Iterable["Alone"], before: Mapping[str, float] | None = None) -> dict[str, float]:
        """How much of the outputs is lost for what a layer itself loses, by name: multiplied with it, the losses of layers add up to about
        the model's, as long as that is small. Those whose pair loses nothing keep what they had `before`,
        or get the median. Asked on the first calls (see `WEIGHED`), of
        copies that are not settled. Raises `ValueError` as `see_dense` and `lost`.
        """
        few = replace(self, few=True, settle=None)
        few.see_dense()
        names, known = [], dict(before or {})
        for one in alone:
            names.append(one.name)
            own = self.of_all(one.lost)[0]  # which may differ in its last digits, and all have to ask for the same
            if own > NOTHING:
                known[one.name] = few.lost(one.plan, one.factors) / own
        usable = sorted(weight for weight in known.values() if 0 < weight < math.inf)
        if not usable:
            return {}
        middle = usable[len(usable) // 2]
        return {name: min(max(known.get(name, middle), middle / WIDEST), WIDEST * middle) for name in names}

    def _settled(self, change: Callable[[nn.Module], object]) -> nn.Module:
        """A copy that is changed."""
        twins: list[nn.Module] = []

        def make() -> None:
            twins.append(self.copied())
            change(twins[0])

        together(make, self.of_all)
        if self.settle is not None:
            self.settle(twins[0])
        return twins[0]

    def _run(self, model: nn.Module, take_in: Callable[[int, list[Tensor]], None], never: Sequence[nn.Module]) -> None:
        """Call a model, which must call none of the layers in `never`."""

        def run() -> None:
            held = numbers = 0
            with (
                evaluating(model, by_batch=self.by_batch),
                torch.no_grad(),
                _uncalled(never),
                closing(self.calls()) as calls,
            ):
                for number, (args, kwargs) in enumerate(calls):
                    outputs = _numbers(model(*args, **kwargs))
                    take_in(number, outputs)
                    held += sum(t.nbytes for t in outputs)
                    numbers += sum(t.numel() for t in outputs)
                    if held > KEPT_BYTES or (self.few and (number + 1 == WEIGHED or numbers >= NUMBERS)):
                        break

        together(run, self.of_all)


def check_keep(keep: object) -> None:
    """Raise `ValueError`, or `TypeError` for what is no number, if it is no share of a model's outputs that can be kept."""
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep is the share of the model's outputs that is kept, in (0, 1); got {type(keep).__name__}.")
    if not 0 < float(keep) < 1:
        raise ValueError(f"keep is the share of the model's outputs that is kept, in (0, 1); got {keep}.")


class _Output(NamedTuple):
    """One tensor of a call's outputs, and which of its numbers are compared; None where all are."""

    values: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, values: Tensor) -> "_Output":
        sizes = values.flatten()[:: -(-values.numel() // SAMPLE)].abs()
        usual = sizes[(sizes > 0) & (sizes < LARGE)]
        bound = max(LARGE, MASKED * float(usual.median())) if len(usual) else math.inf
        kept = values.isfinite() & (values.abs() <= bound)
        return cls(values, None) if kept.all() else cls(values.where(kept, 0.0), kept)

    def moments(self) -> tuple[Tensor, Tensor, float]:
        """Of each feature, the last dimension, or the second of images: numbers, and their sum; and the sum of all squares."""
        feature = -1 if self.values.ndim < 4 else 1
        over = [d for d in range(self.values.ndim) if self.values.ndim > 1 and d != feature % self.values.ndim]
        over = over or list(range(self.values.ndim))
        kept = torch.ones_like(self.values) if self.kept is None else self.kept
        squares = torch.linalg.vector_norm(self.values, dtype=torch.float64).square()
        return (
            kept.sum(over, dtype=torch.float64).cpu(),
            self.values.sum(over, dtype=torch.float64).cpu(),
            float(squares),
        )

    def off(self, got: Tensor) -> float:
        """The sum of the squared differences."""
        if self.values.shape != got.shape:
            raise ValueError(f"outputs of shapes {tuple(self.values.shape)} and {tuple(got.shape)} cannot be compared.")
        off = got - self.values if self.kept is None else (got - self.values).where(self.kept, 0.0)
        return float(
            torch.linalg.vector_norm(off, dtype=torch.float64).square().nan_to_num(nan=math.inf, posinf=math.inf)
        )


def _about_the_mean(moments: Sequence[tuple[Tensor, Tensor, float]]) -> float:
    """Of one place among the outputs: the sum of squares about the features' means, of one number of each about 0. Raises `ValueError`
    where nothing varies.
    """
    numbers, sums = (sum(column[1:], start=column[0]) for column in list(zip(*moments, strict=True))[:2])
    squares = sum(m[2] for m in moments)
    energy = squares - float((sums.square() / numbers.clamp(min=1))[numbers > 1].sum())
    if energy <= 1e-12 * squares:
        raise ValueError("its outputs are the same whatever it is called with.")
    return energy


def _numbers(outputs: object) -> list[Tensor]:
    """The floating-point tensors of a call's outputs, but for losses, of which so small a share may be much."""
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    # Sums are made in double precision, which not every device has.
    places = [t.device if t.device.type in ("cpu", "cuda") else torch.device("cpu") for t in tensors]
    found = [t.detach().to(at).float() for t, at in zip(tensors, places, strict=True) if t.numel() > 1]
    if not found:
        raise ValueError(
            f"it must give floating-point tensors of more than one number; it gave {type(outputs).__name__}."
        )
    return found


@contextmanager
def _uncalled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """A copy may hold functions that are not copied, a forward that was compiled, say, and run the model that it was made of."""

    def found(layer: nn.Module, args: object) -> None:
        raise ValueError("a copy of it calls the layers of the model itself.")

    hooks = [layer.register_forward_pre_hook(found) for layer in layers if not isinstance(layer, RawWeight)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
