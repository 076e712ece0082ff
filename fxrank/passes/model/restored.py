"""What a forward leaves in a model, and how it is taken out again."""

import random
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fxrank.torch_private.writes import Watched

T = TypeVar("T")


@contextmanager
def restored(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Put back what a forward assigned: attributes, buffers, and caches held in plain dicts, lists and sets, nested or
    not. What comes out puts it back for a while, and then what has been assigned until then.
    """
    seen: set[int] = set()
    saved = _saved(c for module in model.modules() for c in _state(module, seen))
    try:
        yield partial(_as_before, saved)
    finally:
        _put_back(saved)


_Saved = list[tuple[Any, Any, list[Any]]]
"""Containers, with copies of them and what they held."""


@contextmanager
def _as_before(saved: _Saved) -> Iterator[None]:
    now = _saved(container for container, _, _ in saved)
    _put_back(saved)
    try:
        yield
    finally:
        _put_back(now)


def _saved(containers: Iterable[Any]) -> _Saved:
    return [(c, c.copy(), _content(c)) for c in containers]


def _put_back(saved: _Saved) -> None:
    for container, copied, content in saved:
        if _content(container) != content:
            container.clear()
            container.extend(copied) if isinstance(container, list) else container.update(copied)


@contextmanager
def modes_put_back(model: nn.Module) -> Iterator[None]:
    """Put back whether each module is in training mode."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def unwritten(model: nn.Module, but: Container[int] = ()) -> Iterator[None]:
    """Put back the numbers that a forward has written into parameters, and into other tensors that the modules hold: a momentum
    encoder, a codebook. Only what is written is copied, and all buffers: kernels of normalization do not say that they write.
    `but`: leave these tensors, by `id`.
    """
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers() if id(b) not in but}
    copied = {id(b) for b, _ in buffers.values()}
    watched = Watched(t for t in tensors_of(model) if id(t) not in but and id(t) not in copied)
    try:
        with watched:
            yield
    finally:
        watched.put_back()
        now = dict(model.named_buffers())
        with torch.no_grad():
            for name, (buffer, value) in buffers.items():
                for one in {id(b): b for b in (buffer, now.get(name, buffer))}.values():
                    one.copy_(value)


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Every tensor that the modules hold, as a parameter, a buffer, or in an attribute or a nest of containers there."""
    return list(_held(model, Tensor))


def seed(number: int) -> None:
    """Begin all of torch's random numbers anew, inside `fork_rng`. Without a device beside the CPU it is the CPU's alone: `torch.manual_seed` takes
    a lock for devices that are not there, and a process that another thread forks meanwhile finds it shut for ever.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@contextmanager
def randoms_put_back(model: nn.Module) -> Iterator[None]:
    """Put back the random numbers of Python, of numpy, and of generators that the modules hold; torch's own see `fork_rng`."""
    own = [(generator, generator.get_state()) for generator in _held(model, torch.Generator)]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for generator, state in own:
            generator.set_state(state)


def _held(model: nn.Module, kind: type[T]) -> Iterator[T]:
    seen: set[int] = set()
    for module in model.modules():
        for container in _state(module, seen):
            yield from (
                v for v in (container.values() if isinstance(container, dict) else container) if isinstance(v, kind)
            )


def _state(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    """The containers of a module: its own dict and those in it. Hooks are among them: some models put them on when they are called first, and
    note that they have.
    """
    own = vars(module)
    yield own
    for value in own.values():
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
