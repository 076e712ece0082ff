"""The training loop behind `auto_lowrank`, and the defaults it fills in."""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.optim import Optimizer
from torch.utils.data import DistributedSampler

from fxrank.distributed.team import Team
from fxrank.loggers import Logger
from fxrank.passes.discovery.selection import Selector, listed
from fxrank.passes.errors import unknown_name
from fxrank.passes.model.calls import call_arguments
from fxrank.passes.profiling.timing import autocast
from fxrank.plan import Plan
from fxrank.policies.base import Policy
from fxrank.resume.keeper import Keeper
from fxrank.session.session import LowRankSession
from fxrank.session.state import FULL, LOW
from fxrank.training.batches import LossFn, loss_of, model_inputs, run_batch, split_batch, takes_targets, to_device
from fxrank.training.measure import StepMemory, median, parameter_count, planned_macs, predicted_speedup
from fxrank.training.progress import Bar, Totals, progress_bar
from fxrank.training.report import Report

log = logging.getLogger("fxrank")

DEFAULT_EPOCHS = 30
AMP_TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


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
    """One run of `auto_lowrank`; the arguments are its arguments."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        epochs: int | None,
        steps_per_epoch: int | None,
        val_loader: Iterable[Any] | None,
        loss_fn: LossFn | None,
        optimizer: Optimizer | None,
        scheduler: Any,
        scheduler_per: str,
        device: str | torch.device | None,
        amp: str | torch.dtype | None,
        policy: Policy,
        seed: int | None,
        progress: bool,
        logger: Logger | None,
        keeper: Keeper | None = None,
    ) -> None:
        if epochs is not None and epochs < 1:
            raise ValueError(f"epochs must be at least 1; got {epochs}.")
        if scheduler_per not in ("epoch", "batch"):
            raise unknown_name("scheduler_per", scheduler_per, ("epoch", "batch"))
        if scheduler is not None and optimizer is None:
            raise ValueError(
                "a scheduler drives one optimizer; got a scheduler without optimizer=. Pass the optimizer it was built with."
            )
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"auto_lowrank steps one torch optimizer; got {type(optimizer).__name__}. For several, attach a LowRankSession to them in a loop of your own."
            )
        if not any(True for _ in model.parameters()):
            raise ValueError(f"the model must have parameters to train; {type(model).__name__} has none.")
        self.amp = _amp_type(amp)
        self.steps_per_epoch = _length(loader) if steps_per_epoch is None else steps_per_epoch
        self.model, self.loader, self.val_loader, self.loss_fn = model, loader, val_loader, loss_fn
        self.keeper = keeper
        if keeper is not None:
            keeper.before_first(self)
        self.first = first_batch(loader)
        self.epochs = DEFAULT_EPOCHS if epochs is None else epochs
        if epochs is None and progress:
            print(f"fxrank: training for {self.epochs} epochs of {self.steps_per_epoch} steps (epochs= to change)")
        self.total_steps = self.epochs * self.steps_per_epoch
        self.team = Team.of(model)
        progress = progress and self.team.is_first
        self.policy, self.seed, self.progress, self.logger = policy, seed, progress, logger
        here = next(model.parameters()).device
        self.device = (
            torch.device(device)
            if device is not None
            else (torch.device("cuda") if torch.cuda.is_available() and self.team.size == 1 else here)
        )
        self.optimizer, self.scheduler, self.scheduler_per = optimizer, scheduler, scheduler_per
        self.history: list[dict[str, Any]] = []
        self.memory: dict[str, int | None] = {FULL: None, LOW: None}
        self.at_switch: dict[str, float | None] = {"before_switch": None, "after_switch": None}
        self.evaluation_seconds = self.seconds_before = 0.0
        self.bar: Bar | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.epoch = self.taken = 0
        """Where the run is: batches `taken` of the epoch."""
        self.totals = Totals(self.device)

    def run(self, include: Iterable[Selector] | Selector, exclude: Iterable[Selector] | Selector) -> Result:
        self.started = time.perf_counter()
        self.include, self.exclude = listed(include), listed(exclude)
        saved = None if self.keeper is None else self.keeper.read(self)
        if self.keeper is not None and saved is not None:
            self.first = self.keeper.deal_again(self, first_batch)
        if self.seed is not None:
            torch.manual_seed(self.seed + self.team.rank)  # processes drop out, and augment, each in its own way
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.to(self.device)
        self.model.train()
        if self.optimizer is None:
            self.optimizer, self.scheduler = _default_optimizer(self.model, self.total_steps)
            self.scheduler_per = "batch"
        before = parameter_count(self.model)
        try:
            self._check_loss()
            session = LowRankSession.attach(
                self.model,
                self.optimizer,
                example_inputs=model_inputs(self.model, to_device(self.first, self.device)),
                total_steps=self.total_steps,
                steps_per_epoch=self.steps_per_epoch,
                policy=self.policy,
                include=self.include,
                exclude=self.exclude,
                amp=self.amp,
                seed=self.seed or 0,
                listener=self._at_switch,
                logger=self.logger,
                state=None if saved is None else saved["session"],
            )
        except Exception:
            for module, mode in modes:
                module.training = mode
            raise
        with session:  # takes its hooks off the optimizer, whatever happens
            if self.keeper is not None:
                self.keeper.start(self, session, saved)
            del saved  # as large as the model and the optimizer's state
            self._train(session)
        plan = session.plan
        assert plan is not None
        report = self._report(session, plan, before, self.seconds_before + time.perf_counter() - self.started)
        monitor = session.scene.monitor
        curves: dict[str, list[Any]] = {} if monitor is None else {"steps": monitor.steps, **monitor.curves}
        return Result(self.model, session.graph_module, plan, self.history, report, curves)

    def _check_loss(self) -> None:
        """Infer the loss of the first batch before anything is changed. What the model itself refuses is left for the
        tracer to name.
        """
        if self.loss_fn is not None:
            return
        batch = to_device(self.first, self.device)
        inputs, targets = split_batch(batch)
        if takes_targets(self.model, targets):
            return  # its losses come in training mode, and there they would leave traces
        args, kwargs = call_arguments(self.model, inputs)
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices), autocast(self.device, self.amp):
                outputs = self.model(*args, **kwargs)
        except Exception as error:
            log.debug("the model refused the first batch: %s", error)
            return
        finally:
            self.model.train()
        loss_of(outputs, targets, batch, None)

    def _train(self, session: LowRankSession) -> None:
        with progress_bar(self.total_steps, session.clock.step, self.progress) as bar:
            self.bar = bar
            while self.epoch < self.epochs:
                self._train_epoch(session, bar)
                self._end_epoch(self.epoch, session, self.totals)
                self.epoch, self.taken, self.totals = self.epoch + 1, 0, Totals(self.device)
                if self.keeper is not None:
                    self.keeper.write(self, session)

    def _train_epoch(self, session: LowRankSession, bar: Bar) -> None:
        assert self.optimizer is not None
        self.model.train()
        sampler = getattr(self.loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(self.epoch)  # or every epoch has the same order
        for batch in self.loader if self.keeper is None else self.keeper.batches(self):
            if self.taken == self.steps_per_epoch:
                break
            self.taken += 1
            batch = to_device(batch, self.device)
            phase, plan = session.phase, session.plan
            steps_in_phase = session.clock.step - (plan.switch_step or 0 if plan else 0)
            if self.memory[phase] is None and steps_in_phase >= 2:
                with StepMemory(self.model, self.optimizer) as memory:
                    self._step(batch)
                # A switch inside this very step would mix the phases.
                self.memory[phase] = memory.peak_bytes if session.phase == phase else None
            else:
                self._step(batch)
            if self.scheduler is not None and self.scheduler_per == "batch":
                self.scheduler.step()
            if self.keeper is not None and self.keeper.due(session.clock.step, switched=session.plan is not plan):
                self.keeper.write(self, session)
            bar.advance(self.epoch, self.epochs, session, self.totals)
        if self.taken == 0:
            raise ValueError(
                f"the loader must yield batches in every epoch; epoch {self.epoch} had none. A generator is spent after one pass: pass a DataLoader or list."
            )

    def _step(self, batch: Any) -> None:
        assert self.optimizer is not None
        with autocast(self.device, self.amp):
            outcome = run_batch(self.model, batch, self.loss_fn)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(outcome.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.totals.add(outcome.loss.detach(), outcome.examples, outcome.correct, outcome.predictions)

    def _end_epoch(self, epoch: int, session: LowRankSession, totals: Totals) -> None:
        assert self.optimizer is not None
        loss, accuracy = totals.means(self.team)
        if not math.isfinite(loss):
            log.warning("the training loss of epoch %d is %s", epoch, loss)
        val_loss, val_accuracy = self.evaluate()
        row = {
            "epoch": epoch,
            "phase": session.phase,
            "loss": loss,
            "accuracy": accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
        }
        row["lr"] = float(self.optimizer.param_groups[0]["lr"])
        row["step_ms"] = median(session.step_ms[session.phase])
        row["stable_ranks"] = session.scene.monitor.latest() if session.scene.monitor and session.phase == FULL else {}
        self.history.append(row)
        log.info("epoch %d (%s): loss %.4f, validation accuracy %s", epoch, session.phase, loss, val_accuracy)
        if self.scheduler is not None and self.scheduler_per == "epoch":
            if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss if val_loss is None else val_loss)
            else:
                self.scheduler.step()

    def evaluate(self) -> tuple[float | None, float | None]:
        """Mean loss and accuracy on `val_loader`, or Nones."""
        if self.val_loader is None:
            return None, None
        start = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        totals = Totals(self.device)
        with torch.no_grad():
            for batch in self.val_loader:
                with autocast(self.device, self.amp):
                    outcome = run_batch(self.model, to_device(batch, self.device), self.loss_fn)
                totals.add(outcome.loss, outcome.examples, outcome.correct, outcome.predictions)
        self.model.train(was_training)
        self.evaluation_seconds += time.perf_counter() - start
        return totals.means(self.team)

    def _at_switch(self, event: str, session: LowRankSession) -> None:
        if event == "before_switch" and self.bar is not None:
            self.bar.say("switching")
        _, self.at_switch[event] = self.evaluate()
        if event == "after_switch" and session.plan is not None:
            log.info(
                "switch at epoch %s: %d layers factorized (%s)", session.plan.E, len(session.plan.R), session.plan.note
            )

    def _report(self, session: LowRankSession, plan: Plan, before: int, total: float) -> Report:
        macs_before, macs_after = planned_macs(plan)
        step_ms = {phase: median(session.step_ms[phase]) for phase in (FULL, LOW)}
        dense_ms = {name: p.dense_ms for name, p in session.scene.profiles.items()}
        full = step_ms[FULL]
        last = self.history[-1]
        return Report(
            plan=plan,
            parameters_before=before,
            parameters_after=parameter_count(self.model),
            macs_before=macs_before,
            macs_after=macs_after,
            epochs=self.epochs,
            settings={
                "device": str(self.device),
                "amp": str(self.amp),
                "policy": repr(self.policy) if len(repr(self.policy)) < 2000 else plan.policy,
                "seed": self.seed,
            },
            step_ms=step_ms,
            memory_bytes=self.memory,
            gradient_bytes=session.gradient_bytes,
            predicted_speedup=None if full is None else predicted_speedup(plan, dense_ms, full),
            loss=last["loss"],
            accuracy=last["accuracy"],
            val_loss=last["val_loss"],
            val_accuracy=last["val_accuracy"],
            accuracy_before_switch=self.at_switch["before_switch"],
            accuracy_after_switch=self.at_switch["after_switch"],
            seconds={"total": total, "evaluation": self.evaluation_seconds, **session.seconds},
            notes=session.notes,
        )


def _default_optimizer(model: nn.Module, total_steps: int) -> tuple[Optimizer, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.05)
    warmup = max(1, total_steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total_steps - warmup))))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _amp_type(amp: str | torch.dtype | None) -> torch.dtype | None:
    if amp is None or amp in AMP_TYPES.values():
        return amp  # type: ignore[return-value]
    if isinstance(amp, str) and amp in AMP_TYPES:
        return AMP_TYPES[amp]
    raise unknown_name("amp", amp, AMP_TYPES)


def _length(loader: Iterable[Any]) -> int:
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"the loader must have a length, so that schedule and switch can be placed; {type(loader).__name__} has none. Pass steps_per_epoch=."
        ) from None
    if length == 0:
        raise ValueError(
            "the loader must yield at least one batch; it is empty (length 0). Check the data set, batch_size and drop_last."
        )
    return length


def first_batch(loader: Iterable[Any]) -> Any:
    """The first batch of a loader that can be iterated again. Raises `TypeError` or `ValueError` for one that cannot or is
    empty.
    """
    iterator = iter(loader)
    if iterator is loader:
        raise TypeError(
            f"the loader must be iterable again for every epoch; got a one-pass {type(loader).__name__}. Pass a DataLoader or a list of batches."
        )
    try:
        return next(iterator)
    except StopIteration:
        raise ValueError(
            "the loader must yield at least one batch; it is empty. Check the data set, batch_size and drop_last."
        ) from None
