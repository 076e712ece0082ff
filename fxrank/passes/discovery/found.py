"""From one place where a weight is used to the `Layer` that it makes, or to the reason why nothing can be done to it there."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.made import Made
from fxrank.passes.model.beyond import masks_gradient
from fxrank.passes.model.names import own_name
from fxrank.passes.model.quantized import is_quantized
from fxrank.passes.model.weights import is_derived, weight_of
from fxrank.passes.pairs.base import FactorPair, Unrolled
from fxrank.passes.pairs.registry import forms_of

QUANTIZED = "its weight is quantized; factorize before quantizing"
_TIED = "tied "
"""What stands before the kind of a table that a layer of another kind shares."""


@dataclass(frozen=True)
class Use:
    """How a weight is used at one place: by a call of its layer, whose output has this shape, or by other code, which multiplies
    with each of its numbers at so many `positions`, in the products that are `made` there.
    """

    node: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...] | None = None
    positions: float = 0
    made: Made | None = None

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
    others = [f for f, other in pairs.items() if f != form and other.suits(dense) and use.allows(other)]
    use = _measured(dense, use, [pairs[f] for f in (form, *others)])
    unrolled = _unrolled(dense, form, pair, use)
    positions = use.counts(pair, dense)[0]
    outputs = unrolled.groups * unrolled.rows * positions if use.output_shape is None else math.prod(use.output_shape)
    layer = Layer(
        name=name,
        kind=pair.kind,
        weight_shape=tuple(weight.shape),
        unrolled=unrolled,
        others=tuple(one for other in others if not (one := _unrolled(dense, other, pairs[other], use)).whole),
        positions=positions,
        outputs=round(outputs),
        is_table=pair.is_table,
        paths=paths or (name,),
        nodes=(use.node,),
        input_shape=use.input_shape,
        dtype=weight.dtype,
        geometry=tuple(str(getattr(dense, g)) for g in pair.geometry),
        made=() if use.made is None else (use.made,),
        reason=reason,
        supported=reason is None,
    )
    if layer.reason is None and masks_gradient(weight):
        layer = layer.kept_for("a hook on its gradient holds something of the weight's shape, which fits no factor")
    return _standing_for(dense, weight), layer


def _standing_for(dense: nn.Module, weight: Tensor) -> Tensor:
    """Of a layer that derives its weight, one parameter stands for it."""
    return next(p for p in dense.parameters() if p.ndim >= 2) if is_derived(dense) else weight


def _unrolled(dense: nn.Module, form: str, pair: type[FactorPair], use: Use) -> Unrolled:
    shape = torch.empty(weight_of(dense).shape, device="meta")  # no kernel is copied for its shape
    groups, rows, cols = pair.unroll(dense, shape).shape
    if use.made is None:
        return Unrolled(pair, form, groups, rows, cols, use.counts(pair, dense)[1:])
    # Linear in the rank, but for what is done with the whole matrix. Not from rank 1, of which torch makes no product.
    low, high = (min(rank, rows, cols) for rank in (2, 3))
    count, more = (use.made.multiply_adds(dense, pair, rank) for rank in (low, high))
    of_one = more - count if high > low else count / low
    places = of_one / (groups * (rows + cols))
    return Unrolled(pair, form, groups, rows, cols, (places, places), round(count - low * of_one))


def _measured(dense: nn.Module, use: Use, pairs: list[type[FactorPair]]) -> Use:
    """The use as it is counted, without its products where torch cannot run them, of the weight or of a pair, without numbers."""
    if use.made is None:
        return use
    try:
        counts = [use.made.multiply_adds(dense), *(use.made.multiply_adds(dense, pair, 1) for pair in pairs)]
    except Exception:  # whatever torch says of an operation that it has not for such tensors
        return replace(use, made=None)
    return replace(use, positions=counts[0] / weight_of(dense).numel())


def _refused_numbers(weight: Tensor) -> str | None:
    if is_quantized(weight):
        return QUANTIZED
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
        unrolled=known.unrolled.also_used(again.unrolled),
        others=_others(known, again),
        unsaving=known.unsaving or again.unsaving,
        made=known.made + again.made if known.made and again.made else (),
        positions=known.positions + again.positions,
        is_table=known.is_table or again.is_table,
        reason=reason,
        supported=known.supported and again.supported and not unlike,
        guarded=known.guarded or again.guarded,
    )


def _others(known: Layer, again: Layer) -> tuple[Unrolled, ...]:
    """The forms that both sites allow."""
    there = {other.form: other for other in again.others}
    return tuple(o.also_used(there[o.form]) for o in known.others if o.form in there)
