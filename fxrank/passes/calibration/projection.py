"""The factors of a given rank whose outputs differ least from the layer's, over the inputs that were seen.

With `z = W x` the error of a pair, `E‖(W - V U) x‖²`, is least where `V Vᵀ` projects on the leading eigenvectors of `C = E[z zᵀ] = W Σ
Wᵀ`, `Σ = E[x xᵀ]`, and `U = Vᵀ W`: the sum of the other eigenvalues. Where the pair has a bias, both are moments about the mean, and the
bias takes `(W - V U) x̄` (Zhang et al. 2015, 1505.06798, §3.1; Swift-SVD 2026). It needs no inverse: inputs that are always zero, or
fewer of them than columns, do no harm. Directions in which nothing was seen are left to the weight's own spectrum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from fxrank.passes.calibration.moments import Moments
from fxrank.passes.spectra import linalg

UNSEEN = 1e-9
"""How much, relative to what was seen, inputs of all directions alike count: enough to order directions of which nothing is known."""


@dataclass(frozen=True)
class Projection:
    """What is known of one weight and its data. `stack` is `W` `(groups, rows, cols)`, and `side` what the moments are of: `"outputs"`
    `z` `(groups, rows)`, `"inputs"` `x` `(groups, cols)`, or `"lookups"`, the rows of `W` in a table, `(groups, cols)`.
    """

    stack: Tensor
    moments: Moments
    side: str
    centred: bool

    @property
    def vectors(self) -> tuple[int, int]:
        """How many vectors were seen, of how many numbers each."""
        return self.moments.count, self.moments.shape[1]

    @cached_property
    def sigma(self) -> Tensor:
        """Root mean squares of the output along its principal directions, `(groups, min(rows, cols))`, descending, float64, on the CPU:
        the squares of those that a pair leaves out add up to its mean squared error. They stand where the singular values stand for
        a pair that knows the weight alone.
        """
        return self._decomposed[0]

    @property
    def energy(self) -> float:
        """The mean squared norm of what the layer gives (about its mean, if `centred`)."""
        return float(self.sigma.square().sum())

    def lost(self, rank: int, search: bool = True) -> float:
        """The least mean squared error of the output at this rank."""
        return float(self.sigma[:, rank:].square().sum())

    def output_error(self, rank: int, search: bool = True) -> float:
        """Of the best pair, relative: the root of the share of `energy` that is lost."""
        return (self.lost(rank) / self.energy) ** 0.5 if self.energy > 0 else 0.0

    def factors(self, rank: int, search: bool = True) -> tuple[Tensor, ...]:
        """`U` `(groups, rank, cols)` and `V` `(groups, rows, rank)` with `‖u_i‖ = ‖v_i‖`, and what the bias gains, `(groups, rows)`, if
        `centred`; of the stack's dtype, on its device. They take no `search`.
        """
        w, basis = self._w, self._decomposed[1][..., :rank]
        u, v = (basis.mT, w @ basis) if self.side == "lookups" else (basis.mT @ w, basis)
        like = self.stack
        found = tuple(t.to(like) for t in balanced(u, v))
        if self.centred:
            mean = self.moments.mean[..., None]
            lost = w @ mean - v @ (u @ mean) if self.side == "inputs" else mean - basis @ (basis.mT @ mean)
            return *found, lost[..., 0].to(like)
        return found

    @property
    def _w(self) -> Tensor:
        return self.stack.detach().to(dtype=torch.float64, device=self.moments.mean.device)

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor]:
        """`sigma`, and an orthonormal basis of the outputs, or of the rows of a table."""
        w, seen = self._w, self.moments.second(centred=self.centred)
        if self.side == "inputs":
            values, directions = _eigh(with_unseen(seen, torch.eye(w.shape[2], dtype=w.dtype, device=w.device)[None]))
            image = w @ (directions * values.clamp(min=0).sqrt()[:, None, :])  # W Σ^½, up to a rotation
            if w.shape[1] <= w.shape[2]:
                basis = _eigh(image @ image.mT)[1]
            else:
                basis = linalg.qr(image @ _eigh(image.mT @ image)[1])[0]
            image = basis.mT @ w
            energies = ((image @ seen) * image).sum(-1)
        else:
            _, basis = _eigh(with_unseen(seen, w @ w.mT if self.side == "outputs" else w.mT @ w))
            energies = ((basis.mT @ seen) * basis.mT).sum(-1)
        kept = min(w.shape[1:])
        return energies[:, :kept].clamp(min=0).sqrt().cpu(), basis[..., :kept]


@dataclass(frozen=True)
class ColumnProjection(Projection):
    """Of a weight that is multiplied from the left, `x W`. `stack` is `Wᵀ`, and so are its inputs; `factors` are those of `W`."""

    def factors(self, rank: int, search: bool = True) -> tuple[Tensor, ...]:
        """`U` and `V` of `W`, as of a `Projection`."""
        u, v = super().factors(rank)
        return v.mT, u.mT


def balanced(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with `‖u_i‖ = ‖v_i‖`."""
    of_u, of_v = torch.linalg.vector_norm(u, dim=2, keepdim=True), torch.linalg.vector_norm(v, dim=1, keepdim=True)
    balance = (of_u / of_v.mT.clamp(min=1e-300)).sqrt().clamp(min=1e-150)
    return u / balance, v * balance.mT


def with_unseen(seen: Tensor, prior: Tensor) -> Tensor:
    """The moments with `UNSEEN` inputs of all directions alike, whose moments are `prior`; these alone if nothing was seen.

    More of them, to make up for few samples, was measured and left out. With a share of `0.001 · size / samples`, on networks for the
    digits of scikit-learn, relative errors on images not seen fell by up to 5 % behind ReLU (layers 128 and 256 wide, 16 to 64 samples) and rose by
    up to 95 % behind tanh (512 wide, 256 samples), where the inputs lie near few directions.
    """
    of_seen, of_prior = (t.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] for t in (seen, prior))
    return torch.where(of_seen > 0, seen + UNSEEN * of_seen / torch.where(of_prior > 0, of_prior, 1.0) * prior, prior)


def improved(
    normal: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    steps: int,
    inverse: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What solves `normal(x) = right`, of the shape of `start`, after at most so many conjugate gradients from there: no step is farther
    from it. `inverse` is about that of `normal`.
    """

    def on(act: Callable[[Tensor], Tensor]) -> LinearOperator:
        def flat(numbers: object) -> object:
            x = torch.as_tensor(numbers, dtype=start.dtype, device=start.device)
            return act(x.reshape(start.shape)).flatten().cpu().numpy()

        return LinearOperator((start.numel(), start.numel()), matvec=flat, dtype="float64")

    found, _ = cg(
        on(normal),
        right.flatten().cpu().numpy(),
        x0=start.flatten().cpu().numpy(),
        maxiter=steps,
        rtol=1e-8,
        M=None if inverse is None else on(inverse),
    )
    return torch.as_tensor(found, dtype=start.dtype, device=start.device).reshape(start.shape)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """In order of falling eigenvalues."""
    values, vectors = linalg.eigh(matrices)
    return values.flip(-1), vectors.flip(-1)
