"""The repeated blocks of a model, found in one call of it, and run one at a time.

What the first block is given, and what every block is given beside it (masks, positions, angles), is recorded once for each batch. Then a
block is all that must be held to get from what it is given to what the next one is given.
"""

import copy
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.large.weights import ReadWhenUsed, Weights
from fxrank.passes.calibration.collect import NO_BATCH
from fxrank.passes.calibration.masks import mask_arguments
from fxrank.passes.errors import CalibrationError
from fxrank.passes.model.calls import Call, at_other_batch_size
from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.locate import dense_at
from fxrank.torch_private import pytree

log = logging.getLogger("fxrank")

WAYS_OUT = (
    "Leave the data out, for factors of the weights alone, or, where the model fits into memory, use fxrank.factorize(model, batch, "
    "calibration=loader)"
)


@dataclass(frozen=True)
class Blocks:
    """The members of an `nn.ModuleList` that are called one after another: its `path`, how many there are, where among a block's arguments
    (position or name) is what the one before it gives, and the length of what it gives if that is a tuple with this first.
    """

    path: str
    count: int
    place: int | str
    length: int | None

    def path_of(self, number: int) -> str:
        """Of one block."""
        return f"{self.path}.{number}"

    def part_of(self, name: str) -> str:
        """The path of the block that a name begins with; empty outside of them."""
        number = name.removeprefix(f"{self.path}.").partition(".")[0] if name.startswith(f"{self.path}.") else ""
        return self.path_of(int(number)) if number.isdigit() else ""

    def given(self, call: Call) -> Tensor:
        """What the block before gives, among the arguments of a block."""
        args, kwargs = call
        found = args[self.place] if isinstance(self.place, int) else kwargs[self.place]
        assert isinstance(found, Tensor)
        return found

    def with_given(self, call: Call, given: Tensor | None) -> Call:
        """The arguments with another one in that place."""
        args, kwargs = call
        if isinstance(self.place, int):
            return (*args[: self.place], given, *args[self.place + 1 :]), kwargs
        return args, kwargs | {self.place: given}


