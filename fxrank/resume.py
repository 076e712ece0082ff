"""A run of `auto_lowrank` that may be killed at any moment and goes on as if it had not been.

A checkpoint holds everything that the rest of the run depends on: the states of model, optimizer, scheduler, loss
scaler and session, the sums of the epoch, the history, and all random numbers: as they are, and as they were when the
epoch began. From those the loader deals the epoch's batches again; the ones already taken are passed over, and the
numbers as they are put back. Batches are dealt alike if they come from random numbers known here: torch's, numpy's,
Python's, and generators that the loader, its samplers or its data set hold.
"""

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxrank.checkpoint import check_names
from fxrank.passes.compiled import uncompiled
from fxrank.passes.errors import CheckpointError
from fxrank.plainfile import read_plain, write_plain
from fxrank.plan import Plan
from fxrank.policy import Clock
from fxrank.session import LowRankSession
from fxrank.state import check_state, described

CHECKPOINT = "checkpoint.safetensors"
_PARTS: dict[str, type | tuple[type, ...]] = {
    "run": dict,
    "epoch": int,
    "taken": int,
    "first_random": dict,
    "random": dict,
    "epoch_random": dict,
    "session": dict,
    "model": dict,
    "optimizer": dict,
    "scheduler": (dict, type(None)),
    "scaler": dict,
    "totals": dict,
    "history": list,
    "memory": dict,
    "at_switch": dict,
    "seconds": list,
}


