"""The training loop behind `auto_lowrank`."""

import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils.data import DistributedSampler

from fxrank.distributed.team import Team
from fxrank.passes.errors import NonFiniteWeightError
from fxrank.passes.profiling.timing import autocast
from fxrank.plan import Plan
from fxrank.session.attach import clock_of, examine
from fxrank.session.session import LowRankSession
from fxrank.session.state import FULL, LOW
from fxrank.training.batches import check_loss, check_validation, model_inputs, run_batch, to_device
from fxrank.training.details import details_of
from fxrank.training.finite import FiniteWeights
from fxrank.training.keeper import Keeper
from fxrank.training.measure import StepMemory, median, parameter_count, planned_macs, predicted_speedup
from fxrank.training.optimization import Optimization
from fxrank.training.options import RunOptions
from fxrank.training.progress import Bar, Totals, progress_bar
from fxrank.training.report import Report
from fxrank.training.run_state import RunState

log = logging.getLogger("fxrank")

_LOOKS = 100
"""Batches between two looks at the loss inside an epoch: each waits for the device."""
_UNVALIDATED = "val_loader yielded nothing"


@dataclass
class Result:
    """What `auto_lowrank` returns.

    `model` is the object that was passed in, trained and factorized. `graph_module` is its fx graph over the same
    parameters: each factorized layer shows as two nodes. `history` has one dict per epoch: `epoch`, `phase`,
    `loss`, `accuracy`, `val_loss`, `val_accuracy`, `lr`, `step_ms`, `stable_ranks`. `curves` holds every rank
    sample: `{"steps": […], layer: […]}`.
    """

    model: nn.Module
    graph_module: fx.GraphModule
    plan: Plan
    history: list[dict[str, Any]]
    report: Report
    curves: dict[str, list[Any]]


