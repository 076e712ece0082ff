"""Texts as tensors: vocabularies, windows, sentences of one length, and batches of them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

UNKNOWN, START, END = 1, 2, 3
"""Tokens with a meaning of their own; 0 fills sentences up."""


def vocabulary(words: Iterable[str], at_least: int) -> dict[str, int]:
    """Words that occur at least so often, the most frequent first; numbers 0 to 3 are `PAD` to `END`."""
    counts = Counter(words)
    for special in ("<pad>", "<unk>", "<s>", "</s>"):
        counts.pop(special, None)
    kept = sorted((w for w, n in counts.items() if n >= at_least), key=lambda w: (-counts[w], w))
    return {w: i for i, w in enumerate(["<pad>", "<unk>", "<s>", "</s>", *kept])}


def numbers(words: Iterable[str], known: Mapping[str, int]) -> list[int]:
    """Words as numbers; words not known become 1."""
    return [known.get(word, UNKNOWN) for word in words]


def padded(sentences: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    """Sentences as `(N, length)`, length rounded up to a multiple of 8; longer ones are cut."""
    length = -(-length // 8) * 8
    return torch.tensor([[*s[:length], *[pad] * (length - len(s))] for s in sentences])


class Batches:
    """Batches of columns `(N, …)`: a tuple of tensors, or a dict by the columns' names.

    `pads` gives the padding value of each column of sentences `(N, longest)`, None for other columns. Such a column
    is cut to the batch's longest sentence, rounded up to a multiple of 8, and sentences of like length share a batch,
    so that there are few shapes and little padding. `shuffle` draws a new order every epoch, from `seed` alone, and drops the last, short batch.
    """

    def __init__(
        self,
        columns: Sequence[Tensor] | Mapping[str, Tensor],
        batch: int,
        *,
        shuffle: bool,
        seed: int = 0,
        pads: Sequence[int | None] = (),
    ) -> None:
        self._names = list(columns) if isinstance(columns, Mapping) else None
        self._columns = list(columns.values()) if isinstance(columns, Mapping) else list(columns)
        self._batch, self._shuffle, self._pads = batch, shuffle, list(pads) or [None] * len(self._columns)
        self._generator = torch.Generator().manual_seed(seed)
        first = next(((c, p) for c, p in zip(self._columns, self._pads, strict=True) if p is not None), None)
        self._lengths = None if first is None else (first[0] != first[1]).sum(1)

    def __len__(self) -> int:
        count = len(self._columns[0])
        return count // self._batch if self._shuffle else -(-count // self._batch)

    def __iter__(self) -> Iterator[Any]:
        count = len(self._columns[0])
        order = torch.randperm(count, generator=self._generator) if self._shuffle else torch.arange(count)
        places = torch.arange(len(self))
        if self._lengths is not None:  # sorted in pools of 16 batches, the batches then in any order
            pools = order[: len(self) * self._batch].split(16 * self._batch)
            order = torch.cat([pool[self._lengths[pool].argsort(stable=True)] for pool in pools])
            if self._shuffle:
                places = torch.randperm(len(self), generator=self._generator)
        for place in places.tolist():
            rows = order[place * self._batch : (place + 1) * self._batch]
            chosen = [_cut(c[rows], pad) for c, pad in zip(self._columns, self._pads, strict=True)]
            yield tuple(chosen) if self._names is None else dict(zip(self._names, chosen, strict=True))


def _cut(column: Tensor, pad: int | None) -> Tensor:
    if pad is None:
        return column
    longest = int((column != pad).any(0).nonzero().max()) + 1
    return column[:, : -(-longest // 8) * 8]


def windows(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A text `(N,)` as inputs and targets `(M, length)`, the targets one token on. Windows do not overlap."""
    count = (len(text) - 1) // length
    return text[: count * length].view(count, length), text[1 : count * length + 1].view(count, length)
