"""What a function's code names, and what a function holds: both can be looked at without calling it."""

import dis
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, nn

from fxrank.torch_private.modules import own_buffers

_LONG = 1000
"""Containers with more items than this are data, and not looked through."""
_MANY = 20_000
"""How many things are looked at behind one function."""


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


def writes(function: types.FunctionType, attribute: str) -> bool:
    """Whether the code names a parameter, or all of them, and something is done in place."""
    named = names(function)
    steps = [step for code in _codes(function.__code__) for step in dis.get_instructions(code)]
    stored = {step.argval for step in steps if step.opname == "STORE_ATTR"}
    in_place = "data" in stored or any(_is_in_place(name) for name in named)
    if attribute not in named:
        return in_place and not named.isdisjoint(("parameters", "named_parameters"))
    augmented = any(step.opname == "BINARY_OP" and step.argrepr.endswith("=") for step in steps)
    return in_place or augmented or attribute in stored or any(step.opname == "STORE_SUBSCR" for step in steps)


def _is_in_place(name: str) -> bool:
    """Whether torch has a function of this name that writes numbers."""
    writes_itself = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return writes_itself and (hasattr(Tensor, name) or hasattr(nn.init, name))


_OWN = set(vars(nn.Module()))


def is_function(value: Any) -> bool:
    """Whether this is a function, a bound method or a partial of one."""
    return isinstance(value, (types.FunctionType, types.MethodType, partial))


def held_by(function: Callable[..., Any]) -> Iterator[Any]:
    """What a function, a bound method, a partial or a callable object holds: in its closure, defaults and arguments, among the
    globals that it names, and in containers and objects there, three levels deep.
    """
    return islice(_held(function, 3), _MANY)


def _held(holder: Any, depth: int) -> Iterator[Any]:
    for thing in _directly_held(holder):
        yield thing
        if depth and not isinstance(thing, (Tensor, nn.Module, types.ModuleType, type)):
            yield from _held(thing, depth - 1)


def _directly_held(thing: Any) -> list[Any]:
    if isinstance(thing, types.FunctionType):
        named = [thing.__globals__[n] for n in names(thing) if n in thing.__globals__]
        return [*cells(thing), *named, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
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


def cells(function: types.FunctionType) -> Iterator[Any]:
    """What is in a function's closure."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty yet
            yield cell.cell_contents
