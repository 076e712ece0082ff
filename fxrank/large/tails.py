"""What ranks are chosen by, kept when moments and factors are let go."""

from dataclasses import dataclass, replace

from torch import Tensor

from fxrank.passes.calibration.evidence import Known


@dataclass(frozen=True)
class Tails:
    """The `sigma` of a projection (see `passes.calibration`), with what else is asked of one but its factors: about the mean, if it was `centred`,
    and of the `plain` moments where a pair without a bias may be as good. Where a projection has no closed form, as of kernels and their
    patches, `lost` is what its start would lose.
    """

    about_mean: Tensor | None
    plain: Tensor | None
    centred: bool

    @classmethod
    def of(cls, known: Known, *, biased: bool) -> "Tails":
        """`biased`: whether the layer has a bias, so that the plain ones are of no use."""
        if not known.centred:
            return cls(None, known.sigma, False)
        return cls(known.sigma, None if biased else replace(known, centred=False).sigma, True)

    @property
    def sigma(self) -> Tensor:
        """As of `Projection`."""
        found = self.about_mean if self.centred else self.plain
        assert found is not None
        return found

    def lost(self, rank: int, search: bool = True) -> float:
        """As of `Projection`."""
        return float(self.sigma[:, rank:].square().sum())

    def output_error(self, rank: int, search: bool = True) -> float:
        """As of `Projection`."""
        energy = float(self.sigma.square().sum())
        return (self.lost(rank) / energy) ** 0.5 if energy > 0 else 0.0

    def factors(self, rank: int, search: bool = True) -> tuple[Tensor, ...]:
        """None: they are made anew when the ranks have been chosen."""
        return ()
