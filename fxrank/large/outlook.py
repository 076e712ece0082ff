"""What a model would become under a budget, and what making it so would take, from its shapes alone.

No weight is looked at, so one ratio of full rank stands for all layers. Times are estimates: a few small decompositions are timed
here, and their time is taken to grow with the number of operations, as it does once matrices are large (a Gram matrix of an `m × n` weight
takes `m n s` multiply-adds with `s = min(m, n)`, an eigendecomposition some `9 s³`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import BudgetError
from fxrank.passes.spectra.exact import decompose, gram
from fxrank.policies.ranks import ratio_rank

EIGH = 9
"""Multiply-adds of an eigendecomposition with all vectors, by the cube of the size (Golub & Van Loan, §8.3)."""
SIZES = (192, 384, 768)
"""Of the matrices that are timed; the largest must be large enough for the cubic law, and small enough to wait for."""
TOKENS = 8 * 2048
"""Calibration counts so many vectors: 8 sequences of 2,048 tokens."""


@dataclass(frozen=True)
class Rates:
    """Multiply-adds a second on this device, of float64 products and of eigendecompositions."""

    products: float
    eigh: float

    @classmethod
    def measured(cls, device: torch.device | str = "cpu") -> "Rates":
        """The best of those of a few sizes, after one that is not counted: the larger the better used is a device."""
        products, eigh = [], []
        for size in (SIZES[0], *SIZES):
            square = torch.randn(1, size, size, generator=torch.Generator().manual_seed(0)).to(device)
            of_gram = _seconds(lambda square=square: gram(square), square.device)
            whole = _seconds(lambda square=square: decompose(square), square.device)
            products.append(size**3 / of_gram)
            eigh.append(EIGH * size**3 / max(whole - of_gram, of_gram))
        return cls(max(products[1:]), max(eigh[1:]))


@dataclass(frozen=True)
class Row:
    """One layer: its `rank`, None where it stays dense, and what factorizing it takes."""

    layer: Layer
    rank: int | None

    @cached_property
    def parameters(self) -> int:
        """Afterwards."""
        return self.layer.parameters if self.rank is None else self.layer.pair_parameters(self.rank)

    @cached_property
    def macs(self) -> int:
        """Afterwards, in one call."""
        return self.layer.macs if self.rank is None else self.layer.pair_macs(self.rank)

    @property
    def moment_bytes(self) -> int:
        """Memory of the second moments of its outputs, float64."""
        return 0 if self.rank is None else 8 * self.layer.groups * self.layer.rows**2

    @property
    def moment_macs(self) -> int:
        """Adding up these moments over `TOKENS`."""
        return 0 if self.rank is None else self.layer.groups * self.layer.rows**2 * TOKENS

    @property
    def split_macs(self) -> tuple[int, int]:
        """Products and eigendecomposition of a split that looks at the weight alone."""
        if self.rank is None:
            return 0, 0
        a = self.layer
        return a.groups * a.rows * a.cols * (a.full_rank + self.rank), EIGH * a.groups * a.full_rank**3

    @property
    def fit_macs(self) -> tuple[int, int]:
        """The same where the moments are known: of the outputs' size, with the unseen directions' product."""
        if self.rank is None:
            return 0, 0
        a = self.layer
        return a.groups * a.rows * a.cols * (a.rows + self.rank), EIGH * a.groups * a.rows**3


@dataclass(frozen=True)
class Outlook:
    """A whole model with one ratio of full rank. `others` counts the parameters that no rank changes."""

    rows: Sequence[Row]
    ratio: float
    others: int

    @property
    def parameters(self) -> tuple[int, int]:
        """Before and after."""
        before = sum(row.layer.parameters for row in self.rows)
        return before + self.others, sum(row.parameters for row in self.rows) + self.others

    @property
    def macs(self) -> tuple[int, int]:
        """Before and after."""
        return sum(row.layer.macs for row in self.rows), sum(row.macs for row in self.rows)

    def seconds(self, rates: Rates) -> dict[str, float]:
        """An estimate of each part."""

        def both(macs: Sequence[tuple[int, int]]) -> float:
            return sum(a for a, _ in macs) / rates.products + sum(b for _, b in macs) / rates.eigh

        return {
            "split": both([row.split_macs for row in self.rows]),
            "moments": sum(row.moment_macs for row in self.rows) / rates.products,
            "fit": both([row.fit_macs for row in self.rows]),
        }


def outlook(model: nn.Module, layers: Sequence[Layer], of: str, target: float) -> Outlook:
    """The largest ratio with which the model keeps to `target`, the share of its `"params"` or of its layers' `"macs"`. A layer
    whose pair would cost as much as it does stays dense. Raises `BudgetError` if none is small enough.
    """
    others = sum(p.numel() for p in model.parameters()) - sum(layer.parameters for layer in layers)

    def at(ratio: float) -> Outlook:
        return Outlook([_row(layer, ratio, of) for layer in layers], ratio, others)

    def share(found: Outlook) -> float:
        before, after = found.parameters if of == "params" else found.macs
        return after / before

    low, high = 0.0, 1.0
    if (least := share(at(low))) > target:
        raise BudgetError(
            f"target_{of} must be at least {least:.4f} here, where every layer that may be factorized has rank 1; got {target:g}. Raise it, or let "
            "more layers be factorized: include='*' takes in the first, the last and the tables too."
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(at(middle)) <= target else (low, middle)
    return at(low)


def _row(layer: Layer, ratio: float, of: str) -> Row:
    if layer.reason is not None:
        return Row(layer, None)
    rank = ratio_rank(layer.full_rank, ratio)
    row = Row(layer, rank)
    saves = row.parameters < layer.parameters if of == "params" else row.macs < layer.macs
    return row if saves else Row(layer, None)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of three."""
    found = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return max(min(found), 1e-9)
