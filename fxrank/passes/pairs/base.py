"""The modules a rewrite puts in: a factor pair at the place of one dense layer. Linear layers and embeddings here.

A pair class is one *form* for one kind of layer. It says how the dense weight is read as a stack of matrices `W`
`(groups, rows, cols)` (`unroll`), and how the factors `U` `(groups, r, cols)` and `V` `(groups, rows, r)` of `W ≈ V
U` are folded into the weights of its two layers `u` (first) and `v` (second). Everything else (splitting, optimizer
state, Frobenius decay, merging, checking) is written once against those few functions, so a new kind or a new form
is one class and one line in `kinds.PAIRS`.

The dense layer's bias belongs to `v`: a bias on `u` would be redundant, `V(Ux + b) + c = VUx + (Vb + c)`. Stride,
padding, dilation, padding mode and groups belong to `u`; `v` is pointwise. `u` then `v` is what Pufferfish §2 and
Cuttlefish §3 use: thin k×k, then 1×1.
"""

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxrank.passes.errors import RankError
from fxrank.passes.pairs.products import factored
from fxrank.passes.spectra.exact import truncated_factors
from fxrank.passes.model.weights import weight_of

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Layers = tuple[nn.Module, Norm | None, nn.Module]


class FactorPair(nn.Module):
    """Two thin layers, `v(u(x))`, in the place of one dense layer.

    Children: `u`, `v`, and `norm`, a BatchNorm between them if it was asked for. The state dict has only their
    plain keys (`u.weight`, `v.weight`, `v.bias`, …). For code that reads the layer's weight and geometry itself, they
    are there under the dense layer's own names; `weight` is a `FactoredWeight`, which multiplies through the factors.
    """

    form: ClassVar[str] = "channel"
    kind: ClassVar[str]
    geometry: ClassVar[tuple[str, ...]]
    """Attributes of the dense layer that a reader may ask the pair for."""
    children_in_order: ClassVar[tuple[str, ...]] = ("u", "norm", "v")
    """The children as the forward calls them."""

    u: Any
    v: Any
    norm: Norm | None

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
            # The very parameter: its gradient, optimizer state and flags go on.
            self.v.bias = cast(nn.Parameter, dense.bias)

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
    def to_dense(self) -> nn.Module:
        """The dense layer with the product of the factors as its weight (exact up to rounding; a `norm` is folded
        in with its running statistics).
        """

    def split(self, weight: Tensor) -> None:
        """Fill the factors with the best rank-r approximation of the dense `weight`, split by √Σ (Cuttlefish §3.3)."""
        if not weight.is_meta:
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
        """The dense weight as the product of the factors, made where its numbers are needed; differentiable. A `norm`
        is not part of it.
        """
        u, v = self.unfold_u(self.u.weight), self.unfold_v(self.v.weight)
        if issubclass(type(u), fx.Proxy):  # being traced: the product in full
            return self.fold_dense(v @ u)
        return self._factored(u, v)

    def _factored(self, u: Tensor, v: Tensor) -> Tensor:
        return cast(Tensor, factored(u, v, self.dense_shape))  # or what stands in for one while a graph is compiled

    @property
    def bias(self) -> Tensor | None:
        """The dense layer's own bias parameter, or None."""
        bias: Tensor | None = self.v.bias
        return bias

    @property
    def extra_norm(self) -> Norm | None:
        """The BatchNorm between the factors, if there is one."""
        return cast("Norm | None", self._modules.get("norm"))

    def extra_repr(self) -> str:
        return f"{self.kind} {self.dense_shape}, rank={self.rank}"












def fill_dense(dense: nn.Module, pair: FactorPair, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """`dense` with this weight and bias, and the pair's mode, gradient flag and memory format."""
    source: Tensor = pair.u.weight
    own = weight_of(dense)
    with torch.no_grad():
        own.copy_(weight)
    if weight.ndim == 4 and not source.is_contiguous():
        dense.to(memory_format=torch.channels_last)
    weight_of(dense).requires_grad_(source.requires_grad)
    if bias is not None:
        dense.register_parameter("bias", cast(nn.Parameter, bias))
    return dense.train(pair.training)
