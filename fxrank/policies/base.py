"""What a policy is: the three questions that a session asks it, and what it may look at to answer them.

A policy is a frozen dataclass of options. The session asks it three things: which layers may be factorized at all
(`eligible`, K), whether to switch now (`ready`, E), and what becomes of each layer (`decide`, R).
"""

import fnmatch
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fxrank.passes.discovery.layer import Layer, matrices_of
from fxrank.passes.errors import unknown_name
from fxrank.passes.model.names import own_name
from fxrank.passes.pairs.registry import FORMS
from fxrank.passes.profiling.timing import Profiler, StackProfile
from fxrank.passes.spectra.exact import Decomposition, check_finite, decompose, truncation_error
from fxrank.plan import LayerDecision, Plan, Training
from fxrank.policies.monitor import Detector, RankMonitor
from fxrank.switch.apply_plan import Factors, keep


@dataclass(frozen=True)
class Clock:
    """Where the training is: `step` optimizer steps made of `total_steps`, `steps_per_epoch` of them an epoch."""

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch


@dataclass
class Scene:
    """What a policy may look at. `profiles` are by layer name; `profiler` measures more when asked, None if timing
    is off.
    """

    model: nn.Module
    layers: list[Layer]
    profiles: dict[str, StackProfile] = field(default_factory=dict)
    profiler: Profiler | None = None
    monitor: RankMonitor | None = None
    factors: Factors = field(default_factory=dict)
    """Factors of the layers decided on, so that the switch needs no second decomposition."""

    def watched(self, kept: Mapping[str, str]) -> frozenset[str]:
        """Layers whose ranks decide the switch: those that may still be factorized, given the policy's `kept`."""
        return frozenset(layer.name for layer in self.layers if layer.reason is None and layer.name not in kept)


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Options common to all policies.

    `frobenius_decay`: strength λ of the decay on `‖VU‖_F²` after the switch, `"auto"` for the optimizer group's own
    weight decay, None for none (the factors then keep the ordinary weight decay). `extra_bn`: a calibrated
    BatchNorm between the factors of convolutions. `lr_scale` multiplies the scheduled learning rate after the
    switch; `rewarmup` is the share of the run over which it ramps up linearly from there, never above the schedule.
    `form` is `"channel"` (one pair a layer), `"qkv"` (a fused projection of queries, keys and values gets a pair for
    each third) or `"auto"` (of the two, at the same number of parameters, the one with the smaller truncation error).
    `freeze` are globs of parameter names that no longer train after the switch, as `"*.intermediate.dense.*"` in the
    papers' BERT recipe.
    """

    frobenius_decay: float | str | None = "auto"
    extra_bn: bool = False
    form: str = "channel"
    lr_scale: float = 1.0
    rewarmup: float = 0.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        decay = self.frobenius_decay
        if isinstance(decay, str) and decay != "auto":
            raise unknown_name("frobenius_decay (or a number, or None)", decay, ["auto"])
        if isinstance(decay, (int, float)) and decay < 0:
            raise ValueError(f"frobenius_decay must not be negative; got {decay}. None switches it off.")
        if self.lr_scale <= 0:
            raise ValueError(f"lr_scale must be above 0; got {self.lr_scale}. 1.0 keeps the schedule.")
        if self.form not in ("auto", *FORMS):
            raise unknown_name("form", self.form, ("auto", *FORMS))
        if isinstance(self.freeze, str):
            raise TypeError(
                f"freeze takes a tuple of globs of parameter names; got the string {self.freeze!r}. Write ({self.freeze!r},)."
            )
        if not 0 <= self.rewarmup < 1:
            raise ValueError(f"rewarmup is a share of the run in [0, 1); got {self.rewarmup}. 0 switches it off.")

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def speedup_needed(self) -> float | None:
        """The threshold for which stacks are profiled, or None if no timing is wanted."""
        return None

    @property
    def probe(self) -> float:
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
        """The plan for a switch at `clock`."""
        return Plan(
            policy=self.name,
            layers=tuple(self.decide(scene)),
            switch_step=clock.step,
            switch_epoch=round(clock.epoch, 4),
            note=why,
            training=Training(self.frobenius_decay, self.lr_scale, self.rewarmup, self.freeze),
        )

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


def in_best_form(layer: Layer, rank: int, policy: Policy, model: nn.Module) -> tuple[Layer, int, Decomposition]:
    """The layer in the form that the policy wants or that suits it best, the rank in that form with no more parameters
    than `rank` has in the layer's own, and the spectrum.
    """
    spectrum = decomposition_of(layer, model)
    if policy.form not in ("auto", *layer.other_forms):
        return layer, rank, spectrum
    best = layer, rank, spectrum
    for form in layer.other_forms:
        other = layer.in_form(form)
        same_size = min(other.full_rank, layer.pair_parameters(rank) // other.pair_parameters(1))
        if same_size < 1:
            continue
        found = decomposition_of(other, model)
        better = truncation_error(found.sigma, same_size) < truncation_error(spectrum.sigma, rank)
        if better or policy.form == form:
            best = other, same_size, found
    return best


def frozen_names(model: nn.Module, globs: Iterable[str]) -> list[str]:
    """The names of the parameters that the globs match, a factor by the name of the weight it stands for as well.
    Raises `ValueError` for a glob that matches none.
    """
    names = [name for name, _ in model.named_parameters()]
    known = {name: (name, own_name(name), *_names_before(own_name(name))) for name in names}
    frozen: set[str] = set()
    for glob in globs:
        hits = {name for name in names if fnmatch.filter(known[name], glob)}
        if not hits:
            raise ValueError(
                f"each glob in freeze must match a parameter; {glob!r} matches none of {len(names)}. Names look like {own_name(names[0])!r}."
            )
        frozen |= hits
    return [name for name in names if name in frozen]


def freeze(model: nn.Module, globs: tuple[str, ...]) -> list[str]:
    """Stop training the parameters that the globs match. Returns a note, or nothing."""
    frozen = set(frozen_names(model, globs))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
    return [f"frozen after the switch: {len(frozen)} parameters ({', '.join(globs)})"] if frozen else []


def _names_before(name: str) -> tuple[str, ...]:
    """What a factor's weight was called as a layer's and as a raw parameter."""
    factor = re.fullmatch(r"(.*)\.[uv]\.(weight|bias)", name)
    return () if factor is None else (f"{factor[1]}.{factor[2]}", factor[1])


def decomposition_of(layer: Layer, model: nn.Module) -> Decomposition:
    """The layer's spectrum, with `σ_max` exact. Raises `NonFiniteWeightError` with its name."""
    stack = matrices_of(layer, model)
    check_finite(stack, layer.name)
    return decompose(stack)
