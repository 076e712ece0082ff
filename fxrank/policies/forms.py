"""A layer in the form that suits it best."""

from torch import nn

from fxrank.passes.discovery.layer import Layer, matrices_of
from fxrank.passes.spectra.exact import Decomposition, check_finite, decompose, truncation_error
from fxrank.policies.base import Policy


def in_best_form(layer: Layer, rank: int, policy: Policy, model: nn.Module) -> tuple[Layer, int, Decomposition]:
    """The layer in the form that the policy wants or that suits it best, the rank in that form with no more parameters
    than `rank` has in the layer's own, and the spectrum.
    """
    spectrum = decomposition_of(layer, model)
    if policy.form not in ("auto", *layer.other_forms):
        return layer, rank, spectrum
    best = layer, rank, spectrum
    for form in layer.other_forms:
        other = layer.in_form(form)
        same_size = min(other.full_rank, layer.pair_parameters(rank) // other.pair_parameters(1))
        if same_size < 1:
            continue
        found = decomposition_of(other, model)
        better = truncation_error(found.sigma, same_size) < truncation_error(spectrum.sigma, rank)
        if better or policy.form == form:
            best = other, same_size, found
    return best


def decomposition_of(layer: Layer, model: nn.Module) -> Decomposition:
    """The layer's spectrum, with `σ_max` exact. Raises `NonFiniteWeightError` with its name."""
    stack = matrices_of(layer, model)
    check_finite(stack, layer.name)
    return decompose(stack)
