"""Layers found again in a model: by name, and by the parameter that they hold."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from fxrank.passes.model.names import module_at
from fxrank.passes.pairs.parameter import RawWeight
from fxrank.passes.pairs.registry import dense_type
from fxrank.torch_private.modules import own_parameters


def dense_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, wrapped or not: a module, or a raw parameter dressed as one. Raises `AttributeError` if there
    is none.
    """
    owner_path, _, attribute = name.rpartition(".")
    owner = module_at(model, owner_path)
    if own_parameters(owner).get(attribute) is not None:
        return RawWeight(owner, attribute)
    return module_at(model, name)


def weight_alone(model: nn.Module, name: str) -> bool:
    """Whether this is the name of a layer's weight itself (`"fc.weight"`, where the layer is `"fc"`): only the weight is replaced then,
    in everything that holds it, and the layers stay.
    """
    owner_path, _, attribute = name.rpartition(".")
    owner = module_at(model, owner_path) if attribute == "weight" else None
    return owner is not None and "weight" in own_parameters(owner) and dense_type(owner) is not None


Owners = Mapping[int, Sequence[tuple[nn.Module, str]]]
"""The modules that hold each parameter, and under which attribute, by the parameter's `id`."""


def owners_in(model: nn.Module) -> Owners:
    """Of all parameters in one walk: who asks for each layer by itself would walk the model as often as it has layers."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in own_parameters(module).items():
            found.setdefault(id(parameter), []).append((module, attribute))
    return found


def holders(owners: Owners, weight: torch.Tensor, *, alone: bool = False) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Everything that holds this parameter: `(owner, attribute, layer)`; the attribute is empty where the layer is the
    owner itself, which it never is if the weight is to be replaced `alone`.
    """
    for module, attribute in owners.get(id(weight), ()):
        whole = attribute == "weight" and dense_type(module) is not None and not alone
        layer = module if whole else RawWeight(module, attribute)
        yield module, "" if whole else attribute, layer