def find_blocks(model: nn.Module, weights: Weights, call: Call) -> Blocks:
    """Of all lists whose members are called one after another, each with the very tensor that the one before it gives, and once each, the one
    with the most parameters. The model is called once, with two rows of a batch, and each weight is read when it is used. Raises
    `CalibrationError` if there is none.
    """
    lists = {path: list(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    calls: list[tuple[int, Call, Any]] = []

    def called(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((id(block), (args, kwargs), output))

    members = {id(block): block for blocks in lists.values() for block in blocks}
    hooks = [block.register_forward_hook(called, with_kwargs=True) for block in members.values()]
    args, kwargs = at_other_batch_size(*call)
    try:
        with torch.no_grad(), ReadWhenUsed(weights):
            model(*args, **kwargs)
    except Exception as error:
        raise CalibrationError(
            f"the batches must run through the model, its weights read when they are used; {type(model).__name__} said of the first: {error}. "
            f"{WAYS_OUT}."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    found = [(blocks, chain) for path, blocks in lists.items() if (chain := _chain(path, blocks, calls)) is not None]
    if not found:
        raise CalibrationError(
            "a model that is calibrated from its files must have blocks: an nn.ModuleList whose members are called one after another, each with "
            f"what the one before it gives; {type(model).__name__} has none. {WAYS_OUT}."
        )
    return max(found, key=lambda f: sum(p.numel() for block in f[0] for p in block.parameters()))[1]


def _chain(path: str, blocks: Sequence[nn.Module], calls: Sequence[tuple[int, Call, Any]]) -> Blocks | None:
    ids = [id(block) for block in blocks]
    own = [(call, output) for block, call, output in calls if block in ids]
    if [block for block, _, _ in calls if block in ids] != ids:
        return None
    places: set[int | str] = set()
    for (_, output), ((args, kwargs), _) in pairwise(own):
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        places.add(next((place for place, value in named if value is _first(output)), ""))
    lengths = {len(output) if isinstance(output, tuple) else None for _, output in own}
    if len(places) > 1 or len(lengths) > 1 or "" in places:
        return None
    return Blocks(path, len(blocks), places.pop(), lengths.pop())


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Batch:
    """One call of the model: what the next block is given, and what each is given beside it."""

    call: Call
    masks: Mapping[str, Tensor]
    given: Tensor | None = None
    gives: Tensor | None = None
    beside: list[Call] = field(default_factory=list)

    @property
    def tensors(self) -> dict[int, Tensor]:
        """All that are held, each once."""
        held = pytree.tree_leaves((self.call, self.given, self.gives, self.beside))
        return {id(t): t for t in held if isinstance(t, Tensor)}


class _ReachedError(Exception):
    """All blocks have been called."""


class Part(nn.Module):
    """One block, under the path that it has in its model."""

    def __init__(
        self, path: str, number: int, block: nn.Module, run: Callable[[nn.Module, int, Batch], Tensor]
    ) -> None:
        super().__init__()
        self.path, self.number = path, number
        place: nn.Module = self
        *outer, last = path.split(".")
        for name in outer:
            place.add_module(name, child := nn.Module())
            place = child
        place.add_module(last, block)
        self._run = run

    def forward(self, batch: Batch, **masks: Tensor) -> Tensor:
        """Run the block. The masks are those that the model is given, which say what is padding (see `passes.calibration.masks`)."""
        batch.gives = self._run(self.block, self.number, batch)
        return batch.gives

    @property
    def block(self) -> nn.Module:
        """The block itself."""
        return self.get_submodule(self.path)


class Feed:
    """What the blocks of a model are given, in memory. `model` is one without numbers that is to run (see `without_numbers`)."""

    def __init__(self, model: nn.Module, weights: Weights, calls: Callable[[], Iterable[Call]]) -> None:
        """Raises `CalibrationError` as `find_blocks`, and where there is no call."""
        first = next(iter(calls()), None)
        if first is None:
            raise CalibrationError(NO_BATCH)
        lost = next((n for n, b in model.named_buffers() if b.is_meta and not weights.has(b)), None)
        if lost is not None:
            raise CalibrationError(
                f"a model that is calibrated from its files must have the buffers that are in none of them; {lost!r} is on the meta device. Build the "
                "model inside fxrank.saving.unfilled.unfilled(), which puts there its parameters alone."
            )
        self.model, self.blocks = model, find_blocks(model, weights, first)
        self._weights, self._calls = weights, calls
        self._batches: list[Batch] = []

    def begin(self) -> None:
        """Run all batches as far as the first block. Raises `CalibrationError` where that cannot be done, or where what is computed between blocks
        is given to the next.
        """
        self._batches = []
        for number, (args, kwargs) in enumerate(self._calls(), 1):
            batch = Batch((args, kwargs), mask_arguments(self.model, args, kwargs))
            moved: dict[int, tuple[Tensor, Tensor]] = {}
            try:
                with self._instead(self.model, partial(self._record, batch, moved)), torch.no_grad():
                    self.model(*args, **kwargs)
            except _ReachedError:
                self._batches.append(batch)
            except CalibrationError:
                raise
            except Exception as error:
                raise CalibrationError(
                    f"every batch must run through the model as far as its blocks; batch {number} did not: {error}. {WAYS_OUT}."
                ) from error
        self._log()

    def _record(
        self, batch: Batch, moved: dict[int, tuple[Tensor, Tensor]], number: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Take down what a block is given; `moved` has the tensors, each once, and what is kept of them."""
        given = self.blocks.given((args, kwargs))
        if not number:
            batch.given = given.cpu()

        def kept(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return _fresh(value)
            if id(value) not in moved:
                if number and value.is_floating_point() and value.isnan().any():
                    raise CalibrationError(
                        f"a block that is run by itself must be given, beside what the one before it gives, nothing that depends on it; "
                        f"{self.blocks.path_of(number)!r} is. {WAYS_OUT}."
                    )
                moved[id(value)] = value, value.cpu()  # an id is one tensor's only as long as it lives
            return moved[id(value)][1]

        batch.beside.append(pytree.tree_map(kept, self.blocks.with_given((args, kwargs), None)))
        if number == self.blocks.count - 1:
            raise _ReachedError
        return self._like_a_block(torch.full_like(given, torch.nan))

    def _like_a_block(self, given: Tensor) -> Any:
        """What a block gives; the rest of it, if it is a tuple, is not a number."""
        length = self.blocks.length
        return given if length is None else (given, *[given.new_full((), torch.nan) for _ in range(length - 1)])

    def part(self, number: int) -> Part:
        """One block with its numbers; calling it with a batch says what the batch `gives`."""
        path = self.blocks.path_of(number)
        block = self._weights.filled(self.model.get_submodule(path)).eval()
        return Part(path, number, block, self._run)

    def another(self, part: Part) -> Part:
        """A copy of a `part`, to be changed."""
        return Part(part.path, part.number, copy.deepcopy(part.block), self._run)

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What batches give meanwhile is forgotten."""
        kept = [batch.gives for batch in self._batches]
        try:
            yield
        finally:
            for batch, gives in zip(self._batches, kept, strict=True):
                batch.gives = gives

    def _run(self, block: nn.Module, number: int, batch: Batch) -> Tensor:
        device = self._weights.device
        assert batch.given is not None
        # A copy, as it is needed once more where moments are taken in several rounds, and blocks may add to it in place.
        args, kwargs = self.blocks.with_given(batch.beside[number], batch.given.clone())
        args, kwargs = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else _fresh(v), (args, kwargs))
        found = _first(block(*args, **kwargs))
        assert isinstance(found, Tensor)
        return found.cpu()

    def of_part(self) -> Generator[Call]:
        """The calls of a `part`."""
        for batch in self._batches:
            yield (batch,), dict(batch.masks)

    def advance(self) -> None:
        """Give the next block what the last one gave."""
        for batch in self._batches:
            batch.given, batch.gives = batch.gives, None

    def outside(self, layers: Iterable[str]) -> nn.Module:
        """The model with the weights of these layers."""
        found = [weight_of(dense_at(self.model, name)) for name in layers]
        return self._weights.filled(self.model, {id(weight) for weight in found}).eval()

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[Callable[[], Iterator[Call]]]:
        """The calls of the model `outside` of its blocks, while the last of them gives what it gave before. Weights that it has not are read when
        they are used.
        """
        batches = iter(self._batches)

        def calls() -> Iterator[Call]:
            nonlocal batches
            batches = iter(self._batches)
            for batch in self._batches:
                yield batch.call

        def answer(number: int, *args: Any, **kwargs: Any) -> Any:
            given = self.blocks.given((args, kwargs))
            if number < self.blocks.count - 1:
                return self._like_a_block(given)
            last = next(batches).given
            assert last is not None
            return self._like_a_block(last.to(self._weights.device))

        with self._instead(model, answer):
            yield calls

    @contextmanager
    def _instead(self, model: nn.Module, act: Callable[..., Any]) -> Iterator[None]:
        """With `act(number, …)` in the place of each block's forward, and numbers for all else."""
        blocks = [model.get_submodule(self.blocks.path_of(number)) for number in range(self.blocks.count)]
        forward = model.forward

        @wraps(forward)
        def with_numbers(*args: Any, **kwargs: Any) -> Any:
            with ReadWhenUsed(self._weights):
                return forward(*args, **kwargs)

        try:
            for number, block in enumerate(blocks):
                vars(block)["forward"] = partial(act, number)
            vars(model)["forward"] = with_numbers
            yield
        finally:
            for module in (*blocks, model):
                vars(module).pop("forward", None)

    def _log(self) -> None:
        held = {key: t for batch in self._batches for key, t in batch.tensors.items()}
        size = sum(t.numel() * t.element_size() for t in held.values())
        log.info("what the blocks are given in %d batches takes %.1f MiB", len(self._batches), size / 2**20)


def _fresh(value: Any) -> Any:
    """A copy of what a block may fill, a cache say; modules, functions and plain values as they are."""
    return value if isinstance(value, nn.Module) or callable(value) else copy.deepcopy(value)
