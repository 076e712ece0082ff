"""Layers found again in a model: by name, and by the parameter that they hold."""

from collections.abc import Iterator

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


def holders(model: nn.Module, weight: torch.Tensor) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Everything that holds this parameter: `(owner, attribute, layer)`; the attribute is empty where the layer is the
    owner itself.
    """
    for module in model.modules():
        for attribute, parameter in own_parameters(module).items():
            if parameter is weight:
                whole = attribute == "weight" and dense_type(module) is not None
                layer = module if whole else RawWeight(module, attribute)
                yield module, "" if whole else attribute, layer
