"""A layer in the form that suits it best."""

from torch import nn

from fxrank.passes.discovery.layer import Layer, matrices_of
from fxrank.passes.pairs.registry import AUTO
from fxrank.passes.spectra.exact import Spectrum, check_finite


def in_best_form(
    layer: Layer, rank: int, wanted: str, model: nn.Module, known: Spectrum | None = None
) -> tuple[Layer, int, Spectrum]:
    """The layer in the form that is `wanted` or that suits it best, the rank in that form with no more parameters
    than `rank` has in the layer's own, and the spectrum. `known` is that of the layer as it is, if it has been computed.
    """
    best = layer, rank, known or spectrum_of(layer, model)
    lost: float | None = None
    for form in _choices(layer, wanted):
        other = layer.in_form(form)
        same_size = other.rank_within(layer.pair_parameters(rank))
        if same_size < 1:
            continue
        found = spectrum_of(other, model)
        error = found.truncation_error(same_size)
        lost = best[2].truncation_error(best[1]) if lost is None else lost
        if error < lost or wanted == form:
            best, lost = (other, same_size, found), error
    return best


def open_forms(layer: Layer, wanted: str) -> list[Layer]:
    """The layer in each form that it may take where a policy wants this one."""
    others = [layer.in_form(form) for form in _choices(layer, wanted)]
    return [layer, *others] if wanted == AUTO else others or [layer]


def _choices(layer: Layer, wanted: str) -> list[str]:
    """The forms to try beside the one that the layer has."""
    if wanted == AUTO:
        return [other.form for other in layer.others if other.pair is not None and other.pair.automatic]
    return [form for form in layer.other_forms if form == wanted]


def spectrum_of(layer: Layer, model: nn.Module) -> Spectrum:
    """The layer's spectrum. Raises `NonFiniteWeightError` with its name."""
    stack = matrices_of(layer, model)
    check_finite(stack, layer.name)
    return Spectrum(stack)
