"""A run of `auto_lowrank` that may be killed at any moment and goes on as if it had not been.

A checkpoint holds everything that the rest of the run depends on: the states of model, loss module, optimizer, scheduler,
loss scaler and session, the sums of the epoch, the history, and all random numbers: as they are, and as they were when the
epoch began. From those the loader deals the epoch's batches again; the ones already taken are passed over, and the
numbers as they are put back. Batches are dealt alike if they come from random numbers known here: torch's, numpy's,
Python's, and generators that the loader, its samplers, its data set or the parts of these hold (see `random_state`). What else
a sampler or a data set remembers from epoch to epoch is not known, nor are random numbers in workers that persist.

What only grows with the epochs stands in a file beside it (`grown`).

A team of processes has one checkpoint; see `team_shares`. As many processes as before go on to the last bit. Another number
goes on with the same model, optimizer, schedule and session, and a note, as the batches are divided in another way.
"""

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fxrank.distributed.team import Team
from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.names import load_own_state, own_state
from fxrank.resume.grown import GROWN, Grown
from fxrank.resume.same_run import DEALT, check_saved, holders, loss_module, run_of
from fxrank.resume.sound import check_sound
from fxrank.resume.team_shares import (
    OWN,
    buckets_of,
    differing,
    hooks_with_memory,
    lay_buckets,
    on_cpu,
    sent,
    share_of,
)
from fxrank.saving.places import put
from fxrank.saving.plainfile import write_plain
from fxrank.saving.random_state import begun_from, random_state, restore_random
from fxrank.session.session import LowRankSession
from fxrank.training.keeper import Keeper
from fxrank.training.optimization import Optimization
from fxrank.training.options import RunOptions
from fxrank.training.run_state import RunState

CHECKPOINT, BEFORE = "checkpoint.safetensors", "checkpoint.before.safetensors"


