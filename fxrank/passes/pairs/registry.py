"""Which layers have a factor pair, and how to find a layer again by its name."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxrank.passes.pairs.convolution import (
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
)
from fxrank.passes.errors import unknown_name
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.embedding import LowRankEmbedding
from fxrank.passes.pairs.linear import LowRankFusedLinear, LowRankLinear
from fxrank.passes.model.names import module_at
from fxrank.passes.pairs.parameter import LowRankWeight, RawWeight
from fxrank.passes.model.weights import computed_part, standardizes, weight_of

PAIRS: dict[type[nn.Module], dict[str, type[FactorPair]]] = {
    nn.Linear: {"channel": LowRankLinear, "qkv": LowRankFusedLinear},
    NonDynamicallyQuantizableLinear: {"channel": LowRankLinear},
    nn.Conv1d: {"channel": LowRankConv1d},
    nn.Conv2d: {"channel": LowRankConv2d},
    nn.Conv3d: {"channel": LowRankConv3d},
    nn.ConvTranspose1d: {"channel": LowRankConvTranspose1d},
    nn.ConvTranspose2d: {"channel": LowRankConvTranspose2d},
    nn.ConvTranspose3d: {"channel": LowRankConvTranspose3d},
    nn.Embedding: {"channel": LowRankEmbedding},
    RawWeight: {"channel": LowRankWeight, "qkv": LowRankWeight, "stack": LowRankWeight},
}
"""Dense layer class → form → pair class. A subclass counts as its base class if it inherits the forward; a subclass with
a forward of its own is traced, and its weight is a raw one, except where it standardizes its weight.
"""
FORMS = sorted({form for forms in PAIRS.values() for form in forms})


def dense_type(layer: nn.Module) -> type[nn.Module] | None:
    """The class in `PAIRS` that computes what this layer does, None if there is none."""
    kind = type(layer)
    if kind in PAIRS:
        return kind
    for base in kind.__mro__[1:]:
        if base in PAIRS:
            inherits = kind.forward is base.forward and _inner(kind) is _inner(base)
            return base if inherits or standardizes(layer) else None
    return None


def _inner(kind: type[nn.Module]) -> object:
    return getattr(kind, "_conv_forward", None)


def pair_class(dense: nn.Module, form: str = "channel") -> type[FactorPair] | None:
    """The pair class for this layer, or None if it has none. Raises `ValueError` for an unknown form."""
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    kind = dense_type(dense)
    if kind is None or (kind is nn.Embedding and (dense.max_norm is not None or dense.scale_grad_by_freq)):
        return None
    if computed_part(dense) is not None:
        return None
    return PAIRS[kind].get(form)


def make_pair(dense: nn.Module, rank: int, *, form: str = "channel", extra_bn: bool = False) -> FactorPair:
    """A factor pair of rank `rank` that approximates `dense` best (Eckart-Young); equal to it up to rounding at
    full rank.

    `dense` is left as it is; its bias parameter is shared, not copied. Raises `RankError` for a rank outside 1 …
    full rank and `TypeError` for a layer that has no pair.
    """
    cls = pair_class(dense, form)
    if cls is None:
        names = ", ".join(t.__name__ for t in PAIRS if t is not RawWeight)
        raise TypeError(f"only {names} have a factor pair; got {type(dense).__name__}. Leave this layer dense.")
    pair = cls(dense, rank, extra_bn)
    pair.split(weight_of(dense))
    return pair




