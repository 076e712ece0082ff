"""Form "gauge": factor pairs in which `r` rows of `V` are the identity and take no parameters.

A product has many factors, `V U = (V T⁻¹)(T U)`, one for each choice of basis (of gauge, in physics) between them. With `T` the rows
`P` of `V`, these rows become the identity, and `T U` are the same rows of the product itself:

    V U = V' (V U)[P]        V'[P] = I        r·(rows + cols - r) numbers, not r·(rows + cols)

So a pair is always smaller than its layer; at full rank it is as large, and where `rows ≤ cols` it is the layer. Source: PIFA (ICML
2025), where the rows are called pivots, and FlexRank's GAR (ICML 2026).

Any `P` with an invertible `T` gives the same product. To keep rounding small it is chosen by QR with column pivoting (Businger &
Golub 1965) of `Qᵀ`, where `V = Q R`: numbers in `V'` are then of the order of 1. `Q` has full rank whatever `V` has, so a weight of lower
rank than `r` is no special case.

What it costs: the output of the pair is put together from the middle and what the free rows make of it, and brought into order by one
indexed copy. The multiply-adds that the identity saves, `r²` at each place, seldom pay for that: the form saves memory, not time.
"""

from typing import Any

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrank.passes.errors import RankError
from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair, Layers, Unrolled
from fxrank.passes.pairs.convolution import LowRankConv1d, LowRankConv2d, LowRankConv3d
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.passes.pairs.registry import register_pair
from fxrank.passes.spectra import linalg

_MULTIPLY = (F.linear, F.conv1d, F.conv2d, F.conv3d)


class FreeRows(nn.Module):
    """The second factor: `(…, groups·r, *places)` to `(…, groups·rows, *places)`, pointwise in the places.

    `weight` `(groups·(rows - r), r, 1…)` are the rows of `V` that are free, in order; `free` `(groups·rows,)` is 1 where a row is one
    of these and 0 where it is one of the identity, which lie in order in each group. A mask of floats and no index, because averages of a
    model's buffers compute with whatever is in them: 0 and 1 stay that, up to rounding, and other whole numbers do not.
    """

    bias: nn.Parameter | None
    free: Tensor

    def __init__(self, groups: int, rows: int, rank: int, places: int, place: dict[str, Any]) -> None:
        """The weight is left uninitialized; the first rows of each group are the identity."""
        super().__init__()
        self.groups, self.rank = groups, rank
        shape = groups * (rows - rank), rank, *[1] * places
        self.weight = nn.Parameter(torch.empty(shape, **place))
        free = torch.ones(groups, rows, **place)
        free[:, :rank] = 0
        self.register_buffer("free", free.flatten())
        self.register_parameter("bias", None)

    @property
    def is_free(self) -> Tensor:
        """Of each row, whether it is free."""
        return self.free > 0.5

    @property
    def order(self) -> Tensor:
        """Where each row lies among those of the identity, of all groups, and the free ones after them."""
        free = self.is_free
        before = free.cumsum(0)
        return torch.where(
            free, before + (self.groups * self.rank - 1), torch.arange(len(free), device=free.device) - before
        )

    def forward(self, input: Tensor) -> Tensor:
        """See the class."""
        places = self.weight.ndim - 2
        rows = -1 - places  # the dimension
        if not len(self.weight):  # all rows are the identity
            return input if self.bias is None else input + self.bias.to(input.dtype).reshape(-1, *[1] * places)
        options = (None, 1, 0, 1, self.groups) if places else ()
        out = torch.cat([input, _MULTIPLY[places](input, self.weight, *options)], rows)
        last = rows != -1 and out.stride(rows) == 1  # channels_last, which stays
        there = -1 if last else rows
        out = (out.movedim(rows, -1) if last else out).index_select(there, self.order)
        if self.bias is not None:
            out.add_(self.bias.reshape(-1, *[1] * (-1 - there)))  # in place: under autocast a bias is wider
        return out.movedim(-1, rows) if last else out

    def extra_repr(self) -> str:
        return f"{len(self.free)} rows, {len(self.weight)} of them free, rank={self.rank}, groups={self.groups}"


