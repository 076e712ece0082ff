"""Who decides E, K and R: one policy per method, all used through the same calls."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fxrank.decisions import keep, take
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import unknown_name
from fxrank.plan import LayerDecision, Plan
from fxrank.policies.base import Policy
from fxrank.policies.cuttlefish import Cuttlefish
from fxrank.policies.forms import in_best_form
from fxrank.policies.ranks import ratio_rank
from fxrank.policies.scene import Clock, Scene


@dataclass(frozen=True, kw_only=True)
class FullRank(Policy):
    """Never switch: the full-rank twin, through the same calls."""

    takes_target = False

    @property
    def may_switch(self) -> bool:
        return False

    def ready(self, clock: Clock, scene: Scene) -> str | None:
        return None

    def decide(self, scene: Scene) -> list[LayerDecision]:
        return [keep(layer, layer.reason or "policy FullRank keeps every layer dense") for layer in scene.layers]

    def plan_without_switch(self, scene: Scene, clock: Clock) -> Plan:
        return Plan(self.name, tuple(self.decide(scene)), note="full rank as asked")


@dataclass(frozen=True, kw_only=True)
class Pufferfish(Policy):
    """E, K and one ratio by hand (Wang et al., MLSys 2021): after `E` epochs every layer beyond the first `K` gets
    `⌊ratio · full rank⌋`.

    The first and last layer stay dense as everywhere; ranks are used as given, except that no layer is made larger.
    """

    E: float
    K: int = 1
    ratio: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.E < 0 or self.K < 0:
            raise ValueError(f"E and K must not be negative; got E={self.E}, K={self.K}.")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be above 0 and at most 1; got {self.ratio}.")

    def ready(self, clock: Clock, scene: Scene) -> str | None:
        return f"E = {self.E:g} epochs as given" if clock.epoch >= self.E else None

    def eligible(self, scene: Scene) -> dict[str, str]:
        return {layer.name: f"among the first K = {self.K} layers" for layer in scene.layers[: self.K]}

    def decide(self, scene: Scene) -> list[LayerDecision]:
        leading = self.eligible(scene)

        def rank(layer: Layer) -> int | str:
            return leading.get(layer.name) or ratio_rank(layer.full_rank, self.ratio)

        return _fixed(self, scene, rank, f"{self.ratio:g} of full rank as given")


@dataclass(frozen=True, kw_only=True)
class SpectralInit(Pufferfish):
    """Low-rank from the start: spectral initialization with Frobenius decay (Khodak et al., ICLR 2021), the case E
    = 0 of Pufferfish.
    """

    E: float = field(default=0.0, init=False)


@dataclass(frozen=True, kw_only=True)
class FixedPlan(Policy):
    """Do what a plan says, at the step it says. A plan without a switch step is applied at once.

    A `Plan` given as the policy becomes one with the options of its own run (`Plan.training`), and so repeats it exactly;
    here they are the defaults unless given.
    """

    given: Plan
    takes_target = False

    @property
    def by_weights(self) -> Policy:
        return replace(self, factors="weight") if self.knows_data else self

    @property
    def known_plan(self) -> Plan:
        return self.given

    def ready(self, clock: Clock, scene: Scene) -> str | None:
        return "as planned" if clock.step >= (self.given.switch_step or 0) and self.given.R else None

    def decide(self, scene: Scene) -> list[LayerDecision]:
        # No optimizer would know a bias that is new.
        return [replace(d, gains_bias=False) if d.gains_bias else d for d in self.given.layers]

    def plan_without_switch(self, scene: Scene, clock: Clock) -> Plan:
        return super().plan_without_switch(scene, clock) if self.given.R else self.given


def _fixed(policy: Policy, scene: Scene, rank_of: Callable[[Layer], int | str], why: str) -> list[LayerDecision]:
    """Decisions for given ranks: a string from `rank_of` is the reason to keep."""
    decisions = []
    for layer in scene.layers:
        rank = layer.reason or rank_of(layer)
        if isinstance(rank, str):
            decisions.append(keep(layer, rank))
            continue
        if rank >= layer.break_even_rank:
            decisions.append(
                keep(
                    layer,
                    f"rank {rank} of {layer.full_rank} would not save anything: break-even is {layer.break_even_rank:.1f}",
                )
            )
            continue
        layer, rank, spectrum = in_best_form(layer, rank, policy.form, scene.model)
        rank_now = spectrum.stable_rank
        if rank_now == 0:  # both factors would be zero, and stay so: each one's gradient is a product with the other
            decisions.append(keep(layer, "its weight is zero (stable rank 0)"))
            continue
        scene.factors[layer.name], error = spectrum.factors(rank), spectrum.truncation_error(rank)
        decision = take(layer, rank, why, extra_bn=policy.extra_bn)
        decisions.append(replace(decision, stable_rank=round(rank_now, 4), truncation_error=round(error, 6)))
    return decisions


POLICIES: dict[str, Callable[..., Policy]] = {
    "cuttlefish": Cuttlefish,
    "cuttlefish-transformer": Cuttlefish.transformer,
    "cuttlefish-paper": Cuttlefish.paper,
    "cuttlefish-reference": Cuttlefish.reference,
    "pufferfish": Pufferfish,
    "spectral-init": SpectralInit,
    "full-rank": FullRank,
}
"""Policies by the names the command line takes."""


def as_policy(policy: Policy | Plan | str | None) -> Policy:
    """A policy as users may give it: an object, a plan to repeat, a name, or None for the default. `ValueError`
    lists the valid names.
    """
    if policy is None:
        return Cuttlefish()
    if isinstance(policy, Plan):
        factors = "auto" if policy.calibration_batches is None else "data"
        return FixedPlan(given=policy, factors=factors, **({} if policy.training is None else vars(policy.training)))
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise unknown_name("policy", policy, POLICIES)
        if policy == "pufferfish":
            raise ValueError(
                "the policy 'pufferfish' needs an E of yours, so it has no name alone; pass fxrank.Pufferfish(E=…, K=…, ratio=…)."
            )
        return POLICIES[policy]()
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy must be a fxrank policy, a Plan or a name; got {type(policy).__name__}. Valid names: {', '.join(POLICIES)}."
        )
    return policy
