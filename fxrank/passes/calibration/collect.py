"""Running a model over calibration batches, and adding up what its layers see or give."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fxrank.passes.calibration.masks import paddings
from fxrank.passes.calibration.moments import Lookups, Moments
from fxrank.passes.calibration.parts import NARROW, Parts
from fxrank.passes.calibration.processes import OfAll, alone, together
from fxrank.passes.calibration.reads import Reading, Reads
from fxrank.passes.errors import CalibrationError
from fxrank.passes.model.calls import Call
from fxrank.passes.model.compiled import eagerly
from fxrank.passes.model.restored import modes_put_back, randoms_put_back, restored, unwritten
from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.torch_private.modules import BatchNorm, own_parameters

K = TypeVar("K")


class Drawn(NamedTuple):
    """How many vectors one call of a layer adds at most: `vectors`, or `of_each` for each number of a vector, if these are more. They are drawn
    evenly from all of its positions, and the draws of several calls add up.
    """

    vectors: float = 4096
    of_each: float = 4.0

    def at_most(self, size: int) -> int:
        """Of vectors of so many numbers."""
        return math.ceil(max(self.vectors, self.of_each * size))


DRAWN = Drawn()
LARGEST_BYTES = 2**33
"""Memory for the moments of one product, at most: what a table is multiplied with from the left has as many numbers as it has rows."""
ROUND_BYTES = 2**30
"""Memory for the moments of the layers that are watched in one round over the batches; more layers take more rounds."""

NO_BATCH = "calibration must yield at least one batch; it is empty. Check the data set, batch_size, drop_last and calibration_batches."


@dataclass(frozen=True)
class Watch:
    """One weight to be watched: its layers (more than one if they share it), and how its pair class reads it."""

    name: str
    pair: type[FactorPair]
    layers: tuple[nn.Module, ...]
    side: str
    shape: tuple[int, int]
    """`(groups, size)` of one vector."""
    weight: Tensor | None = None
    """The parameter, if it may be multiplied with outside of the layers' calls too."""
    narrow: bool = True
    """Whether what a whole matrix gives may be taken for what it is given, where it is fewer numbers."""

    @property
    def bytes(self) -> int:
        groups, size = self.shape
        return 8 * groups * size * size


def collect(
    model: nn.Module,
    watched: Mapping[K, Watch],
    calls: Callable[[], Iterable[Call]],
    of_all: OfAll = alone,
    *,
    by_batch: bool = False,
    drawn: Drawn = DRAWN,
) -> tuple[dict[K, Moments | Parts], int]:
    """The moments of each watched weight over all calls of the model in evaluation mode, and how many calls these were; one that no call
    reached is not there, and of one that was multiplied with outside of its layers it is the `Parts`. Padding is left out where the
    model is told of it (see `masks`). Nothing of the model is changed. `by_batch`: each BatchNorm that is in training mode normalizes by
    the batch, as its statistics lag behind then. `drawn`: how many vectors are taken of each call.

    `calls` is asked anew in each round. What several processes see is added up. Raises `CalibrationError` for numbers that are not finite, naming the layer, and where there
    is no call.
    """
    found: dict[K, Moments | Parts] = {}
    number = 0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    exact = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    for keys in list(rounds(watched, ROUND_BYTES)) or [[]]:  # with nothing to watch too, the batches must be good ones
        moments = {key: Moments(*watched[key].shape, device=exact) for key in keys}
        with ExitStack() as hooks:
            batch = _Batch(exact, drawn)
            for key in keys:
                for layer in watched[key].layers:
                    hooks.callback(layer.register_forward_pre_hook(batch.enter).remove)
                    hook = partial(batch.take_in, watched[key], moments[key])
                    hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            reads = batch.reads({key: watched[key] for key in keys})

            def run(batch: _Batch = batch, reads: Reads[int] = reads) -> None:
                for batch.number, (args, kwargs) in enumerate(calls(), 1):
                    batch.masks = paddings(model, args, kwargs)
                    with reads:  # torch's fused encoder layers, which call no hooks, step aside for it
                        model(*args, **kwargs)

            with evaluating(model, by_batch), torch.no_grad():
                together(run, of_all)
        number = sum(of_all(batch.number))
        if not number:
            raise CalibrationError(NO_BATCH)
        for key in keys:
            weight = watched[key].weight
            seen = Moments.added(of_all(moments[key])) if of_all is not alone else moments[key]
            parts = Parts() if weight is None else Parts.added(of_all(batch.parts.get(id(weight), Parts())))
            if parts.moments or parts.missed:
                parts.called |= seen.count > 0
                found[key] = parts
            elif seen.count:
                found[key] = seen
    return found, number


