"""Factor pairs of embeddings."""

from typing import Any

import torch
from torch import Tensor, nn

from fxrank.passes.pairs.base import FactorPair, Layers, fill_dense
from fxrank.passes.pairs.linear import LowRankLinear


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
