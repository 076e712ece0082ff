"""What a model's modules hold aside: everything that their attributes and hooks lead to, in whatever holds it.

Containers of any class, named tuples, dataclasses and other plain objects, `functools.partial`, bound methods, closures and
weak references are gone through, nested as they come. Torch's, numpy's and Python's own objects are not (an optimizer holds
all parameters by right), nor are classes and the globals of a function: what is only there belongs to nobody's attributes.
"""

import copy
import functools
import sys
import types
import weakref
from collections import UserDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from fxrank.torch_private.modules import own_buffers, own_children, own_parameters

Change = Callable[[Any, str], Any]
"""Is given a thing and where it is held, the module's path and the attribute. Returns what is to stand in its place, often itself."""


def change_held(model: nn.Module, change: Change) -> None:
    """Put what `change` returns in the place of everything that the model's modules hold aside.

    Each thing is gone through once, whoever holds it. What cannot be written into (a tuple, a bound method, a function, whose
    variables a frame of the user's may share) is made anew where something in it changes; all else stays the same object.
    """
    walk = _Walk(change, model)
    for path, module in model.named_modules():
        held = vars(module)
        for name, value in list(held.items()):
            if name in _OWN or (name in _OF_RECURRENT and isinstance(module, nn.RNNBase)):
                continue
            changed = walk.through(value, f"{path}.{name}".lstrip("."), True, 0)
            if changed is not value:
                held[name] = changed


class _Walk:
    def __init__(self, change: Change, model: nn.Module) -> None:
        self._change = change
        self._inside = {id(module) for module in model.modules()}
        self._seen: dict[int, tuple[Any, Any]] = {}

    def through(self, value: Any, where: str, ours: bool, depth: int) -> Any:
        """What stands in the place of `value`. What is not `ours`, below a function that a copy shares with its original, is
        copied before it is written into.
        """
        if type(value) in _ATOMS:
            return value
        changed = self._change(value, where)
        if changed is not value or id(value) in self._inside or depth > _DEEPEST:
            return changed
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        if len(self._seen) >= _MOST or (parts := _parts(value)) is None:
            return value
        self._seen[id(value)] = value, value
        ours = ours and not isinstance(value, types.FunctionType)
        changes = {}
        for key, part in parts:
            if type(part) not in _ATOMS and (new := self.through(part, where, ours, depth + 1)) is not part:
                changes[key] = new
        if changes:
            self._seen[id(value)] = value, _with(value, changes, ours)
        return self._seen[id(value)][1]


_OWN = {name for name in vars(nn.Module()) if "_hooks" not in name}
"""What every module has: children, parameters and flags."""
_OF_RECURRENT = {"_flat_weights", "_flat_weight_refs"}
"""Where a recurrent layer lists its own parameters once more."""
_ATOMS = {type(None), bool, int, float, complex, str, bytes, type, type(...), types.ModuleType, types.CodeType}
_DEEPEST = 60
_MOST = 200_000
"""What is nested deeper, and what comes after so many things, is not looked at: it is data."""
_MAPPINGS = (dict, UserDict, weakref.WeakValueDictionary)
_METHODS = (types.MethodType, types.BuiltinMethodType)
_STRANGE = {"torch", "numpy", "fxrank", *sys.stdlib_module_names} - {"__main__", "types"}
"""Whose objects are not gone through."""

Parts = Iterable[tuple[Any, Any]]


def _parts(value: Any) -> Parts | None:
    """What a thing holds, by keys for `_with`; None if it is nothing to go through."""
    if isinstance(value, Tensor):
        return None
    if isinstance(value, nn.Module):
        return None if _is_strange(value) and "parallel" in type(value).__module__ else _of_module(value)
    if isinstance(value, _MAPPINGS):
        return [*value.items(), *((_Key(i), key) for i, key in enumerate(value) if type(key) not in _ATOMS)]
    if isinstance(value, (list, tuple, deque)):
        return enumerate(value)
    if isinstance(value, (set, frozenset)):
        return [(part, part) for part in value]
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords), ("more", vars(value))]
    if isinstance(value, _METHODS):
        return [("self", value.__self__), ("func", getattr(value, "__func__", None))]
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if type(value) is weakref.ReferenceType:
        return [("target", value())]
    return None if isinstance(value, (type, types.ModuleType)) or _is_strange(value) else _of_object(value)