class Keeper:
    """Writes the checkpoint of one run, `folder/checkpoint.safetensors`, and goes on from it."""

    def __init__(self, folder: str | os.PathLike[str], every: int | None) -> None:
        """One is written at the start, at the end of each epoch, right after the switch, and after every `every` steps."""
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(
                f"checkpoint_every counts optimizer steps, at least 1; got {every!r}. None leaves it at every epoch."
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"resume=True keeps one process's random numbers; this run has {dist.get_world_size()} processes. "
                "Save LowRankSession.state_dict() with the model's and the optimizer's states in a loop of your own."
            )
        self.path = Path(folder) / CHECKPOINT
        self._every = every
        self._run: dict[str, Any] = {}
        self._first_random: dict[str, Any] = {}
        self._epoch_random: dict[str, Any] = {}
        self._now: dict[str, Any] | None = None

    def before_first(self, loaders: Iterable[Any]) -> None:
        """Note the random numbers from which the example batch is dealt."""
        self._first_random = random_state(loaders)

    def read(self, trainer: Any) -> dict[str, Any] | None:
        """The checkpoint, checked against the run that is to go on from it; None if there is none yet.

        Changes nothing. Raises `CheckpointError` for a damaged file or one of another run, `PlanMismatchError` for a
        plan that does not fit the model.
        """
        self._run = _run_of(trainer)
        if not self.path.exists():
            return None
        saved: dict[str, Any] = read_plain(self.path)
        fix = "Pass the same, or start afresh: with another output_dir, or without this file"
        for name, kind in _PARTS.items():
            if not isinstance(saved, dict) or name not in saved or not isinstance(saved[name], kind):
                raise CheckpointError(f"a checkpoint must hold the whole run; {self.path} has no good {name!r}. {fix}.")
        for name, value in self._run.items():
            if saved["run"].get(name) != value:
                before, value = _difference(saved["run"].get(name), value)
                raise CheckpointError(
                    f"a run goes on as it was started; in {self.path} its {name} was {before:.300}, now it is {value:.300}. {fix}."
                )
        clock = Clock(0, trainer.total_steps, trainer.steps_per_epoch)
        model = uncompiled(trainer.model)
        plan, _ = check_state(saved["session"], trainer.policy, clock, None, model)
        stored: dict[Any, tuple[str, tuple[int, ...]]] = {}
        for name, value in saved["model"].items():
            if isinstance(value, Tensor):
                stored.setdefault(value.data_ptr() if value.numel() else name, (name, tuple(value.shape)))
        check_names(model, plan or Plan("", ()), dict(stored.values()))
        self._first_random = saved["first_random"]
        return saved

    def deal_again(self, trainer: Any, deal: Callable[[Iterable[Any]], Any]) -> Any:
        """The example batch that the run was started with."""
        restore_random(self._first_random, _loaders(trainer))
        return deal(trainer.loader)

    def start(self, trainer: Any, session: LowRankSession, saved: dict[str, Any] | None) -> None:
        """Bring run, model, optimizer and all random numbers to the saved point; without one, write the first."""
        if saved is None:
            self.write(trainer, session)
            return
        assert trainer.optimizer is not None
        uncompiled(trainer.model).load_state_dict(saved["model"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        if trainer.scheduler is not None:
            trainer.scheduler.load_state_dict(saved["scheduler"])
        trainer.scaler.load_state_dict(saved["scaler"])
        trainer.totals.load_state_dict(saved["totals"])
        trainer.epoch, trainer.taken = saved["epoch"], saved["taken"]
        trainer.history[:] = saved["history"]
        trainer.memory.update(saved["memory"])
        trainer.at_switch.update(saved["at_switch"])
        trainer.seconds_before, trainer.evaluation_seconds = saved["seconds"]
        self._epoch_random, self._now = saved["epoch_random"], saved["random"]
        restore_random(self._now, _loaders(trainer))

    def batches(self, trainer: Any) -> Iterator[Any]:
        """The batches of the epoch, from the first that was not taken yet."""
        skipped = trainer.taken
        if skipped:
            restore_random(self._epoch_random, _loaders(trainer))
        else:
            self._epoch_random = random_state(_loaders(trainer))
        number = 0
        for number, batch in enumerate(trainer.loader, 1):
            if number > skipped:
                yield batch
            elif number == skipped:
                assert self._now is not None
                restore_random(self._now, _loaders(trainer))
                self._now = None
        if number < skipped:
            raise CheckpointError(
                f"the loader must deal the batches it dealt before; epoch {trainer.epoch} has ended after {number}, {skipped} were taken. Pass the same loader."
            )

    def due(self, step: int, *, switched: bool) -> bool:
        """Whether a checkpoint belongs after this step."""
        return switched or (self._every is not None and step % self._every == 0)

    def write(self, trainer: Any, session: LowRankSession) -> None:
        """Write the checkpoint; the last one stays until the new one is whole. Raises `TypeError` for a state that is
        not plain data, `OSError`.
        """
        assert trainer.optimizer is not None
        elapsed = trainer.seconds_before + time.perf_counter() - trainer.started
        now = random_state(_loaders(trainer))
        tree = {
            "run": self._run,
            "epoch": trainer.epoch,
            "taken": trainer.taken,
            "first_random": self._first_random,
            "random": now,
            "epoch_random": self._epoch_random if trainer.taken else now,
            "session": session.state_dict(),
            "model": uncompiled(trainer.model).state_dict(keep_vars=True),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "totals": trainer.totals.state_dict(),
            "history": trainer.history,
            "memory": trainer.memory,
            "at_switch": trainer.at_switch,
            "seconds": [elapsed, trainer.evaluation_seconds],
        }
        write_plain(self.path, tree)
        session.pause()


def random_state(loaders: Iterable[Any] = ()) -> dict[str, Any]:
    """The states of all random numbers: torch's on the CPU and the GPUs, numpy's, Python's, and those of the generators
    that these loaders hold.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
        "generators": [_state_of(generator) for generator in generators_of(loaders)],
    }


def restore_random(state: dict[str, Any], loaders: Iterable[Any] = ()) -> None:
    """Inverse of `random_state`, with loaders that hold as many generators."""
    torch.set_rng_state(state["torch"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    for generator, saved in zip(generators_of(loaders), state["generators"], strict=True):
        if isinstance(generator, torch.Generator):
            generator.set_state(saved)
        elif isinstance(generator, random.Random):
            generator.setstate(saved)
        else:
            generator.bit_generator.state = saved


def generators_of(loaders: Iterable[Any]) -> list[torch.Generator | np.random.Generator | random.Random]:
    """The random generators that loaders, their samplers and their data sets hold, each once."""
    found: dict[int, Any] = {}
    for loader in loaders:
        batch_sampler = getattr(loader, "batch_sampler", None)
        samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
        for holder in (loader, *samplers, getattr(loader, "dataset", None)):
            for value in getattr(holder, "__dict__", {}).values():
                if isinstance(value, (torch.Generator, np.random.Generator, random.Random)):
                    found[id(value)] = value
    return list(found.values())


def _state_of(generator: torch.Generator | np.random.Generator | random.Random) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else dict(generator.bit_generator.state)


def _loaders(trainer: Any) -> list[Any]:
    return [trainer.loader, trainer.val_loader]


def _run_of(trainer: Any) -> dict[str, Any]:
    """What must be the same when the run goes on, of a model before the switch."""
    optimizer, scheduler = trainer.optimizer, trainer.scheduler
    sizes = [] if optimizer is None else [len(group["params"]) for group in optimizer.param_groups]
    return {
        "model": _tensors_of(uncompiled(trainer.model)),
        "optimizer": "the default" if optimizer is None else f"{type(optimizer).__name__} of {sizes} parameters",
        "scheduler": f"{type(scheduler).__name__}, stepped by {trainer.scheduler_per}",
        "number of epochs": str(trainer.epochs),
        "number of steps an epoch": str(trainer.steps_per_epoch),
        "policy": described(trainer.policy),
        "amp": str(trainer.amp),
        "generators of the loaders": ", ".join(type(g).__name__ for g in generators_of(_loaders(trainer))),
    }


def _tensors_of(model: nn.Module) -> dict[str, str]:
    """Shape and dtype of each entry of the state dict, and the name under which a shared one came first."""
    first: dict[int, str] = {}
    tensors = {}
    for name, value in model.state_dict(keep_vars=True).items():
        what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        shared = first.setdefault(id(value), name)
        tensors[name] = what if shared == name else f"{what}, shared with {shared}"
    return tensors


def _difference(before: Any, now: Any) -> tuple[str, str]:
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(n for n in [*now, *before] if before.get(n) != now.get(n))
        return f"{name!r} {before.get(name, 'missing')}", f"{now.get(name, 'missing')}"
    return str(before), str(now)
