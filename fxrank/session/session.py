"""The engine: watches a model in anybody's training loop and makes the switch inside `optimizer.step()`.

    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=batch, total_steps=n)
    for ...:            # an ordinary loop, nothing to call, nothing to forget
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    print(session.plan)

Order of events: `attach` traces, lists the layers, profiles their stacks and takes the first sample (ξ). After
every `interval` optimizer steps the ranks are sampled; when the policy says so, the weights are split, the pairs
installed in the model and in the graph, the optimizer's parameters and state follow.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxrank.distributed.team import Team, gradient_bytes
from fxrank.loggers import Logger
from fxrank.passes.discovery.selection import Selector
from fxrank.passes.errors import NothingFactorizedWarning
from fxrank.passes.model.calls import Example
from fxrank.passes.profiling.clock import Share, Stopwatch
from fxrank.passes.rewriting.install import pairs_in
from fxrank.plan import Plan
from fxrank.policies.base import Policy
from fxrank.policies.fixed import as_policy
from fxrank.policies.scene import Clock
from fxrank.session.attach import Attachment, clock_of, examine
from fxrank.session.hooks import StepHooks
from fxrank.session.live_data import LastCalls, fitted_to, measure_again
from fxrank.session.spectra import cut_spectra
from fxrank.session.state import FULL, LOW, restore_session, session_state
from fxrank.session.switch import hand_over, put_pairs
from fxrank.session.truth import StepsElsewhere, check_length, expect_end, has_ended
from fxrank.session.whole_outputs import choose
from fxrank.session.worth import decided
from fxrank.switch.averages import ListedAverage, averaged_in, check_averages
from fxrank.switch.freeze import as_in_training
from fxrank.switch.plan_of import has_plan, remember_plan
from fxrank.wrappers import check_not_captured, check_not_graphed, check_outside_backward, outside_autocast

Listener = Callable[[str, "LowRankSession"], None]
"""Called with `"before_switch"` and `"after_switch"`, inside the optimizer step after which the switch is made."""


class LowRankSession:
    """One model, its optimizer or optimizers, one policy, from attach to the end of training. Made by `attach`.

    Public state: `phase` (`"full-rank"` or `"low-rank"`), `plan` (None before the switch), `scene` (layers,
    profiles and, where ranks are watched, their histories: `scene.monitor.curves`), `clock`, `graph_module`,
    `seconds` (time spent in monitor, profile and switch), `step_ms` (recent step times by phase), `share` (what the training step was
    measured to take with the plan's pairs, of the dense one's time, before the switch; None if it was not), `spectra` (what was cut,
    see `cut_spectra`), `notes`.
    """

    def __init__(self, attached: Attachment, listener: Listener | None = None) -> None:
        """Nothing is hooked before `begin`."""
        self.team, self.model, self.optimizers = attached.team, attached.team.model, attached.optimizers
        self.graph_module, self.scene = attached.graph_module, attached.scene
        self.policy, self.clock = attached.policy, attached.clock
        self.plan: Plan | None = None
        self.share: Share | None = None
        self.spectra: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = list(attached.notes)
        profiler = self.scene.profiler
        self.seconds = {"monitor": 0.0, "profile": profiler.seconds if profiler else 0.0, "switch": 0.0}
        self.step_ms: dict[str, deque[float]] = {FULL: deque(maxlen=1024), LOW: deque(maxlen=1024)}
        self.gradient_bytes: dict[str, int | None] = {FULL: gradient_bytes(self.model), LOW: None}
        self._attached, self._listener = attached, listener or (lambda *_: None)
        self._averages, self._logger = list(attached.averages), attached.logger
        self._hooks = StepHooks(self.optimizers)
        self._calls = LastCalls.of_run(attached.clock.total_steps)
        self._elsewhere = StepsElsewhere(self.optimizers, self._say)
        self._end_watch: Callable[[], None] = lambda: None
        self._watch = Stopwatch(next(self.model.parameters()).device)
        self._broken: BaseException | None = None
        self.ready_since: int | None = None

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        example_inputs: Example,
        total_steps: int,
        steps_per_epoch: int | None = None,
        policy: Policy | Plan | str | None = None,
        include: Iterable[Selector] | Selector = (),
        exclude: Iterable[Selector] | Selector = (),
        amp: torch.dtype | None = None,
        seed: int = 0,
        listener: Listener | None = None,
        logger: Logger | None = None,
        followers: Iterable[object] = (),
        keep_comm_hooks: bool = True,
        state: dict[str, Any] | None = None,
    ) -> "LowRankSession":
        """Watch `model` through `optimizer.step()`.

        Of several optimizers (Muon for the matrices and AdamW for the rest, say) each keeps its part; give them in the order
        in which they step: the last one's step counts, and the switch is made after it. Weights that none of them holds
        are factorized as well, and stay untrained.
        `example_inputs` is one batch of the job's size on the model's device: a tensor, a tuple of positional
        inputs, a dict of keyword inputs, or a batch `(inputs, targets)`. `total_steps` counts optimizer steps;
        `steps_per_epoch` (default: all) gives E its unit. `policy` defaults to `Cuttlefish()`; a `Plan` is repeated
        as it stands. `include` and `exclude` select layers by name, glob, regular expression, class or module.
        `amp` is the autocast dtype for profiling. `model` may be wrapped in `DistributedDataParallel`: the first process
        decides, all do the same, and the wrapper goes on with its options and, with `keep_comm_hooks`, its
        communication hooks. `followers` are averages of the model (see `follow`). `logger` receives
        rank curves and events (see `Logger`). A policy with E = 0 switches right here.
        `state` is what another session's `state_dict` returned: this one goes on from there, and measures nothing anew.

        Everything is checked before anything is changed. Raises `ValueError` (optimizer of another model, bad
        option), `TypeError` (LBFGS, batch that does not fit), `TraceError`, `NonFiniteWeightError`,
        `NothingToFactorizeError`; where nothing is left because of what the layers do, it warns with `NothingFactorizedWarning`.
        """
        if listener is not None and not callable(listener):
            raise TypeError(f"a listener is called at each event; got {type(listener).__name__}. Give a function.")
        chosen, clock = as_policy(policy), clock_of(total_steps, steps_per_epoch)
        attached = examine(
            Team.of(model, keep_comm_hooks),
            optimizer,
            chosen,
            clock,
            example_inputs,
            include=include,
            exclude=exclude,
            amp=amp,
            seed=seed,
            logger=logger,
            followers=followers,
            state=state,
        )
        session = cls(attached, listener)
        session.begin(state)
        return session

    def begin(self, state: dict[str, Any] | None = None) -> None:
        """Take the first sample, or go on from a `state`; watch the steps from here on, and switch at once if the policy
        says so. Called once, by `attach`.
        """
        if state is not None:
            self.load_state_dict(state)
        elif self.scene.monitor is not None:
            self._observe(exact=True)
        self._hooks.put_on(self._before_step, self._after_step)
        self._end_watch = self._elsewhere.watch()
        if self.policy.knows_data and self.plan is None:
            self._calls.watch(self.model)
        expect_end(self)
        try:
            if state is None:
                self._consider_switch()
        except BaseException:  # `attach` has failed
            self.detach()
            raise
        self._watch.mark()

    @property
    def phase(self) -> str:
        """`"full-rank"`, or `"low-rank"` from the switch on."""
        return LOW if self.plan is not None and self.plan.R else FULL

    def follow(self, average: object) -> None:
        """Take an average of the model through the switch: `AveragedModel`, timm's `ModelEmaV3`, or any module, bare or
        wrapped, that has the model's parameters by name and shape; or a list of tensors beside `model.parameters()`, such as
        the `shadow_params` of diffusers' `EMAModel`, given with what holds it or by itself. Its weights are split at the model's ranks and in the
        basis of its factors, so that it goes on as an average; see `averages`.

        Raises `ValueError` or `TypeError` for anything else, a dense average after the switch among it.
        """
        self._averages.append(averaged_in(average, self.model))

    # -- inside optimizer.step()

    def _before_step(self) -> None:
        self._check_whole()
        check_not_captured()
        check_outside_backward()
        if self.plan is None and self.policy.may_switch:
            self.team.check()

    def _say(self, note: str) -> None:
        self.notes.append(note)
        warnings.warn(note, UserWarning, stacklevel=2)

    def _after_step(self) -> None:
        self._watch.mark()
        self.clock = Clock(self.clock.step + 1, self.clock.total_steps, self.clock.steps_per_epoch)
        if (wrong := check_length(self.clock)) is not None:
            self._say(wrong)
        monitor = self.scene.monitor
        if self.plan is None and (monitor is None or monitor.due(self.clock.step)):
            self.step()
        elif self.clock.step % 64 == 0:
            self._collect_times()
        self._calls.step_made()
        self._watch.mark()

    def step(self) -> bool:
        """Take a rank sample now and switch if the policy says so. Called by itself at every due step; call it per
        epoch to be explicit. True after the switch.
        """
        if self.plan is None:
            self._collect_times()
            if self.scene.monitor is not None and self.scene.monitor.steps[-1] != self.clock.step:
                self._observe()
            self._consider_switch()
        return self.phase == LOW

    @outside_autocast
    def _observe(self, exact: bool = False) -> None:
        assert self.scene.monitor is not None
        start = time.perf_counter()
        judged = self.scene.watched(self.policy.eligible(self.scene))
        self.scene.monitor.observe(self.clock.step, exact=exact, judged=judged)
        if self._logger is not None:
            values = {f"stable_rank/{name}": rank for name, rank in self.scene.monitor.latest().items()}
            self._logger.log(self.clock.step, values)
        self.seconds["monitor"] += time.perf_counter() - start

    def _collect_times(self) -> None:
        # Marks alternate: end of our work, start of our work. Every other lap is the user's own step, data loading included.
        self.step_ms[self.phase].extend(lap.ms for lap in self._watch.laps()[0::2])

    def _consider_switch(self) -> None:
        why = self.policy.ready(self.clock, self.scene)
        if why is None or self.plan is not None:
            self.ready_since = None
            return
        since = self.ready_since = self.clock.step if self.ready_since is None else self.ready_since
        # Right after a checkpoint few calls are known, and a switch that finds its own moment may as well know more. A run that goes on
        # from there waits as long; one with a checkpoint every other step has what there is.
        finds_its_moment = self.policy.knows_data and self.scene.monitor is not None
        if finds_its_moment and self._calls.lacks_some and self.clock.step - since < self._calls.steps:
            return
        self._switch(why)

    @outside_autocast
    def _switch(self, why: str) -> None:
        check_not_graphed(self.model)
        self.team.check()
        self.team.together(lambda: self._listener("before_switch", self))
        start, profiled = time.perf_counter(), self._profiled()
        known = None
        if (keeps := self.policy.keeps) is not None:
            known, notes = choose(keeps, self._calls, self._attached)
            self.notes += notes
        steps = list(self.step_ms[FULL])
        plan, self.share, notes = self.team.agree(lambda: decided(self._attached, self.clock, why, steps))
        self.notes += notes
        if self.policy.knows_data and plan.R:
            plan, note = fitted_to(plan, self._calls, self._attached, known)
            self.notes.append(note)
        measured = self._profiled() - profiled
        self.seconds["profile"] += measured
        self.spectra = cut_spectra(plan, self.scene)
        self.install(plan)
        self.seconds["switch"] += time.perf_counter() - start - measured
        if self._logger is not None:
            self._logger.log(self.clock.step, {f"rank/{name}": float(rank) for name, rank in plan.R.items()})
            self._logger.event(self.clock.step, f"{len(plan.R)} of {len(plan.layers)} layers factorized ({plan.note})")
        self.team.together(lambda: self._listener("after_switch", self))

    def _profiled(self) -> float:
        """Seconds spent on timing layers so far."""
        return self.scene.profiler.seconds if self.scene.profiler else 0.0

    def install(self, plan: Plan, *, split: bool = True) -> None:
        """Make the switch that `plan` describes: model, graph and optimizer. `split=False` leaves the factors for a
        checkpoint to fill.
        """
        if not plan.R:
            self.plan = plan
            self._calls.stop()
            return
        with as_in_training(p for held in self._hooks.trained.values() for p in held):
            averages = [a.as_module(self.model) if isinstance(a, ListedAverage) else a for a in self._averages]
            self.team.together(lambda: check_averages(averages, plan))  # the first process's alone, often
            pairs = pairs_in(self.model).keys()
            try:
                self._install(plan, averages, split)
            except BaseException as error:
                if pairs_in(self.model).keys() != pairs:  # else nothing is changed yet, and the next step may try again
                    self._broken = error
                raise
        self._hooks.trained = {}
        self._calls.stop()

    def _install(self, plan: Plan, averages: Sequence[nn.Module], split: bool) -> None:
        replacements = put_pairs(self._attached, averages, plan, split=split)
        self.plan = plan
        regimes, notes = hand_over(self._attached, plan, replacements, lambda: self.clock.step, split=split)
        for average, module in zip(self._averages, averages, strict=True):
            if isinstance(average, ListedAverage):
                average.take(module, self.model)
        if split and self.policy.knows_data:
            notes += measure_again(plan, self._calls, self._attached)
        self._hooks.regimes.update(regimes)
        self.notes += notes
        self.gradient_bytes[LOW] = gradient_bytes(self.model)

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise RuntimeError(
                f"a switch must be made whole; the one after step {self.clock.step} broke off with {type(self._broken).__name__}, and some of the "
                "optimizer's parameters are no longer the model's. Go on from a checkpoint, with a freshly built model."
            ) from self._broken

    # -- the end

    def finish(self) -> Plan:
        """Take the hooks off and return the plan. Warns with `NothingFactorizedWarning`, listing the reasons, if
        every layer was left dense.
        """
        self.detach()
        self._check_whole()
        self._collect_times()
        if self.plan is None:
            self.plan = self.policy.plan_without_switch(self.scene, self.clock)
        if not self.plan.R and not has_plan(self.model):
            remember_plan(self.model, self.plan)  # it can be saved like any other
        if not self.plan.R and self.policy.may_switch:
            listing = "".join(f"\n  {d.name} ({d.kind}): {d.reason}" for d in self.plan.layers)
            warnings.warn(
                f"nothing was factorized ({self.plan.note}); the model is full-rank. Layer by layer:{listing}",
                NothingFactorizedWarning,
                stacklevel=2,
            )
        return self.plan

    def detach(self) -> None:
        """Take the hooks off without an end of the training, as of one that was broken off."""
        self._hooks.take_off()
        self._calls.stop()
        self._end_watch()
        has_ended(self)

    def __enter__(self) -> "LowRankSession":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.finish()
        else:
            self.detach()

    @property
    def settled_count(self) -> tuple[int, int]:
        """(layers settled, layers watched)."""
        if self.scene.monitor is None:
            return 0, 0
        watched = self.scene.watched(self.policy.eligible(self.scene))
        return len(self.scene.monitor.settled & watched), len(watched)

    # -- persistence

    def state_dict(self) -> dict[str, Any]:
        """Plain data and small tensors: clock, plan, rank histories and the tracker's state, timings, notes. Save it
        beside the model's and the optimizer's own state; `torch.load(…, weights_only=True)` reads it.
        """
        self._check_whole()
        self.pause()
        return session_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring a freshly attached session to the saved point; load the model's and the optimizer's states after
        it, they then fit. For a policy that switches at once, give the state to `attach`.

        Raises `CheckpointError` for a damaged state or one of another run (steps, policy, layers), `PlanMismatchError`
        for a plan of another model, and changes nothing then.
        """
        restore_session(self, state)
        self._calls.forget()

    def pause(self) -> None:
        """Leave the time since the last step out of the step times, as for the writing of a checkpoint, which knows nothing of what the
        model was called with.
        """
        self._calls.forget()
        self._collect_times()
        self._watch.mark()
