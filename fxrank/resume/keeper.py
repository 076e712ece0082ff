"""A run of `auto_lowrank` that may be killed at any moment and goes on as if it had not been.

A checkpoint holds everything that the rest of the run depends on: the states of model, loss module, optimizer, scheduler,
loss scaler and session, the sums of the epoch, the history, and all random numbers: as they are, and as they were when the
epoch began. From those the loader deals the epoch's batches again; the ones already taken are passed over, and the
numbers as they are put back. Batches are dealt alike if they come from random numbers known here: torch's, numpy's,
Python's, and generators that the loader, its samplers, its data set or the parts of these hold (see `randoms`). What else
a sampler or a data set remembers from epoch to epoch is not known, nor are random numbers in workers that persist.

A team of processes has one checkpoint; see `shares`. As many processes as before go on to the last bit. Another number
goes on with the same model, optimizer, schedule and session, and a note, as the batches are divided in another way.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.names import load_own_state, own_state
from fxrank.plan import Plan
from fxrank.policies.scene import Clock
from fxrank.resume.team_shares import (
    OWN,
    buckets_of,
    check_others,
    differing,
    hooks_with_memory,
    lay_buckets,
    on_cpu,
    sent,
    share_of,
)
from fxrank.saving.model_files import check_names
from fxrank.saving.plainfile import read_plain, write_plain
from fxrank.saving.random_state import begun_from, generators_of, random_state, restore_random
from fxrank.session.session import LowRankSession
from fxrank.session.state import check_state, described
from fxrank.switch.plan_of import has_plan

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
    "loss": dict,
    "totals": dict,
    "history": list,
    "memory": dict,
    "at_switch": dict,
    "seconds": list,
    "others": list,
    "buckets": (list, type(None)),
}
_DEALT, _STEPS = "generators of the loaders", "number of steps an epoch"


class Keeper:
    """Writes the checkpoint of one run, `folder/checkpoint.safetensors`, and goes on from it."""

    def __init__(self, folder: str | os.PathLike[str], every: int | None) -> None:
        """One is written at the start, at the end of each epoch, right after the switch, and after every `every` steps."""
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(
                f"checkpoint_every counts optimizer steps, at least 1; got {every!r}. None leaves it at every epoch."
            )
        self.path = Path(folder) / CHECKPOINT
        self._every = every
        self._run: dict[str, Any] = {}
        self._first_random: dict[str, Any] = {}
        self._epoch_random: dict[str, Any] = {}
        self._now: dict[str, Any] | None = None
        self._as_before = True
        """Whether as many processes go on as there were."""

    def before_first(self, trainer: Any) -> None:
        """Note the random numbers from which the example batch is dealt."""
        self._first_random = random_state(_holders(trainer))

    def read(self, trainer: Any) -> dict[str, Any] | None:
        """This process's share of the checkpoint, checked against the run that is to go on from it; None if there is
        none yet.

        Changes nothing. Raises `CheckpointError` for a damaged file or one of another run, `PlanMismatchError` for a
        plan that does not fit the model, `TypeError` for a sharded model; in all processes if in one.
        """
        self._run = trainer.team.together(lambda: _run_of(trainer))
        saved = sent(trainer.team, trainer.device, lambda: read_plain(self.path) if self.path.exists() else None)
        if saved is None:
            return None
        trainer.team.together(lambda: self._check(trainer, saved))
        self._as_before = trainer.team.size == 1 + len(saved["others"])
        share = share_of(saved, trainer.team)
        if self._as_before:
            self._first_random = share["first_random"]
        return share

    def _check(self, trainer: Any, saved: Any) -> None:
        fix = "Pass the same, or start afresh: with another output_dir, or without this file"
        for name, kind in _PARTS.items():
            if not isinstance(saved, dict) or name not in saved or not isinstance(saved[name], kind):
                raise CheckpointError(f"a checkpoint must hold the whole run; {self.path} has no good {name!r}. {fix}.")
        check_others(saved)
        before, now = 1 + len(saved["others"]), trainer.team.size
        for name, value in self._run.items():
            if saved["run"].get(name) == value or (name == _DEALT and before != now):
                continue  # loaders that divide the data have samplers of another kind
            if name == _STEPS and before != now:
                fix = f"{before} processes became {now}: pass batches of {before}/{now} the size, so that all together take the same, or steps_per_epoch={saved['run'].get(name)}"
            if name == "model" and has_plan(trainer.model):
                fix = "This one has been made low-rank already, by the run that was broken off maybe: build it anew, and its optimizer and scheduler"
            old, new = _difference(saved["run"].get(name), value)
            raise CheckpointError(
                f"a run goes on as it was started; in {self.path} its {name} was {old:.300}, now it is {new:.300}. {fix}."
            )
        clock = Clock(0, trainer.total_steps, trainer.steps_per_epoch)
        model = uncompiled(trainer.model)
        plan, _ = check_state(saved["session"], trainer.policy, clock, None, model)
        tensors = {name: value for name, value in saved["model"].items() if isinstance(value, Tensor)}
        shapes = dict.fromkeys(saved["model"]) | {name: tuple(value.shape) for name, value in tensors.items()}
        memory = {name: value.data_ptr() for name, value in tensors.items() if value.numel()}
        check_names(model, plan or Plan("", ()), shapes, memory)

    def deal_again(self, trainer: Any, deal: Callable[[Iterable[Any]], Any]) -> Any:
        """The example batch that the run was started with; the one at hand if the batches are divided anew."""
        if not self._as_before:
            return trainer.first
        restore_random(self._first_random, _holders(trainer))
        return deal(trainer.loader)

    def start(self, trainer: Any, session: LowRankSession, saved: dict[str, Any] | None) -> None:
        """Bring run, model, optimizer and all random numbers to the saved point; without one, write the first."""
        if saved is None:
            self.write(trainer, session)
            return
        assert trainer.optimizer is not None
        load_own_state(uncompiled(trainer.model), saved["model"])
        load_own_state(_loss_of(trainer), saved["loss"])
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
        if self._as_before:
            lay_buckets(trainer.team, saved["buckets"])
        else:
            self._divide_anew(trainer, session, saved)
        for hook in hooks_with_memory(trainer.team):
            session.notes.append(
                f"at step {session.clock.step} the communication hook {hook} began anew: a checkpoint does not hold its memory, so losses and weights are not "
                "those of an uninterrupted run"
            )
        if trainer.epoch < trainer.epochs and getattr(trainer.loader, "persistent_workers", False):
            session.notes.append(
                f"at step {session.clock.step} the loader's persistent workers began anew: random numbers drawn in them, for augmentation say, are others than "
                "in an uninterrupted run; with persistent_workers=False they are the same"
            )
        restore_random(self._now, _holders(trainer))

    def _divide_anew(self, trainer: Any, session: LowRankSession, saved: dict[str, Any]) -> None:
        """Fit the random numbers of one team to another, and say what that means."""
        before, now = 1 + len(saved["others"]), trainer.team.size
        if saved["run"][_DEALT] != self._run[_DEALT]:
            own = random_state(_holders(trainer))["generators"]
            self._epoch_random = self._epoch_random | {"generators": own}
            self._now = saved["random"] | {"generators": own}
        if trainer.team.rank >= before:
            assert self._now is not None
            self._now = begun_from(self._now, trainer.team.rank, _holders(trainer))
        session.notes.append(
            f"at step {session.clock.step} {now} process{'es' * (now > 1)} went on from a checkpoint of {before}: batches and random numbers are divided in "
            "another way since, so losses and weights are not those of an uninterrupted run; where processes had buffers of their own, the first one's are kept"
        )

    def batches(self, trainer: Any) -> Iterator[Any]:
        """The batches of the epoch, from the first that was not taken yet."""
        skipped = trainer.taken
        if skipped:
            restore_random(self._epoch_random, _holders(trainer))
        else:
            self._epoch_random = random_state(_holders(trainer))
        number = 0
        for number, batch in enumerate(trainer.loader, 1):
            if number > skipped:
                yield batch
            elif number == skipped:
                assert self._now is not None
                restore_random(self._now, _holders(trainer))
                self._now = None
        if number < skipped and self._as_before:
            raise CheckpointError(
                f"the loader must deal the batches it dealt before; epoch {trainer.epoch} has ended after {number}, {skipped} were taken. Pass the same loader."
            )

    def due(self, step: int, *, switched: bool) -> bool:
        """Whether a checkpoint belongs after this step."""
        return switched or (self._every is not None and step % self._every == 0)

    def write(self, trainer: Any, session: LowRankSession) -> None:
        """Write the checkpoint; the last one stays until the new one is whole. Raises `TypeError` for a state that is
        not plain data, `OSError`; in all processes if in the first, which writes.
        """
        assert trainer.optimizer is not None
        team = trainer.team
        elapsed = trainer.seconds_before + time.perf_counter() - trainer.started
        now = random_state(_holders(trainer))
        model, optimizer = own_state(uncompiled(trainer.model)), trainer.optimizer.state_dict()
        own = {
            "first_random": self._first_random,
            "random": now,
            "epoch_random": self._epoch_random if trainer.taken else now,
            "loss": {name: on_cpu(value) for name, value in own_state(_loss_of(trainer)).items()},
            "totals": {name: on_cpu(value) for name, value in trainer.totals.state_dict().items()},
            "memory": trainer.memory,
            "seconds": [elapsed, trainer.evaluation_seconds],
        }
        assert own.keys() == OWN.keys()
        others = team.gather(own | differing(team, model, optimizer))
        tree = own | {
            "run": self._run,
            "epoch": trainer.epoch,
            "taken": trainer.taken,
            "session": session.state_dict(),
            "model": model,
            "optimizer": optimizer,
            "scheduler": None if trainer.scheduler is None else trainer.scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "history": trainer.history,
            "at_switch": trainer.at_switch,
            "others": others[1:],
            "buckets": buckets_of(team),
        }
        team.agree(lambda: write_plain(self.path, tree))
        session.pause()


def _loaders(trainer: Any) -> list[Any]:
    return [trainer.loader, trainer.val_loader]


def _holders(trainer: Any) -> list[Any]:
    """Where the user's generators may be."""
    return [*_loaders(trainer), uncompiled(trainer.model), trainer.loss_fn]


