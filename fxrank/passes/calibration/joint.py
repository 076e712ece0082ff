"""Factors of one matrix that several products share, each with data of its own: a table that is the head too, a joint projection whose
parts see different inputs, columns and rows of one parameter.

Each use `p` has a block `W_p` of the matrix, and its squared error is `⟨X, L X R⟩` of the block's `X = W_p - (V U)_p`: `R` are second
moments of inputs `x` of `x Wᵀ`, `L` those of inputs of `x W`, or on its diagonal how often each row is looked up. What is made least is
the sum over all uses. Products of one kind count for as many vectors as they saw; products, and lookups, are different outputs, and
each kind counts by its share of its own outputs' mean square. (Elementwise weighted low-rank approximation is a case of it; it
has no closed form, Srebro & Jaakkola 2003.)

The sum is quadratic in each factor, so both are improved in turn by conjugate gradients. Where all uses together are one `L` and one `R`
the least has a closed form, and of others this start, `L` and `R` their traces over each other, is near it; its inverse also
preconditions the gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fxrank.passes.calibration.projection import UNSEEN, balanced, improved
from fxrank.passes.spectra import linalg
from fxrank.passes.spectra.exact import Spectrum

ROUNDS = 20
"""Of both factors in turn, at most."""
GAIN = 0.01
"""A round that takes away no more than this share of the error is the last."""
STEPS = 20
"""Conjugate gradients, at most, for one factor."""


@dataclass(frozen=True)
class Use:
    """One kind of product with the block `rows` × `cols` of a matrix: `left` `(rows, rows)`, or its diagonal `(rows,)`, and `right` `(cols,
    cols)`, each None for the identity; from `count` vectors of `size` numbers.
    """

    side: str
    rows: range
    cols: range
    left: Tensor | None
    right: Tensor | None
    count: int
    size: int
    weight: float = 1.0

    def block(self, x: Tensor) -> Tensor:
        """The block, of a matrix `(rows, cols)`."""
        found: Tensor = x[_slice(self.rows), _slice(self.cols)]
        return found

    def weighed(self, x: Tensor, right: Tensor | None = None) -> Tensor:
        """`L X R` of a block, or with another matrix in the place of `R`."""
        right = self.right if right is None else right
        x = x if right is None else x @ right
        if self.left is not None:
            x = self.left @ x if self.left.ndim == 2 else self.left[:, None] * x
        return self.weight * x

    def squared(self, x: Tensor) -> float:
        """`⟨X, L X R⟩` of the block of a matrix."""
        block = self.block(x)
        return float((block * self.weighed(block)).sum())

    def with_unseen(self) -> "Use":
        """With a little of all directions alike, see `projection.UNSEEN`."""
        left, right = self.left, self.right
        if left is not None:
            more = UNSEEN * (left if left.ndim == 1 else left.diagonal()).mean()
            left = left + (more if left.ndim == 1 else more * torch.eye(len(left)).to(left))
        if right is not None:
            right = right + UNSEEN * right.diagonal().mean() * torch.eye(len(right)).to(right)
        return replace(self, left=left, right=right)


@dataclass(frozen=True)
class JointProjection:
    """What is known of one matrix and its uses, with the interface of `Projection`. `stack` is `(1, rows, cols)`."""

    stack: Tensor
    uses: tuple[Use, ...]
    centred: bool = field(default=False, init=False)
    _found: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, stack: Tensor, uses: Sequence[Use]) -> "JointProjection":
        """With the uses weighed against each other."""
        w, energy = _numbers(stack, uses), dict.fromkeys((use.side for use in uses), 0.0)
        for use in uses:
            energy[use.side] += use.count * use.squared(w)
        return cls(stack, tuple(replace(use, weight=use.count / (energy[use.side] or 1.0)) for use in uses))

    @property
    def vectors(self) -> tuple[int, int]:
        """As of `Projection`, of the use that saw least."""
        return min(((use.count, use.size) for use in self.uses), key=lambda seen: seen[0] / seen[1])

    @cached_property
    def sigma(self) -> Tensor:
        """Those of the start, `(1, min(rows, cols))`: what lower ranks lose, about."""
        found = self._start.sigma
        scaled: Tensor = found * (self.energy / max(1e-300, float(found.square().sum()))) ** 0.5
        return scaled.cpu()

    @cached_property
    def energy(self) -> float:
        """The sum of the squares of what the uses give, each kind in its own unit: how many kinds there are."""
        return self._squared(self._w)

    def lost(self, rank: int, search: bool = True) -> float:
        """The sum of the squared errors of the outputs of `factors`, each kind relative to its outputs."""
        u, v = self._fit(rank, search)
        return self._squared(self._w - v @ u)

    def output_error(self, rank: int, search: bool = True) -> float:
        """The same, relative: the root of the share of `energy` that is lost."""
        return (max(0.0, self.lost(rank, search)) / self.energy) ** 0.5 if self.energy > 0 else 0.0

    def factors(self, rank: int, search: bool = True) -> tuple[Tensor, ...]:
        """As `SpatialProjection.factors`."""
        u, v = self._fit(rank, search)
        return tuple(t.to(self.stack) for t in balanced(u[None], v[None]))

    @cached_property
    def _w(self) -> Tensor:
        return _numbers(self.stack, self.uses)

    @cached_property
    def _known(self) -> list[Use]:
        """The uses with something of all directions in them, and of the whole matrix, so that the factors of each are determined."""
        uses = [use.with_unseen() for use in self.uses]
        rows, cols = self._w.shape
        scale = float(self._w.square().sum()) or 1.0
        whole = Use("", range(rows), range(cols), None, None, 0, 0, UNSEEN * (self.energy or 1.0) / scale)
        return [*uses, whole]

    @cached_property
    def _marginals(self) -> tuple[Tensor, Tensor]:
        """All `L`, `(rows, rows)` or `(rows,)` if all are diagonal, and all `R` `(cols, cols)`, each weighed by the trace of the other."""
        rows, cols = self._w.shape
        whole = any(use.left is not None and use.left.ndim == 2 for use in self._known)
        of_rows = self._w.new_zeros((rows, rows) if whole else (rows,))
        of_cols = self._w.new_zeros(cols, cols)
        for use in self._known:
            down, across = _slice(use.rows), _slice(use.cols)
            left = self._w.new_ones(len(use.rows)) if use.left is None else use.left
            right = torch.eye(len(use.cols)).to(self._w) if use.right is None else use.right
            trace = (left if left.ndim == 1 else left.diagonal()).sum()
            of_cols[across, across] += use.weight * trace * right
            if whole and left.ndim == 1:
                left = left.diag()
            of_rows[(down, down) if whole else down] += use.weight * right.diagonal().sum() * left
        return of_rows, of_cols

    @cached_property
    def _roots(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of each of these the root, and its inverse."""
        return _root(self._marginals[0]), _root(self._marginals[1])

    @cached_property
    def _start(self) -> Spectrum:
        """Of the matrix between the roots: its truncation is the least error where the uses are one `L` and one `R`."""
        (left, _), (right, _) = self._roots
        return Spectrum((_times(left, self._w) @ right)[None])

    @cached_property
    def _own(self) -> Spectrum:
        return Spectrum(self.stack)

    @cached_property
    def _target(self) -> Tensor:
        """`Σ L W R`."""
        found = torch.zeros_like(self._w)
        for use in self._known:
            use.block(found).add_(use.weighed(use.block(self._w)))
        return found

    def _squared(self, x: Tensor) -> float:
        return sum(use.squared(x) for use in self.uses)

    def _fit(self, rank: int, search: bool = True) -> tuple[Tensor, Tensor]:
        """From the start, or from the weight's own factors where those would be better than what comes of it: the problem has
        several minima.
        """
        key = rank, search
        if key not in self._found:
            own = self._truncated(self._own, rank)
            best = own
            if rank < min(self._w.shape) and not search:
                best = min(own, self._start_of(rank), key=self._lost)
            elif rank < min(self._w.shape):
                best = self._improved(*self._start_of(rank))
                if self._lost(best) > self._lost(own):
                    best = min(own, self._improved(*own), key=self._lost)
            self._found.clear()  # whoever asks for one rank asks for it again at once
            self._found[key] = best
        return self._found[key]

    def _start_of(self, rank: int) -> tuple[Tensor, Tensor]:
        (_, left), (_, right) = self._roots
        u, v = self._truncated(self._start, rank)
        return u @ right, _times(left, v)

    def _truncated(self, spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
        u, v = spectrum.factors(rank)
        return u[0].to(self._w), v[0].to(self._w)

    def _lost(self, factors: tuple[Tensor, Tensor]) -> float:
        return self._squared(self._w - factors[1] @ factors[0])

    def _improved(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        before = math.inf
        for _ in range(ROUNDS):
            v = self._best_v(u, v)
            u = self._best_u(u, v)
            now = self._lost((u, v))
            if now >= (1 - GAIN) * before:
                break
            before = now
        return u, self._best_v(u, v)

    def _best_v(self, u: Tensor, start: Tensor) -> Tensor:
        """The gradient in `V` of a use is `L V (U R Uᵀ)`."""
        narrow = [u[:, _slice(use.cols)] for use in self._known]
        inner = [
            part @ (part.mT if use.right is None else use.right @ part.mT)
            for part, use in zip(narrow, self._known, strict=True)
        ]

        def normal(v: Tensor) -> Tensor:
            found = torch.zeros_like(v)
            for use, square in zip(self._known, inner, strict=True):
                found[_slice(use.rows)] += use.weighed(v[_slice(use.rows)], square)
            return found

        (_, left), _ = self._roots
        across = torch.linalg.pinv(u @ self._marginals[1] @ u.mT, hermitian=True)
        return improved(normal, self._target @ u.mT, start, STEPS, lambda v: _times(left, _times(left, v)) @ across)

    def _best_u(self, start: Tensor, v: Tensor) -> Tensor:
        """The gradient in `U` of a use is `(Vᵀ L V) U R`."""
        inner = [
            part.mT @ replace(use, right=None).weighed(part) for use in self._known for part in [v[_slice(use.rows)]]
        ]

        def normal(u: Tensor) -> Tensor:
            found = torch.zeros_like(u)
            for use, square in zip(self._known, inner, strict=True):
                part = square @ u[:, _slice(use.cols)]
                found[:, _slice(use.cols)] += part if use.right is None else part @ use.right
            return found

        _, (_, right) = self._roots
        down = torch.linalg.pinv(v.mT @ _times(self._marginals[0], v), hermitian=True)
        return improved(normal, v.mT @ self._target, start, STEPS, lambda u: down @ u @ right @ right)


def _numbers(stack: Tensor, uses: Sequence[Use]) -> Tensor:
    """The matrix in float64, where the uses are."""
    device = next(t.device for use in uses for t in (use.left, use.right) if t is not None)
    return stack[0].detach().to(dtype=torch.float64, device=device)


def _slice(places: range) -> slice:
    return slice(places.start, places.stop, places.step)


def _times(left: Tensor, x: Tensor) -> Tensor:
    """A matrix, or the diagonal of one, times a matrix."""
    return left @ x if left.ndim == 2 else left[:, None] * x


def _root(square: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a positive matrix, or of a diagonal, and its inverse."""
    if square.ndim == 1:
        return square.sqrt(), square.rsqrt()
    values, vectors = linalg.eigh(square)
    roots = values.clamp(min=1e-15 * values[-1]).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
