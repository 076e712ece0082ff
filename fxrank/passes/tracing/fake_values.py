"""What the nodes of a graph give: fake tensors, which have a shape, a dtype and a device and no data.

Computing one takes torch half a millisecond. A model repeats its blocks, and the graphs of both modes ask the same
again, so results are remembered by what they depend on.

It knows torch's inside; tried on torch 2.8.0 and 2.14.1.
"""

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxrank.torch_private import pytree
from fxrank.torch_private.kernels import GROUPED


def _grouped_product(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None, **_: Any) -> Any:
    """What `grouped_mm` gives for stacked experts. Its fake kernel takes bfloat16 only (up to torch 2.14), unlike the real ones."""
    if type(a) is not FakeTensor or type(b) is not FakeTensor or a.dtype != b.dtype or (a.ndim, b.ndim) != (2, 3):
        return NotImplemented
    return (
        a.new_empty((a.shape[0], b.shape[2]), dtype=out_dtype or a.dtype)
        if a.shape[1] == b.shape[1]
        else NotImplemented
    )


class Values:
    """Evaluates functions, methods and modules on fake tensors."""

    def __init__(self, mode: FakeTensorMode | None = None) -> None:
        """In the mode of fake tensors that are there already, if one is given."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True) if mode is None else mode
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}  # by id; the real ones are held, so that no id comes again
        self._known: dict[Hashable, Any] = {}

    def fake(self, tree: Any) -> Any:
        """The same nest of containers with fake tensors in the places of tensors."""
        return pytree.tree_map_only(Tensor, self._fake, tree)

    def _fake(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._fakes:
            self._fakes[id(tensor)] = tensor, self.mode.from_tensor(tensor.detach(), static_shapes=True)
        return self._fakes[id(tensor)][1]

    def of_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a function returns."""

        def compute() -> Any:
            with self.mode:
                result = _grouped_product(*args, **kwargs) if function in GROUPED else NotImplemented
                return function(*args, **kwargs) if result is NotImplemented else result

        return self._remembered((function, args, kwargs), compute) if _worth_it(function, args) else compute()

    def of_method(self, name: str, args: Any, kwargs: Any) -> Any:
        """What the method of that name of the first argument returns."""

        def compute() -> Any:
            with self.mode:
                return getattr(args[0], name)(*args[1:], **kwargs)

        pure = isinstance(args[0], Tensor) and not name.endswith("_")
        return self._remembered((name, args, kwargs), compute) if pure else compute()

    def of_module(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a module returns. An update of a buffer (BatchNorm's counter) goes to a fake one."""

        def compute() -> Any:
            state = {name: self._fake(t) for name, t in [*module.named_parameters(), *module.named_buffers()]}
            with self.mode:
                return torch.func.functional_call(module, state, args, kwargs)

        return self._remembered((module, args, kwargs), compute)

    def _remembered(self, about: Any, compute: Callable[[], Any]) -> Any:
        try:
            key = _key(about)
        except _UnknownError:
            return compute()
        if key not in self._known:
            result = compute()
            with contextlib.suppress(_UnknownError):
                self._known[key] = _described(result)
            return result
        return self._again(self._known[key])

    def _again(self, described: Any) -> Any:
        if type(described) is _Likeness:
            return described.tensor(self.mode)
        if type(described) in (tuple, list):
            return type(described)([self._again(d) for d in described])
        return described


def value_after(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a module makes of the values of a graph; nothing of it is changed. None where none of them is a fake tensor."""
    fakes = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)]
    if not fakes:
        return None
    with torch.no_grad():
        return Values(fakes[0].fake_mode).of_module(module, args, kwargs)


class _UnknownError(Exception):
    """Nobody knows what this value depends on."""


class _Likeness(NamedTuple):
    """All that tells one fake tensor from another."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Likeness":
        device = tensor.device
        if type(tensor) is FakeTensor:
            device = tensor.fake_device
            if tensor.constant is not None:  # a small number that torch keeps track of
                raise _UnknownError
        elif type(tensor) not in (Tensor, nn.Parameter):
            raise _UnknownError
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            raise _UnknownError
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, device)

    def tensor(self, mode: FakeTensorMode) -> Tensor:
        elem = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if self.offset:
            last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
            span = self.offset + (0 if 0 in self.shape else 1 + last)
            base = torch.empty(span, dtype=self.dtype, device="meta")
            elem = base.as_strided(self.shape, self.stride, self.offset)
        return FakeTensor(mode, elem, self.device)


_CONSTANTS = {int, float, complex, bool, str, bytes, type(None), type(...), torch.Size}
_FUNCTIONS = {FunctionType, BuiltinFunctionType, type}
_CONSTANTS |= {torch.dtype, torch.device, torch.layout, torch.memory_format}


def _key(value: Any) -> Hashable:
    kind: type = type(value)
    if kind in _CONSTANTS:
        return kind, value  # 1, 1.0 and True are equal, and not the same
    if kind in _FUNCTIONS:
        return (value,)
    if isinstance(value, Tensor):
        return _Likeness.of(value)
    if kind in (tuple, list):
        return kind, *[_key(v) for v in value]
    if kind in (dict, OrderedDict):
        return kind, *[(_key(k), _key(v)) for k, v in value.items()]
    if kind is set:
        return kind, frozenset(_key(v) for v in value)
    if kind is slice:
        return kind, _key((value.start, value.stop, value.step))
    if isinstance(value, nn.Module):
        return kind, *[(name, _key(v)) for name, v in vars(value).items() if "_hooks" not in name or v]
    raise _UnknownError


def _described(result: Any) -> Any:
    kind = type(result)
    if kind is FakeTensor and not result.requires_grad:
        return _Likeness.of(result)
    if kind in (tuple, list):
        return kind([_described(r) for r in result])
    if kind in _CONSTANTS:
        return result
    raise _UnknownError


def _worth_it(function: Callable[..., Any], args: Any) -> bool:
    """Whether a function computes with tensors, and does nothing else."""
    if function in (getattr, operator.getitem):
        return function is operator.getitem and isinstance(args[0], Tensor)
    own = type(function) is BuiltinFunctionType or str(getattr(function, "__module__", "")).startswith("torch.")
    return own and not getattr(function, "__name__", "_").endswith("_")
