"""What fxrank knows about one weight: a `Layer`."""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.passes.discovery.made import Made
from fxrank.passes.errors import PlanMismatchError
from fxrank.passes.model.weights import check_not_computed, numbers_of, weight_of
from fxrank.passes.pairs.base import FactorPair, Unrolled
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.pairs.registry import pair_class


@dataclass(frozen=True)
class Layer:
    """One weight of the model, seen from the graph.

    The weight unrolls to `groups` matrices of `(rows, cols)`, in its present `form`. `positions` is how often each of its numbers
    is multiplied with in one call of the model at the example's sizes, so that the dense layer takes `groups · rows · cols ·
    positions` multiply-adds (MACs); `outputs` is how many numbers come out.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    unrolled: Unrolled = field(default_factory=Unrolled)
    """The weight as the pair class of the present form reads it."""
    others: tuple[Unrolled, ...] = ()
    """The same in other forms that its pair may have instead; see `in_form`."""
    positions: float = 0
    outputs: int = 0
    is_table: bool = False
    """Whether some of its sites look the weight up."""
    paths: tuple[str, ...] = ()
    """Every module path under which the weight can be reached; `name` is the first."""
    nodes: tuple[str, ...] = ()
    """Graph nodes that use it, in execution order."""
    input_shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    geometry: tuple[Any, ...] = ()
    reason: str | None = None
    """Why this layer cannot be factorized at all; None if it can."""
    supported: bool = True
    """Whether the layer's kind has a factor pair, whatever `reason` says about this one."""
    guarded: bool = False
    """Whether it stays dense for what it does, or keeps true, beside multiplying with a matrix."""
    unsaving: str | None = None
    """Why its pair would save no work, so that it is left dense unless it is included; None if it would."""
    made: tuple[Made, ...] = ()
    """The products with it, where code of the model's own makes them all."""
    boundary: str | None = None
    """`"first"` if no other weight comes before it in the graph, `"last"` if none comes after."""

    def kept_for(self, reason: str) -> "Layer":
        """The layer, `guarded` for this reason."""
        return replace(self, reason=reason, supported=False, guarded=True)

    @property
    def form(self) -> str:
        return self.unrolled.form

    @property
    def other_forms(self) -> tuple[str, ...]:
        return tuple(other.form for other in self.others)

    @property
    def groups(self) -> int:
        return self.unrolled.groups

    @property
    def rows(self) -> int:
        return self.unrolled.rows

    @property
    def cols(self) -> int:
        return self.unrolled.cols

    @property
    def full_rank(self) -> int:
        return self.unrolled.full_rank

    @property
    def parameters(self) -> int:
        """Numbers in the dense weight (the bias stays as it is)."""
        return self.groups * self.rows * self.cols

    @property
    def macs(self) -> int:
        return round(self.parameters * self.positions)

    @property
    def key(self) -> tuple[str, str]:
        """Its name and form, of forms that read the same matrices the first by name: what is known of one is known of the others."""
        alike = (a.form for a in self.others if a.matrices == self.unrolled.matrices and self._pair.reads_as(a.pair))
        return self.name, min(self.form, *alike, self.form)

    def pair_parameters(self, rank: int) -> int:
        """Numbers in both factors of its pair."""
        return self._pair.pair_parameters(self.unrolled, rank)

    def pair_macs(self, rank: int) -> int:
        """Multiply-adds of both factors in one call of the model."""
        return self._pair.pair_macs(self.unrolled, rank)

    @property
    def break_even_rank(self) -> float:
        """The rank at which a pair is as large as the layer; 0 where there is no pair."""
        return 0.0 if self.unrolled.pair is None else self._pair.break_even_rank(self.unrolled)

    def rank_within(self, parameters: int) -> int:
        """The largest rank at which its pair has no more numbers than so many, 0 if there is none."""
        return bisect_right(range(1, self.full_rank + 1), parameters, key=self.pair_parameters)

    @property
    def takes_norm(self) -> bool:
        """Whether a BatchNorm may stand between its factors."""
        return self.unrolled.pair is not None and self._pair.takes_norm

    @property
    def _pair(self) -> type[FactorPair]:
        assert self.unrolled.pair is not None, self.name
        return self.unrolled.pair

    def if_in_form(self, form: str) -> "Layer":
        """`in_form`, or the layer as it is where its pair has no such form."""
        return self.in_form(form) if form in self.other_forms else self

    def in_form(self, form: str) -> "Layer":
        """The same weight read in another of its forms; itself in the form that it has."""
        if form == self.form:
            return self
        chosen = next(other for other in self.others if other.form == form)
        others = (self.unrolled, *(other for other in self.others if other is not chosen))
        return replace(self, unrolled=chosen, others=others)


def stack_of(layer: Layer, model: nn.Module) -> Tensor:
    """The layer's live weight as `(groups, rows, cols)`, without a copy where the memory allows; for spectra only."""
    return _unrolled(layer, model, spectral=True)


def matrices_of(layer: Layer, model: nn.Module) -> Tensor:
    """The layer's live weight as `(groups, rows, cols)` in the order of rows and columns that a pair's factors have."""
    return _unrolled(layer, model, spectral=False)


def _unrolled(layer: Layer, model: nn.Module, *, spectral: bool) -> Tensor:
    dense = dense_at(model, layer.name)
    check_not_computed(dense, layer.name)
    cls = pair_class(dense, layer.form)
    if cls is None:
        raise PlanMismatchError(
            f"a layer must be dense until its own session switches it; {layer.name!r} is {type(dense).__name__} now. Has another session switched it, "
            "or has it been replaced? Finish the one before you attach the other."
        )
    weight = numbers_of(weight_of(dense)).detach()
    return cls.spectral_view(dense, weight) if spectral else cls.unroll(dense, weight)
