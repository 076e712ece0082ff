"""Singular values of weights: exact spectra, truncated factors, and the rank metrics built on them.

Everything here works on *stacks of matrices* of shape `(groups, rows, cols)`: a Linear weight or an ungrouped
convolution is a stack of one, a grouped convolution has one matrix per group. One stack gets one number (the mean
over its groups), because the factor pair of a grouped layer has one rank for all groups.

Exact spectra come from the Gram matrix of the short side, `G = W Wᵀ` (or `Wᵀ W`), whose eigenvalues are `σ²`: for
an `m × n` matrix that costs `m²n + O(m³)` with a small constant instead of the full SVD's. In float64 the relative
error of `σ_max` is about 1e-15, of a singular value `σ` about `1e-16 · (σ_max/σ)²`. The truncated factors do not
depend on that accuracy: they are a *projection* `Q (Qᵀ W)`, so at full rank the product is `W` up to rounding
whatever the eigenvalues were.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from fxrank.passes.errors import NonFiniteWeightError, unknown_name


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


def gram(stack: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gram matrices of the short side, `(groups, s, s)` with `s = min(rows, cols)`, in `dtype`."""
    wide = stack if stack.shape[1] <= stack.shape[2] else stack.transpose(1, 2)
    wide = wide.to(dtype)
    if wide.device.type != "cpu":
        return wide @ wide.transpose(1, 2)
    syrk = scipy.linalg.blas.dsyrk if dtype == torch.float64 else scipy.linalg.blas.ssyrk
    # syrk does half the work of a product. BLAS is column-major, so the C-ordered (s, n) matrix is passed as its transpose, uncopied.
    grams = [syrk(1.0, matrix.contiguous().numpy().T, trans=1, lower=1) for matrix in wide]
    return torch.from_numpy(np.stack([g + np.tril(g, -1).T for g in grams]))


def singular_values(stack: Tensor) -> Tensor:
    """All singular values, `(groups, min(rows, cols))`, descending, float64, on the CPU.

    The spectrum is computed in float64 from the Gram matrix on the weight's own device, whatever the weight's
    dtype. Source: Cuttlefish §3.1 takes a full SVD; the Gram route is exact to 1e-14 for the metrics below.
    """
    matrices = gram(stack)
    if matrices.device.type == "cpu":
        eigenvalues = torch.from_numpy(
            np.stack(
                [
                    scipy.linalg.eigh(g.numpy(), eigvals_only=True, check_finite=False, overwrite_a=True)
                    for g in matrices
                ]
            )
        )
    else:
        eigenvalues = torch.linalg.eigvalsh(matrices).cpu()
    return eigenvalues.flip(-1).clamp_(min=0).sqrt_()


@dataclass(frozen=True)
class Decomposition:
    """Spectrum and leading subspaces of a stack from one eigendecomposition; made by `decompose`.

    `sigma` `(groups, s)` descending, float64, on the CPU, `s = min(rows, cols)`; `σ_max` is a Rayleigh quotient in float64
    and `Σ σ²` is `‖W‖_F²` in float64, so the stable rank is exact to 1e-6; the others carry an error of at most about `3e-4 σ_max` for a float32 stack (the square root of its rounding), far less where they
    matter to a rank.
    """

    sigma: Tensor
    _stack: Tensor
    _vectors: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best rank-`rank` factors with the singular values split evenly, `W ≈ V U`.

        Returns `U` `(groups, rank, cols)` and `V` `(groups, rows, rank)` in float64 if the stack is float64, else float32, on
        its device, with `‖u_i‖ = ‖v_i‖ = √σ_i` (Cuttlefish §3.3, Pufferfish Alg. 1). The product is the projection of `W` on its
        leading singular subspace, so its error is Eckart-Young's optimum up to rounding (excess about 1e-12 relative), and at
        `rank = s` it is `W` itself.
        """
        stack = self._stack
        tall = stack.shape[1] > stack.shape[2]
        wide = stack.transpose(1, 2) if tall else stack
        basis = self._vectors[..., :rank]  # (groups, s, rank)
        image = _exact_matmul(basis.transpose(1, 2), wide)  # (groups, rank, n): rows are σ_i · right singular vectors
        sigma = torch.linalg.vector_norm(image, dim=2, keepdim=True)
        root = sigma.sqrt()
        image = torch.where(sigma > 0, image / root.clamp(min=torch.finfo(stack.dtype).tiny), torch.zeros_like(image))
        basis = basis * root.transpose(1, 2)
        return (basis.transpose(1, 2), image.transpose(1, 2)) if tall else (image, basis)


def decompose(stack: Tensor) -> Decomposition:
    """All singular values and singular vectors of the short side, from one Gram matrix and one symmetric eigendecomposition.

    Float64 for a float64 stack, else float32, on the stack's device (the Gram matrix on a GPU in float64: float32 products there
    may run in TF32, with 10 bits of mantissa). About ten times cheaper than a full SVD (benchmarks/results).
    """
    dtype = torch.float64 if stack.dtype == torch.float64 else torch.float32
    stack = stack.detach().to(dtype)
    on_cpu = stack.device.type == "cpu"
    matrices = gram(stack, dtype if on_cpu else torch.float64)
    if on_cpu:
        pairs = [scipy.linalg.eigh(g.numpy(), driver="evd", check_finite=False, overwrite_a=True) for g in matrices]
        values = torch.from_numpy(np.stack([p[0] for p in pairs]))
        vectors = torch.from_numpy(np.stack([p[1] for p in pairs]))
    else:
        values, vectors = torch.linalg.eigh(matrices)
    vectors = vectors.flip(-1).to(dtype)
    wide = stack if stack.shape[1] <= stack.shape[2] else stack.transpose(1, 2)
    # Rayleigh: an error e in the vector is an error e² here. On a CPU float32 sums are good for 1e-7; a GPU may use TF32.
    exact = dtype if on_cpu else torch.float64
    top = [
        torch.linalg.vector_norm(m.to(exact).t() @ q.to(exact), dtype=torch.float64)
        / torch.linalg.vector_norm(q, dtype=torch.float64)
        for m, q in zip(wide, vectors[..., 0], strict=True)
    ]
    leader = torch.stack(top).cpu()
    squares = values.flip(-1).double().cpu().clamp(min=0).minimum(leader.square()[:, None])
    squares[:, 0] = leader.square()
    # ‖W‖_F² is known exactly: the rest of the spectrum is scaled to sum up to it.
    rest = torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float64).square().cpu() - squares[:, 0]
    found = squares[:, 1:].sum(1)
    squares[:, 1:] *= torch.where(found > 0, rest.clamp(min=0) / found.clamp(min=torch.finfo(torch.float64).tiny), 1.0)[
        :, None
    ]
    sigma = squares.sqrt().minimum(leader[:, None])
    return Decomposition(sigma, stack, vectors)


def truncated_factors(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`decompose(stack).factors(rank)`."""
    return decompose(stack).factors(rank)


def _exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` without TF32: the result is written into the user's weights."""
    if a.device.type == "cpu" or a.dtype == torch.float64:
        return a @ b
    return (a.double() @ b.double()).to(a.dtype)


def truncation_error(sigma: Tensor, rank: int) -> float:
    """Relative Frobenius error of the best rank-`rank` approximation, `√(Σ_{i>rank} σ_i² / Σ σ_i²)`, for `sigma`
    `(groups, s)`.
    """
    total = float(sigma.square().sum())
    return math.sqrt(float(sigma[:, rank:].square().sum()) / total) if total > 0 else 0.0


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
    return float(_least_covering(sigma.square(), share))


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
