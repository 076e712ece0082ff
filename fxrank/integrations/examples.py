"""What the callbacks of all trainers share: the session's options, one batch to trace a model with, taken beside the
loader that the training will use, and a look at whether stored weights have the model's form.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from fxrank.loggers import Logger
from fxrank.passes.discovery.selection import Selector
from fxrank.passes.errors import CheckpointError
from fxrank.passes.pairs.base import FactorPair
from fxrank.plan import Plan
from fxrank.policies.base import Policy
from fxrank.saving.random_state import random_state, restore_random


def check_factors(model: nn.Module, stored: Iterable[str], fix: str) -> None:
    """Raise `CheckpointError` if there are factors among the names of stored weights that `model` has no place for, or
    the other way round.
    """
    own, names = {*model.state_dict(keep_vars=True)}, {*stored}
    lost = {n for n in names - own if n.endswith(".u.weight") and f"{n.removesuffix('.u.weight')}.v.weight" in names}
    pairs = {f"{path}.u.weight" for path, module in model.named_modules() if isinstance(module, FactorPair)}
    unfilled = (pairs & own) - names
    if lost or unfilled:
        form, name = ("after", lost) if lost else ("before", unfilled)
        raise CheckpointError(
            f"a checkpoint from {form} the switch is for a {'factorized' if lost else 'dense'} model; {min(name)!r} has no place in "
            f"{type(model).__name__ if lost else 'it'}. {fix}"
        )


def session_options(
    policy: Policy | Plan | str | None,
    include: Iterable[Selector] | Selector,
    exclude: Iterable[Selector] | Selector,
    seed: int,
    logger: Logger | None,
) -> dict[str, Any]:
    """What a callback keeps of its arguments for `LowRankSession.attach`, by name."""
    return {"policy": policy, "include": include, "exclude": exclude, "seed": seed, "logger": logger}


@contextmanager
def random_untouched(*loaders: Any) -> Iterator[None]:
    """Put back all random numbers afterwards, the generators that the loaders hold among them."""
    before = random_state(loaders)
    try:
        yield
    finally:
        restore_random(before, loaders)


def example_batch(loader: Iterable[Any]) -> Any:
    """One batch of the size and form that `loader` deals, on the CPU.

    Nothing is consumed: a `DataLoader`'s data set is read from its start, without sampler and workers; anything else is
    iterated anew. Random numbers are as before. Raises `TypeError` for what can be iterated only once, `ValueError` for an
    empty loader.
    """
    with random_untouched(loader):
        for batch in _batches(loader):
            return batch
    raise ValueError("the loader must yield at least one batch; it is empty. Check the data set and drop_last.")


def _batches(loader: Any) -> Iterator[Any]:
    if not isinstance(loader, DataLoader):
        return _again(loader)
    data, sampler = loader.dataset, loader.batch_sampler
    size = loader.batch_size or getattr(sampler, "batch_size", None)
    if isinstance(data, IterableDataset):
        items = _again(data)
        return _collated(loader, [[*islice(items, size)]] if size else items)
    if sampler is None:
        return _collated(loader, (data[i] for i in loader.sampler))
    chosen = range(min(size, len(data))) if size else next(iter(sampler), [])  # type: ignore[arg-type]
    return _collated(loader, [[data[i] for i in chosen]])


def _collated(loader: Any, groups: Iterable[Any]) -> Iterator[Any]:
    return (loader.collate_fn(group) for group in groups if not isinstance(group, list) or group)


def _again(source: Any) -> Iterator[Any]:
    iterator: Iterator[Any] = iter(source)
    if iterator is source or iterator is iter(source):
        raise TypeError(
            f"a batch is taken beside the loader, which must be iterable again; got a one-pass {type(source).__name__}. Pass example_inputs=."
        )
    return iterator
