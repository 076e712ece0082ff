"""Names as the user's own class has them, whatever wraps its parts.

`torch.compile(block)` puts a module of one child, `_orig_mod`, in the block's place, torch's `checkpoint_wrapper` one with
`_checkpoint_wrapped_module`. Both show up in the paths of modules and, the second only sometimes, in the names of parameters
and of entries of the state dict. Layers, plans and files leave them out, so that each fits the model wrapped or not. Graphs,
and what is put into a module's place, keep the real paths.
"""

from typing import Any

import torch
from torch import nn

from fxrank.passes.model.weights import made_in_inference
from fxrank.torch_private.modules import CHECKPOINTED, COMPILED, own_children

_INSIDE = (COMPILED, CHECKPOINTED)


def own_name(name: str) -> str:
    """A path, or a name of a parameter, without the wrappers."""
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, inside whatever wraps it. Raises `AttributeError` if there is none."""
    module, own = _unwrapped(model), own_name(name)
    for part in own.split(".") if own else ():
        module = _unwrapped(module.get_submodule(part))
    return module


def _unwrapped(module: nn.Module) -> nn.Module:
    while (inner := next((m for n in _INSIDE if (m := own_children(module).get(n)) is not None), None)) is not None:
        module = inner
    return module


def own_state(model: nn.Module) -> dict[str, Any]:
    """The state dict, as it lives in the model, by own names."""
    return {own_name(name): value for name, value in model.state_dict(keep_vars=True).items()}


def load_own_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load what `own_state` gave, of this model or of one that is wrapped otherwise."""
    real = {own_name(name): name for name in model.state_dict(keep_vars=True)}
    with torch.inference_mode(torch.is_inference_mode_enabled() or made_in_inference(model) is not None):
        model.load_state_dict({real.get(name, name): value for name, value in state.items()}, strict=True)
