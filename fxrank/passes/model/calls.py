"""One call of a model: the batch as a user gives it → positional and keyword arguments; other batch sizes; messages."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxrank.passes.model.compiled import uncompiled
from fxrank.torch_private import pytree

Example = Any
"""One call's inputs: a tensor (the only argument), a tuple or list (positional), or a mapping (keywords); values
may nest.
"""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


def own_call(call: Call) -> Call:
    """With tensors of its own: some models write into what they are given."""
    return cast(Call, pytree.tree_map_only(Tensor, torch.clone, call))


def call_arguments(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example` as `(args, kwargs)` of one call.

    A tensor is the only positional argument, a tuple or list are the positional arguments, a mapping the keyword
    arguments. A tuple or list that does not fit the signature of `model.forward` while its first element does (a
    batch `(inputs, targets)`) stands for that element. Raises `TypeError` if nothing fits.
    """
    try:
        signature = inspect.signature(uncompiled(model).forward)
    except (TypeError, ValueError):  # a C++ forward: nothing to check against
        signature = None

    def fits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if signature is None:
            return True
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    candidates: list[tuple[tuple[Any, ...], dict[str, Any]]]
    if isinstance(example, Mapping):
        candidates = [((), {str(k): v for k, v in example.items()}), ((example,), {})]
    elif isinstance(example, (tuple, list)):
        candidates = [(tuple(example), {})]
        if example:
            candidates.append(
                call_arguments(model, example[0]) if isinstance(example[0], Mapping) else ((example[0],), {})
            )
        candidates.append(((example,), {}))
    else:
        candidates = [((example,), {})]
    for args, kwargs in candidates:
        if fits(args, kwargs):
            return args, kwargs
    raise TypeError(
        f"the batch must fit {type(model).__name__}.forward{signature}; got {describe(example)}. "
        "Pass a tensor, a tuple of positional inputs, or a dict of keyword inputs."
    )


def at_other_batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with 2 rows, or 3 if it has 2: of every tensor whose first size is that of the first tensor. As it is with
    sparse or nested tensors, which torch cuts into rows by ways of their own.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors or any(tensor.layout is not torch.strided for tensor in tensors):
        return args, kwargs
    batch = tensors[0].shape[0]
    rows = 3 if batch == 2 else 2

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != batch or not batch:
            return leaf
        return leaf[:rows] if batch >= rows else torch.cat([leaf, leaf[: rows - batch]])

    resized_args, resized_kwargs = pytree.tree_map(resized, (args, kwargs))
    return resized_args, resized_kwargs


def describe(value: object) -> str:
    """Shapes and types of a nested value, for messages."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(describe(v) for v in value)})"
    return type(value).__name__
