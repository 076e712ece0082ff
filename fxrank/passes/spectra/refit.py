"""Factors for another product: what is set as the weight of a pair, or written into it."""

import torch
from torch import Tensor

from fxrank.passes.errors import RankError
from fxrank.passes.spectra.exact import truncated_factors


@torch.no_grad()
def refit(weight: Tensor, u: Tensor, v: Tensor, *, only_rows: bool = False) -> tuple[Tensor | None, Tensor]:
    """`U` `(groups, r, cols)`, None where it stays as it is, and `V` `(groups, rows, r)` whose product is `weight` `(groups, rows,
    cols)`, as exactly as its dtype can say.

    Rows of the present product, scaled, scale the rows of `V`: that is what folding BatchNorm asks for. `only_rows` allows no more.
    Anything else is split anew. Raises `RankError` for a weight that no product of rank `r` is.
    """
    wanted, first, second = (x.detach().to(torch.float64) for x in (weight, u, v))
    now = second @ first
    size = now.square().sum(-1, keepdim=True)
    scale = torch.where(size > 0, (wanted * now).sum(-1, keepdim=True) / size, 1.0)
    # What is read and scaled is rounded twice, and a product sums up more; other weights differ by far more than this.
    tolerance = max(1e-5, 4 * torch.finfo(weight.dtype).eps)
    if _same(scale * now, wanted, tolerance):
        return None, scale * second
    error = "more than its rows scaled, under a BatchNorm between the factors"
    if not only_rows:
        first, second = (x.to(torch.float64) for x in truncated_factors(wanted, u.shape[1]))
        if _same(second @ first, wanted, tolerance):
            return first, second
        away = (second @ first - wanted).norm() / wanted.norm()
        error = f"one that differs by {float(away):.1e} of its norm from the nearest of them"
    raise RankError(
        f"the weight of a factor pair must be a product of rank {u.shape[1]}; got {error}. Merge the pair first (fxrank.merge), or change its "
        "u.weight and v.weight."
    )


def _same(product: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Row by row: a small row must not be lost beside a large one."""
    return bool(((product - wanted).norm(dim=-1) <= tolerance * wanted.norm(dim=-1)).all())