class FileKeeper(Keeper):
    """Writes the checkpoint of one run, `output/checkpoint.safetensors`, and goes on from it. The one before it stays beside it,
    `checkpoint.before.safetensors`, until the run is over.

    One is written at the start, at the end of each epoch, right after the switch, and after every `checkpoint_every` steps.
    """

    files = (f"{CHECKPOINT}.partial", BEFORE, GROWN)  # a checkpoint that is no file is refused where it is read
    keeps = True

    def __init__(self, options: RunOptions, team: Team) -> None:
        super().__init__(options, team)
        assert options.output is not None
        self.path = options.output / CHECKPOINT
        self._grown = Grown(options.output / GROWN)
        self._holders = holders(options)
        self._run: dict[str, Any] = {}
        self._first_random: dict[str, Any] = {}
        self._epoch_random: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None
        """This process's share of the checkpoint, from `read` to `start`: it is as large as model and optimizer."""
        self._now: dict[str, Any] | None = None
        self._kept = (0, 0)
        """Epoch and batches of the last checkpoint."""
        self._as_before = True
        """Whether as many processes go on as there were."""

    def first_batch(self) -> Any:
        """Notes the random numbers from which it is dealt."""
        self._first_random = random_state(self._holders)
        return super().first_batch()

    def read(self) -> dict[str, Any] | None:
        """Read the checkpoint, if there is one yet, and check it against the run that is to go on from it.

        Changes nothing. Raises `CheckpointError` for a damaged file or one of another run, `PlanMismatchError` for a
        plan that does not fit the model, `TypeError` for a sharded model; in all processes if in one.
        """
        options, team = self.options, self.team
        self._run = team.together(lambda: run_of(options))
        device = options.device_for(team)
        saved = sent(team, device, lambda: self._grown.read(self.path) if self.path.exists() else None)
        if saved is None:
            return None
        team.together(lambda: check_saved(saved, self._run, options, team, self.path))
        team.together(lambda: check_sound(saved, options, dealt_alike=saved["run"].get(DEALT) == self._run[DEALT]))
        self._as_before = team.size == 1 + len(saved["others"])
        self._saved = share_of(saved, team)
        if self._as_before:
            self._first_random = self._saved["first_random"]
        session: dict[str, Any] = self._saved["session"]
        return session

    def first_batch_again(self, first: Any) -> Any:
        """The example batch that the run was started with; the one at hand if the batches are divided anew."""
        if self._saved is None or not self._as_before:
            return first
        restore_random(self._first_random, self._holders)
        return super().first_batch()

    def start(self, state: RunState, optimization: Optimization, session: LowRankSession) -> None:
        """Bring run, model, optimizer and all random numbers to the saved point; without one, write the first."""
        saved, self._saved = self._saved, None
        if saved is None:
            self.write(state, optimization, session)
            return
        self._load(saved, state, optimization)
        self._epoch_random, self._now = saved["epoch_random"], saved["random"]
        if self._as_before:
            lay_buckets(self.team, saved["buckets"])
        else:
            self._divide_anew(session, saved)
        for hook in hooks_with_memory(self.team):
            session.notes.append(
                f"at step {session.clock.step} the communication hook {hook} began anew: a checkpoint does not hold its memory, so losses and weights are not "
                "those of an uninterrupted run"
            )
        if state.epoch < self.options.epochs and getattr(self.options.loader, "persistent_workers", False):
            session.notes.append(
                f"at step {session.clock.step} the loader's persistent workers began anew: random numbers drawn in them, for augmentation say, are others than "
                "in an uninterrupted run; with persistent_workers=False they are the same"
            )
        restore_random(self._now, self._holders)

    def _load(self, saved: dict[str, Any], state: RunState, optimization: Optimization) -> None:
        load_own_state(uncompiled(self.options.model), saved["model"])
        load_own_state(loss_module(self.options), saved["loss"])
        optimization.optimizer.load_state_dict(saved["optimizer"])
        if optimization.scheduler is not None:
            optimization.scheduler.load_state_dict(saved["scheduler"])
        optimization.scaler.load_state_dict(saved["scaler"])
        state.totals.load_state_dict(saved["totals"])
        state.epoch, state.taken = saved["epoch"], saved["taken"]
        self._kept = (state.epoch, state.taken)
        state.history[:] = saved["history"]
        state.memory.update(saved["memory"])
        state.at_switch.update(saved["at_switch"])
        state.seconds_before, state.evaluation_seconds = saved["seconds"]

    def _divide_anew(self, session: LowRankSession, saved: dict[str, Any]) -> None:
        """Fit the random numbers of one team to another, and say what that means."""
        before, now = 1 + len(saved["others"]), self.team.size
        if saved["run"][DEALT] != self._run[DEALT]:
            own = random_state(self._holders)["generators"]
            self._epoch_random = self._epoch_random | {"generators": own}
            self._now = saved["random"] | {"generators": own}
        if self.team.rank >= before:
            assert self._now is not None
            self._now = begun_from(self._now, self.team.rank, self._holders)
        session.notes.append(
            f"at step {session.clock.step} {now} process{'es' * (now > 1)} went on from a checkpoint of {before}: batches and random numbers are divided in "
            "another way since, so losses and weights are not those of an uninterrupted run; where processes had buffers of their own, the first one's are kept"
        )

    def batches(self, state: RunState) -> Iterator[Any]:
        """The batches of the epoch, from the first that was not taken yet."""
        skipped = state.taken
        if skipped:
            restore_random(self._epoch_random, self._holders)
        else:
            self._epoch_random = random_state(self._holders)
        number = 0
        for number, batch in enumerate(self.options.loader, 1):
            if number > skipped:
                yield batch
            elif number == skipped:
                assert self._now is not None
                restore_random(self._now, self._holders)
                self._now = None
        if number < skipped and self._as_before:
            raise CheckpointError(
                f"the loader must deal the batches it dealt before; epoch {state.epoch} has ended after {number}, {skipped} were taken. Pass the same loader."
            )

    def due(self, step: int, *, switched: bool) -> bool:
        """Whether a checkpoint belongs after this step."""
        every = self.options.checkpoint_every
        return switched or (every is not None and step % every == 0)

    def write(self, state: RunState, optimization: Optimization, session: LowRankSession) -> None:
        """Write the checkpoint; the last one stays until the new one is whole. Raises `TypeError` for a state that is
        not plain data, `OSError`; in all processes if in the first, which writes.
        """
        team, elapsed = self.team, state.seconds
        now = random_state(self._holders)
        model, optimizer = own_state(uncompiled(self.options.model)), optimization.optimizer.state_dict()
        own = {
            "first_random": self._first_random,
            "random": now,
            "epoch_random": self._epoch_random if state.taken else now,
            "loss": {name: on_cpu(value) for name, value in own_state(loss_module(self.options)).items()},
            "totals": {name: on_cpu(value) for name, value in state.totals.state_dict().items()},
            "memory": state.memory,
            "seconds": [elapsed, state.evaluation_seconds],
        }
        assert own.keys() == OWN.keys()
        others = team.gather(own | differing(team, model, optimizer))
        tree = own | {
            "run": self._run,
            "epoch": state.epoch,
            "taken": state.taken,
            "session": session.state_dict(),
            "model": model,
            "optimizer": optimizer,
            "scheduler": None if optimization.scheduler is None else optimization.scheduler.state_dict(),
            "scaler": optimization.scaler.state_dict(),
            "history": state.history,
            "at_switch": state.at_switch,
            "others": others[1:],
            "buckets": buckets_of(team),
        }
        over = state.epoch >= self.options.epochs
        try:
            team.agree(lambda: self._put(tree, over))
        except OSError as error:
            if not over:
                raise
            # The training is done, and its result is at hand.
            warnings.warn(f"the last checkpoint could not be written, the one before it stays: {error}", stacklevel=2)
        self._kept = (state.epoch, state.taken)
        session.pause()

    def _put(self, tree: dict[str, Any], over: bool) -> None:
        before = self.path.with_name(BEFORE)
        if over:
            before.unlink(missing_ok=True)
        elif self.path.exists():
            put(before, lambda partial: _copy(self.path, partial))
        counted, add = self._grown.counted(tree)
        write_plain(self.path, counted, add)

    def way_back(self) -> str:
        """See `Keeper`."""
        epoch, taken = self._kept
        return (
            f"{self.path} holds the run after {taken} batches of epoch {epoch}, when all weights were finite: the same call goes on from there, with the "
            f"cause mended in the data or the code; with another learning rate, start afresh in another output_dir. {BEFORE} is the checkpoint before it."
        )


def _copy(path: Path, to: Path) -> None:
    """Another name for the file, where the disk has such, which costs nothing; else a copy."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)
