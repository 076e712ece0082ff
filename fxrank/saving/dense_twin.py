"""The model that a file will be loaded into: dense, as it was before it was rewritten, and without numbers."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fxrank.passes.pairs.base import FactorPair
from fxrank.torch_private.modules import made_of, own_buffers, own_children, own_parameters


def dense_twin(model: nn.Module) -> nn.Module:
    """A model on the meta device of the same classes, names and ties, in which every pair is the dense layer again, or the
    parameter. The model is left as it is, and no part of it is run.
    """
    return _Twin().of(model)


class _Twin:
    """What has been made, by what it was made of."""

    def __init__(self) -> None:
        self._tensors: dict[int, Tensor] = {}
        self._weights: dict[int, nn.Parameter] = {}
        """Of dense layers, by the first factor of the pair."""
        self._modules: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if (known := self._modules.get(id(module))) is not None:
            return known
        if isinstance(module, torch.jit.ScriptModule):  # no pair is inside, and it cannot be made again
            return module
        if isinstance(module, FactorPair):
            return self._modules.setdefault(id(module), self._dense(module))
        parameters = {name: self._bare(p) for name, p in own_parameters(module).items()}
        buffers = {name: self._bare(b) for name, b in own_buffers(module).items()}
        children: dict[str, nn.Module | None] = {}
        twin = self._modules[id(module)] = made_of(module, parameters, buffers, children)
        for name, child in own_children(module).items():
            made = None if child is None else self.of(child)
            if isinstance(child, FactorPair) and child.is_parameter and made is not None:
                parameters[name] = cast(nn.Parameter, made.weight)
            else:
                children[name] = made
        return twin

    def _dense(self, pair: FactorPair) -> nn.Module:
        factor: nn.Parameter = pair.u.weight
        dense = pair.empty_dense({"device": torch.device("meta"), "dtype": factor.dtype})
        # Pairs that share their factors come of layers that shared the weight.
        dense.weight = self._weights.setdefault(id(factor), cast(nn.Parameter, dense.weight))
        if pair.bias is not None:
            dense.bias = self._bare(pair.bias)
        return dense

    def _bare(self, tensor: Tensor | None) -> Any:
        """A tensor, or a parameter, as the given one, without memory."""
        if tensor is None:
            return None
        if id(tensor) not in self._tensors:
            bare = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            self._tensors[id(tensor)] = nn.Parameter(bare, False) if isinstance(tensor, nn.Parameter) else bare
        return self._tensors[id(tensor)]
