"""Singular values of weights: exact spectra, truncated factors, and the rank metrics built on them.

Everything here works on *stacks of matrices* of shape `(groups, rows, cols)`: a Linear weight or an ungrouped
convolution is a stack of one, a grouped convolution has one matrix per group. One stack gets one number (the mean
over its groups), because the factor pair of a grouped layer has one rank for all groups.

A float32 weight, or a narrower one, has 24 bits; its spectrum comes from the Gram matrix of the short side in float64, `G = W
Wᵀ` (or `Wᵀ W`), whose eigenvalues are `σ²`: for an `m × n` matrix that costs `m²n + O(m³)` with a small constant instead of the
full SVD's. A Gram matrix squares, so that directions below `√eps · σ_max` are noise: 1.5e-8 in float64, below the rounding of the
weight itself; in float32 it would be 3e-4, which is the better part of many trained weights. A float64 weight goes through QR
and SVD, which do not square. The truncated factors are a *projection* `Q (Qᵀ W)`, so at full rank the product is `W` up to
rounding whatever the eigenvalues were.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from fxrank.passes.errors import NonFiniteWeightError, unknown_name
from fxrank.passes.spectra import linalg
from fxrank.passes.spectra.leading import Leading, is_worth_it, leading


def as_stack(weight: Tensor) -> Tensor:
    """View a weight as a stack of matrices `(groups, rows, cols)`.

    A 2-D weight `(out, in)` becomes `(1, out, in)`; a weight with more dimensions, as of a convolution `(out, in,
    kh, kw)`, is unrolled to `(1, out, in·kh·kw)` (Cuttlefish §3.1; spec of the unrolling: Pufferfish §2.2). Raises
    `ValueError` below two dimensions.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"a weight is a tensor; got {type(weight).__name__}. Pass a layer's .weight.")
    if weight.ndim < 2:
        raise ValueError(
            f"a weight needs at least 2 dimensions to have a rank; got shape {tuple(weight.shape)}. Pass a matrix or a kernel."
        )
    if not weight.numel():
        raise ValueError(f"a weight needs numbers to have a rank; got shape {tuple(weight.shape)}. Leave it out.")
    return weight.detach().reshape(1, weight.shape[0], -1)


def check_finite(stack: Tensor, name: str = "weight") -> None:
    """Raise `NonFiniteWeightError` if `stack` holds NaN or infinity."""
    if not stack.is_meta and not torch.isfinite(stack).all():
        bad = int((~torch.isfinite(stack)).sum())
        raise NonFiniteWeightError(
            f"weights must be finite to have singular values; {name!r} holds {bad} NaN or infinite "
            f"value{'s' if bad != 1 else ''} of {stack.numel()}. Lower the learning rate or restore an earlier checkpoint."
        )


BLOCK, SHARE = 1 << 16, 16
"""So many numbers of a weight, or such a part of it, whichever is more, are lifted to float64 at a time: there is no copy of the whole
in twice its size.
"""


APART = 256
"""The longest side of a Gram matrix that is decomposed beside itself, in one thread; a larger one in its own place, for the memory."""


def gram(stack: Tensor) -> Tensor:
    """Gram matrices of the short side, `(groups, s, s)` with `s = min(rows, cols)`, in float64; of each the lower triangle, which
    is all that an eigendecomposition reads.
    """
    size = min(stack.shape[1:])
    grams = torch.zeros(len(stack), size, size, dtype=torch.float64, device=stack.device)
    if stack.device.type != "cpu":
        for group, _, block in _blocks(stack):
            grams[group].addmm_(block.t(), block)
        return grams
    # syrk does half the work of a product. BLAS is column-major: a C-ordered block is passed as its transpose, and the upper triangle there is
    # the lower one here, uncopied.
    for group, _, block in _blocks(stack):
        scipy.linalg.blas.dsyrk(
            1.0, block.contiguous().numpy().T, beta=1.0, c=grams[group].numpy().T, lower=0, overwrite_c=1
        )
    return grams


