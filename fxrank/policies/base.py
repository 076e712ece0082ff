"""What a policy is: the three questions that a session asks it, and what it may look at to answer them.

A policy is a frozen dataclass of options. The session asks it three things: which layers may be factorized at all
(`eligible`, K), whether to switch now (`ready`, E), and what becomes of each layer (`decide`, R). All else that it asks is
a property or a method with an answer here, so that a policy of one's own needs no more than `ready` and `decide`.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, ClassVar, get_args

from fxrank.decisions import keep
from fxrank.passes.errors import unknown_name
from fxrank.passes.pairs.registry import AUTO, forms
from fxrank.plan import Budget, LayerDecision, Plan, Training
from fxrank.policies.budget import asked_budget
from fxrank.policies.monitor import Detector
from fxrank.policies.scene import Clock, Scene
from fxrank.policies.within import Within
from fxrank.switch.zero_weights import without_zero_weights

_KINDS: dict[Any, Any] = {float: Real, int: Integral, str: str, NoneType: NoneType}
"""What an option may be, by its annotation: numbers of numpy are as good as Python's."""
LATER = {"later": True}
"""Metadata of an option that earlier versions did not have: a `repr` has it only where it is not the default, so that their runs go on."""


def _check_kind(name: str, annotation: Any, value: object) -> None:
    kinds = get_args(annotation) or (annotation,)
    if all(kind in _KINDS for kind in kinds) and not isinstance(value, tuple(_KINDS[kind] for kind in kinds)):
        allowed = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
        raise TypeError(
            f"the option {name} must be {allowed}; got {type(value).__name__}. Leave it out for its default."
        )


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Options common to all policies.

    `frobenius_decay`: strength λ of the decay on `‖VU‖_F²` after the switch, `"auto"` for the optimizer group's own
    weight decay, None for none (the factors then keep the ordinary weight decay). `extra_bn`: a calibrated
    BatchNorm between the factors of convolutions. `lr_scale` multiplies the scheduled learning rate after the
    switch; `rewarmup` is the share of the run over which it ramps up linearly from there, never above the schedule.
    `form` is `"channel"` (one pair a layer), `"qkv"` (a fused projection of queries, keys and values gets a pair for
    each third), `"auto"` (of the two, at the same number of parameters, the one with the smaller truncation error),
    `"spatial"` (two-dimensional kernels get one down and one across), `"gauge"` (rows of the second factor are the identity and take no
    parameters), or one of `register_pair`; layers without it keep theirs.
    `freeze` are globs of parameter names that no longer train after the switch, as `"*.intermediate.dense.*"` in the
    papers' BERT recipe. `factors` are made of the `"weight"` alone, its truncated SVD, or of the `"data"`: those whose outputs differ
    least from the layer's on what the model was called with in the last steps before the switch (see `session.live_data`); `"auto"` is
    `"data"` where the policy chooses the ranks by outputs, and else `"weight"`. `target_params` and `target_macs` are a budget, one of them at most: the share, in (0, 1], of all the
    model's parameters, or of the multiply-adds of its weight layers, that the model may have after the switch. The policy decides when, and
    which layers stay dense, and the ranks are chosen by the spectra at the switch, so that the least is lost (see `policies.within`).
    """

    takes_target: ClassVar[bool] = True
    """Whether ranks may be chosen for a target."""

    # In this order, as a policy's `repr` is compared when a run goes on.
    frobenius_decay: float | str | None = Training.frobenius_decay
    extra_bn: bool = False
    form: str = "channel"
    lr_scale: float = Training.lr_scale
    rewarmup: float = Training.rewarmup
    freeze: tuple[str, ...] = Training.freeze
    factors: str = field(default="auto", metadata=LATER)
    target_params: float | None = field(default=None, metadata=LATER)
    target_macs: float | None = field(default=None, metadata=LATER)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__repr__" not in vars(cls):
            cls.__repr__ = Policy.__repr__  # type: ignore[method-assign]  # else the dataclass makes its own

    def __repr__(self) -> str:
        """Every option, but for a `LATER` one that has its default: it is compared when a run goes on."""
        usual: dict[str, tuple[Any, ...]] = {f.name: (f.default,) for f in fields(self) if "later" in f.metadata}
        if self.keeps is None:
            usual["factors"] = "auto", "weight"  # which are the same then
        shown = [f for f in fields(self) if f.repr and getattr(self, f.name) not in usual.get(f.name, ())]
        return f"{type(self).__qualname__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, float) and math.isnan(value):  # every comparison with it is false
                raise ValueError(
                    f"an option must be a number or say what it means; {option.name} is {value}. Leave it out, or give a number."
                )
            _check_kind(option.name, option.type, value)
        _ = self.training  # which has the rules for its options
        if self.budget is not None and not self.takes_target:
            raise ValueError(
                f"a target is what ranks are chosen for; {self.name} chooses none, and got target_{self.budget.of}={self.budget.target:g}. Leave it out."
            )
        if self.form not in (AUTO, *forms()):
            raise unknown_name("form", self.form, (AUTO, *forms()))
        if self.factors not in ("auto", "weight", "data"):
            raise unknown_name("factors", self.factors, ("auto", "weight", "data"))

    @property
    def name(self) -> str:
        """What plans and reports call it."""
        return type(self).__name__

    @property
    def training(self) -> Training:
        """How the run goes on after the switch."""
        return Training(self.frobenius_decay, self.lr_scale, self.rewarmup, self.freeze)

    @property
    def budget(self) -> Budget | None:
        """What the model may have after the switch; None if the policy's own ranks count."""
        return asked_budget(params=self.target_params, macs=self.target_macs)

    @property
    def _within(self) -> Within | None:
        return None if self.budget is None else Within(self.budget, self.form, self.extra_bn)

    def check(self, scene: Scene) -> None:
        """Raise before anything is changed what would be in the way at the switch: `BudgetError` for a target out of reach."""
        if self._within is not None:
            self._within.check(scene)

    @property
    def may_switch(self) -> bool:
        """Whether a switch is wanted at all: a model that has nothing to factorize, or has stayed dense, is then worth an
        error or a warning.
        """
        return True

    @property
    def known_plan(self) -> Plan | None:
        """The plan that is known before the training, so that it can be checked against the model; None for most."""
        return None

    @property
    def speedup_needed(self) -> float | None:
        """The threshold for which stacks are profiled, or None if no timing is wanted."""
        return None

    @property
    def must_pay(self) -> bool | None:
        """Whether pairs are given back with which the whole training step is not faster. With False the step is timed, and it is said;
        with None it is not timed.
        """
        return None

    @property
    def keeps(self) -> float | None:
        """The share of the model's outputs for which `scene.chosen` is made, before `decide`; None if nothing is."""
        return None

    @property
    def floor(self) -> float:
        """And the share of their layers' parameters that the pairs in it have at least, all together."""
        return 0.0

    @property
    def knows_data(self) -> bool:
        """Whether the factors know what the model was called with."""
        return self.factors == "data" or (self.factors == "auto" and self.keeps is not None)

    @property
    def by_weights(self) -> "Policy":
        """The policy to take its place where no layer can be looked at on data, unless the user asks for that."""
        return self

    @property
    def probe(self) -> float:
        """The share of the full rank at which a stack's pair is timed."""
        return 0.25

    def detector(self, clock: Clock) -> Detector | None:
        """The convergence test, or None if ranks need not be watched."""
        return None

    def interval(self, clock: Clock) -> int:
        """Optimizer steps between two samples of the ranks."""
        return max(1, round(clock.total_steps / 300))

    def eligible(self, scene: Scene) -> dict[str, str]:
        """K: layers that this policy leaves dense whatever their rank, with the reason."""
        return {}

    @abstractmethod
    def ready(self, clock: Clock, scene: Scene) -> str | None:
        """E: why to switch now, or None to go on."""

    @abstractmethod
    def decide(self, scene: Scene) -> list[LayerDecision]:
        """R: one decision per layer, in order."""

    def plan(self, scene: Scene, clock: Clock, why: str) -> Plan:
        """The plan for a switch at `clock`. Under a target `decide` is not asked. `BudgetError` as of `check`, if weights have become zero."""
        budget: Budget | None = None
        if self._within is None:
            decisions = self.decide(scene)
        else:
            decisions, budget, unspent = self._within.decide(scene, self.eligible(scene))
            why = f"{why}; {unspent}" if unspent else why
        plan = Plan(
            policy=self.name,
            layers=tuple(decisions),
            switch_step=clock.step,
            switch_epoch=round(clock.epoch, 4),
            note=why,
            training=self.training,
            budget=budget,
        )
        plan = without_zero_weights(scene.model, plan)
        for name in scene.factors.keys() - plan.R.keys():
            del scene.factors[name]
        return plan

    def plan_without_switch(self, scene: Scene, clock: Clock) -> Plan:
        """The plan of a run that ended at `clock` without a switch: every layer dense, with the reason."""
        kept = self.eligible(scene)
        decisions = []
        for layer in scene.layers:
            waiting = f"no switch within {clock.step} steps"
            if scene.monitor is not None:
                settled = layer.name in scene.monitor.settled
                waiting += "; its rank had settled, others had not" if settled else "; its rank had not settled"
            decisions.append(keep(layer, layer.reason or kept.get(layer.name) or waiting))
        return Plan(
            self.name,
            tuple(decisions),
            note=f"the policy did not switch within {clock.step} of {clock.total_steps} steps",
        )
