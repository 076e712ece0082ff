"""Tensors that are written into, seen before it happens, whoever writes and under whichever name (`p.mul_`, `p.data`, `out=`).

Modes of the dispatcher see every operation, and are not promised to stay as they are. Tried on torch 2.8.0 and 2.14.1.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from fxrank.torch_private import pytree


class Watched(TorchDispatchMode):
    """While it is on, the watched tensors are copied before they are first written into, or, if they are `fixed`, nobody may
    write: `PermissionError`. `read` is called with tensors that are computed with.
    """

    supports_higher_order_operators = True  # which are handed on like any other

    def __init__(
        self, tensors: Iterable[Tensor], *, fixed: bool = False, read: Callable[[Tensor], None] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fixed, self._read = fixed, read
        self._tensors: dict[int, list[Tensor]] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        for tensor in tensors:
            if place := _place(tensor):
                self._tensors.setdefault(place, []).append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            named = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | (kwargs or {})
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._before_write(named.get(argument.name))
        if (read := self._read) is not None:
            for tensor in pytree.tree_leaves((args, kwargs)):
                if type(tensor) is Parameter:
                    read(tensor)
        return func(*args, **(kwargs or {}))

    def _before_write(self, written: Any) -> None:
        for tensor in pytree.tree_leaves(written):
            place = _place(tensor) if isinstance(tensor, Tensor) else 0
            if place not in self._tensors:
                continue
            if self._fixed:
                raise PermissionError("it writes into a tensor of the model, which no graph does")
            self._copies += [(own, own.detach().clone()) for own in self._tensors.pop(place)]

    @contextmanager
    def allowing(self) -> Iterator[None]:
        """Meanwhile everybody may write: a run inside puts its writing back itself."""
        before, self._fixed = self._fixed, False
        read, self._read = self._read, None
        watched, self._tensors = self._tensors, {}
        try:
            yield
        finally:
            self._fixed, self._read, self._tensors = before, read, watched

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo what was written; when it is off again."""
        for tensor, value in self._copies:
            tensor.copy_(value)
        self._copies = []


def _place(tensor: Tensor) -> int:
    """Where the memory of a tensor is; 0 if it has none of its own."""
    if type(tensor) is FakeTensor or tensor.is_meta or tensor.layout is not torch.strided:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # of a subclass that holds other tensors
        return 0


def memory_of(tensor: Tensor) -> tuple[str, int, int]:
    """The device, and the first address that a tensor's numbers lie at and the one after the last; 0 and 0 if it has no memory of
    its own, or no numbers.
    """
    if not _place(tensor) or not tensor.numel():
        return "", 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return str(tensor.device), start, start + (last + 1) * tensor.element_size()