def _blocks(stack: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """The matrices with their long side down, `(n, s)`, in float64, a few rows of one at a time: its number, that of the first
    row, the rows.
    """
    tall = stack if stack.shape[1] > stack.shape[2] else stack.transpose(1, 2)
    rows = max(1, BLOCK // tall.shape[2], tall.shape[1] // SHARE)
    for group, matrix in enumerate(tall):
        for start in range(0, len(matrix), rows):
            yield group, start, matrix[start : start + rows].double()


def singular_values(stack: Tensor) -> Tensor:
    """All singular values, `(groups, min(rows, cols))`, descending, float64, on the CPU.

    Accurate to 1.5e-8 of the largest for a float32 stack or a narrower one, to 1e-15 of it for float64. Source: Cuttlefish §3.1
    takes a full SVD.
    """
    if stack.dtype == torch.float64:
        sigma: Tensor = linalg.svdvals(_square(stack))
        return sigma.cpu()
    squares: Tensor = linalg.eigvalsh(gram(stack))
    return squares.cpu().flip(-1).clamp_(min=0).sqrt_()


def _square(stack: Tensor) -> Tensor:
    """Matrices `(groups, s, s)` with the same singular values, and the same singular vectors of the short side on the left."""
    wide = stack if stack.shape[1] <= stack.shape[2] else stack.transpose(1, 2)
    if wide.shape[1] == wide.shape[2]:
        return wide
    triangle: Tensor = linalg.qr(wide.transpose(1, 2), mode="r")[1]
    return triangle.transpose(1, 2)


@dataclass(frozen=True)
class Decomposition:
    """Spectrum and leading subspaces of a stack from one decomposition; made by `decompose`.

    `sigma` `(groups, s)` descending, float64, on the CPU, `s = min(rows, cols)`, as accurate as `singular_values`.
    """

    sigma: Tensor
    _stack: Tensor
    _vectors: Tensor
    """Singular vectors of the short side, one a column, `(groups, s, s)`, that of the largest value last, and no wider than the
    factors: what they lose of being orthonormal is made up for when some of them are used.
    """

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best rank-`rank` factors with the singular values split evenly, `W ≈ V U`.

        Returns `U` `(groups, rank, cols)` and `V` `(groups, rows, rank)` in float64 if the stack is float64, else float32, on
        its device, with `‖u_i‖ = ‖v_i‖ = √σ_i` (Cuttlefish §3.3, Pufferfish Alg. 1). The product is the projection of `W` on its
        leading singular subspace, made in float64: its error is Eckart-Young's optimum up to one rounding of the factors, and at
        `rank = s` it is `W` itself.
        """
        basis: Tensor = linalg.qr(self._vectors[..., -rank:].flip(-1).double())[0]
        return balanced_factors(self._stack, basis)


def balanced_factors(stack: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The projection of a stack on an orthonormal `basis` `(groups, s, rank)` of its short side, float64, as `U` and `V`; see
    `Decomposition.factors`.
    """
    dtype = torch.float64 if stack.dtype == torch.float64 else torch.float32
    image = basis.new_empty(len(stack), max(stack.shape[1:]), basis.shape[2], dtype=dtype)
    squares = basis.new_zeros(len(stack), 1, basis.shape[2])
    # In units of the largest number: the square of 1e-200 is zero.
    unit = torch.stack([torch.stack(matrix.aminmax()).abs().amax() for matrix in stack]).double()
    unit = torch.where(unit > 0, unit, 1.0)[:, None, None]
    for group, start, block in _blocks(stack):
        product = block @ basis[group]  # columns are σ_i · singular vectors
        image[group, start : start + len(block)] = product
        squares[group] += product.div_(unit[group]).square_().sum(0)
    sigma = squares.sqrt() * unit
    root = torch.where(sigma > 0, sigma, 1.0).sqrt()
    image = image.div_(root.to(dtype))
    basis = (basis * torch.where(sigma > 0, root, 0.0)).to(dtype)
    if stack.shape[1] > stack.shape[2]:
        return basis.transpose(1, 2), image
    return image.transpose(1, 2), basis


def decompose(stack: Tensor) -> Decomposition:
    """All singular values and singular vectors of the short side, in float64, on the stack's device.

    Of a float32 stack, or a narrower one, from one Gram matrix and one symmetric eigendecomposition, several times
    cheaper than a full SVD; of a float64 stack by QR and SVD.
    """
    stack = stack.detach()
    if stack.dtype == torch.float64:
        vectors, sigma, _ = linalg.svd(_square(stack), full_matrices=False)
        return Decomposition(sigma.cpu(), stack, vectors.flip(-1))
    if stack.device.type != "cpu":
        values, vectors = linalg.eigh(gram(stack))
        return Decomposition(values.cpu().flip(-1).clamp_(min=0).sqrt_(), stack, vectors.float())
    eigh = _eigh if min(stack.shape[1:]) <= APART else _eigh_in_place
    pairs = [eigh(gram(stack[group : group + 1])[0]) for group in range(len(stack))]
    values, vectors = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    return Decomposition(values.flip(-1).clamp_(min=0).sqrt_(), stack, vectors)


def _eigh(lower: Tensor) -> tuple[Any, Any]:
    """Eigenvalues, ascending, and eigenvectors in float32."""
    values, vectors = linalg.eigh(lower)
    return values.numpy(), vectors.numpy().astype(np.float32)


def _eigh_in_place(lower: Tensor) -> tuple[Any, Any]:
    """The same. The matrix is written over: what LAPACK needs beside it is gone again afterwards."""
    values, vectors = scipy.linalg.eigh(
        lower.numpy().T, lower=False, driver="evd", check_finite=False, overwrite_a=True
    )
    return values, vectors.astype(np.float32)


class Spectrum:
    """What a policy asks of a stack, found when it is asked: of a large stack, where only a small rank is asked for, from its
    leading singular vectors, else from one decomposition in full.
    """

    def __init__(self, stack: Tensor) -> None:
        """`stack` `(groups, rows, cols)`; nothing is computed yet."""
        self._stack = stack.detach()
        self._whole: Decomposition | None = None
        self._leading: list[Leading] = []
        self._stable_rank: float | None = None

    @property
    def full_rank(self) -> int:
        """The short side of its matrices."""
        return min(self._stack.shape[1:])

    @property
    def sigma(self) -> Tensor:
        """All singular values; see `Decomposition`."""
        return self._in_full().sigma

    @property
    def stable_rank(self) -> float:
        """`‖W‖_F² / σ_max²`, the mean over the groups."""
        if self._stable_rank is None:
            found = None if self._whole is not None else _leading_stable_rank(self._stack)
            self._stable_rank = mean_over_groups(stable, self.sigma) if found is None else found
        return self._stable_rank

    def truncation_error(self, rank: int) -> float:
        """Relative Frobenius error of the best approximation of this rank; see `truncation_error`."""
        found = self._leading_of(rank)
        if not found:
            return truncation_error(self.sigma, rank)
        rest = sum(max(0.0, one.squared_norm - float(one.sigma[:rank].square().sum())) for one in found)
        return math.sqrt(rest / sum(one.squared_norm for one in found))

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors of this rank, as `Decomposition.factors` has them. Of a large stack and a small rank their error is
        the optimum but for a factor of 1 + 1e-5 at most.
        """
        found = self._leading_of(rank)
        if not found:
            return self._in_full().factors(rank)
        return balanced_factors(self._stack, torch.stack([one.vectors[:, :rank] for one in found]))

    def _in_full(self) -> Decomposition:
        if self._whole is None:
            self._whole = decompose(self._stack)
        return self._whole

    def _leading_of(self, rank: int) -> list[Leading]:
        """The leading vectors of all groups, that many or more; none where the decomposition in full is there, or better."""
        if self._whole is None and is_worth_it(self._stack, rank) and not _as_many(self._leading, rank):
            self._leading = _leading_of_all(self._stack, rank, lambda _, rest: MISSED * rest)
        return self._leading if self._whole is None and _as_many(self._leading, rank) else []


MISSED = 1e-5
"""What an approximation may miss, beside what the best one of its rank misses: this share of it, of the squares."""


def _as_many(found: list[Leading], rank: int) -> bool:
    return bool(found) and len(found[0].sigma) >= rank


def _leading_of_all(stack: Tensor, rank: int, may_miss: Callable[[float, float], float]) -> list[Leading]:
    """The leading vectors of all groups, or none if those of one are not found."""
    tall = stack if stack.shape[1] > stack.shape[2] else stack.transpose(1, 2)
    found: list[Leading] = []
    for matrix in tall:
        one = leading(matrix, rank, may_miss)
        if one is None:
            return []
        found.append(one)
    return found


def _leading_stable_rank(stack: Tensor) -> float | None:
    found = _leading_of_all(stack, 1, lambda top, _: MISSED * top) if is_worth_it(stack, 1) else []
    return sum(one.squared_norm / float(one.sigma[0]) ** 2 for one in found) / len(found) if found else None


def stable_rank_of(stack: Tensor) -> float:
    """Stable rank `‖W‖_F² / σ_max²` of a stack, the mean over its groups: exact, of a large stack within 1e-5."""
    found = _leading_stable_rank(stack.detach())
    return mean_over_groups(stable, singular_values(stack)) if found is None else found


def truncated_factors(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`Spectrum(stack).factors(rank)`."""
    return Spectrum(stack).factors(rank)


def truncation_error(sigma: Tensor, rank: int) -> float:
    """Relative Frobenius error of the best rank-`rank` approximation, `√(Σ_{i>rank} σ_i² / Σ σ_i²)`, for `sigma`
    `(groups, s)`.
    """
    sigma = _unscaled(sigma)
    total = float(sigma.square().sum())
    return math.sqrt(float(sigma[:, rank:].square().sum()) / total) if total > 0 else 0.0


def _unscaled(sigma: Tensor) -> Tensor:
    """Over the largest of them, whose square may be no number any more: 1e-200 in float64."""
    top = sigma.max()
    return sigma / top if top > 0 else sigma


def stable_rank(weight: Tensor) -> float:
    """Stable rank `‖W‖_F² / σ_max²` of one weight, a real number in `[1, min(rows, cols)]`; 0 for a zero matrix.

    `weight` is a matrix `(out, in)` or a kernel `(out, in, …)`, unrolled to `(out, in·…)`; any float dtype and
    device; exact (float64). The reference code rounds this down; the paper (Cuttlefish §3.1) and fxrank do not.
    Raises `ValueError` below two dimensions, `NonFiniteWeightError` on NaN or infinity.
    """
    stack = as_stack(weight)
    check_finite(stack)
    return mean_over_groups(stable, singular_values(stack))


def mean_over_groups(metric: Callable[[Tensor], float], sigma: Tensor) -> float:
    """`metric` of every row of `sigma` `(groups, s)`, averaged: the pair of a grouped layer has one rank for all
    groups.
    """
    return sum(metric(row) for row in sigma) / len(sigma)


# Rank metrics: functions of one descending spectrum `(s,)`. Each returns a real number in [0, s], 0 only for a zero matrix.


def stable(sigma: Tensor) -> float:
    """`Σ σ² / σ_max²` (Cuttlefish §3.1)."""
    top = float(sigma[0])
    return float((sigma / top).square().sum()) if top > 0 else 0.0


def accumulative(sigma: Tensor, share: float = 0.8) -> float:
    """Least `r` with `Σ_{i≤r} σ_i ≥ share · Σ σ_i` (Cuttlefish appendix; plain σ, not σ²)."""
    return float(_least_covering(sigma, share))


def energy(sigma: Tensor, share: float = 0.9) -> float:
    """Least `r` whose squared singular values hold `share` of `‖W‖_F²`: the truncation error is then at most
    `√(1-share)`.
    """
    return float(_least_covering(_unscaled(sigma).square(), share))


def entropy(sigma: Tensor) -> float:
    """Effective rank `exp(H(p))`, `p_i = σ_i / Σ σ` (Roy & Vetterli 2007). Not pinned near 1 by one dominant
    singular value.
    """
    total = float(sigma.sum())
    if total == 0:
        return 0.0
    share = sigma / total
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def _least_covering(parts: Tensor, share: float) -> int:
    total = float(parts.sum())
    if total == 0:
        return 0
    # A relative slack of 1e-12 keeps rounding in the running sum from asking for one rank too many at share = 1.
    return int((parts.cumsum(0) < share * total * (1 - 1e-12)).sum()) + 1


METRICS: dict[str, Callable[[Tensor], float]] = {
    "stable": stable,
    "accumulative": accumulative,
    "energy": energy,
    "entropy": entropy,
}


def metric_named(name: str) -> Callable[[Tensor], float]:
    """The spectrum metric called `name`. Raises `ValueError` that lists the valid names."""
    if name not in METRICS:
        raise unknown_name("spectrum metric", name, METRICS)
    return METRICS[name]
