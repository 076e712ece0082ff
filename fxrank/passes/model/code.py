"""What a function's code names, and what a function holds: both can be looked at without calling it."""

import dis
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn

from fxrank.torch_private.modules import own_buffers

_LONG = 1000
"""Containers with more items than this are data, and not looked through."""


def functions(value: Any) -> Iterator[types.FunctionType]:
    """The Python functions that are run where this is called, or read as a property."""
    if isinstance(value, types.FunctionType):
        yield value
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        yield from functions(value.__func__)
    elif isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if isinstance(f, types.FunctionType))
    elif isinstance(value, partial):
        yield from functions(value.func)
    elif not isinstance(value, type) and callable(value):
        yield from functions(vars(type(value)).get("__call__"))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def names(function: Any) -> set[str]:
    """The names in the code of what is called: attributes, globals and methods."""
    return {name for f in functions(function) for code in _codes(f.__code__) for name in code.co_names}


def writes(function: types.FunctionType, about: Iterable[str]) -> bool:
    """Whether the code names one of these things, and something is done in place."""
    named = names(function)
    if named.isdisjoint(about):
        return False
    if any(n.endswith("_") and not n.endswith("__") and (hasattr(Tensor, n) or hasattr(nn.init, n)) for n in named):
        return True
    steps = (step for code in _codes(function.__code__) for step in dis.get_instructions(code))
    return any(
        step.opname == "STORE_SUBSCR"
        or (step.opname == "STORE_ATTR" and step.argval in ("data", *about))
        or (step.opname == "BINARY_OP" and step.argrepr.endswith("="))
        for step in steps
    )


_OWN = set(vars(nn.Module()))


def is_function(value: Any) -> bool:
    """Whether this is a function, a bound method or a partial of one."""
    return isinstance(value, (types.FunctionType, types.MethodType, partial))


def held_by(function: Callable[..., Any], depth: int = 3) -> Iterator[Any]:
    """What a function, a bound method, a partial or a callable object holds: in its closure, defaults and arguments, among the
    globals that it names, and in containers and objects there.
    """
    for thing in _directly_held(function):
        yield thing
        if depth and not isinstance(thing, (Tensor, nn.Module, types.ModuleType, type)):
            yield from held_by(thing, depth - 1)


def _directly_held(thing: Any) -> list[Any]:
    if isinstance(thing, types.FunctionType):
        named = [thing.__globals__[n] for n in names(thing) if n in thing.__globals__]
        return [*_cells(thing), *named, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    if isinstance(thing, types.MethodType):
        owner: Any = thing.__self__
        held = {n: v for n, v in vars(owner).items() if n not in _OWN} if isinstance(owner, nn.Module) else {}
        return [owner, thing.__func__, *held.values(), *(own_buffers(owner).values() if held else ())]
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, (dict, list, tuple, set)):
        items = thing.values() if isinstance(thing, dict) else thing
        return list(items) if len(thing) <= _LONG else []
    return list(vars(thing).values()) if hasattr(thing, "__dict__") else []


def _cells(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty yet
            yield cell.cell_contents