class _GaugePair(FactorPair):
    """What the kinds share. It multiplies with less only where the layer is called: for code that reads the weight it is the product."""

    basis = ("free",)
    saves_time = False
    multiplies_when_read = False
    v: FreeRows

    def __init__(self, dense: nn.Module, rank: int, extra_bn: bool = False) -> None:
        """See `FactorPair`."""
        super().__init__(dense, rank, extra_bn)
        if not self.v.weight.numel():  # nothing in it trains, and there is nothing that it could wait for
            self.v.weight.requires_grad_(False)

    def make_layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        first, norm, _ = super().make_layers(dense, place, extra_bn)  # type: ignore[safe-super]
        groups, rows, _ = type(self).unroll(dense, torch.empty(self.dense_shape, device="meta")).shape
        second = FreeRows(groups, rows, self.rank, len(self.dense_shape) - 2, place)
        if second.weight.ndim == 4 and not weight_of(first).is_contiguous():
            second.to(memory_format=torch.channels_last)
        return first, norm, second

    def fold_v(self, v: Tensor) -> Tensor:
        rows = v.reshape(-1, self.rank)
        return rows[self.v.is_free.to(rows.device)].reshape(self.v.weight.shape)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        identity = torch.eye(self.rank, dtype=tensor.dtype, device=tensor.device).repeat(self.v.groups, 1)
        rows = torch.cat([identity, tensor.reshape(-1, self.rank)])
        return rows.index_select(0, self.v.order.to(tensor.device)).reshape(self.v.groups, -1, self.rank)

    def choose_basis(self, v: Tensor) -> None:
        free = torch.ones(v.shape[:2])
        for mask, q in zip(free, linalg.qr(v.double())[0].mT.cpu().numpy(), strict=True):
            _, pivots = scipy.linalg.qr(q, mode="r", pivoting=True)
            mask[torch.from_numpy(pivots[: self.rank]).long()] = 0
        self.v.free.copy_(free.flatten())

    def in_basis(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        u, v = u.to(torch.float64), v.to(torch.float64)
        fixed = ~self.v.is_free.to(v.device).reshape(v.shape[:2])
        q = linalg.qr(v)[0]
        top = q[fixed].reshape(len(v), self.rank, self.rank)
        return v[fixed].reshape(top.shape) @ u, linalg.solve(top, q, left=False)

    def _refitted(self, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        u, v = super()._refitted(weight)
        if self.extra_norm is not None:
            raise RankError(
                "the weight of a pair whose second factor has rows of the identity stays as it is under a BatchNorm between the factors, as these "
                "rows cannot be scaled; got another. Merge the pair first (fxrank.merge), which takes the BatchNorm in."
            )
        return self.unfold_u(self.u.weight.detach()) if u is None else u, v  # rows of the identity hold no scale

    @classmethod
    def pair_parameters(cls, weight: Unrolled, rank: int) -> int:
        """`groups · r · (rows + cols - r)`."""
        return weight.groups * rank * (weight.rows + weight.cols - rank)

    @classmethod
    def pair_macs(cls, weight: Unrolled, rank: int) -> int:
        of_u, of_v = weight.positions
        return weight.whole + round(weight.groups * rank * (weight.cols * of_u + (weight.rows - rank) * of_v))

    @classmethod
    def break_even_rank(cls, weight: Unrolled) -> float:
        """The full rank: `r·(rows + cols - r) = rows·cols` for `r = rows` and for `r = cols`."""
        return float(weight.full_rank)


class LowRankGaugeLinear(_GaugePair, LowRankLinear):
    """`Linear(in, out)` as `Linear(in, r, bias=False)`, whose outputs are `r` of the layer's, and the others as their combinations.

    `r·(in + out - r)` parameters and MACs.
    """


class LowRankGaugeConv1d(_GaugePair, LowRankConv1d):
    """`Conv1d` in form "gauge"; see `LowRankGaugeConv2d`."""


class LowRankGaugeConv2d(_GaugePair, LowRankConv2d):
    """`Conv2d(m, n, k)` as `Conv2d(m, g·r, k)`, whose outputs are `r` channels of each of the layer's `g` groups, and the other channels
    as their combinations.

    `r·(m·kh·kw + n - r)` parameters for `g = 1`, and so many MACs at each place. All geometry stays with the first factor.
    """


class LowRankGaugeConv3d(_GaugePair, LowRankConv3d):
    """`Conv3d` in form "gauge"; see `LowRankGaugeConv2d`."""


register_pair(nn.Linear, LowRankGaugeLinear, form="gauge")
register_pair(nn.Conv1d, LowRankGaugeConv1d, form="gauge")
register_pair(nn.Conv2d, LowRankGaugeConv2d, form="gauge")
register_pair(nn.Conv3d, LowRankGaugeConv3d, form="gauge")
