"""R: from a layer's spectrum to the rank it gets.

A rank rule is a function of one `Evidence` and returns a real-valued rank; rounding, clamping and the break-even
rule come after it, once, for all rules. To add one, write the function and name it in `RANK_RULES`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fxrank.passes.errors import unknown_name
from fxrank.passes.spectra import exact as spectra


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at: the spectrum, of which `sigma` is `(groups, full_rank)`, descending, ξ, and the policy's options
    `share` and `ratio`. All singular values of a large layer take long: `stable_rank` does not need them.
    """

    spectrum: spectra.Spectrum
    xi: float
    share: float
    ratio: float

    @property
    def sigma(self) -> Tensor:
        return self.spectrum.sigma

    @property
    def full_rank(self) -> int:
        return self.spectrum.full_rank


def stable_rank(e: Evidence) -> float:
    """`‖W‖_F² / σ_max²`, unscaled (Cuttlefish uses it for SVHN)."""
    return e.spectrum.stable_rank


def scaled_stable_rank(e: Evidence) -> float:
    """`ξ · stable rank` (Cuttlefish §3.1): at initialization it is the full rank."""
    return e.xi * stable_rank(e)


def accumulative_rank(e: Evidence) -> float:
    """Least `r` with `Σ_{i≤r} σ_i ≥ share · Σ σ_i` (Cuttlefish appendix, share 0.8)."""
    return spectra.mean_over_groups(lambda s: spectra.accumulative(s, e.share), e.sigma)


def max_scaled_accumulative(e: Evidence) -> float:
    """The larger of the two: the paper's rule for Transformers (Cuttlefish appendix)."""
    return max(scaled_stable_rank(e), accumulative_rank(e))


def entropy_rank(e: Evidence) -> float:
    """`exp(entropy of σ / Σσ)` (Roy & Vetterli 2007); one dominant singular value does not pin it near 1."""
    return spectra.mean_over_groups(spectra.entropy, e.sigma)


def energy_rank(e: Evidence) -> float:
    """Least `r` that keeps `share` of `‖W‖_F²`; the truncation error is then at most `√(1 - share)`."""
    return spectra.mean_over_groups(lambda s: spectra.energy(s, e.share), e.sigma)


def fixed_ratio(e: Evidence) -> float:
    """`⌊ratio · full rank⌋` (Pufferfish)."""
    return float(ratio_rank(e.full_rank, e.ratio))


RANK_RULES: dict[str, Callable[[Evidence], float]] = {
    "scaled_stable_rank": scaled_stable_rank,
    "stable_rank": stable_rank,
    "accumulative": accumulative_rank,
    "max_scaled_accumulative": max_scaled_accumulative,
    "entropy": entropy_rank,
    "energy": energy_rank,
    "ratio": fixed_ratio,
}

OF_OUTPUTS = "outputs"
"""The metric that is no rule for one layer: ranks of all together, by what the whole model gives (see `session.whole_outputs`)."""


def rank_rule(name: str) -> Callable[[Evidence], float]:
    """The rule called `name`; `ValueError` that lists the valid names otherwise."""
    if name not in RANK_RULES:
        raise unknown_name("rank_metric", name, (*RANK_RULES, OF_OUTPUTS))
    return RANK_RULES[name]


def whole_rank(value: float, full_rank: int) -> int:
    """Round up once, into `1 … full_rank`. The slack of 1e-9 keeps rounding from turning a full rank into `full
    rank + 1`.
    """
    return min(full_rank, max(1, math.ceil(value - 1e-9)))


def ratio_rank(full_rank: int, ratio: float) -> int:
    """`⌊ratio · full_rank⌋`, at least 1 (Pufferfish's rounding)."""
    return max(1, int(full_rank * ratio + 1e-9))


def random_matrix_xi(rows: int, cols: int) -> float:
    """ξ of a matrix with independent random entries: `full rank · σ_max² / ‖W‖_F² → (1 + √(min/max))²`
    (Marchenko-Pastur edge).

    Stands in for a measured ξ when a model arrives trained and its initialization is gone.
    """
    small, large = min(rows, cols), max(rows, cols)
    return (1 + math.sqrt(small / large)) ** 2


Xi = str | float | Mapping[str, float]
