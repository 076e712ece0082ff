"""What an `nn.Module` holds: the dicts themselves, since its public ways read, register and rename but do not replace.

Reading a parameter by its attribute would run properties and parametrizations, and leave a node in a graph being traced.
Tried on torch 2.8.0 and 2.14.1.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import _WeightNorm

BatchNorm = _BatchNorm
"""What all of torch's batch normalizations are; its own `update_bn` asks for it too."""
COMPILED = "_orig_mod"
"""The child in which `torch.compile(module)` holds the module; it is in the names of parameters."""
CHECKPOINTED = "_checkpoint_wrapped_module"
"""The same of torch's `checkpoint_wrapper`."""


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by attribute, to read and to change."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by attribute, to read and to change."""
    return module._buffers


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own children by attribute, to read and to change: `named_children` leaves out one that comes twice."""
    return module._modules


def made_of(
    module: nn.Module,
    parameters: dict[str, nn.Parameter | None],
    buffers: dict[str, Tensor | None],
    children: dict[str, nn.Module | None],
) -> nn.Module:
    """A module of the same class, with the very attributes and hooks, that holds these; nothing of it is run or copied."""
    twin = nn.Module.__new__(type(module))
    twin.__dict__ |= vars(module) | {"_parameters": parameters, "_buffers": buffers, "_modules": children}
    return twin


def become(module: nn.Module, other: nn.Module) -> None:
    """Let `module` be what `other` is, with its class and all that it holds, for everyone who holds it, however they do. `other` is
    not to be used after. As torch does it: lazy modules become others with their first call, and `fully_shard` changes the class.

    Raises `TypeError` where the classes differ in their memory, by `__slots__` say; nothing is changed then.
    """
    object.__setattr__(module, "__class__", type(other))
    vars(module).clear()
    vars(module).update(vars(other))


def can_become(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module can `become` one of this class; tried on one without contents."""
    try:
        object.__setattr__(nn.Module.__new__(type(module)), "__class__", kind)
    except TypeError:
        return False
    return True


def pre_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """The hooks that are called before the forward, by key: who has no handle can take one off here only."""
    return module._forward_pre_hooks


def post_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """The hooks that are called after the forward, by key."""
    return module._forward_hooks


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether something is called with the gradients of the module's inputs and outputs."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


WEIGHT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Where a parameter has the hooks on its gradient: dicts, which a factor takes over as they are, so that handles stay valid."""


def keeps_nothing(step: nn.Module) -> bool:
    """Whether a step of a parametrization can make any matrix: weight norm, which takes a direction and a length."""
    return isinstance(step, _WeightNorm)


def all_hooks(module: nn.Module) -> dict[str, Any]:
    """Everything of the module's hooks but those of its state dict, by the attribute that holds it; to read and to change."""
    own = vars(module)
    names = {name for name in vars(nn.Module()) if "_hooks" in name and "state_dict" not in name}
    return {name: own[name] for name in names | {"_is_full_backward_hook"}}


def times_written(tensor: Tensor) -> int:
    """How many times something was written into a tensor: it tells a weight that was loaded from one that was not."""
    return tensor._version


def read_weights_again(rnn: nn.RNNBase) -> None:
    """Let a recurrent layer compute with the parameters that it has now: it keeps a list of its own of them."""
    weights = [getattr(rnn, name, None) for name in weight_names(rnn)]
    rnn._flat_weights = weights
    rnn._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]


def weight_names(rnn: nn.RNNBase) -> list[str]:
    """The names of a recurrent layer's parameters that its kernel is called with, in order."""
    return rnn._flat_weights_names
