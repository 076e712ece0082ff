"""Pairs in the place of layers in a user's module tree, and the way back."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fxrank.passes.model.compiled import compiled_parts, follow_change
from fxrank.passes.model.names import own_name
from fxrank.passes.model.weights import drop_norm_hooks
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.torch_private.modules import all_hooks, own_children, own_parameters, read_weights_again


def install(model: nn.Module, replacements: Mapping[int, nn.Module]) -> list[str]:
    """Put each module in the place of the one with that `id`, at every path where it is registered, and where a module
    of the model holds it aside (`self.blocks = [self.a, self.b]`). Returns the paths.

    The replacement takes over the layer's forward and backward hooks; their handles stay valid. A replacement of the
    model itself is impossible: raises `ValueError`. Other modules, their hooks and parameters are untouched.
    """
    if id(model) in replacements:
        raise ValueError(
            "the layer to replace must sit inside the model; the model is itself that layer "
            f"({type(model).__name__}). Wrap it: torch.nn.Sequential(model)."
        )
    done = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in replacements:
            replacement = replacements[id(module)]
            vars(replacement).update(all_hooks(module))
            drop_norm_hooks(replacement)
            model.set_submodule(path, replacement)
            follow_change(model.get_submodule(path.rpartition(".")[0]))
            done.append(path)
    _swap_held(model, replacements)
    return done


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
        _swap_held(model, inside)
    return model


def _swap_held(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    seen: _Seen = {}
    for module in model.modules():
        held = vars(module)
        held.update({name: _swapped(value, replacements, seen) for name, value in held.items() if name not in _OWN})


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


_OWN = set(vars(nn.Module()))
"""What every module has: children, parameters, hooks and flags."""


_Seen = dict[int, tuple[Any, Any]]
"""Containers that were gone through, by `id`, and what stands in their places: one that all modules hold is gone through once."""


def _swapped(value: Any, replacements: Mapping[int, nn.Module], seen: _Seen) -> Any:
    """`value` with the layers replaced in plain lists, dicts and tuples, which fx and a user's forward go through as
    if they were children.
    """
    if id(value) in replacements:
        return replacements[id(value)]
    if type(value) not in (list, dict, tuple):
        return value
    if id(value) in seen:
        return seen[id(value)][1]
    seen[id(value)] = value, value
    if type(value) is tuple:
        items = tuple(_swapped(item, replacements, seen) for item in value)
        if any(a is not b for a, b in zip(items, value, strict=True)):
            seen[id(value)] = value, items
        return seen[id(value)][1]
    for key, item in list(value.items() if type(value) is dict else enumerate(value)):
        value[key] = _swapped(item, replacements, seen)
    return value


def pairs_in(model: nn.Module) -> dict[str, FactorPair]:
    """Every factor pair of a model, by its first name."""
    return {own_name(path): module for path, module in model.named_modules() if isinstance(module, FactorPair)}
