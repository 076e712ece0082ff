"""The random numbers that a run depends on: torch's, numpy's, Python's, and those of generators that the user's objects hold.

Generators are found by their ways, attribute by attribute, from the loaders and the model: `loader.dataset.dataset.rng`,
`model.blocks.0.noise`. One that is there now and was not when the state was taken, as it is made at its first use, stays
as it is.
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType, NoneType
from typing import Any

import numpy as np
import torch

Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
_OPAQUE = (
    *(int, float, str, bytes, NoneType, torch.Tensor, np.ndarray),
    *(type, FunctionType, ModuleType, random.SystemRandom),
)
_MOST = 1000
"""Longer lists and dicts hold data, not parts."""


def random_state(holders: Iterable[Any] = ()) -> dict[str, Any]:
    """The states of all random numbers: torch's on the CPU and the GPUs, numpy's, Python's, and those of the generators
    that these objects hold.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
        "generators": {way: _state_of(generator) for way, generator in generators_of(holders).items()},
    }


def restore_random(state: dict[str, Any], holders: Iterable[Any] = ()) -> None:
    """Inverse of `random_state`, with objects that hold their generators in the same places."""
    torch.set_rng_state(state["torch"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    for way, generator in generators_of(holders).items():
        if (saved := state["generators"].get(way)) is None:
            continue
        if isinstance(generator, (torch.Generator, np.random.RandomState)):
            generator.set_state(saved)
        elif isinstance(generator, random.Random):
            generator.setstate(saved)
        else:
            generator.bit_generator.state = saved


def begun_from(state: dict[str, Any], number: int, holders: Iterable[Any]) -> dict[str, Any]:
    """Random numbers for a process that there was not before: others in each, but generators, by which processes may
    agree on an order, are as in the first.
    """
    restore_random(state, holders)
    seed = int(torch.randint(2**31, (number,))[-1])
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return random_state(holders)


def generators_of(holders: Iterable[Any]) -> dict[str, Generator]:
    """The random generators that can be reached from these objects by attributes, lists, tuples and dicts, each once, by
    the shortest way to it.
    """
    found: dict[str, Generator] = {}
    seen: set[int] = set()
    left = deque((str(index), holder) for index, holder in enumerate(holders))
    while left:
        way, value = left.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Generator):
            found[way] = value
        else:
            left.extend((f"{way}.{name}", inner) for name, inner in _inside(value) if not isinstance(inner, _OPAQUE))
    return found


def _inside(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, (list, tuple)):
        return enumerate(value) if len(value) <= _MOST else ()
    if isinstance(value, dict):
        return _named(value) if len(value) <= _MOST else ()
    try:  # past a __getattr__ of the user's
        return _named(object.__getattribute__(value, "__dict__"))
    except AttributeError:
        return ()


def _named(entries: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    return ((name, inner) for name, inner in entries.items() if isinstance(name, (str, int)))


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.getstate() if isinstance(generator, random.Random) else dict(generator.bit_generator.state)
