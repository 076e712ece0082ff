"""Functions that stand in for others in one thread only: a trace changes Python and torch, whose names every thread reads.

What takes a function's place asks which thread calls, and calls the function itself in every thread but the one that traces.
What cannot be kept apart are the random numbers that torch draws from the process-wide generator, which a trace puts back
(`fork_rng`), the filters of `warnings`, and the model itself: no other thread may use the model that is being traced.

It knows torch's inside; tried on torch 2.8.0 and 2.14.1.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

_turn = threading.RLock()
_active: "list[Patches]" = []
"""The patches that are on, of whichever thread traces now."""


class _Here(threading.local):
    """What holds for this thread."""

    patches: "Patches | None" = None


_HERE = _Here()


def _end_in_child() -> None:
    """A process forked in the middle of another thread's trace has neither that thread nor its end."""
    global _turn
    _turn = threading.RLock()
    for patches in reversed(_active):
        patches.take_off()
    _active.clear()
    _HERE.patches = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_in_child)


@contextmanager
def turn() -> Iterator[None]:
    """Wait until no other thread traces. In a forward that is being traced, the patches of that trace are off meanwhile."""
    with _turn:
        outer, _HERE.patches = _HERE.patches, None
        try:
            if outer is not None:
                outer.take_off()
            yield
        finally:
            if outer is not None:
                outer.put_on()
            _HERE.patches = outer


@dataclass
class _Patch:
    owner: Any  # the dict of a module, or a class
    name: str
    original: Any
    stand_in: Any

    def read(self) -> Any:
        # Not `getattr`, which binds the method of a class anew.
        return (self.owner if type(self.owner) is dict else vars(self.owner)).get(self.name)

    def write(self, value: Any) -> None:
        if type(self.owner) is dict:
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


class Patches:
    """What stands in for functions in this thread, until the end of the block. Has the methods that `torch.fx` asks of the
    class in whose place it is used, `torch.fx._symbolic_trace._Patcher`.
    """

    def __init__(self) -> None:
        self._made: list[_Patch] = []
        self._called: dict[int, Callable[..., Any]] = {}
        self._visited: set[int] = set()

    def __enter__(self) -> "Patches":
        self._outer, _HERE.patches = _HERE.patches, self
        _active.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _HERE.patches = self._outer
        self.take_off()
        if self in _active:  # not so in a child that was forked meanwhile
            _active.remove(self)
        # Whoever took a stand-in with him (`from torch import zeros`) must not hold the traced model with it.
        self._made.clear()
        self._called.clear()

    def patch(
        self, namespace: dict[str, Any], name: str, stand_in: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        """Let a function of a module be `stand_in` in this thread."""
        original = namespace[name]
        self._make(_Patch(namespace, name, original, self._only_here(stand_in, original)))

    def patch_method(self, cls: type, name: str, stand_in: Callable[..., Any], deduplicate: bool = True) -> None:
        """Let a method of a class be `stand_in` in this thread."""
        original = getattr(cls, name)
        self._make(_Patch(cls, name, original, self._only_here(stand_in, original)))

    def replace(self, owner: dict[str, Any] | type, name: str, value: Any) -> None:
        """Put something in place, in a module's dict or in a class, that gives other threads what they had before, by its own
        doing.
        """
        original = owner[name] if isinstance(owner, dict) else vars(owner)[name]
        self._make(_Patch(owner, name, original, value))

    def visit_once(self, thing: object) -> bool:
        """Whether this is the first call with that thing."""
        if id(thing) in self._visited:
            return False
        self._visited.add(id(thing))
        return True

    def take_off(self) -> None:
        """Put everything back, but for what somebody else has put something over."""
        for patch in reversed(self._made):
            if patch.read() is patch.stand_in:
                patch.write(patch.original)

    def put_on(self) -> None:
        """Undo `take_off`."""
        for patch in self._made:
            patch.write(patch.stand_in)

    def _make(self, patch: _Patch) -> None:
        self._made.append(patch)
        patch.write(patch.stand_in)

    def _only_here(self, stand_in: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        here, called, key = _HERE, self._called, len(self._called)
        called[key] = stand_in

        @functools.wraps(original)
        def asks_the_thread(*args: Any, **kwargs: Any) -> Any:
            return (called[key] if here.patches is self else original)(*args, **kwargs)

        return asks_the_thread


def tracing_here() -> bool:
    """Whether this thread is in the middle of a trace."""
    return _HERE.patches is not None


def with_globals(function: Any, **names: Any) -> Callable[..., Any]:
    """A copy of a function that reads these in place of globals of its module, which stay as they are for everybody else."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
