"""σ_max of many weights, many times, at a few matrix-vector products each.

Training changes a weight slowly, so the leading singular vector of the last look is an excellent start for the
next. A Lanczos process on `W Wᵀ` (short side) with full reorthogonalization then needs 3-6 products where a cold
start needs 10-40 and power iteration up to 600 on the flat spectra of fresh layers.

When to stop: a Ritz pair `(θ, y)` with residual `ρ = ‖W Wᵀ y − θ y‖` has an eigenvalue within `ρ²/γ` of `θ`, `γ`
the gap to the next Ritz value (Parlett, *The Symmetric Eigenvalue Problem*, §11.7), and within `ρ` if the gap is
unknown. That bounds the distance to *an* eigenvalue; where two nearly coincide the process could lock on the
second. So the start always mixes in the second Ritz vector and a fresh random direction, and the second must have
converged too before the gap is believed.

On a CPU the square of a narrow matrix is cheaper than the process: up to `NARROW` its largest eigenvalue is taken as it is.

The scalars of a few steps of all layers travel to the host in one transfer, so on a GPU a whole sample costs a
handful of synchronizations.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxrank.passes.errors import CheckpointError, NonFiniteWeightError
from fxrank.passes.spectra import linalg

STEPS_PER_ROUND = 4
KEPT = 2
SMALL = 1_000_000
MAX_STEPS = 64
NARROW = 128
"""Short sides up to this many numbers, measured: 0.08 against 0.73 ms at 48, 0.63 against 1.8 ms at 128, 1.9 against 1.8 ms at 192."""
TOLERANCE = 2e-4
"""Accepted relative error bound of `σ_max²`; the measured error of the stable rank is in benchmarks/results."""
SQUARED_SAFELY = (1e-15, 1e15)
"""Norms whose squares, and those of what counts beside them, are numbers in float32."""
RANDOM_SHARE = 0.05
SECOND_SHARE = 0.2


@dataclass
class _Run:
    """One Lanczos process on one matrix `(s, n)`, wide or square."""

    matrix: Tensor
    basis: Tensor
    """Lanczos vectors, one a row, `(MAX_STEPS + 1, s)`; the first is the start."""
    scalars: list[Tensor] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    theta: float = 0.0
    ritz: Tensor | None = None
    """The last Ritz vectors, `(up to KEPT, s)`, the leading one last."""
    done: bool = False

    def advance(self, steps: int) -> None:
        first = len(self.alphas)
        for step in range(first, first + steps):
            image = self.matrix.t() @ self.basis[step]
            alpha = torch.dot(image, image)
            residual = self.matrix @ image
            basis = self.basis[: step + 1]
            # Twice is enough (Parlett §6.9), once is not: ghosts of the converged vector made 4 % of the estimates wrong.
            for _ in range(2):
                residual = torch.addmv(residual, basis.t(), basis @ residual, alpha=-1)
            beta = torch.linalg.vector_norm(residual)
            self.scalars += [alpha, beta]
            torch.div(residual, beta.clamp(min=torch.finfo(beta.dtype).tiny), out=self.basis[step + 1])

    def judge(self, scalars: list[float]) -> None:
        """Take the scalars of the last steps, solve the small tridiagonal problem, decide whether to stop."""
        self.alphas += scalars[0::2]
        self.betas += scalars[1::2]
        # An invariant subspace ends the recurrence: what follows a vanishing beta is rounding noise.
        noise = 1e-6 * max(max(self.alphas), 0.0)
        size = next((i + 1 for i, beta in enumerate(self.betas) if beta <= noise), len(self.alphas))
        exhausted = size < len(self.alphas) or self.betas[size - 1] <= noise or size >= len(self.basis) - 1
        # At this size a dense solve costs a third of scipy's checked tridiagonal one.
        off = self.betas[: size - 1]
        theta, vectors = np.linalg.eigh(np.diag(self.alphas[:size]) + np.diag(off, 1) + np.diag(off, -1))
        self.theta = float(max(theta[-1], 0.0))
        residual = self.betas[size - 1] * abs(float(vectors[-1, -1]))
        second = self.betas[size - 1] * abs(float(vectors[-1, -2])) if size > 1 else float("inf")
        gap = float(theta[-1] - theta[-2]) - second if size > 1 else 0.0
        bound = residual * min(1.0, residual / gap) if gap > 0 else residual
        if exhausted or bound <= TOLERANCE * self.theta:
            self.done = True
            basis = self.basis[:size]
            weights = torch.from_numpy(vectors[:, -KEPT:].T.copy()).to(basis)
            # Row by row: a product with one or two columns is many times slower than as many matrix-vector products.
            self.ritz = torch.stack([basis.t() @ row for row in weights])


class StableRankTracker:
    """Stable ranks of a fixed list of weights, cheap from the second look on.

    `seed` fixes the random directions. The state is the last two Ritz vectors of every matrix: float32, two vectors
    of the short side each.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._ritz: dict[tuple[int, int], Tensor] = {}

    def __call__(self, stacks: list[Tensor], names: list[str], first: int = 0) -> list[float]:
        """Stable rank `‖W‖_F² / σ_max²` of every stack `(groups, rows, cols)`, the mean over its groups; 0 for a
        zero matrix.

        `names` are used in errors only; `first` is the number of the first stack, where they come in several calls. Relative error below 1e-3 on 99 % of the layers of real training runs
        (measured, see benchmarks/results). Raises `NonFiniteWeightError` that names the first weight with NaN or
        infinity.
        """
        keys = [(index, group) for index, stack in enumerate(stacks, first) for group in range(len(stack))]
        matrices = [stacks[index - first].detach()[group].float() for index, group in keys]
        found = [torch.linalg.vector_norm(matrix) for matrix in matrices]
        norms = torch.stack([n.cpu() for n in found] if _mixed(found) else found).tolist()
        squares: dict[tuple[int, int], float] = {}
        runs: dict[tuple[int, int], _Run] = {}
        for number, (key, matrix) in enumerate(zip(keys, matrices, strict=True)):
            if not SQUARED_SAFELY[0] < norms[number] < SQUARED_SAFELY[1]:
                matrix, norms[number] = _in_units(stacks[key[0] - first].detach()[key[1]])
            if not np.isfinite(norms[number]):
                raise NonFiniteWeightError(
                    f"weights must be finite to have a stable rank; layer {names[key[0] - first]!r} holds NaN or infinity. "
                    "Lower the learning rate or restore an earlier checkpoint."
                )
            matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.t()
            if norms[number] == 0:
                squares[key] = 0.0
            elif is_narrow(matrix):
                squares[key] = float(linalg.eigvalsh(matrix @ matrix.t())[-1])
            else:
                runs[key] = _Run(matrix, self._start(key, matrix))
        while active := [run for run in runs.values() if not run.done]:
            for run in active:
                run.advance(min(_steps(run.matrix), len(run.basis) - 1 - len(run.alphas)))
            pending = [scalar for run in active for scalar in run.scalars]
            values = iter(torch.stack([p.cpu() for p in pending] if _mixed(pending) else pending).tolist())
            for run in active:
                run.judge([next(values) for _ in run.scalars])
                run.scalars = []
        for key, run in runs.items():
            squares[key] = run.theta
            if run.ritz is not None:
                self._ritz[key] = run.ritz
        ranks = [0.0] * len(stacks)
        for key, matrix, norm in zip(keys, matrices, norms, strict=True):
            rank = min(max(norm**2 / squares[key], 1.0), float(min(matrix.shape))) if squares[key] > 0 else 0.0
            ranks[key[0] - first] += rank / len(stacks[key[0] - first])
        return ranks

    def state_dict(self) -> dict[str, Any]:
        """The random numbers' state and the Ritz vectors `[index, group, (up to 2, short side)]`: with them the next
        samples are the same to the last bit.
        """
        ritz = [[index, group, vectors.clone()] for (index, group), vectors in self._ritz.items()]
        return {"generator": self._generator.get_state(), "ritz": ritz}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, of a state that `check_state` has seen."""
        self._generator.set_state(state["generator"])
        self._ritz = {(index, group): vectors.clone() for index, group, vectors in state["ritz"]}

    def check_state(self, state: Any, short_sides: list[int]) -> None:
        """Raise `CheckpointError` unless `load_state_dict` can take this state, of stacks with these short sides."""
        try:
            torch.Generator().set_state(state["generator"])
            fits = all(
                vectors.dtype == torch.float32
                and vectors.ndim == 2
                and 1 <= len(vectors) <= KEPT
                # the short side of a matrix is its layer's full rank
                and vectors.shape[1] == short_sides[index]
                and index >= 0
                and group >= 0
                for index, group, vectors in state["ritz"]
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            fits = False
        if not fits:
            raise CheckpointError(
                "a rank tracker's state must be what it wrote for these layers; this one is damaged. Load another copy, or start afresh."
            )

    def _start(self, key: tuple[int, int], matrix: Tensor) -> Tensor:
        start = torch.randn(len(matrix), generator=self._generator, dtype=matrix.dtype).to(matrix.device)
        start /= torch.linalg.vector_norm(start)
        ritz = self._ritz.get(key)
        if ritz is not None:
            ritz = ritz.to(matrix.device)  # a loaded one comes from the CPU
            start = ritz[-1] + RANDOM_SHARE * start
            for other in ritz[:-1]:
                start += SECOND_SHARE * other
        basis = start.new_empty(min(MAX_STEPS, len(matrix)) + 1, len(matrix))
        torch.div(start, torch.linalg.vector_norm(start), out=basis[0])
        return basis


def is_narrow(matrix: Tensor) -> bool:
    """Whether its square is cheaper than a few products with it."""
    return matrix.device.type == "cpu" and min(matrix.shape) <= NARROW


def _in_units(matrix: Tensor) -> tuple[Tensor, float]:
    """A very small or very large matrix in units of its largest number, which has the same stable rank, and its norm then."""
    largest = matrix.abs().max().double()
    if not 0 < largest < float("inf"):
        return matrix.float(), float(largest)  # of zeros, or not finite
    unit = (matrix.double() / largest).float()
    return unit, float(torch.linalg.vector_norm(unit))


def _mixed(scalars: list[Tensor]) -> bool:
    """Whether the scalars live on several devices (a model spread over GPUs)."""
    return len({s.device for s in scalars}) > 1


def _steps(matrix: Tensor) -> int:
    """Steps between two looks at the residual: where a product is cheap, more of them, as a guard against a hidden
    leader.
    """
    return 2 * STEPS_PER_ROUND if matrix.numel() < SMALL else STEPS_PER_ROUND
