"""What fxrank knows about one weight: a `Layer`."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.passes.errors import PlanMismatchError
from fxrank.passes.model.weights import check_not_computed, numbers_of, weight_of
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.pairs.registry import pair_class


@dataclass(frozen=True)
class Layer:
    """One weight of the model, seen from the graph.

    The weight unrolls to `groups` matrices of `(rows, cols)`. `positions` is how often each of its numbers is used
    in one call of the model at the example's sizes, so that the dense layer takes `groups · rows · cols ·
    positions` multiply-adds (MACs).
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    groups: int = 1
    rows: int = 0
    cols: int = 0
    positions: float = 0
    paths: tuple[str, ...] = ()
    """Every module path under which the weight can be reached; `name` is the first."""
    nodes: tuple[str, ...] = ()
    """Graph nodes that use it, in execution order."""
    input_shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    geometry: tuple[Any, ...] = ()
    form: str = "channel"
    other_forms: tuple[str, ...] = ()
    """Forms that its pair may have instead; see `in_form`."""
    reason: str | None = None
    """Why this layer cannot be factorized at all; None if it can."""
    supported: bool = True
    """Whether the layer's kind has a factor pair, whatever `reason` says about this one."""
    boundary: str | None = None
    """`"first"` if no other weight comes before it in the graph, `"last"` if none comes after."""

    @property
    def full_rank(self) -> int:
        return min(self.rows, self.cols)

    @property
    def parameters(self) -> int:
        """Numbers in the dense weight (the bias stays as it is)."""
        return self.groups * self.rows * self.cols

    @property
    def macs(self) -> int:
        return 0 if self.kind == "embedding" else round(self.parameters * self.positions)

    def pair_parameters(self, rank: int) -> int:
        return self.groups * rank * (self.rows + self.cols)

    def pair_macs(self, rank: int) -> int:
        per_position = rank * self.cols if self.kind == "embedding" else self.pair_parameters(rank)
        return round(per_position * self.positions)

    @property
    def break_even_rank(self) -> float:
        """`rows·cols / (rows + cols)`: a pair of this rank is as large, and takes as many MACs, as the layer (spec
        of the rule: Pufferfish Table 1).
        """
        return self.rows * self.cols / (self.rows + self.cols) if self.rows else 0.0

    def in_form(self, form: str) -> "Layer":
        """The same weight split otherwise: `"channel"` one matrix (or one per group), `"qkv"` three below each other."""
        if form == self.form:
            return self
        assert form in self.other_forms, form
        rows = self.groups * self.rows
        groups = 3 if form == "qkv" else 1
        others = tuple(f for f in (self.form, *self.other_forms) if f != form)
        return replace(self, form=form, other_forms=others, groups=groups, rows=rows // groups)


def stack_of(layer: Layer, model: nn.Module) -> Tensor:
    """The layer's live weight as `(groups, rows, cols)`, without a copy where the memory allows; for spectra only."""
    return _unrolled(layer, model, spectral=True)


def matrices_of(layer: Layer, model: nn.Module) -> Tensor:
    """The layer's live weight as `(groups, rows, cols)` in the order of rows and columns that a pair's factors have."""
    return _unrolled(layer, model, spectral=False)


def _unrolled(layer: Layer, model: nn.Module, *, spectral: bool) -> Tensor:
    dense = dense_at(model, layer.name, layer.form)
    check_not_computed(dense, layer.name)
    cls = pair_class(dense, layer.form)
    if cls is None:
        raise PlanMismatchError(
            f"a layer must be dense until its own session switches it; {layer.name!r} is {type(dense).__name__} now. Has another session switched it, "
            "or has it been replaced? Finish the one before you attach the other."
        )
    weight = numbers_of(weight_of(dense)).detach()
    return cls.spectral_view(dense, weight) if spectral else cls.unroll(dense, weight)
