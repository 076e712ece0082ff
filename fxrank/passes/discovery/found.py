"""From one place where a weight is used to the `Layer` that it makes, or to the reason why nothing can be done to it there."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.model.names import own_name
from fxrank.passes.model.weights import is_derived, weight_of
from fxrank.passes.pairs.base import FactorPair, Unrolled
from fxrank.passes.pairs.registry import forms_of

_TIED = "tied "
"""What stands before the kind of a table that a layer of another kind shares."""


@dataclass(frozen=True)
class Use:
    """How a weight is used at one place: by a call of its layer, whose output has this shape, or by other code, which multiplies
    with each of its numbers at so many `positions`.
    """

    node: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] | None = None
    positions: float = 0

    def counts(self, pair: type[FactorPair], dense: nn.Module) -> tuple[float, float, float]:
        """How often each number of the weight, of `U` and of `V` is multiplied with."""
        if self.output_shape is not None:
            return pair.uses(dense, self.input_shape, self.output_shape)
        return self.positions, self.positions, self.positions

    def allows(self, pair: type[FactorPair]) -> bool:
        """Whether such a pair saves anything here."""
        return self.output_shape is not None or pair.multiplies_when_read


def layer_from(
    dense: nn.Module, name: str, use: Use, *, form: str, paths: tuple[str, ...] = (), reason: str | None = None
) -> tuple[Tensor, Layer]:
    """The parameter that stands for the weight, and the layer that `dense` is, in this form first, with the reason if it cannot
    be factorized.
    """
    weight = weight_of(dense)
    pairs = forms_of(dense)
    pair = pairs[form]
    if not weight.numel():
        return _standing_for(dense, weight), unsupported(name, pair.kind, weight, "its weight has no numbers", use.node)
    if not all(isinstance(size, int) for size in (*use.input_shape, *(use.output_shape or ()))):
        why = "its input is a nested tensor, whose rows differ in size"
        return _standing_for(dense, weight), unsupported(name, pair.kind, weight, why, use.node)
    reason = _refused_numbers(weight) or reason
    unrolled = _unrolled(dense, form, pair, use)
    others = [f for f, other in pairs.items() if f != form and other.suits(dense) and use.allows(other)]
    positions = use.counts(pair, dense)[0]
    outputs = unrolled.groups * unrolled.rows * positions if use.output_shape is None else math.prod(use.output_shape)
    layer = Layer(
        name=name,
        kind=pair.kind,
        weight_shape=tuple(weight.shape),
        unrolled=unrolled,
        others=tuple(_unrolled(dense, other, pairs[other], use) for other in others),
        positions=positions,
        outputs=round(outputs),
        is_table=pair.is_table,
        paths=paths or (name,),
        nodes=(use.node,),
        input_shape=use.input_shape,
        dtype=weight.dtype,
        geometry=tuple(str(getattr(dense, g)) for g in pair.geometry),
        reason=reason,
        supported=reason is None,
    )
    return _standing_for(dense, weight), layer


def _standing_for(dense: nn.Module, weight: Tensor) -> Tensor:
    """Of a layer that derives its weight, one parameter stands for it."""
    return next(p for p in dense.parameters() if p.ndim >= 2) if is_derived(dense) else weight


def _unrolled(dense: nn.Module, form: str, pair: type[FactorPair], use: Use) -> Unrolled:
    shape = torch.empty(weight_of(dense).shape, device="meta")  # no kernel is copied for its shape
    groups, rows, cols = pair.unroll(dense, shape).shape
    return Unrolled(pair, form, groups, rows, cols, use.counts(pair, dense)[1:])


def _refused_numbers(weight: Tensor) -> str | None:
    if weight.is_complex() or not weight.is_floating_point():
        kind = str(weight.dtype).removeprefix("torch.")
        return f"its weight is {kind}; only real floating-point weights have a low-rank split here"
    if weight.dtype.itemsize < 2:
        return (
            f"its weight is {str(weight.dtype).removeprefix('torch.')}, with which nothing computes; convert it before"
        )
    if weight.layout != nn.Parameter().layout:
        return f"its weight is {str(weight.layout).removeprefix('torch.')}; only dense memory has a low-rank split"
    return None


def unsupported(name: str, kind: str, weight: Tensor, reason: str, node: str = "") -> Layer:
    """A weight that has no pair, with the reason."""
    return Layer(
        name=name,
        kind=kind,
        weight_shape=tuple(weight.shape),
        unrolled=Unrolled(rows=weight.shape[0], cols=weight[0].numel() if len(weight) else 0),
        paths=(name,),
        nodes=(node,) if node else (),
        dtype=weight.dtype,
        reason=reason,
        supported=False,
    )


def untied(kind: str) -> str:
    """The kind of the layer itself, tied or not."""
    return kind.removeprefix(_TIED)


def done(name: str, pair: FactorPair, node: str) -> Layer:
    """A pair that is there already."""
    layer = unsupported(name, pair.kind, pair.u.weight, f"already a factor pair, of rank {pair.rank}", node)
    return replace(layer, weight_shape=pair.dense_shape)


def merged(known: Layer, again: Layer) -> Layer:
    """One weight met at another site."""
    reason = known.reason or again.reason
    unlike = known.unrolled.matrices != again.unrolled.matrices or not (known.supported and again.supported)
    if unlike and reason is None:
        reason = f"its weight is shared with {own_name(again.name)!r} ({again.kind})"
    kind, name = known.kind, known.name
    if known.kind != again.kind and known.is_table != again.is_table and not known.kind.startswith(_TIED):
        # A decoder tied to an embedding: the table's kind and name, so that it is left dense unless asked for.
        table = known if known.is_table else again
        kind, name = _TIED + table.kind, table.name
    return replace(
        known,
        name=name,
        kind=kind,
        paths=known.paths + tuple(p for p in again.paths if p not in known.paths),
        nodes=known.nodes + tuple(n for n in again.nodes if n not in known.nodes),
        unrolled=known.unrolled.also_used(again.unrolled.positions),
        others=_others(known, again),
        positions=known.positions + again.positions,
        is_table=known.is_table or again.is_table,
        reason=reason,
        supported=known.supported and again.supported and not unlike,
    )


def _others(known: Layer, again: Layer) -> tuple[Unrolled, ...]:
    """The forms that both sites allow."""
    there = {other.form: other for other in again.others}
    return tuple(o.also_used(there[o.form].positions) for o in known.others if o.form in there)
