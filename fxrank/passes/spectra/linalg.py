"""Decompositions of torch, of small matrices in one thread.

Several threads save little there, and where others want the cores, a loader's processes say, they may cost much: they meet hundreds of times in
each decomposition, and every time one waits for the other. Measured on 2 cores, float64, milliseconds in one thread and in two: an eigendecomposition
of 256 numbers 6 and 4 alone, 25 and 29 beside trainings and tests, of 512 38 and 22, 82 and 396; a QR of 1536x384 30 and 20, 72 and 385.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SMALL = 2**28
"""A matrix is small if its numbers times its short side are no more than this: 512x1024, 4096x256."""


def is_small(shape: Sequence[int]) -> bool:
    """Of matrices `(..., rows, cols)`, whether each is decomposed in one thread."""
    rows, cols = shape[-2:]
    return rows * cols * min(rows, cols) <= SMALL


@contextmanager
def one_thread() -> Iterator[None]:
    """Meanwhile torch uses one thread on the CPU, of those that the calling thread has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sparing(decompose: Callable[..., Any]) -> Callable[..., Any]:
    def call(matrices: Tensor, *others: Any, **options: Any) -> Any:
        if matrices.device.type != "cpu" or not is_small(matrices.shape) or torch.get_num_threads() == 1:
            return decompose(matrices, *others, **options)
        with one_thread():
            return decompose(matrices, *others, **options)

    call.__doc__ = f"`torch.linalg.{decompose.__name__.removeprefix('linalg_')}`."
    return call


eigh, eigvalsh, qr, solve, svd, svdvals = (
    _sparing(of)
    for of in (
        torch.linalg.eigh,
        torch.linalg.eigvalsh,
        torch.linalg.qr,
        torch.linalg.solve,
        torch.linalg.svd,
        torch.linalg.svdvals,
    )
)
