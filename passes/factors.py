"""The modules a rewrite puts in: a factor pair at the place of one dense layer.

A pair class is one *form* for one kind of layer. It says how the dense weight is read as a stack of matrices `W`
`(groups, rows, cols)` (`unroll`), and how the factors `U` `(groups, r, cols)` and `V` `(groups, rows, r)` of `W ≈ V
U` are folded into the weights of its two layers `u` (first) and `v` (second). Everything else (splitting, optimizer
state, Frobenius decay, merging, checking) is written once against those few functions, so a new kind or a new form
is one class here and one line in `PAIRS`.

The dense layer's bias belongs to `v`: a bias on `u` would be redundant, `V(Ux + b) + c = VUx + (Vb + c)`. Stride,
padding, dilation, padding mode and groups belong to `u`; `v` is pointwise. `u` then `v` is what Pufferfish §2 and
Cuttlefish §3 use: thin k×k, then 1×1.
"""

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fxrank.passes.errors import RankError, unknown_name
from fxrank.passes.spectra import truncated_factors


Dense = nn.Linear | nn.Conv2d
"""Layers that have a pair. A new kind joins here."""
Layers = tuple[Dense, nn.BatchNorm2d | None, Dense]


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight; for layers that are known to have one."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


class FactorPair(nn.Module):
    """Two thin layers, `v(u(x))`, in the place of one dense layer.

    Children: `u`, `v`, and `norm`, a BatchNorm between them if it was asked for. The state dict has only their
    plain keys (`u.weight`, `v.weight`, `v.bias`, …). For code that only looks at the layer, `weight`, `bias` and
    the geometry are readable under the dense layer's own names; `weight` builds the dense product at every reading,
    so do not compute with it.
    """

    form: ClassVar[str] = "channel"
    kind: ClassVar[str]
    dense_type: ClassVar[type[nn.Module]]
    geometry: ClassVar[tuple[str, ...]]
    """Attributes of the dense layer that a reader may ask the pair for."""

    u: nn.Linear | nn.Conv2d
    v: nn.Linear | nn.Conv2d
    norm: nn.BatchNorm2d | None

    def __init__(self, dense: nn.Module, rank: int, extra_bn: bool = False) -> None:
        """Empty factors of rank `rank` (columns of `V` per group) with the geometry, dtype, device and training
        mode of `dense`.

        Raises `RankError` if `rank` is not in 1 … full rank.
        """
        super().__init__()
        full = self.full_rank_of(dense)
        if not 1 <= rank <= full:
            raise RankError(f"a rank must be in 1 … {full}, the full rank of the layer; got {rank}.")
        self.rank = rank
        weight = weight_of(dense)
        self.dense_shape: tuple[int, ...] = tuple(weight.shape)
        for name in self.geometry:
            self.__dict__[name] = getattr(dense, name)
        self.u, self.norm, self.v = self._layers(dense, {"device": weight.device, "dtype": weight.dtype}, extra_bn)
        self.train(dense.training)
        for parameter in self.parameters():
            parameter.requires_grad_(weight.requires_grad)
        if getattr(dense, "bias", None) is not None:
            self.v.bias = cast(
                nn.Parameter, dense.bias
            )  # the very parameter: its gradient, optimizer state and flags go on

    @classmethod
    def full_rank_of(cls, dense: nn.Module) -> int:
        """`min(rows, cols)` of one group's matrix."""
        return min(cls.unroll(dense, weight_of(dense)).shape[1:])

    @classmethod
    @abstractmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        """A tensor of the dense weight's shape (weight, gradient, moment) as a stack `(groups, rows, cols)`."""

    @classmethod
    def spectral_view(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        """As `unroll`, rows and columns in whatever order needs no copy: same singular values."""
        return cls.unroll(dense, tensor)

    @abstractmethod
    def _layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers: ...

    @abstractmethod
    def fold_u(self, u: Tensor) -> Tensor:
        """`U` `(groups, r, cols)` in the shape of `u.weight`."""

    @abstractmethod
    def fold_v(self, v: Tensor) -> Tensor:
        """`V` `(groups, rows, r)` in the shape of `v.weight`."""

    @abstractmethod
    def unfold_u(self, tensor: Tensor) -> Tensor:
        """Inverse of `fold_u`."""

    @abstractmethod
    def unfold_v(self, tensor: Tensor) -> Tensor:
        """Inverse of `fold_v`."""

    @abstractmethod
    def fold_dense(self, matrix: Tensor) -> Tensor:
        """Inverse of `unroll`."""

    @abstractmethod
    def to_dense(self) -> Dense:
        """The dense layer with the product of the factors as its weight (exact up to rounding; a `norm` is folded
        in with its running statistics).
        """

    def split(self, weight: Tensor) -> None:
        """Fill the factors with the best rank-r approximation of the dense `weight`, split by √Σ (Cuttlefish §3.3)."""
        self.fill(*truncated_factors(type(self).unroll(self, weight), self.rank))

    def fill(self, u: Tensor, v: Tensor) -> None:
        """Fill the factors with `U` `(groups, r, cols)` and `V` `(groups, rows, r)`."""
        with torch.no_grad():
            self.u.weight.copy_(self.fold_u(u))
            self.v.weight.copy_(self.fold_v(v))

    def forward(self, input: Tensor) -> Tensor:
        """`v(u(x))`; shapes in and out, and the argument's name, as the dense layer's."""
        x: Tensor = self.u(input)
        if self.norm is not None:
            x = self.norm(x)
        out: Tensor = self.v(x)
        return out

    @property
    def weight(self) -> Tensor:
        """The dense weight, built anew; differentiable in the factors. A `norm` is not part of it."""
        return self.fold_dense(self.unfold_v(self.v.weight) @ self.unfold_u(self.u.weight))

    @property
    def bias(self) -> Tensor | None:
        """The dense layer's own bias parameter, or None."""
        bias = self.v.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def extra_repr(self) -> str:
        return f"{self.kind} {self.dense_shape}, rank={self.rank}"


class LowRankLinear(FactorPair):
    """`Linear(in, out)` as `Linear(in, r, bias=False)` then `Linear(r, out)`.

    Break-even rank `in·out / (in + out)` in parameters and in MACs. `extra_bn` is not available: the feature
    dimension's place in the input is the caller's business.
    """

    kind = "linear"
    dense_type = nn.Linear
    geometry = ("in_features", "out_features")
    in_features: int
    out_features: int

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return tensor[None]

    def _layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        first: nn.Linear = nn.utils.skip_init(nn.Linear, self.in_features, self.rank, bias=False, **place)
        return first, None, nn.utils.skip_init(nn.Linear, self.rank, self.out_features, bias=False, **place)

    def fold_u(self, u: Tensor) -> Tensor:
        return u[0]

    def fold_v(self, v: Tensor) -> Tensor:
        return v[0]

    def unfold_u(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor[None]

    def fold_dense(self, matrix: Tensor) -> Tensor:
        return matrix[0]

    def to_dense(self) -> Dense:
        weight = self.weight.detach()
        dense = nn.utils.skip_init(
            nn.Linear, self.in_features, self.out_features, bias=False, device=weight.device, dtype=weight.dtype
        )
        return _fill_dense(dense, self, weight, self.bias)


class LowRankConv2d(FactorPair):
    """`Conv2d(m, n, k)` as `Conv2d(m, g·r, k)` then `Conv2d(g·r, n, 1)`, both with the layer's `g` groups and rank
    `r` in each.

    Unrolled matrix per group `(n/g, m/g·kh·kw)`. Break-even rank `m·n·kh·kw / (m·kh·kw + n·g)` for `g = 1`; see
    `Layer.break_even_rank`. Stride, padding (numbers or `same`), padding mode and dilation stay with the first.
    """

    kind = "conv2d"
    dense_type = nn.Conv2d
    geometry = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "transposed",
        "output_padding",
    )
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        groups = dense.groups
        assert isinstance(groups, int)
        return tensor.reshape(groups, tensor.shape[0] // groups, -1)

    @classmethod
    def spectral_view(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        if tensor.is_contiguous(memory_format=torch.channels_last):
            tensor = tensor.permute(0, 2, 3, 1)
        return cls.unroll(dense, tensor)

    def _conv(self, place: dict[str, Any], **changes: Any) -> nn.Conv2d:
        options: dict[str, Any] = {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.padding_mode,
            "bias": False,
        }
        conv: nn.Conv2d = nn.utils.skip_init(nn.Conv2d, **(options | changes), **place)
        return conv

    def _layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        width = self.groups * self.rank
        pointwise = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "padding_mode": "zeros"}
        first = self._conv(place, out_channels=width)
        second = self._conv(place, in_channels=width, **pointwise)
        if weight_of(dense).is_contiguous(memory_format=torch.channels_last) and not weight_of(dense).is_contiguous():
            first.to(memory_format=torch.channels_last)
            second.to(memory_format=torch.channels_last)
        return first, nn.BatchNorm2d(width, **place) if extra_bn else None, second

    def fold_u(self, u: Tensor) -> Tensor:
        return u.reshape(self.groups * self.rank, self.in_channels // self.groups, *self.kernel_size)

    def fold_v(self, v: Tensor) -> Tensor:
        return v.reshape(self.out_channels, self.rank, 1, 1)

    def unfold_u(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, self.rank, -1)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, -1, self.rank)

    def fold_dense(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.dense_shape)

    def to_dense(self) -> Dense:
        v, u = self.unfold_v(self.v.weight.detach()), self.unfold_u(self.u.weight.detach())
        bias = self.bias
        if isinstance(self.norm, nn.BatchNorm2d):
            norm = self.norm
            assert norm.running_mean is not None and norm.running_var is not None
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
            shift = (norm.bias - norm.running_mean * scale).detach().reshape(self.groups, self.rank, 1)
            v_shift = (v @ shift).reshape(-1)
            u = u * scale.reshape(self.groups, self.rank, 1)
            trained = self.v.weight.requires_grad if bias is None else bias.requires_grad
            bias = nn.Parameter(v_shift if bias is None else bias.detach() + v_shift, trained)
        weight = self.fold_dense(v @ u)
        return _fill_dense(self._conv({"device": weight.device, "dtype": weight.dtype}), self, weight, bias)


def _fill_dense(dense: Dense, pair: FactorPair, weight: Tensor, bias: Tensor | None) -> Dense:
    source = pair.u.weight
    assert isinstance(source, Tensor)
    with torch.no_grad():
        dense.weight.copy_(weight)
    if isinstance(source, Tensor) and weight.ndim == 4 and not source.is_contiguous():
        dense.to(memory_format=torch.channels_last)
    dense.weight.requires_grad_(source.requires_grad)
    dense.bias = bias
    return dense.train(pair.training)


PAIRS: dict[type[nn.Module], dict[str, type[FactorPair]]] = {
    nn.Linear: {"channel": LowRankLinear},
    nn.Conv2d: {"channel": LowRankConv2d},
}
"""Dense layer class → form → pair class. Looked up by exact type: a subclass may compute something else."""


def pair_class(dense: nn.Module, form: str = "channel") -> type[FactorPair] | None:
    """The pair class for this layer, or None if its exact type has none. Raises `ValueError` for an unknown form."""
    forms = {name for by_form in PAIRS.values() for name in by_form}
    if form not in forms:
        raise unknown_name("form", form, forms)
    return PAIRS.get(type(dense), {}).get(form)


def make_pair(dense: nn.Module, rank: int, *, form: str = "channel", extra_bn: bool = False) -> FactorPair:
    """A factor pair of rank `rank` that approximates `dense` best (Eckart-Young); equal to it up to rounding at
    full rank.

    `dense` is left as it is; its bias parameter is shared, not copied. Raises `RankError` for a rank outside 1 …
    full rank and `TypeError` for a layer whose exact type has no pair.
    """
    cls = pair_class(dense, form)
    if cls is None:
        names = ", ".join(t.__name__ for t in PAIRS)
        raise TypeError(f"only {names} have a factor pair; got {type(dense).__name__}. Leave this layer dense.")
    pair = cls(dense, rank, extra_bn)
    pair.split(weight_of(dense))
    return pair