def _is_strange(value: Any) -> bool:
    return str(getattr(type(value), "__module__", "")).partition(".")[0] in _STRANGE


class _Key(int):
    """The place of a key in a mapping: looked at, and left."""


def _of_module(module: nn.Module) -> Parts:
    """Of one that is held aside, outside of the model."""
    own: tuple[Mapping[str, Any], ...] = (own_parameters(module), own_buffers(module), own_children(module))
    yield from ((_Entry((name, at)), part) for at, held in enumerate(own) for name, part in held.items())
    yield from ((name, part) for name, part in list(vars(module).items()) if name not in _OWN)


class _Entry(tuple[str, int]):
    """The name of a parameter, buffer or child of a module."""


def _of_function(function: types.FunctionType) -> Parts:
    for number, cell in enumerate(function.__closure__ or ()):
        try:
            yield number, cell.cell_contents
        except ValueError:  # nothing is in it yet
            continue
    yield "defaults", function.__defaults__
    yield "kwdefaults", function.__kwdefaults__
    if "_parameters" not in vars(
        function
    ):  # else `functools.wraps(module)` has put there what the module had, which nobody reads
        yield "more", vars(function)


def _of_object(value: Any) -> Parts:
    with suppress(AttributeError):
        yield from list(object.__getattribute__(value, "__dict__").items())
    for cls in type(value).__mro__:
        for slot in [s for s in vars(cls).values() if isinstance(s, types.MemberDescriptorType)]:
            try:
                yield slot, slot.__get__(value)
            except AttributeError:  # nothing is in it
                continue


def _with(value: Any, changes: dict[Any, Any], ours: bool) -> Any:
    """The thing with these parts changed: itself where it can be written into and is ours, else one made anew."""
    if isinstance(value, tuple):
        made = tuple.__new__(type(value), [changes.get(i, part) for i, part in enumerate(value)])
        getattr(made, "__dict__", {}).update(getattr(value, "__dict__", {}))
        return made
    if isinstance(value, frozenset):
        return type(value)(changes.get(part, part) for part in value)
    if isinstance(value, _METHODS):
        held = changes.get("self", value.__self__)
        function = changes.get("func", getattr(value, "__func__", None))
        return getattr(held, value.__name__) if function is None else types.MethodType(function, held)
    if isinstance(value, weakref.ReferenceType):
        return weakref.ref(changes["target"])
    if isinstance(value, types.FunctionType):
        return _function_with(value, changes)
    written = value if ours else copy.copy(value)
    _write(written, changes)
    return written


def _function_with(function: types.FunctionType, changes: dict[Any, Any]) -> types.FunctionType:
    cells = function.__closure__
    made = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        changes.get("defaults", function.__defaults__),
        cells and tuple(types.CellType(changes[i]) if i in changes else cell for i, cell in enumerate(cells)),
    )
    functools.update_wrapper(made, function, updated=())
    del made.__wrapped__  # type: ignore[attr-defined]
    vars(made).update(changes.get("more", vars(function)))
    made.__kwdefaults__ = changes.get("kwdefaults", function.__kwdefaults__)
    return made


def _write(value: Any, changes: dict[Any, Any]) -> None:
    if isinstance(value, functools.partial):
        own = value.func, value.args, value.keywords, vars(value)
        named = zip(("func", "args", "keywords", "more"), own, strict=True)
        value.__setstate__(tuple(changes.get(name, part) for name, part in named))  # type: ignore[attr-defined]
    elif isinstance(value, set):
        value.difference_update(changes)
        value.update(changes.values())
    elif isinstance(value, (*_MAPPINGS, list, deque)):
        for key, new in changes.items():
            if not isinstance(key, _Key):
                value[key] = new
    else:
        for key, new in changes.items():
            if isinstance(key, types.MemberDescriptorType):
                key.__set__(value, new)
            elif isinstance(key, _Entry):
                (own_parameters, own_buffers, own_children)[key[1]](value)[key[0]] = new
            else:
                vars(value)[key] = new
