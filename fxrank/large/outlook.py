"""What a model would become under a budget, and what making it so would take, from its shapes alone.

No weight is looked at, so all pairs get the same share of what their layers cost. Times are estimates: a few small decompositions are timed
here, and their time is taken to grow with the number of operations, as it does once matrices are large (a Gram matrix of an `m × n` weight
takes `m n s` multiply-adds with `s = min(m, n)`, an eigendecomposition some `9 s³`).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn

from fxrank.passes.calibration.collect import ROUND_BYTES
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import BudgetError
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.spectra.exact import decompose, gram

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
            of_gram = _seconds(partial(gram, square), square.device)
            whole = _seconds(partial(decompose, square), square.device)
            products.append(size**3 / of_gram)
            eigh.append(EIGH * size**3 / max(whole - of_gram, of_gram))
        return cls(max(products[1:]), max(eigh[1:]))


@dataclass(frozen=True)
class Row:
    """One layer: its `rank`, None where it stays dense, and what factorizing it takes. Calibration looks at this `side` of it, at
    none where that is None.
    """

    layer: Layer
    rank: int | None
    side: str | None = None

    @cached_property
    def parameters(self) -> int:
        """Afterwards."""
        return self.layer.parameters if self.rank is None else self.layer.pair_parameters(self.rank)

    @cached_property
    def macs(self) -> int:
        """Afterwards, in one call."""
        return self.layer.macs if self.rank is None else self.layer.pair_macs(self.rank)

    @property
    def watched(self) -> int:
        """The size of the vectors whose moments are taken, 0 where none are."""
        return {None: 0, "outputs": self.layer.rows}.get(self.side, self.layer.cols)

    @property
    def moment_bytes(self) -> int:
        """Memory of the moments, float64."""
        return 8 * self.layer.groups * self.watched**2

    @property
    def moment_macs(self) -> int:
        """Adding them up over `TOKENS`."""
        return self.layer.groups * self.watched**2 * TOKENS

    @property
    def split_macs(self) -> tuple[int, int]:
        """Products and eigendecomposition of a split that looks at the weight alone."""
        a = self.layer
        if self.rank is None:
            return 0, 0
        return a.groups * a.rows * a.cols * (a.full_rank + self.rank), EIGH * a.groups * a.full_rank**3

    @property
    def fit_macs(self) -> tuple[int, int]:
        """The same where the moments are known (`passes.calibration.projection`): of inputs two eigendecompositions, of inputs and outputs."""
        a, times = self.layer, 2 if self.side == "inputs" else 1
        products = a.groups * a.rows * a.cols * self.watched
        return (3 * times - 1) * products, times * EIGH * a.groups * self.watched**3


@dataclass(frozen=True)
class Outlook:
    """A whole model whose pairs have `share` of their layers' parameters. `others` counts the parameters that no rank changes."""

    rows: Sequence[Row]
    share: float
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

    @property
    def rounds(self) -> int:
        """How often calibration runs over its batches: moments of more layers than fit into `ROUND_BYTES` are not held at once."""
        found, held = 0, ROUND_BYTES
        for size in (row.moment_bytes for row in self.rows if row.moment_bytes):
            if held + size > ROUND_BYTES:
                found, held = found + 1, 0
            held += size
        return found

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
    """The largest share of all pairs with which the model keeps to `target`, the share of its `"params"` or of its layers' `"macs"`.
    Raises `BudgetError` if none is small enough.
    """
    sides = {
        a.name: a.unrolled.pair.side(dense_at(model, a.name)) for a in layers if a.reason is None and a.unrolled.pair
    }
    others = sum(p.numel() for p in model.parameters()) - sum(layer.parameters for layer in layers)

    def at(share: float) -> Outlook:
        return Outlook([_row(layer, share, sides.get(layer.name)) for layer in layers], share, others)

    def reached(found: Outlook) -> float:
        before, after = found.parameters if of == "params" else found.macs
        return after / before

    low, high = 0.0, 1.0
    if (least := reached(at(low))) > target:
        raise BudgetError(
            f"target_{of} must be at least {least:.4f} here, where every layer that may be factorized has rank 1; got {target:g}. Raise it, or let "
            "more layers be factorized: include='*' takes in the first, the last and the tables too."
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(at(middle)) <= target else (low, middle)
    return at(low)


def _row(layer: Layer, share: float, side: str | None) -> Row:
    if layer.reason is not None:
        return Row(layer, None)
    return Row(layer, min(layer.full_rank, max(1, int(share * layer.break_even_rank))), side)


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
