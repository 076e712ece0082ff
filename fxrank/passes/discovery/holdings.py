"""Weights that something else in the model holds too, and that no pair could take the place of there.

A layer's own object becomes its pair, whoever holds it. A weight that is held as a tensor does not: a list of parameters, a second
parameter on the same memory (`nn.Parameter(a.weight.data)`), a view. Each would go on with the numbers of the dense weight,
outside of the optimizer, so such a layer stays dense. Ties that are one parameter in several modules are `discover`'s.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxrank.passes.discovery.inside import joined
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.model.held import change_held
from fxrank.passes.model.names import own_name
from fxrank.passes.model.weights import is_derived
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.registry import dense_type
from fxrank.torch_private.modules import own_buffers, own_parameters
from fxrank.torch_private.writes import memory_of


@dataclass(frozen=True)
class _Holding:
    """A tensor that is held under this name, by an attribute `aside` or as a parameter or buffer, and its memory."""

    name: str
    tensor: Tensor
    aside: bool
    memory: tuple[str, int, int]


def held_elsewhere(model: nn.Module, found: Mapping[int, Layer], read_aside: Container[str]) -> dict[int, str]:
    """The reasons to leave dense, by the key in `found`, of layers that have none so far. `read_aside`: the parameters that a
    trace has seen read past their modules. The model is walked once.
    """
    keys = _keys(model, found)
    holdings: list[_Holding] = []

    def note(tensor: Any, name: str, aside: bool = True) -> Any:
        if isinstance(tensor, Tensor):
            holdings.append(_Holding(own_name(name), tensor, aside, memory_of(tensor)))
        return tensor

    for path, module in model.named_modules():
        if not isinstance(module, FactorPair):
            for name, tensor in (*own_parameters(module).items(), *own_buffers(module).items()):
                note(tensor, joined(path, name), aside=False)
    change_held(model, note)

    reasons: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        if name in read_aside and id(parameter) in keys:
            reasons[keys[id(parameter)]] = (
                "its weight is read past its layer, from a list, a global or parameters(), where no pair can take its place"
            )
    for one in holdings:
        if one.aside and id(one.tensor) in keys:
            reasons[keys[id(one.tensor)]] = f"its weight is also held in {one.name!r}, where no pair can take its place"
    for one, other in _overlapping(holdings):
        for weight, holder in ((one, other), (other, one)):
            if not weight.aside and id(weight.tensor) in keys:
                reasons.setdefault(
                    keys[id(weight.tensor)],
                    f"its weight is in one memory with {holder.name!r}, which no pair can take the place of",
                )
    return reasons


def _keys(model: nn.Module, found: Mapping[int, Layer]) -> dict[int, int]:
    """The key in `found` by each parameter of a layer that may become a pair: of one that derives its weight there are several."""
    keys = {key: key for key, layer in found.items() if layer.reason is None}
    for module in model.modules():
        if dense_type(module) is not None and is_derived(module):
            own = [id(p) for p in module.parameters() if p is not getattr(module, "bias", None)]
            keys |= {one: key for key in own if key in keys for one in own}
    return keys


def _overlapping(holdings: list[_Holding]) -> list[tuple[_Holding, _Holding]]:
    """Different tensors that have some memory in common."""
    pairs: list[tuple[_Holding, _Holding]] = []
    open_: list[_Holding] = []
    for one in sorted((h for h in holdings if h.memory[2]), key=lambda h: h.memory):
        place, start, _ = one.memory
        open_ = [o for o in open_ if o.memory[0] == place and o.memory[2] > start]
        pairs += [(o, one) for o in open_ if o.tensor is not one.tensor]
        if not any(o.tensor is one.tensor for o in open_):
            open_.append(one)
    return pairs