def _loss_of(trainer: Any) -> nn.Module:
    """The loss, if it is a module, which may learn or remember; else one without a state."""
    return trainer.loss_fn if isinstance(trainer.loss_fn, nn.Module) else nn.Module()


def _run_of(trainer: Any) -> dict[str, Any]:
    """What must be the same when the run goes on, of a model before the switch."""
    check_whole(trainer.model)
    check_held(trainer.optimizer, trainer.model, _loss_of(trainer))
    optimizer, scheduler = trainer.optimizer, trainer.scheduler
    sizes = [] if optimizer is None else [len(group["params"]) for group in optimizer.param_groups]
    return {
        "model": _tensors_of(uncompiled(trainer.model)),
        "loss_fn": _tensors_of(_loss_of(trainer)),
        "optimizer": "the default" if optimizer is None else f"{type(optimizer).__name__} of {sizes} parameters",
        "optimizer's option": {
            name: described(value)
            for name, value in getattr(optimizer, "defaults", {}).items()
            if not isinstance(value, Tensor)  # a learning rate that schedulers write into
        },
        "scheduler": f"{type(scheduler).__name__}, stepped by {trainer.scheduler_per}",
        "number of epochs": str(trainer.epochs),
        _STEPS: str(trainer.steps_per_epoch),
        "policy": described(trainer.policy),
        "include": ", ".join(map(described, trainer.include)) or "()",
        "exclude": ", ".join(map(described, trainer.exclude)) or "()",
        "seed": str(trainer.seed),
        "amp": str(trainer.amp),
        _DEALT: ", ".join(type(g).__name__ for g in generators_of(_loaders(trainer)).values()),
    }


