"""Running a model over calibration batches, and adding up what its layers see or give."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxrank.passes.calibration.moments import Moments
from fxrank.passes.errors import CalibrationError
from fxrank.passes.model.calls import Call
from fxrank.passes.model.compiled import eagerly
from fxrank.passes.model.restored import modes_put_back, randoms_put_back, restored, unwritten
from fxrank.passes.pairs.base import FactorPair
from fxrank.torch_private.modules import BatchNorm

K = TypeVar("K")
POSITIONS = 4096
"""Vectors that one call of a layer adds at most, or four for each number of a vector, if these are more: drawn evenly from all of its
positions. The draws of several batches add up.
"""
ROUND_BYTES = 2**30
"""Memory for the moments of the layers that are watched in one round over the batches; more layers take more rounds."""
MASKS = {"attention_mask": True, "padding_mask": False, "key_padding_mask": False, "src_key_padding_mask": False}
"""Arguments of models that say which positions are padding, and whether they hold 1 for those that are not."""


@dataclass(frozen=True)
class Watch:
    """One weight to be watched: its layers (more than one if they share it), and how its pair class reads it."""

    name: str
    pair: type[FactorPair]
    layers: tuple[nn.Module, ...]
    side: str
    shape: tuple[int, int]
    """`(groups, size)` of one vector."""

    @property
    def bytes(self) -> int:
        groups, size = self.shape
        return 8 * groups * size * size


def collect(
    model: nn.Module, watched: Mapping[K, Watch], calls: Callable[[], Iterable[Call]], *, by_batch: bool = False
) -> tuple[dict[K, Moments], int]:
    """The moments of each watched weight over all calls of the model in evaluation mode, and how many calls these were; one that no call
    reached is not there. Padding is left out where the model is told of it (`MASKS`). Nothing of the model is changed. `by_batch`: each
    BatchNorm that is in training mode normalizes by the batch, as its statistics lag behind then.

    `calls` is asked anew in each round. Raises `CalibrationError` for numbers that are not finite, naming the layer, and where there
    is no call.
    """
    found: dict[K, Moments] = {}
    number = 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    exact = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    for keys in list(rounds(watched, ROUND_BYTES)) or [[]]:  # with nothing to watch too, the batches must be good ones
        moments = {key: Moments(*watched[key].shape, device=exact) for key in keys}
        with ExitStack() as hooks:
            batch = _Batch()
            for key in keys:
                for layer in watched[key].layers:
                    hook = partial(batch.take_in, watched[key], moments[key])
                    hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            with _evaluating(model, by_batch), torch.no_grad():
                for batch.number, (args, kwargs) in enumerate(calls(), 1):
                    batch.padding = _padding(kwargs)
                    model(*args, **kwargs)
        number = batch.number
        if not number:
            raise CalibrationError(
                "calibration must yield at least one batch; it is empty. Check the data set, batch_size, drop_last and calibration_batches."
            )
        found |= {key: one for key, one in moments.items() if one.count}
    return found, number


class _Batch:
    """The batch that is on its way through the model."""

    def __init__(self) -> None:
        self.number = 0
        self.padding: Tensor | None = None

    def take_in(self, watch: Watch, moments: Moments, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """A forward hook."""
        given = args[0] if args else next(iter(kwargs.values()))
        vectors = watch.pair.seen(layer, watch.side, given, output).detach()
        leading = vectors.shape[: -4 if watch.side == "patches" else -2]
        drawn = torch.randperm(math.prod(leading), generator=torch.Generator().manual_seed(moments.count))
        if self.padding is not None and leading[: self.padding.ndim] == self.padding.shape:
            trailing = (1,) * (len(leading) - self.padding.ndim)
            kept = ~self.padding.cpu().reshape(*self.padding.shape, *trailing).expand(leading).flatten()
            drawn = drawn[kept[drawn]]
        at_most = max(POSITIONS, 4 * watch.shape[1])
        places = torch.unravel_index(drawn[:at_most].to(vectors.device), leading)
        vectors = vectors[places] if leading else vectors[None]
        vectors = vectors.reshape(-1, *watch.shape).to(device=moments.mean.device, dtype=torch.float64)
        if not torch.isfinite(vectors).all():
            bad = int((~torch.isfinite(vectors)).sum())
            raise CalibrationError(
                f"activations must be finite to calibrate on; the {watch.side} of {watch.name!r} hold {bad} NaN or infinite values of {vectors.numel()} in "
                f"batch {self.number}. Check the inputs of that batch, or calibrate in a wider dtype."
            )
        moments.add(vectors)


@contextmanager
def _evaluating(model: nn.Module, by_batch: bool) -> Iterator[None]:
    """In evaluation mode, compiled parts as they were written, and everything as before at the end. `by_batch` as of `collect`, but for a
    BatchNorm that would wait for other processes.
    """
    kept = restored(model), randoms_put_back(model), unwritten(model), modes_put_back(model)
    with kept[0], kept[1], kept[2], kept[3], eagerly(model), torch.random.fork_rng():
        norms = [m for m in model.modules() if isinstance(m, BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
        trained = [norm for norm in norms if norm.training] if by_batch else []
        model.eval()
        for norm in trained:
            norm.training = True
        yield


def _padding(kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which positions `(batch, length)` of a call are padding; None if the model is not told."""
    for name, keeps in MASKS.items():
        mask = kwargs.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
            return mask == 0 if keeps else mask != 0
    return None


def rounds(watched: Mapping[K, Watch], at_most: int) -> Iterator[list[K]]:
    """Keys, in rounds whose moments fit into so many bytes; a larger layer has one of its own."""
    keys: list[K] = []
    held = 0
    for key, watch in watched.items():
        if keys and held + watch.bytes > at_most:
            yield keys
            keys, held = [], 0
        keys.append(key)
        held += watch.bytes
    if keys:
        yield keys
