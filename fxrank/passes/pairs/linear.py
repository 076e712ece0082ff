"""Factor pairs of linear layers, whole and in blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxrank.passes.pairs.base import FactorPair, Layers, fill_dense


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
