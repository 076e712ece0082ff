"""The leading singular vectors of a large matrix, without the others: block Krylov iteration, checked by its residuals.

A full decomposition of an `n × s` matrix takes `n s² + O(s³)`; a hundredth of the rank takes a few products with a thin block. The
block grows by its residuals (a block Lanczos process with full reorthogonalization and thick restarts; Golub and Van Loan, *Matrix
Computations*, §10.3), and between two products it is made orthonormal, so that nothing is squared. A Ritz pair `(σ, z)` with `ρ =
‖Wᵀ p − σ z‖`, `p = W z/σ`, misses at most `σρ` of its singular value's square, and at most `(σρ)²/γ` where `γ` is the gap to what the
block does not hold (Parlett, *The Symmetric Eigenvalue Problem*, §11.7). What all pairs miss together decides when to stop; where
that is not reached in time, the caller takes the full way.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxrank.passes.spectra import linalg

LARGE = 2048
"""Short sides below this are decomposed in full, in a second or two."""
FEW = 12
"""A rank is small if the short side is so many times as long."""
SPARE = 8
"""Columns of the block beyond the rank, at least: the last of them converge slowly, and make the gap."""
BLOCKS, COLUMNS = 5, 200
"""What the basis has at most, whichever is more, before it is pressed into half of it."""
MAX_STEPS = 80
UNSCALED = (1e-12, 1e12)
"""Norms for which float32 needs no scaling here."""


class Leading(NamedTuple):
    """`vectors` `(s, rank)`, orthonormal, their `sigma` `(rank,)` `= ‖W z‖`, and `squared_norm` `= ‖W‖_F²`, all in float64."""

    vectors: Tensor
    sigma: Tensor
    squared_norm: float


def is_worth_it(stack: Tensor, rank: int) -> bool:
    """Whether the iteration is likely to be faster than a decomposition in full. On other devices than the CPU it is not tried:
    their float32 products may have ten bits (TF32), and their decompositions are fast.
    """
    size = min(stack.shape[1:])
    return stack.device.type == "cpu" and size >= LARGE and FEW * rank <= size


def leading(matrix: Tensor, rank: int, may_miss: Callable[[float, float], float]) -> Leading | None:
    """The `rank` leading right singular vectors of a tall matrix `(n, s)`; None if they are not found in time.

    `may_miss(found, rest)` is how much of `‖W‖_F²` they may miss of what the best ones hold: `found` are the squares of the
    singular values found, summed, `rest` all others'. The random start is the same in every call, and the user's random numbers
    are left alone.
    """
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    norm = float(torch.linalg.vector_norm(matrix))
    if not UNSCALED[0] < norm < UNSCALED[1]:
        return None
    squared_norm = sum(float(rows.double().square().sum()) for rows in matrix.split(256))
    rounding = (4 * torch.finfo(matrix.dtype).eps * norm) ** 2
    width = rank + max(SPARE, rank // 4)
    room = min(matrix.shape[1], max(BLOCKS * width, COLUMNS))
    generator = torch.Generator().manual_seed(0)
    basis = _orthonormal(torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype))
    image = matrix @ basis
    for _ in range(MAX_STEPS):
        left, triangle = linalg.qr(image)
        p, sigma, z = linalg.svd(triangle)
        ritz = basis @ z[:width].t()
        residual = matrix.t() @ (left @ p[:, :width]) - ritz * sigma[:width]
        squares = sigma[:width].double().square()
        error = (sigma[:rank] * torch.linalg.vector_norm(residual, dim=0)[:rank]).double()
        gap = (squares[:rank] - squares[-1]).clamp(min=torch.finfo(torch.float64).tiny)
        found = float(squares[:rank].sum())
        missed = float(torch.minimum(error, error.square() / gap).sum())
        if missed <= may_miss(found, max(0.0, squared_norm - found)) + rounding:
            vectors = _orthonormal(ritz[:, :rank].double())
            exact = sum((rows.double() @ vectors).square_().sum(0) for rows in matrix.split(256))
            return Leading(vectors, torch.as_tensor(exact).sqrt(), squared_norm)
        if basis.shape[1] + width > room:
            kept = max(2 * width, room // 2)
            basis, image = basis @ z[:kept].t(), left @ (p[:, :kept] * sigma[:kept])
        fresh = residual
        for _ in range(2):  # twice is enough (Parlett §6.9)
            fresh = _orthonormal(fresh - basis @ (basis.t() @ fresh))
        basis, image = torch.cat([basis, fresh], 1), torch.cat([image, matrix @ fresh], 1)
    return None


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = linalg.qr(columns)[0]
    return basis
