"""Functions of torch's C++ side, under names of ours: the very objects, because `torch.compile` knows them by identity.

Tried on torch 2.8.0 and 2.14.1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED: tuple[Any, ...] = tuple(
    getattr(place, name) for place, name in ((torch, "_grouped_mm"), (F, "grouped_mm")) if hasattr(place, name)
)
"""The product of stacked matrices that experts are computed with, under all names it has in this torch, the private one first:
torch 2.8 has no other.
"""
NN_FUNCTIONS: Any = torch._C._nn
"""Where functions of `torch.nn.functional` that are written in C++ are: `linear`, `gelu`, …"""
without_torch_function: Any = torch._C.DisableTorchFunctionSubclass
"""Meanwhile subclasses of `Tensor` are plain tensors to torch's functions, as in `Tensor.__torch_function__` itself."""
tensor_without_numbers: Any = Tensor._make_wrapper_subclass
"""Makes a tensor of a class that has a shape and a dtype only: what it stands for, its `__torch_function__` knows."""

set_gradients: Any = torch._C._set_grad_enabled
"""Switches gradients on or off from here on: a node of a graph has no block, and fx keeps this one though nobody uses its result."""


def is_of_functorch(value: object) -> bool:
    """Whether this is a tensor that `torch.func.vmap`, `grad` or `jvp` made for the function it transforms."""
    return isinstance(value, Tensor) and bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def inside_backward() -> bool:
    """Whether a backward pass is calling this, from a hook: torch has no public way to ask."""
    return bool(torch._C._current_graph_task_id() != -1)
