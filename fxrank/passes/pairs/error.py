"""How far a pair is from the layer that it stands for."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.spectra.exact import singular_values, truncation_error


@dataclass(frozen=True)
class PairError:
    """How far a pair's product is from the dense weight.

    `spectral` is `‖W - VU‖₂` (largest over the groups), `bound` the least possible, `σ_{r+1}`
    (Eckart-Young-Mirsky); `relative` is the Frobenius error over `‖W‖_F`, `relative_bound` its optimum. A Linear's
    output moves by at most `spectral · ‖x‖₂`.
    """

    spectral: float
    bound: float
    relative: float
    relative_bound: float


def pair_error(dense: nn.Module, pair: FactorPair) -> PairError:
    """Compare `pair`, without its `norm`, to `dense` in float64."""
    stack = type(pair).unroll(dense, weight_of(dense).detach().double())
    u, v = pair.unfold_u(pair.u.weight.detach().double()), pair.unfold_v(pair.v.weight.detach().double())
    # In units of the largest number: the square of 1e-200 is zero.
    unit = float(stack.abs().max()) or 1.0
    stack, product = stack / unit, (v / math.sqrt(unit)) @ (u / math.sqrt(unit))
    sigma, residual = singular_values(stack), stack - product
    norm = float(torch.linalg.vector_norm(stack))
    return PairError(
        spectral=unit * float(torch.linalg.matrix_norm(residual, 2).max()),
        bound=unit * float(sigma[:, pair.rank].max()) if pair.rank < sigma.shape[1] else 0.0,
        relative=float(torch.linalg.vector_norm(residual)) / norm if norm else 0.0,
        relative_bound=truncation_error(sigma, pair.rank),
    )
