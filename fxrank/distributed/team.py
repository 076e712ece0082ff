"""Several processes that train one model, on torch's own engines: `DistributedDataParallel`, and `fully_shard` (`fsdp2`).

What depends on a clock or on one process's rounding is decided once, by the first process, and sent to the others:
the timings, the rank samples, the plan, the factors.
"""

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from fxrank.distributed.ddp import check_not_joined, check_wrapper, ignored_paths, rewrap_all, wrapper_around
from fxrank.distributed.fsdp2 import Shards
from fxrank.loggers import Logger, check_logger
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.model.calls import Example
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.tracing.trace import TracedModule
from fxrank.plan import Plan
from fxrank.switch.apply_plan import Factors, Replacement, apply_plan
from fxrank.switch.sites import sites
from fxrank.torch_private.dtensor import is_sharded
from fxrank.torch_private.modules import COMPILED, own_children

T = TypeVar("T")


class Team:
    """The processes that train one `model`: one alone, or those of its `wrapper`'s group."""

    def __init__(
        self, model: nn.Module, wrapper: DistributedDataParallel | None = None, keep_comm_hooks: bool = True
    ) -> None:
        """`model` is the one inside the wrapper. Without `keep_comm_hooks`, gradients are averaged as they are after
        the switch.
        """
        self._model, self._wrapper, self._keep = model, wrapper, keep_comm_hooks
        self._shards = Shards(model) if is_sharded(model) else None
        together = dist.is_available() and dist.is_initialized()
        self._group = wrapper.process_group if wrapper is not None else dist.group.WORLD if together else None
        self.size = dist.get_world_size(self._group) if together else 1
        self.rank = dist.get_rank(self._group) if together else 0
        self._grouped, self._looked = together, wrapper is not None
        if wrapper is None and self._shards is None and self.size > 1 and not self._has_one_model():
            warnings.warn(
                f"processes that train one model must start with the same parameters; those of these {self.size} differ, so each is taken to train "
                "a model of its own. If it is one model, wrap it in DistributedDataParallel, or broadcast it, before attaching.",
                stacklevel=4,
            )
            self._group, self.size, self.rank = None, 1, 0
        self.is_first = self.rank == 0

    @classmethod
    def of(cls, model: nn.Module, keep_comm_hooks: bool = True) -> "Team":
        """The team of a model that is given with or without its wrapper.

        Raises `TypeError`, which names the way out, for engines that hold the parameters in pieces of their own (DeepSpeed,
        FSDP1), for shards that cannot be replaced, and for a wrapper with options that outlive its parameters.
        """
        if type(model).__name__ == "DeepSpeedEngine":
            raise TypeError(
                "DeepSpeed keeps flat copies of the parameters that it was started with, so they cannot be replaced under it; got a "
                "DeepSpeedEngine. Train the full-rank phase with DistributedDataParallel, or start DeepSpeed on a model from fxrank.factorize."
            )
        inner = uncompiled(model)
        wrapper = next((m for m in _layers_of_wrapping(model) if isinstance(m, DistributedDataParallel)), None)
        for name, module in inner.named_modules():
            if type(module).__name__ == "FullyShardedDataParallel":
                raise TypeError(
                    f"a weight must be a parameter of its own to be factorized; {name or 'the model'!r} is FSDP1, which flattens them. Shard with "
                    "fully_shard (FSDP2), or factorize first (fxrank.factorize, or a plan) and wrap the result."
                )
        if wrapper is None and dist.is_available() and dist.is_initialized():
            wrapper = wrapper_around(inner)
        if wrapper is not None:
            check_wrapper(wrapper)
        return cls(inner, wrapper, keep_comm_hooks)

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def structure(self) -> nn.Module:
        """What to trace and to decide on: the model, or its skeleton if it lies in shards."""
        return self._model if self._shards is None else self._shards.skeleton

    def look_again(self) -> None:
        """Take up a model that was moved, run or put in another mode since the team was made; in all processes."""
        if self._shards is not None:
            self._shards = Shards(self._model)

    def example(self, given: Example) -> Example:
        """A batch as `structure` takes it."""
        return given if self._shards is None else self._shards.example(given)

    def refused(self, layers: list[Layer]) -> list[Layer]:
        """The layers, with a reason for those that this engine does not let go."""
        refusal = self._refusal()
        return [x if x.reason is not None else replace(x, reason=refusal(x.name)) for x in layers]

    def check_plan(self, plan: Plan) -> None:
        """Raise as `sites` does for a plan that does not fit; and raise `TypeError` for a layer that this engine does not let go."""
        sites(self.structure, plan)
        refusal = self._refusal()
        for decision in plan.layers:
            if decision.factorized and (reason := refusal(decision.name)) is not None:
                raise TypeError(
                    f"the layers of a plan must be ones that this engine lets go; of {decision.name!r}, {reason}. "
                    "Change that, or leave it dense in the plan."
                )

    def _refusal(self) -> Callable[[str], str | None]:
        """Says why a layer, by name, must stay; None if it need not."""
        if self._shards is not None:
            return self._shards.refusal
        ignored = ignored_paths(self._wrapper, self._model) if self._wrapper is not None else frozenset()
        reason = "DistributedDataParallel was told to ignore its parameters, and would average those of a pair"
        return lambda name: reason if name in ignored else None

    def check(self) -> None:
        """Raise `RuntimeError` if the processes cannot make a switch together; before each step until it is made."""
        now = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if now > 1 and not self._grouped:
            raise RuntimeError(
                f"a switch must be the same in all processes, which the session learns when it is attached; there was no process group then, and "
                f"there is one of {now} now. Attach after init_process_group()."
            )
        if dist.is_available() and dist.is_initialized() and not self._looked:  # a look at every object there is: once
            if self._shards is None and is_sharded(self._model):
                raise RuntimeError(
                    "shards must be there when a session is attached, which then decides without the whole model; these were made later. "
                    "Attach after fully_shard."
                )
            if (late := wrapper_around(self._model)) is not None:
                self._take_late(late)
            self._looked = True
        if self.size > 1 and self._wrapper is not None:
            check_not_joined(self._wrapper)

    def _take_late(self, wrapper: DistributedDataParallel) -> None:
        check_wrapper(wrapper)
        size, ignored = dist.get_world_size(wrapper.process_group), ignored_paths(wrapper, self._model)
        if self.size != size or ignored:
            what = (
                f"it ignores {min(ignored)!r}"
                if ignored
                else f"it is for {size} processes, the session for {self.size}"
            )
            raise RuntimeError(
                f"a DistributedDataParallel made after the session was attached must suit it; {what}. Attach after wrapping the model."
            )
        self._wrapper = wrapper

    def check_alike(self, **options: Any) -> None:
        """Raise `ValueError`, in all processes, unless they were given the same: they would part at a sample or the switch."""
        for rank, theirs in enumerate(all_of_them := self.of_all(options)):
            for name, value in all_of_them[0].items():
                if theirs[name] != value:
                    raise ValueError(
                        f"all processes must attach with the same {name}, so that they decide in the same step; got {value} in the first and "
                        f"{theirs[name]} in process {rank}. Count the batches that each of them gets, and load a state in all."
                    )

    def _has_one_model(self) -> bool:
        """Whether all processes have the same parameters, to the last bit."""
        mine = [(n, tuple(p.shape), _checksum(p)) for n, p in self._model.named_parameters() if not is_lazy(p)]
        try:
            return all(theirs == mine for theirs in self.of_all(mine))
        except RuntimeError as error:  # after the group's timeout, or at once where one has ended
            raise RuntimeError(
                f"where torch.distributed is initialized every process of the group makes this call; not all {self.size} did. Make it in all of "
                "them, or before init_process_group(), or after destroy_process_group()."
            ) from error

    def of_all(self, value: T) -> list[T]:
        """The values of all processes, in each."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._group)
        return values

    def apply(
        self, plan: Plan, gm: TracedModule, example: Example, factors: Factors, *, split: bool
    ) -> list[Replacement]:
        """`apply_plan` on the model, with the first process's factors in all of them. `split=False` leaves them
        unfilled.
        """
        self.check_plan(plan)
        share = self.share if split else None
        if self._shards is not None:
            return self._shards.apply(plan, gm, example, split=split and self.is_first, factors=factors, share=share)
        return apply_plan(
            self._model, plan, gm=gm, example=example, split=split and self.is_first, factors=factors, share=share
        )

    def agree(self, decide: Callable[[], T]) -> T:
        """What `decide` returns in the first process, in every process. If it raises there, all raise."""
        if self.size == 1:
            return decide()
        if self._wrapper is not None:
            check_not_joined(self._wrapper)
        own: Exception | None = None
        outcome: tuple[Any, Exception | None] = None, None
        if self.is_first:
            try:
                with self._asking():
                    outcome = decide(), None
            except Exception as error:  # the others wait for an answer
                own, outcome = error, (None, _sendable(error))
            self._tell((None, outcome))
        else:
            wanted: str | None = ""
            while wanted is not None:
                wanted, outcome = self._tell()
                if wanted is not None and self._shards is not None:
                    self._shards.gather(wanted)
        value, failure = outcome
        if failure is not None:
            raise own or failure
        return value  # type: ignore[no-any-return]

    def _asking(self) -> AbstractContextManager[None]:
        if self._shards is None:
            return nullcontext()
        return self._shards.announcing(lambda name: self._tell((name, (None, None))))

    def _tell(self, message: Any = None) -> Any:
        box = [message]
        dist.broadcast_object_list(box, src=self._first, group=self._group)
        return box[0]

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's numbers."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, src=self._first, group=self._group)
                tensor.copy_(whole)

    def gather(self, value: T) -> list[T]:
        """The values of all processes in the first one, in order of their ranks; nothing in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values, dst=self._first, group=self._group)
        return values or []

    def together(self, act: Callable[[], T]) -> T:
        """What `act` returns in this process. If it raises in any process, all raise, so that none waits for another."""
        if self.size == 1:
            return act()
        failure: Exception | None = None
        try:
            value = act()
        except Exception as error:
            failure = error
        failures = [error for error in self.gather(failure and _sendable(failure)) if error is not None]
        theirs = self.agree(lambda: failures[0] if failures else None)
        if theirs is not None:
            raise failure or theirs
        return value

    def logger(self, given: Logger | None) -> Logger | None:
        """What all processes call: the first one's logger. If it raises, all raise; `TypeError` for what is none."""
        self.together(lambda: check_logger(given))
        return given if self.size == 1 else _FirstLogger(self, given)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(numbers, group=self._group)
        return numbers

    def rewrap(self, gone: Iterable[nn.Parameter]) -> str | None:
        """Let the gradients of what came for the parameters that are gone be averaged. Returns what the user must do where
        there is no wrapper to tell.
        """
        if self._shards is not None or rewrap_all(gone, self._keep) or self.size == 1:
            return None
        missing = "no DistributedDataParallel holds the model: average the gradients of its factors yourself"
        warnings.warn(missing, stacklevel=2)
        return missing

    @property
    def wrapper(self) -> DistributedDataParallel | None:
        return self._wrapper or (None if self.size == 1 else wrapper_around(self._model))

    @property
    def _first(self) -> int:
        return 0 if self._group is None else dist.get_global_rank(self._group, 0)


class _FirstLogger:
    """The first process's logger, called in all."""

    def __init__(self, team: Team, logger: Logger | None) -> None:
        self._team = team
        self._logger = logger

    def log(self, step: int, values: dict[str, float]) -> None:
        self._team.agree(lambda: None if self._logger is None else self._logger.log(step, values))

    def event(self, step: int, text: str) -> None:
        self._team.agree(lambda: None if self._logger is None else self._logger.event(step, text))


def _checksum(tensor: Tensor) -> int:
    """The sum of its bytes: exact, whatever the order of summation."""
    return int(tensor.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64))


def _sendable(error: Exception) -> Exception:
    """The error as another process can read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class of its own making may raise anything here
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _layers_of_wrapping(model: nn.Module) -> Iterator[nn.Module]:
    """The model as given, and each module down to the user's own."""
    inner = uncompiled(model)
    while model is not inner:
        yield model
        outer = own_children(model)
        model = outer.get(COMPILED) or outer["module"]  # type: ignore[assignment]


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of one set of gradients: what a step sends to be averaged, before compression."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