class _Batch:
    """The batch that is on its way through the model."""

    def __init__(self, device: torch.device | str = "cpu", drawn: Drawn = DRAWN) -> None:
        """Moments of weights that are read are added up on this `device`. `drawn` as of `collect`."""
        self._drawn = drawn
        self.number = 0
        self.masks: list[Tensor] = []
        self.parts: dict[int, Parts] = {}
        self._device = device
        self._inside: set[int] = set()

    def reads(self, watched: Mapping[Any, Watch]) -> Reads[int]:
        """A mode in which the products with these weights outside of their layers are taken into `parts`, by the `id` of the weight."""
        by_weight = {id(w.weight): w for w in watched.values() if w.weight is not None}
        weights = {key: w.weight for key, w in by_weight.items() if w.weight is not None}
        wide = {id(w.weight) for w in watched.values() if not w.narrow or w.shape[0] > 1}

        def see(key: int, reading: Reading) -> None:
            if key in self._inside:
                return
            parts = self.parts.setdefault(key, Parts())
            groups, size = reading.vectors.shape[-2:]
            side, through = reading.side, None
            if key not in wide and side in NARROW and (through := _narrower(weights[key], reading)) is not None:
                side, size = NARROW[side], through.shape[1]
            at = side, reading.kept, reading.summed
            if at not in parts.moments:
                if (needed := 8 * groups * size**2) > LARGEST_BYTES:
                    parts.missed = f"moments of inputs of {size} numbers would take {needed / 2**30:.0f} GiB"
                    return
                lookups = side == "lookups"
                parts.moments[at] = (
                    Lookups(len(reading.kept), self._device) if lookups else Moments(groups, size, self._device)
                )
            said = side if side in ("outputs", "lookups") else "inputs"
            self._add(by_weight[key].name, said, parts.moments[at], reading.vectors, through)

        def miss(key: int, why: str) -> None:
            if key not in self._inside:
                self.parts.setdefault(key, Parts()).missed = why

        return Reads(weights, see, miss, self._with_mask)

    @contextmanager
    def _with_mask(self, mask: Tensor | None) -> Iterator[None]:
        before = self.masks
        self.masks = before if mask is None else [mask]
        yield
        self.masks = before

    def enter(self, layer: nn.Module, args: Any) -> None:
        """A forward pre-hook."""
        self._inside.add(id(own_parameters(layer).get("weight")))

    def take_in(self, watch: Watch, moments: Moments, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        """A forward hook."""
        self._inside.discard(id(own_parameters(layer).get("weight")))
        given = args[0] if args else next(iter(kwargs.values()))
        vectors = watch.pair.seen(layer, watch.side, given, output).detach()
        own = weight_of(layer).ndim if watch.side == "patches" else 2
        self._add(watch.name, watch.side, moments, vectors, own=own)

    def _add(
        self,
        name: str,
        side: str,
        moments: Moments | Lookups,
        vectors: Tensor,
        through: Tensor | None = None,
        own: int = 2,
    ) -> None:
        """Take in the vectors, whose `own` dimensions are the last ones, or, of those that are drawn, what they become `through` a matrix."""
        leading = vectors.shape[:-own]
        drawn = torch.randperm(math.prod(leading), generator=torch.Generator().manual_seed(moments.count))
        mask = next((m for m in self.masks if leading[: m.ndim] == m.shape), None)
        if mask is not None:
            trailing = (1,) * (len(leading) - mask.ndim)
            kept = ~mask.cpu().reshape(*mask.shape, *trailing).expand(leading).flatten()
            drawn = drawn[kept[drawn]]
        groups, size = moments.shape
        places = torch.unravel_index(drawn[: self._drawn.at_most(size)].to(vectors.device), leading)
        vectors = vectors[places] if leading else vectors[None]
        size = size if through is None else len(through)
        vectors = vectors.reshape(-1, groups, size).to(device=moments.device, dtype=torch.float64)
        # A sum tells in a fraction of the time; one that overflows is looked at more closely.
        if not torch.isfinite(vectors.sum()) and (bad := int((~torch.isfinite(vectors)).sum())):
            raise CalibrationError(
                f"activations must be finite to calibrate on; the {side} of {name!r} hold {bad} NaN or infinite values of {vectors.numel()} in "
                f"batch {self.number}. Check the inputs of that batch, or calibrate in a wider dtype."
            )
        moments.add(vectors if through is None else vectors @ through.to(vectors))


def _narrower(weight: Tensor, reading: Reading) -> Tensor | None:
    """The matrix that a product with a whole weight multiplies its inputs with, `(size, …)`, if it gives fewer numbers than it takes."""
    if weight.ndim != 2 or len(reading.kept) >= len(reading.summed):
        return None
    matrix = weight.mT if reading.side == "inputs" else weight
    return matrix if matrix.shape == (len(reading.summed), len(reading.kept)) else None


@contextmanager
def evaluating(model: nn.Module, by_batch: bool) -> Iterator[None]:
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