class Trainer:
    """One run of `auto_lowrank`."""

    def __init__(self, options: RunOptions, team: Team, keeper: Keeper) -> None:
        """Takes the first batch, and leaves model and optimizer alone."""
        self.options, self.team, self.keeper = options, team, keeper
        check_validation(options.val_loader, team)
        self._first = keeper.first_batch()
        if options.epochs_by_default and options.progress:
            print(
                f"fxrank: training for {options.epochs} epochs of {options.steps_per_epoch} steps (epochs= to change)"
            )
        self.device = options.device_for(team)
        self.state = RunState(Totals(self.device))
        self._bar: Bar | None = None

    def run(self) -> Result:
        """Train from the start, or from where the keeper has left the run."""
        options, model = self.options, self.options.model
        self.state.started = time.perf_counter()
        saved = self.keeper.read()
        self._first = self.keeper.first_batch_again(self._first)
        if options.seed is not None:
            torch.manual_seed(options.seed + self.team.rank)  # processes drop out, and augment, each in its own way
        modes = {name: module.training for name, module in model.named_modules()}
        try:
            return self._run(saved)
        except BaseException:  # of a loader, say, or by the user
            for name, module in model.named_modules():  # the parts of a pair as the layer was
                module.training = modes.setdefault(name, modes[name.rpartition(".")[0]])
            raise

    def _run(self, saved: dict[str, Any] | None) -> Result:
        options, model = self.options, self.options.model
        model.to(self.device)
        model.train()
        optimization = Optimization.of(options, self.device)
        before = parameter_count(model)
        session = self._attach(optimization, saved)
        del saved  # tensors of the rank tracker, which has its own by now
        with session:  # takes its hooks off the optimizer, whatever happens
            self.keeper.start(self.state, optimization, session)
            self._finite = FiniteWeights(model)
            try:
                self._train(session, optimization)
            except NonFiniteWeightError as error:
                raise NonFiniteWeightError(f"{error} {self.keeper.way_back()}") from error
        plan = session.plan
        assert plan is not None
        report = self._report(session, plan, before)
        monitor = session.scene.monitor
        curves: dict[str, list[Any]] = {} if monitor is None else {"steps": monitor.steps, **monitor.curves}
        return Result(model, session.graph_module, plan, self.state.history, report, curves)

    def _attach(self, optimization: Optimization, saved: dict[str, Any] | None) -> LowRankSession:
        """What `LowRankSession.attach` does, with the run's own team. `saved` is a session's state."""
        options = self.options
        if options.loss_fn is None:
            check_loss(options.model, self._first, self.device, options.amp)
        self.team.look_again()
        attached = examine(
            self.team,
            optimization.optimizer,
            options.policy,
            clock_of(options.total_steps, options.steps_per_epoch),
            model_inputs(options.model, to_device(self._first, self.device)),
            include=options.include,
            exclude=options.exclude,
            amp=options.amp,
            seed=options.seed or 0,
            logger=options.logger,
            state=saved,
        )
        session = LowRankSession(attached, self._at_switch)
        session.begin(saved)
        return session

    def _train(self, session: LowRankSession, optimization: Optimization) -> None:
        options, state = self.options, self.state
        shown = options.progress and self.team.is_first
        with progress_bar(options.total_steps, session.clock.step, shown) as self._bar:
            while state.epoch < options.epochs:
                self._train_epoch(session, optimization, self._bar)
                self._check_weights(session)
                self._end_epoch(session, optimization)
                state.next_epoch()
                self.keeper.write(state, optimization, session)

    def _train_epoch(self, session: LowRankSession, optimization: Optimization, bar: Bar) -> None:
        options, state = self.options, self.state
        options.model.train()
        sampler = getattr(options.loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(state.epoch)  # or every epoch has the same order
        for batch in self.keeper.batches(state):
            if state.taken == options.steps_per_epoch:
                break
            state.taken += 1
            plan = session.plan
            self._step(to_device(batch, self.device), session, optimization)
            optimization.after_batch()
            if state.taken % _LOOKS == 0 and self.team.size == 1 and not state.totals.loss.isfinite():
                self._finite.check(session.clock.step)
            if self.keeper.due(session.clock.step, switched=session.plan is not plan):
                self._check_weights(session)
                self.keeper.write(state, optimization, session)
            bar.advance(state.epoch, options.epochs, session, state.totals)
        if state.taken == 0:
            raise ValueError(
                f"the loader must yield batches in every epoch; epoch {state.epoch} had none. A generator is spent after one pass: pass a DataLoader or list."
            )

    def _check_weights(self, session: LowRankSession) -> None:
        """Stop a run that has diverged, before a checkpoint is written. Where it is over and nothing was kept to go on from,
        its result says so instead.
        """
        step, over = session.clock.step, session.clock.step >= self.options.total_steps
        if over and not self.keeper.keeps:
            if names := self._finite.broken():
                session.notes.append(
                    f"THE WEIGHTS ARE NOT FINITE: {names[0]!r} and {len(names) - 1} more hold NaN or infinity"
                )
                log.warning("the weights are not finite at the end: %s", names[0])
            return
        self.team.together(lambda: self._finite.check(step))

    def _step(self, batch: Any, session: LowRankSession, optimization: Optimization) -> None:
        """One training step; the third one of each phase with its memory."""
        memory, phase, plan = self.state.memory, session.phase, session.plan
        steps_in_phase = session.clock.step - (plan.switch_step or 0 if plan else 0)
        if memory[phase] is not None or steps_in_phase < 2:
            self._learn(batch, optimization)
            return
        with StepMemory(self.options.model, optimization.optimizer) as measured:
            self._learn(batch, optimization)
        # A switch inside this very step would mix the phases.
        memory[phase] = measured.peak_bytes if session.phase == phase else None

    def _learn(self, batch: Any, optimization: Optimization) -> None:
        with autocast(self.device, self.options.amp):
            outcome = run_batch(self.options.model, batch, self.options.loss_fn)
        optimization.step(outcome.loss)
        self.state.totals.add(outcome.loss.detach(), outcome.examples, outcome.correct, outcome.predictions)

    def _end_epoch(self, session: LowRankSession, optimization: Optimization) -> None:
        epoch, monitor = self.state.epoch, session.scene.monitor
        loss, accuracy = self.state.totals.means(self.team)
        loss = math.nan if loss is None else loss  # batches without an example
        if not math.isfinite(loss):
            log.warning("the training loss of epoch %d is %s", epoch, loss)
        val_loss, val_accuracy = self.evaluate(session)
        row = {
            "epoch": epoch,
            "phase": session.phase,
            "loss": loss,
            "accuracy": accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "lr": float(optimization.optimizer.param_groups[0]["lr"]),
            "step_ms": median(session.step_ms[session.phase]),
            "stable_ranks": monitor.latest() if monitor and session.phase == FULL else {},
        }
        self.state.history.append(row)
        log.info("epoch %d (%s): loss %.4f, validation accuracy %s", epoch, session.phase, loss, val_accuracy)
        optimization.after_epoch(loss if self.options.val_loader is None else val_loss)

    def evaluate(self, session: LowRankSession) -> tuple[float | None, float | None]:
        """Mean loss and accuracy on `val_loader`; Nones without one, and, with a note, from one that yields nothing."""
        options = self.options
        if options.val_loader is None:
            return None, None
        start = time.perf_counter()
        was_training = options.model.training
        options.model.eval()
        totals = Totals(self.device)
        try:
            with torch.no_grad():
                for batch in options.val_loader:
                    with autocast(self.device, options.amp):
                        outcome = run_batch(options.model, to_device(batch, self.device), options.loss_fn)
                    totals.add(outcome.loss, outcome.examples, outcome.correct, outcome.predictions)
        finally:
            options.model.train(was_training)
        self.state.evaluation_seconds += time.perf_counter() - start
        loss, accuracy = totals.means(self.team)
        if loss is None and not any(note.startswith(_UNVALIDATED) for note in session.notes):
            log.warning("val_loader yielded nothing in epoch %d", self.state.epoch)
            session.notes.append(
                f"{_UNVALIDATED} in epoch {self.state.epoch}: there is no validation loss from then on wherever it yields nothing"
            )
        return loss, accuracy

    def _at_switch(self, event: str, session: LowRankSession) -> None:
        if event == "before_switch" and self._bar is not None:
            self._bar.say("switching")
        _, self.state.at_switch[event] = self.evaluate(session)
        if event == "after_switch" and session.plan is not None and session.plan.R:
            log.info(
                "switch at epoch %s: %d layers factorized (%s)", session.plan.E, len(session.plan.R), session.plan.note
            )

    def _report(self, session: LowRankSession, plan: Plan, before: int) -> Report:
        start = time.perf_counter()
        details = details_of(session, plan, self.state.history)
        session.seconds["profile"] += time.perf_counter() - start
        options, state, total = self.options, self.state, self.state.seconds
        macs_before, macs_after = planned_macs(plan)
        step_ms = {phase: median(session.step_ms[phase]) for phase in (FULL, LOW)}
        dense_ms = {name: p.dense_ms for name, p in session.scene.profiles.items()}
        full = step_ms[FULL]
        predicted = None if full is None else predicted_speedup(plan, dense_ms, full)
        if session.share is not None and plan.R:
            predicted = 1 / session.share.median
        last = state.history[-1]
        return Report(
            plan=plan,
            parameters_before=before,
            parameters_after=parameter_count(options.model),
            macs_before=macs_before,
            macs_after=macs_after,
            epochs=options.epochs,
            settings={
                "device": str(self.device),
                "amp": str(options.amp),
                "policy": repr(options.policy) if len(repr(options.policy)) < 2000 else plan.policy,
                "seed": options.seed,
            },
            step_ms=step_ms,
            memory_bytes=state.memory,
            gradient_bytes=session.gradient_bytes,
            predicted_speedup=predicted,
            loss=last["loss"],
            accuracy=last["accuracy"],
            val_loss=last["val_loss"],
            val_accuracy=last["val_accuracy"],
            accuracy_before_switch=state.at_switch["before_switch"],
            accuracy_after_switch=state.at_switch["after_switch"],
            seconds={"total": total, "evaluation": state.evaluation_seconds, **session.seconds},
            notes=session.notes,
            details=details,
        )
