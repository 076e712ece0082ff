"""Proxies that know their value, and how Python's questions about them are answered while a trace is on."""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, is_grad_enabled

from fxrank.passes.tracing.gradients import NEEDED


class ValueProxy(fx.Proxy):
    """A proxy that knows its value."""

    tracer: "fx.Tracer"

    @property
    def _value(self) -> Any:
        return self.node.meta["val"]

    def __getattr__(self, name: str) -> Any:
        value = self._value
        if isinstance(value, Tensor) and name in _OF_GRADIENTS:
            return self._about_gradients(name)
        if isinstance(value, Tensor) and name in _STATIC_ATTRIBUTES:
            return getattr(value, name)
        if isinstance(value, Mapping) and name in ("items", "values"):
            return getattr({key: self[key] for key in value}, name)
        attribute = getattr(value, name)  # raises AttributeError as the value would
        if callable(attribute) and not isinstance(attribute, torch.dtype):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        if isinstance(attribute, str):
            return attribute
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def _about_gradients(self, name: str) -> bool | None:
        """A value without data has no gradient; whether the model's would have one is in its node."""
        self.tracer.asked_gradients = True  # type: ignore[attr-defined]
        needed = bool(self.node.meta.get(NEEDED, False))
        if name == "requires_grad":
            return needed
        if name == "is_leaf":
            return not needed or self.node.op in ("placeholder", "get_attr")
        if name in ("grad", "grad_fn") and not needed:
            return None
        raise TypeError(f"{name} of the tensor {self.node.name!r} is of its gradient, which a trace does not have")

    def dim(self) -> int:
        return int(self._value.dim())

    def __bool__(self) -> bool:
        return bool(self._concrete("bool"))

    def __int__(self) -> int:
        return int(self._concrete("int"))

    def __index__(self) -> int:
        return operator.index(self._concrete("index"))

    def __float__(self) -> float:
        return float(self._concrete("float"))

    def __len__(self) -> int:
        return len(self._value)

    def __iter__(self) -> Iterator[Any]:
        value = self._value
        return iter(value) if isinstance(value, Mapping) else (self[i] for i in range(len(value)))

    def __contains__(self, item: object) -> bool:
        value = self._value
        return item in value if isinstance(value, Mapping) else any(bool(element == item) for element in self)

    def keys(self) -> Any:
        return self._value.keys()

    def __getitem__(self, index: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iadd__(self, other: Any) -> Any:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable[..., Any], other: Any) -> Any:
        # Python then takes `x = x + …`, which does the same but for a tensor whose gradients must not hear of it.
        if is_grad_enabled() or not isinstance(self._value, Tensor):
            return NotImplemented
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __hash__(self) -> int:
        return id(self)

    def _concrete(self, question: str) -> Any:
        value = self._value
        if isinstance(value, Tensor):
            raise TypeError(
                f"{question}() of the tensor {self.node.name!r} needs its data, which a trace does not have"
            )
        return value


_STATIC_ATTRIBUTES = {
    "ndim",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_nested",
    "is_sparse",
    "is_quantized",
    "is_mkldnn",
    "layout",
    "names",
}
_OF_GRADIENTS = {
    "requires_grad",
    "is_leaf",
    "grad",
    "grad_fn",
    "register_hook",
    "register_post_accumulate_grad_hook",
    "retain_grad",
}


class Mode(int):
    """`module.training` during a trace: as good as a bool, and it tells when it is asked for."""

    asked: Callable[[], None]

    def __new__(cls, training: bool, asked: Callable[[], None]) -> "Mode":
        self = super().__new__(cls, training)
        self.asked = asked
        return self

    def __bool__(self) -> bool:
        self.asked()
        return int(self) != 0

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __hash__(self) -> int:
        return hash(bool(self))


def values_of(tree: Any) -> Any:
    """The values of all proxies in a nest of tuples, lists, dicts and slices."""
    if type(tree) is Mode:
        return bool(tree)
    if isinstance(tree, fx.Proxy):
        return tree.node.meta["val"]
    if isinstance(tree, (tuple, list)):
        items = [values_of(e) for e in tree]
        if isinstance(tree, tuple):
            return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
        return items
    if isinstance(tree, dict):
        return {k: values_of(v) for k, v in tree.items()}
    if isinstance(tree, slice):
        return slice(values_of(tree.start), values_of(tree.stop), values_of(tree.step))
    return tree
