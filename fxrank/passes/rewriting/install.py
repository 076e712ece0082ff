"""Pairs in the place of layers in a user's module tree, and the way back."""

from collections.abc import Iterable, Mapping
from types import MethodType
from typing import Any

from torch import nn

from fxrank.passes.model.compiled import compiled_parts, follow_change
from fxrank.passes.model.held import change_held
from fxrank.passes.model.names import own_name
from fxrank.passes.model.weights import drop_norm_hooks
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.torch_private.modules import all_hooks, become, own_children, own_parameters, read_weights_again


def install(model: nn.Module, replacements: Mapping[int, nn.Module]) -> list[str]:
    """Let each layer with one of these `id`s become what is to stand in its place. Returns the paths of the layers.

    The layer's own object becomes the replacement (see `become`): whoever holds it, the model at several paths, a container or a
    closure, a second network, a global variable, has the new one with it, and nobody computes with the old one unseen. The
    object given as the replacement is not to be used after. A method of the layer's old class that the model holds aside, its
    `forward` say, becomes that of the new one.

    The layer's forward and backward hooks stay, and their handles stay valid. The model itself cannot be replaced: raises
    `ValueError`. Other modules, their hooks and parameters are untouched.
    """
    if id(model) in replacements:
        raise ValueError(
            "the layer to replace must sit inside the model; the model is itself that layer "
            f"({type(model).__name__}). Wrap it: torch.nn.Sequential(model)."
        )
    places = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if id(m) in replacements]
    for module in {id(m): m for _, m in places}.values():
        replacement = replacements[id(module)]
        vars(replacement).update(all_hooks(module))
        drop_norm_hooks(replacement)
        become(module, replacement)
    for path, _ in places:
        follow_change(model.get_submodule(path.rpartition(".")[0]))
    change_held(model, lambda value, where: _method_now(value, replacements))
    return [path for path, _ in places]


def _method_now(value: Any, replaced: Mapping[int, nn.Module]) -> Any:
    """The method of that name that a replaced layer has now, of one that was bound to it before."""
    if isinstance(value, MethodType) and id(value.__self__) in replaced:
        return getattr(value.__self__, value.__name__, value)
    return value


def install_all(
    model: nn.Module, layers: Mapping[int, nn.Module], weights: Iterable[tuple[nn.Module, str, FactorPair]]
) -> list[str]:
    """`install` of the `layers`, and pairs in the places, and under the names, of raw parameters: `(owner, attribute, pair)`.

    Returns the paths of all. The model is walked once, however many there are.
    """
    done = install(model, layers) if layers else []
    attributes: dict[int, list[str]] = {}
    for owner, attribute, pair in weights:
        _install_weight(owner, attribute, pair)
        attributes.setdefault(id(owner), []).append(attribute)
    for path, module in model.named_modules(remove_duplicate=False) if attributes else ():
        done += [f"{path}.{attribute}".lstrip(".") for attribute in attributes.get(id(module), ())]
    return done


def uncompile_parts(model: nn.Module) -> nn.Module:
    """Put what is inside in the place of every compiled part, so that names and classes are the user's own. Returns the
    model.
    """
    if inside := compiled_parts(model):
        for module in list(model.modules()):
            own_children(module).update({n: inside[id(c)] for n, c in own_children(module).items() if id(c) in inside})
        change_held(model, lambda value, where: inside.get(id(value), value))
    return model


def _install_weight(owner: nn.Module, attribute: str, pair: FactorPair) -> None:
    if isinstance(pair, LowRankWeight):
        siblings = [m.place for m in own_children(owner).values() if isinstance(m, LowRankWeight)]
        pair.place = siblings[0] if siblings else tuple(own_parameters(owner))
    del own_parameters(owner)[attribute]
    own_children(owner)[attribute] = pair
    _refresh(owner)


def put_back(model: nn.Module, dense: Iterable[tuple[FactorPair, nn.Module]]) -> None:
    """The way back: the dense layers, or their parameters, in the places of the pairs, wherever those are."""
    layers: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for pair, layer in dense:
        if isinstance(pair, LowRankWeight):
            weights[id(pair)] = layer.get_parameter("weight")
        else:
            layers[id(pair)] = layer
    if layers:
        install(model, layers)
    for owner in list(model.modules()) if weights else ():
        for attribute, child in list(own_children(owner).items()):
            if id(child) in weights and isinstance(child, LowRankWeight):
                _put_back_weight(owner, attribute, child, weights[id(child)])


def _put_back_weight(owner: nn.Module, attribute: str, pair: LowRankWeight, weight: nn.Parameter) -> None:
    """In its old position among the owner's parameters."""
    del own_children(owner)[attribute]
    owner.register_parameter(attribute, weight)
    known = [n for n in pair.place if n in own_parameters(owner)]
    for name in [*known, *(n for n in list(own_parameters(owner)) if n not in pair.place)]:
        own_parameters(owner)[name] = own_parameters(owner).pop(name)
    _refresh(owner)


def _refresh(owner: nn.Module) -> None:
    if isinstance(owner, nn.RNNBase):
        read_weights_again(owner)


def pairs_in(model: nn.Module) -> dict[str, FactorPair]:
    """Every factor pair of a model, by its first name."""
    return {own_name(path): module for path, module in model.named_modules() if isinstance(module, FactorPair)}
