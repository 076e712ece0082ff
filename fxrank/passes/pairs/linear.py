"""Factor pairs of linear layers, whole and in three blocks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair, Layers, whole_number
from fxrank.passes.pairs.registry import register_pair


class LowRankLinear(FactorPair):
    """`Linear(in, out)` as `Linear(in, r, bias=False)` then `Linear(r, out)`.

    Break-even rank `in·out / (in + out)` in parameters and in MACs. `extra_bn` is not available: the feature
    dimension's place in the input is the caller's business.
    """

    kind = "linear"
    geometry = ("in_features", "out_features")
    multiplies_when_read = True
    in_features: int
    out_features: int

    @classmethod
    def side(cls, dense: nn.Module) -> str | None:
        _, rows, cols = cls.unroll(dense, weight_of(dense)).shape
        return "inputs" if cols < rows else "outputs"

    @classmethod
    def seen(cls, dense: nn.Module, side: str, input: Tensor, output: Tensor) -> Tensor:
        if side == "inputs":
            return input.unsqueeze(-2)
        groups, rows, _ = cls.unroll(dense, weight_of(dense)).shape
        bias = getattr(dense, "bias", None)
        found = output if bias is None else output - bias
        return found.reshape(*found.shape[:-1], groups, rows)

    def make_layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        # The output projection of torch's attention is a class of its own, which no quantizer takes, as its weight is read. So
        # are its factors and its merged layer.
        kind = self.dense_class = type(dense) if type(dense) is NonDynamicallyQuantizableLinear else nn.Linear
        first: nn.Linear = nn.utils.skip_init(kind, self.in_features, self.rank, bias=False, **place)
        return first, None, nn.utils.skip_init(kind, self.rank, self.out_features, bias=False, **place)

    def empty_dense(self, place: dict[str, Any]) -> nn.Module:
        kind = getattr(self, "dense_class", nn.Linear)
        dense: nn.Module = nn.utils.skip_init(kind, self.in_features, self.out_features, bias=False, **place)
        return dense


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

    blocks = 3
    automatic = True

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        rows = whole_number(dense, "out_features")
        return f"in {cls.blocks} blocks: it has {rows} rows" if rows % cls.blocks else None

    @classmethod
    def suits(cls, dense: nn.Module) -> bool:
        return whole_number(dense, "out_features") == cls.blocks * whole_number(dense, "in_features")

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.reshape(cls.blocks, -1, tensor.shape[1])

    def make_layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        width = self.blocks * self.rank
        first: nn.Linear = nn.utils.skip_init(nn.Linear, self.in_features, width, bias=False, **place)
        return first, None, BlockLinear(self.blocks, self.rank, self.out_features, **place)

    def unfold_u(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.blocks, self.rank, -1)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.blocks, -1, self.rank)


register_pair(nn.Linear, LowRankLinear)
register_pair(nn.Linear, LowRankFusedLinear, form="qkv")
register_pair(NonDynamicallyQuantizableLinear, LowRankLinear)
