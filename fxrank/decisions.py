"""From what is known of a layer to the decision about it."""

from dataclasses import replace

from fxrank.passes.discovery.layer import Layer
from fxrank.plan import LayerDecision


def keep(layer: Layer, reason: str) -> LayerDecision:
    """The decision to leave a layer dense."""
    return LayerDecision(
        name=layer.name,
        kind=layer.kind,
        weight_shape=layer.weight_shape,
        full_rank=layer.full_rank,
        rank=None,
        reason=reason,
        parameters=layer.parameters,
        macs=layer.macs,
    )


def take(layer: Layer, rank: int, reason: str, *, extra_bn: bool = False) -> LayerDecision:
    """The decision to factorize a layer, in its present form, at `rank`."""
    return replace(
        keep(layer, reason),
        rank=rank,
        form=layer.form,
        extra_bn=extra_bn and layer.takes_norm,
        pair_parameters=layer.pair_parameters(rank),
        pair_macs=layer.pair_macs(rank),
    )