def check_whole(model: nn.Module) -> None:
    """Raise `TypeError` for a model that processes hold in pieces."""
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise TypeError(
                f"a checkpoint of resume=True holds whole tensors; {name!r} is sharded. Save LowRankSession.state_dict() beside torch.distributed.checkpoint in a loop of your own."
            )


def check_held(optimizer: Optimizer | None, model: nn.Module, loss: nn.Module) -> None:
    """Raise `TypeError` for an optimizer with parameters that are in no checkpoint."""
    groups = [] if optimizer is None else optimizer.param_groups
    stepped = {id(p): p for group in groups for p in group["params"]}
    others = stepped.keys() - {id(p) for module in (model, loss) for p in module.parameters()}
    if others and len(others) < len(stepped):  # one of another model is refused later
        raise TypeError(
            f"a checkpoint of resume=True holds the parameters of the model, and of loss_fn if it is a module; the optimizer steps {len(others)} other, of shape "
            f"{tuple(stepped[min(others)].shape)} for one. Register it in either, or train without resume=True."
        )


def _tensors_of(model: nn.Module) -> dict[str, str]:
    """Shape and dtype of each entry of the state dict, and the name under which a shared one came first."""
    first: dict[int, str] = {}
    tensors = {}
    for name, value in own_state(model).items():
        what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        shared = first.setdefault(id(value), name)
        tensors[name] = what if shared == name else f"{what}, shared with {shared}"
    return tensors


def _difference(before: Any, now: Any) -> tuple[str, str]:
    if isinstance(before, dict) and isinstance(now, dict):
        name = next(n for n in [*now, *before] if before.get(n) != now.get(n))
        return f"{name!r} {before.get(name, 'missing')}", f"{now.get(name, 'missing')}"
    return str(before), str(now)
