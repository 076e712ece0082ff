"""Factors of a kernel, one down and one across, whose outputs differ least from the layer's, over the patches that were seen.

The pair's kernel is `W'[n, m, i, j] = Σ_r V[n, j, r] U[r, m, i]`. Its error `E‖(W - W') x‖²` over patches `x[m, i, j]` with second moments
`S` is quadratic in each factor, and not in both: `V` and `U` are improved in turn (alternating least squares; Zhang et al. 2015,
1505.06798, use it for their asymmetric decomposition). The start takes `S` as the same for every column `j` and independent between them,
which has a closed form (see `projection`).

What a transposed convolution gives at one place is a kernel over a patch of its inputs too: all that fall on that place, with nothing
where none does. So the error is that of its outputs, what overlaps in them added up.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fxrank.passes.calibration.moments import Moments
from fxrank.passes.calibration.projection import Projection, balanced, improved, with_unseen
from fxrank.passes.spectra import linalg
from fxrank.passes.spectra.exact import Spectrum

ROUNDS = 2
"""Of both factors in turn. The second improves by a tenth of what the first does."""
STEPS = 20
"""Conjugate gradients, at most, that a factor `U` takes in one round: its normal equations are too large to be solved at once."""


@dataclass(frozen=True)
class SpatialProjection:
    """What is known of one kernel and its patches, with the interface of `Projection`.

    `stack` is the kernel as the spatial pair unrolls it, `(groups, n·kw, m·kh)`, and `moments` are of patches `(groups, m·kh·kw)`, `kw` fastest.
    """

    stack: Tensor
    moments: Moments
    width: int
    centred: bool
    _found: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @property
    def vectors(self) -> tuple[int, int]:
        """As of `Projection`."""
        return self.moments.count, self.moments.shape[1]

    @property
    def sigma(self) -> Tensor:
        """Those of the start, `(groups, min(rows, cols))`: what lower ranks lose, about, where columns are independent."""
        return self._start.sigma

    @cached_property
    def energy(self) -> float:
        """The mean squared norm of what the layer gives (about its mean, if `centred`)."""
        return self._squared(self._kernel)

    def lost(self, rank: int, search: bool = True) -> float:
        """The mean squared error of the output of `factors`."""
        return self._squared_error(*self._fit(rank, search))

    def output_error(self, rank: int, search: bool = True) -> float:
        """The same, relative: the root of the share of `energy` that is lost."""
        return (self.lost(rank, search) / self.energy) ** 0.5 if self.energy > 0 else 0.0

    def factors(self, rank: int, search: bool = True) -> tuple[Tensor, ...]:
        """As `Projection.factors`. Without a `search`, which takes most of the time, they are those that it starts from."""
        return self._with_bias(*self._fit(rank, search))

    def _with_bias(self, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        found = tuple(t.to(self.stack) for t in balanced(u, v))
        if not self.centred:
            return found
        lost = (self._kernel - _kernel_of(u, v, self.width)).flatten(2) @ self.moments.mean[..., None]
        return (*found, lost[..., 0].to(self.stack))

    @cached_property
    def _kernel(self) -> Tensor:
        """`(groups, n, m·kh, kw)`."""
        w = self.stack.detach().to(dtype=torch.float64, device=self.moments.mean.device)
        return _by_column(w, self.width)

    @cached_property
    def _seen(self) -> Tensor:
        """`S`, `(groups, m·kh·kw, m·kh·kw)`."""
        seen = self.moments.second(centred=self.centred)
        return with_unseen(seen, torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device)[None])

    @cached_property
    def _start(self) -> Projection:
        blocks = self.moments.of_parts(self.width)
        return Projection(self.stack, blocks, "inputs", self.centred)

    @cached_property
    def _own(self) -> Spectrum:
        return Spectrum(self.stack)

    def _squared(self, kernel: Tensor) -> float:
        flat = kernel.flatten(2)
        return float(((flat @ self._seen) * flat).sum())

    def _fit(self, rank: int, search: bool = True) -> tuple[Tensor, Tensor]:
        """From the start, or from the weight's own factors where those would be better than what comes of it: the problem has
        several minima.
        """
        key = rank, search
        if key not in self._found:
            best = self._improved_from(self._start.factors(rank)[:2], rank, search)
            own = self._own.factors(rank)
            if self._squared_error(*best) > self._squared_error(*(t.to(best[0]) for t in own)):
                best = self._improved_from(own, rank, search)
            self._found.clear()  # whoever asks for one rank asks for it again at once
            self._found[key] = best
        return self._found[key]

    def _improved_from(self, factors: tuple[Tensor, ...], rank: int, search: bool) -> tuple[Tensor, Tensor]:
        u, v = (t.to(self._kernel) for t in factors)
        if rank < min(self.stack.shape[1:]):
            for _ in range(ROUNDS if search else 0):
                v = self._best_v(u)
                u = self._best_u(u, v)
            v = self._best_v(u)
        return u, v

    def _squared_error(self, u: Tensor, v: Tensor) -> float:
        return self._squared(self._kernel - _kernel_of(u, v, self.width))

    def _best_v(self, u: Tensor) -> Tensor:
        """Least squares on the features `(r, kw)` that `U` makes of a patch: `(groups, n·kw, r)`."""
        groups, rank, places = u.shape
        seen = self._seen.unflatten(2, (places, self.width)).unflatten(1, (places, self.width))
        half = torch.einsum("gra,gawbx->grwbx", u, seen)
        features = torch.einsum("grwbx,gsb->grwsx", half, u).reshape(groups, rank * self.width, -1)
        cross = torch.einsum("gnaw,grxaw->gnrx", self._kernel, half.movedim(2, 2)).flatten(2)
        scale = features.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        ridge = 1e-10 * scale * torch.eye(features.shape[1], dtype=u.dtype, device=u.device)
        v: Tensor = linalg.solve(features + ridge, cross.mT).mT
        return v.reshape(groups, -1, rank, self.width).transpose(2, 3).flatten(1, 2)

    def _best_u(self, start: Tensor, v: Tensor) -> Tensor:
        """A few conjugate gradients on the normal equations of `U`, from where it is."""
        return torch.stack([self._improved(g, start[g], v[g]) for g in range(len(v))])

    def _improved(self, group: int, start: Tensor, v: Tensor) -> Tensor:
        seen, kernel = self._seen[group], self._kernel[group]
        by_column = v.unflatten(0, (-1, self.width))  # (n, kw, r)

        def gathered(kernels: Tensor) -> Tensor:
            """`(n, m·kh, kw)` to the gradient in `U`, `(r, m·kh)`."""
            moved = (kernels.flatten(1) @ seen).unflatten(1, kernels.shape[1:])
            return torch.einsum("nwr,naw->ra", by_column, moved)

        def normal(u: Tensor) -> Tensor:
            return gathered(torch.einsum("nwr,ra->naw", by_column, u))

        return improved(normal, gathered(kernel), start, STEPS)


class TurnedProjection(SpatialProjection):
    """Of a transposed convolution, `W' = V[n, j, r] U[r, m]` over all places `j` of its kernel. `stack` and the patches are `turned`;
    `factors` are those of the layer.
    """

    def _with_bias(self, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        u, v, *gained = super()._with_bias(u, v)
        return (u, turned(v, self.width), *gained)


def turned(rows: Tensor, width: int) -> Tensor:
    """Matrices `(groups, n·width, …)` with the places of the kernel the other way round."""
    found: Tensor = rows.unflatten(1, (-1, width)).flip(2).flatten(1, 2)
    return found


def _kernel_of(u: Tensor, v: Tensor, width: int) -> Tensor:
    """`(groups, n, m·kh, kw)`."""
    return _by_column(v @ u, width)


def _by_column(matrices: Tensor, width: int) -> Tensor:
    """`(groups, n·kw, m·kh)` as `(groups, n, m·kh, kw)`."""
    groups, _, places = matrices.shape
    return matrices.reshape(groups, -1, width, places).transpose(2, 3)
