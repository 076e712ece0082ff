"""The numbers of a model that is itself without any: in files, read for one weight, one call or one part of the model at a time."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.names import own_state
from fxrank.passes.model.weights import weight_of
from fxrank.saving.shards import Shards
from fxrank.torch_private import pytree

COMPUTED = "rotary_emb.inv_freq"
"""Older files of language models hold these angles in every layer; the models compute them now."""
_VIEWS = [getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data")]
"""Of what is read of a tensor by a dot, that which has numbers."""


def without_numbers(model: nn.Module, *, to_run: bool = False) -> nn.Module:
    """A copy of a model on the meta device. One that is `to_run` has the buffers that are no part of the state dict, which are in no file,
    as the model has them; the others are of at least 32 bits, as are the numbers that `Weights` computes with.
    """
    stored = {id(value) for value in own_state(model).values()}
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in stored or not to_run:
            dtype = wide(tensor.dtype) if to_run else tensor.dtype
            empty = torch.empty_like(tensor, device="meta", dtype=dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What numbers of this dtype are computed with."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class Weights:
    """The numbers of a model on the meta device."""

    def __init__(self, model: nn.Module, source: Shards, device: torch.device) -> None:
        """Raises `CheckpointError` unless the files hold each tensor of the model once, under one of its names, and nothing else."""
        self._source, self.device = source, device
        state = own_state(model)
        self.keys: dict[str, int] = {}
        """By the name in the files the `id` of the model's tensor, in the order of the files."""
        fix = "Read the whole model with the library that wrote it, and give it to fxrank.factorize"
        known: set[int] = set()
        for name, shape in source.shapes.items():
            if name not in state and name.endswith(COMPUTED):
                continue
            if name not in state:
                raise CheckpointError(
                    f"every stored tensor must be one of the model's; {type(model).__name__} has no {name!r}. {fix}."
                )
            if shape != tuple(state[name].shape):
                raise CheckpointError(
                    f"stored shapes must fit the model; {name!r} is {shape} in the files and {tuple(state[name].shape)} in its configuration. {fix}."
                )
            if id(state[name]) not in known:  # else tied, and stored under both names
                self.keys[name] = id(state[name])
                known.add(id(state[name]))
        if missing := [name for name, value in state.items() if id(value) not in known]:
            raise CheckpointError(
                f"every tensor of the model must be stored; {missing[0]!r} is not in {source.folder}. {fix}."
            )
        self._names = {key: name for name, key in self.keys.items()}

    def of(self, dense: nn.Module) -> Tensor:
        """The weight of a layer."""
        return self.read(self._names[id(weight_of(dense))])

    def read(self, name: str) -> Tensor:
        """A tensor, on the device."""
        return self._source.read(name).to(self.device)

    def has(self, tensor: Tensor) -> bool:
        """Whether it is one of the model's that lies in the files."""
        return id(tensor) in self._names

    def numbers(self, tensor: Tensor) -> Tensor:
        """Those of one of the model's tensors, to compute with; another tensor as it is."""
        name = self._names.get(id(tensor))
        if name is None:
            return tensor
        found = self.read(name)
        return found.to(wide(found.dtype))

    def filled(self, part: nn.Module, only: Collection[int] | None = None) -> nn.Module:
        """A copy of a part of the model with its numbers; with those of the tensors of these `id`s alone, and all others the model's own."""
        memo: dict[int, object] = {}
        for tensor in (*part.parameters(), *part.buffers()):
            if only is not None and id(tensor) not in only:
                memo[id(tensor)] = tensor
                continue
            numbers = self.numbers(tensor).to(self.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(numbers, tensor.requires_grad) if is_parameter else numbers
        return copy.deepcopy(part, memo)


class ReadWhenUsed(TorchFunctionMode):
    """While it is entered each function that gets a tensor of a model without numbers gets them, from the files, for this one call."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__" and func not in _VIEWS:
            of_device = func == Tensor.device.__get__ and self._weights.has(args[0])
            return self._weights.device if of_device else func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(Tensor, self._weights.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)
