"""Factor pairs of embeddings."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.passes.pairs.base import FactorPair, Layers, whole_number
from fxrank.passes.pairs.registry import register_pair


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
    is_table = True
    multiplies_when_read = True
    takes_bias = False
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        changes = dense.max_norm is not None or dense.scale_grad_by_freq
        return "with max_norm or scale_grad_by_freq" if changes else None

    @classmethod
    def uses(
        cls, dense: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int]
    ) -> tuple[float, float, float]:
        lookups = math.prod(output_shape) / whole_number(dense, "embedding_dim")
        return 0.0, lookups, 0.0

    @classmethod
    def side(cls, dense: nn.Module) -> str | None:
        return "lookups"

    @classmethod
    def seen(cls, dense: nn.Module, side: str, input: Tensor, output: Tensor) -> Tensor:
        return output.unsqueeze(-2)

    @classmethod
    def shape_when_read(cls, dense: nn.Module, positions: float) -> tuple[int, ...]:
        return (max(1, round(positions)),)

    @classmethod
    def probe_input(cls, dense: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Random indices."""
        return torch.randint(whole_number(dense, "num_embeddings"), tuple(shape), device=device)

    def _table(self, width: int, place: dict[str, Any]) -> nn.Embedding:
        options = {
            n: self.__dict__[n] for n in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        }
        table: nn.Embedding = nn.utils.skip_init(nn.Embedding, self.num_embeddings, width, **options, **place)
        return table

    def make_layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        return Expansion(self.rank, self.embedding_dim, **place), None, self._table(self.rank, place)

    def empty_dense(self, place: dict[str, Any]) -> nn.Module:
        return self._table(self.embedding_dim, place)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.u(self.v(input))
        if self.padding_idx is not None:  # such places give no gradient, to `u` neither
            out = torch.where((input == self.padding_idx).unsqueeze(-1), out.detach(), out)
        return out

    @property
    def bias(self) -> Tensor | None:
        """An embedding has none."""
        return None


register_pair(nn.Embedding, LowRankEmbedding)
