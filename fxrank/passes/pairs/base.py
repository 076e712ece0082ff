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


class LowRankLinear(FactorPair):
    """`Linear(in, out)` as `Linear(in, r, bias=False)` then `Linear(r, out)`.

    Break-even rank `in·out / (in + out)` in parameters and in MACs. `extra_bn` is not available: the feature
    dimension's place in the input is the caller's business.
    """

    kind = "linear"
    geometry = ("in_features", "out_features")
    in_features: int
    out_features: int

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return tensor[None]

    def _layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        # The output projection of torch's attention is a class of its own, which its merged layer must be again.
        self.dense_class = type(dense) if type(dense) is NonDynamicallyQuantizableLinear else nn.Linear
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
        return matrix.reshape(self.dense_shape)

    def to_dense(self) -> nn.Module:
        weight = self.fold_dense(self.unfold_v(self.v.weight.detach()) @ self.unfold_u(self.u.weight.detach()))
        dense = nn.utils.skip_init(
            getattr(self, "dense_class", nn.Linear),
            self.in_features,
            self.out_features,
            bias=False,
            device=weight.device,
            dtype=weight.dtype,
        )
        return fill_dense(dense, self, weight, self.bias)


class BlockLinear(nn.Module):
    """`blocks` linear layers side by side, each on its own share of the input: `(…, blocks·in)` to `(…, out)`, weight
    `(out, in)`, the rows of each block in turn.
    """

    bias: nn.Parameter | None

    def __init__(self, blocks: int, in_features: int, out_features: int, **place: Any) -> None:
        """The weight is left uninitialized."""
        super().__init__()
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **place))
        self.register_parameter("bias", None)

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        weights = self.weight.chunk(self.blocks)
        parts = zip(input.chunk(self.blocks, -1), weights, strict=True)
        out = torch.cat([F.linear(x, w) for x, w in parts], -1)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}"


class LowRankFusedLinear(LowRankLinear):
    """A fused `Linear(in, 3·d)` (queries, keys and values) as three pairs: `Linear(in, 3r)`, then each third by itself.

    Each third has a subspace of its own, as in Pufferfish §2.3, where they are separate matrices. For the same rank it
    takes `3·r·in + r·out` parameters against `r·in + r·out` of one joint pair, at a smaller error; which is better for
    the same size depends on the weight.
    """

    form = "qkv"
    blocks = 3

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.reshape(cls.blocks, -1, tensor.shape[1])

    def _layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        width = self.blocks * self.rank
        first: nn.Linear = nn.utils.skip_init(nn.Linear, self.in_features, width, bias=False, **place)
        return first, None, BlockLinear(self.blocks, self.rank, self.out_features, **place)

    def fold_u(self, u: Tensor) -> Tensor:
        return u.flatten(0, 1)

    def fold_v(self, v: Tensor) -> Tensor:
        return v.flatten(0, 1)

    def unfold_u(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.blocks, self.rank, -1)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.blocks, -1, self.rank)


class Expansion(nn.Module):
    """`x @ weight` with a weight `(r, out)`: the second step of an embedding, on the factor that a tied decoder uses as
    its first.
    """

    def __init__(self, in_features: int, out_features: int, **place: Any) -> None:
        """The weight is left uninitialized."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features, **place))

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        return input @ self.weight


class LowRankEmbedding(FactorPair):
    """`Embedding(n, d)` as `Embedding(n, r)`, the factor `v`, then `r → d`, the factor `u`.

    The factors have the shapes of a `Linear(d, n)`'s, so that a tied decoder shares them. Break-even rank `n·d / (n +
    d)` in parameters; a lookup costs no MACs, the pair's second step `r·d` for each. A maximal norm and gradients scaled
    by frequency are not available.
    """

    kind = "embedding"
    geometry = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )
    children_in_order = ("v", "u")
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return tensor[None]

    def _table(self, width: int, place: dict[str, Any]) -> nn.Embedding:
        options = {
            n: self.__dict__[n] for n in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        }
        table: nn.Embedding = nn.utils.skip_init(nn.Embedding, self.num_embeddings, width, **options, **place)
        return table

    def _layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        return Expansion(self.rank, self.embedding_dim, **place), None, self._table(self.rank, place)

    fold_u = LowRankLinear.fold_u
    fold_v = LowRankLinear.fold_v
    unfold_u = LowRankLinear.unfold_u
    unfold_v = LowRankLinear.unfold_v
    fold_dense = LowRankLinear.fold_dense

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.u(self.v(input))
        if self.padding_idx is not None:  # such places give no gradient, to `u` neither
            out = torch.where((input == self.padding_idx).unsqueeze(-1), out.detach(), out)
        return out

    @property
    def bias(self) -> Tensor | None:
        """An embedding has none."""
        return None

    def to_dense(self) -> nn.Module:
        weight = (self.v.weight @ self.u.weight).detach()
        table = self._table(self.embedding_dim, {"device": weight.device, "dtype": weight.dtype})
        return fill_dense(table, self, weight, None)


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
