"""What a forward leaves in a model, and how it is taken out again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put back what a forward assigned: attributes, buffers, and caches held in plain dicts, lists and sets, nested or
    not.
    """
    seen: set[int] = set()
    saved = [(c, c.copy(), _content(c)) for module in model.modules() for c in _state(module, seen)]
    try:
        yield
    finally:
        for container, copied, content in saved:
            if _content(container) != content:
                container.clear()
                container.extend(copied) if isinstance(container, list) else container.update(copied)


def _state(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    """The containers of a module: its own dict and those in it, but for hooks."""
    own = vars(module)
    yield own
    for name, value in own.items():
        if "_hooks" not in name:
            yield from _containers(value, seen)


def _containers(value: Any, seen: set[int]) -> Iterator[Any]:
    """Every dict, list and set in a nest of them and of tuples."""
    if not isinstance(value, (dict, list, set, tuple)) or id(value) in seen:
        return
    seen.add(id(value))
    if not isinstance(value, tuple):
        yield value
    for item in value.values() if isinstance(value, dict) else value:
        yield from _containers(item, seen)


def _content(container: Any) -> list[Any]:
    """What a container holds, comparable where its items are not."""
    return [(k, id(v)) for k, v in container.items()] if isinstance(container, dict) else [id(v) for v in container]
