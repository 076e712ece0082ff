"""Whether a model's code may ask what its parts are, or hold them aside: only then has it to be tried with other parts in it.

Code is looked at and not run: the names in all functions that a forward may get to. What is found is found too often rather than too
seldom; a name that is built at run time, or a function that only a foreign object knows, is not.
"""

import sys
import types
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.passes.model.code import cells, names
from fxrank.torch_private.modules import all_hooks

ASKING = {
    *("isinstance", "issubclass", "type", "hasattr", "getattr", "setattr", "vars", "dir", "repr", "str", "format"),
    *("__class__", "__dict__", "__name__", "_parameters", "_modules", "_buffers", "functional_call", "requires_grad"),
    *("modules", "named_modules", "children", "named_children", "buffers", "named_buffers", "state_dict", "_get_name"),
    *("parameters", "named_parameters", "get_parameter", "get_submodule", "get_buffer", "extra_repr", "data"),
}
"""Names by which code asks what a module or a weight is."""


def may_ask(model: nn.Module) -> bool:
    """Whether the code of the model's own classes, of its hooks, or of what is held in attributes names any of `ASKING`, or a
    parameter and something that works in place; or an attribute holds what a layer may be hidden in.
    """
    weights = frozenset(name for module in model.modules() for name, _ in module.named_parameters(recurse=False))
    seen: set[Any] = set()
    for module in model.modules():
        hooks = [hook for held in all_hooks(module).values() if isinstance(held, dict) for hook in held.values()]
        torchs = _is_known(type(module))  # recurrent layers list their own parameters once more
        own = [v for name, v in vars(module).items() if name not in _OWN and not (torchs and name.startswith("_"))]
        if any(not _is_plain(value) for value in own) or (hooks and any(_asks(f, weights) for f in _functions(hooks))):
            return True
        if type(module) not in seen and not torchs:
            seen.add(type(module))
            if _asks_somewhere(type(module), weights, seen):
                return True
    return False


_OWN = set(vars(nn.Module()))
_DATA = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range, type)


def _is_plain(value: Any) -> bool:
    """Whether nothing can be hidden in an attribute."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value) in (list, tuple, set, frozenset, torch.Size) and all(map(_is_plain, value))
    if isinstance(value, dict):
        return type(value) is dict and all(map(_is_plain, value.values()))
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    if isinstance(value, partial):
        return all(map(_is_plain, (value.func, value.args, value.keywords)))
    return isinstance(value, _DATA) or _is_known(value)


def _is_known(value: Any) -> bool:
    """Whether it is torch's, numpy's or Python's own class or function: those ask nothing that a pair does not answer."""
    home = str(getattr(value, "__module__", None)).partition(".")[0]
    return isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) and home in _KNOWN


_KNOWN = {"torch", "numpy", *sys.stdlib_module_names} - {"__main__"}


def _asks(function: types.FunctionType, weights: frozenset[str]) -> bool:
    named = names(function)
    in_place = any(name.endswith("_") and not name.startswith("_") for name in named)
    if named & ASKING or (in_place and named & weights):
        return True
    return any(not _is_plain(cell) and not isinstance(cell, types.FunctionType) for cell in cells(function))


def _asks_somewhere(cls: type, weights: frozenset[str], seen: set[Any]) -> bool:
    """Whether a function asks that is run when a module of this class is called."""
    todo = list(_methods(cls))
    while todo:
        function = todo.pop()
        if function in seen or _is_known(function):
            continue
        seen.add(function)
        if _asks(function, weights):
            return True
        todo += _reached(function, cls)
    return False


def _methods(cls: type) -> Iterator[types.FunctionType]:
    """What runs when a module of this class is called."""
    for name in ("__call__", "forward", "__getattr__", "__getattribute__"):
        yield from _functions([getattr(cls, name, None)])


def _reached(function: types.FunctionType, cls: type) -> Iterator[types.FunctionType]:
    """The functions that a function names: methods of the class, globals, those in global containers and other modules."""
    named = names(function)
    yield from _functions(value for base in cls.__mro__ for name, value in vars(base).items() if name in named)
    yield from _functions(cells(function))
    for name in named & function.__globals__.keys():
        value = function.__globals__[name]
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in _KNOWN:
            yield from _functions(vars(value)[n] for n in named if n in vars(value))
        else:
            yield from _functions([value])


def _functions(values: Iterable[Any]) -> Iterator[types.FunctionType]:
    """The Python functions among them, in them, or behind them."""
    for value in values:
        if isinstance(value, types.FunctionType):
            yield value
        elif isinstance(value, (list, tuple, set, frozenset)):
            yield from _functions(value)
        elif isinstance(value, dict):
            yield from _functions(value.values())
        elif isinstance(value, (classmethod, staticmethod, types.MethodType)):
            yield from _functions([value.__func__])
        elif isinstance(value, property):
            yield from _functions([value.fget, value.fset])
        elif isinstance(value, partial):
            yield from _functions([value.func])
