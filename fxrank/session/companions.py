"""Weights that are a model's and another module's too: of a loss, of a second network.

A layer's own object becomes its pair, so whoever holds the layer has the pair with it. A module that holds the weight itself, as
a parameter of its own, would keep the dense one; that is found before. What nobody can find before (a weight in a list of
the loop's) shows in the first step after the switch, by its gradient; see `FactorRegime`.
"""

import gc
from collections.abc import Iterable, Sequence

from torch import nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.tracing.trace import TracedModule


def shared_outside(layers: Sequence[Layer], model: nn.Module) -> dict[str, str]:
    """Reasons, by name, for the layers whose weight is a parameter of a module outside of the model too. fxrank's own
    graphs of the model are no such modules. Looks at every object that Python knows, once, and once more, after its collector
    has run, if there is a suspect: a dead one does no harm.
    """
    weights = {
        id(p): layer.name
        for layer in layers
        if layer.reason is None
        for name, p in dense_at(model, layer.name).named_parameters()
        if name != "bias"
    }
    inside = {id(module) for module in model.modules()}
    reasons = _found_outside(weights, inside)
    if reasons:
        gc.collect()
        reasons = _found_outside(weights, inside)
    return reasons


def _found_outside(weights: dict[int, str], inside: set[int]) -> dict[str, str]:
    there = gc.get_objects()
    kinds = {kind for kind in set(map(type, there)) if issubclass(kind, nn.Module) and not _is_own(kind)}
    reasons = {}
    for module in [thing for thing in there if type(thing) in kinds and id(thing) not in inside]:
        for name, parameter in vars(module).get("_parameters", {}).items():
            if id(parameter) in weights:
                reasons[weights[id(parameter)]] = (
                    f"its weight is also {name!r} of a {type(module).__name__} outside of the model, which would keep the dense one"
                )
    return reasons


def _is_own(kind: type[nn.Module]) -> bool:
    return issubclass(kind, TracedModule) or kind.__module__.partition(".")[0] == "fxrank"


def left_dense(layers: Iterable[Layer], reasons: dict[str, str]) -> list[Layer]:
    """The layers, with these reasons."""
    return [x.kept_for(reasons[x.name]) if x.reason is None and x.name in reasons else x for x in layers]
