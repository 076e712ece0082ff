"""Cuttlefish: E from the rank curves, K from profiling, R from what the model gives on data, or from the spectra."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from fxrank.decisions import keep, take
from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.discovery.stacks import stacks
from fxrank.passes.errors import unknown_name
from fxrank.plan import LayerDecision
from fxrank.policies.base import LATER, Policy
from fxrank.policies.forms import in_best_form, spectrum_of
from fxrank.policies.monitor import Detector, RankMonitor, ReferenceDetector, SlopeDetector
from fxrank.policies.outputs import check_keep
from fxrank.policies.ranks import OF_OUTPUTS, Evidence, Xi, random_matrix_xi, rank_rule, whole_rank
from fxrank.policies.scene import Clock, Scene
from fxrank.policies.times import Rounding
from fxrank.switch.zero_weights import why_dead

PAPER_SPEEDUP = 1.5
"""υ of the paper's Alg. 2."""
KEEP = 0.98
"""Of the model's outputs."""
FLOOR = 0.3
"""Of the parameters of the layers that are factorized."""
EARLIEST, LATEST = 0.65, 0.75
"""Shares of the run. At 0.65 short runs keep more accuracy than at the 0.4 at which their ranks have settled (`docs/benchmarks.md`); where the ranks
of a long one settle long before, as in the papers' 300 epochs, an earlier switch saves more time.
"""
MOVED = 0.9
"""A stable rank below this share of a random matrix's says that a layer has learned something."""
STILL = 0.01
"""Ranks of which most have moved by no more than this share are those that a pretrained model came with."""
BESIDE = 4
"""Pairs of a stack that are timed with the dense layer at a time."""
_PAPER: dict[str, Any] = {
    "rank_metric": "scaled_stable_rank",
    "speedup_threshold": PAPER_SPEEDUP,
    "round_to": 1,
    "wait": False,
    "latest": None,
    "earliest": 0.0,
}
FULL_SPEED = 1.0
"""A pair must be faster than the dense layer at the very rank chosen."""


@dataclass(frozen=True, kw_only=True)
class Cuttlefish(Policy):
    """E, K and R by themselves (Wang et al., MLSys 2023).

    - E: switch when the stable rank of every eligible layer has settled. `epsilon` is in percent of the full rank
      per 1/300 of the run; see `SlopeDetector`. With `wait`, settled ranks of which none is below break-even yet (by outputs: below those of
      random matrices) do not count: a run that has hardly begun is flat as well. Nor do, where ranks are chosen by outputs, those of which most are
      as they were at the start: fine-tuning moves what a pretrained model gives, and hardly its spectra. Ranks that have settled before the share
      `earliest` of the run wait for it: what is still to be learned is learned better by the full model. `latest` is the share of the run at which the switch is
      made in any case, None for never.
    - K: a stack of layers is factorized only if its pair at `probe_ratio` of the full rank is more than
      `speedup_threshold` times as fast. `k_rule="stack"` judges each stack by itself; `"prefix"` is the paper's Alg. 2, the
      longest run of leading stacks that fail. `speedup_threshold=None` switches all timing off.
    - R: `rank_metric` is a name in `fxrank.policies.ranks.RANK_RULES`, `share` its coverage (accumulative, energy), `ratio`
      for `"ratio"`. `"outputs"` is no rule for one layer: the ranks of all together are the smallest with which the model keeps the share
      `keep` of its outputs on live data, by factors that know them, but no smaller together than `floor` (see `session.whole_outputs`).
      `min_ratio` bounds the rank from below. `xi` is the scale of the stable rank: `"init"` measures
      it when the session starts, which is only right for a fresh model; for a model that arrives pretrained use
      `"random"` (that of a random matrix of the shape), a number, or a dict by layer name. `round_to`: ranks are
      rounded up to a multiple of it; `"auto"` measures the rank and the next multiples of 8 and 16 and takes the
      fastest. On a CPU ranks chosen by outputs stay as they are, and are timed at the next multiple of 8 (see `times.Rounding`).

    - Under a target ranks are chosen for it, by the spectra: `rank_metric`, `share`, `ratio`, `min_ratio` and `round_to` decide nothing then.

    Else always: a layer whose rank reaches break-even, or whose pair is not faster at the rank chosen, unless size is the `objective`,
    stays dense.
    """

    rank_metric: str = OF_OUTPUTS
    epsilon: float = 0.1
    window: int = 25
    wait: bool = True
    latest: float | None = LATEST
    earliest: float = field(default=EARLIEST, metadata=LATER)
    speedup_threshold: float | None = FULL_SPEED
    probe_ratio: float = 0.25
    k_rule: str = "stack"
    share: float = 0.8
    ratio: float = 0.25
    min_ratio: float = 0.0
    xi: Xi = "init"
    round_to: int | str = "auto"
    test: Detector | None = None
    """A convergence test of your own instead of the slope test."""
    form: str = "auto"
    samples: int | str = 300
    """Samples of the ranks in a run, or `"epoch"` for one an epoch. Where so many would take much of a step's time they are fewer, and the
    window spans as many steps (see `monitor.spacing`).
    """
    keep: float = field(default=KEEP, metadata=LATER)
    """For `rank_metric="outputs"`."""
    floor: float = field(default=FLOOR, metadata=LATER)
    """For the same: pairs have at least this share of their layers' parameters, all together. What a model gives early in a training takes few
    of them, and what it still learns may take more; 0 where nothing is learned any more.
    """
    objective: str = field(default="auto", metadata=LATER)
    """`"speed"`: before the switch the whole training step is timed with the pairs, on copies, and those that do not pay are given back;
    `"size"`: it is timed and said, and no layer is left dense for its time. `"auto"` is `"size"` under a target, and else `"speed"`; under the papers' prefix rule it is not timed.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank_metric != OF_OUTPUTS:
            rank_rule(self.rank_metric)
        elif self.factors == "weight" and self.budget is None:
            raise ValueError(
                f"rank_metric={self.rank_metric!r} says how many ranks factors need that know the data; got factors={self.factors!r}. "
                "Leave it out, or choose another rank_metric."
            )
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor is a share of the layers' parameters, in [0, 1); got {self.floor}.")
        check_keep(self.keep)
        if self.k_rule not in ("stack", "prefix"):
            raise unknown_name("k_rule", self.k_rule, ("stack", "prefix"))
        if self.objective not in ("auto", "speed", "size"):
            raise unknown_name("objective", self.objective, ("auto", "speed", "size"))
        if isinstance(self.xi, str) and self.xi not in ("init", "random"):
            raise unknown_name("xi (or a number, or a dict by layer name)", self.xi, ("init", "random"))
        if isinstance(self.samples, str) and self.samples != "epoch":
            raise unknown_name("samples (or a number)", self.samples, ("epoch",))
        if isinstance(self.round_to, str) and self.round_to != "auto":
            raise unknown_name("round_to (or a number)", self.round_to, ("auto",))
        for option in ("probe_ratio", "ratio", "share"):
            if not 0 < getattr(self, option) <= 1:
                raise ValueError(f"{option} must be above 0 and at most 1; got {getattr(self, option)}.")
        if not isinstance(self.round_to, str) and self.round_to < 1:
            raise ValueError(f"round_to must be at least 1; got {self.round_to}. 1 keeps ranks as they are.")
        for option in ("min_ratio", "earliest", "latest", "speedup_threshold"):
            value = getattr(self, option)
            if value is not None and (value < 0 or (option != "speedup_threshold" and value > 1)):
                allowed = "at least 0" if option == "speedup_threshold" else "a share in [0, 1]"
                or_none = " or None" if option in ("latest", "speedup_threshold") else ""
                raise ValueError(f"{option} must be {allowed}{or_none}; got {value}.")
        if not isinstance(self.samples, str) and self.samples < 1:
            raise ValueError(f"samples must be at least 1; got {self.samples}.")
        scales = self.xi.values() if isinstance(self.xi, Mapping) else () if isinstance(self.xi, str) else (self.xi,)
        if not all(isinstance(scale, Real) for scale in scales):
            raise TypeError(f"xi must be a number, a dict of numbers, 'init' or 'random'; got {self.xi!r}.")
        if self.test is not None and not isinstance(self.test, Detector):
            raise TypeError(f"test must be a Detector, whose settled() says it; got {type(self.test).__name__}.")
        if any(scale <= 0 for scale in scales):
            raise ValueError(f"xi must be above 0; got {self.xi}. 1.0 leaves the stable rank unscaled.")
        if self.epsilon <= 0 or self.window < 2:
            raise ValueError(f"epsilon must be above 0 and window at least 2; got {self.epsilon} and {self.window}.")
        unused = {"xi": "init", "share": 0.8, "ratio": 0.25} if self.keeps is not None else {}
        for option, default in unused.items():
            if (value := getattr(self, option)) != default:
                raise ValueError(
                    f"{option} is an option of other ranks than rank_metric={self.rank_metric!r} chooses; got {value}. Leave it out, or name the "
                    "rank_metric that it is for: 'scaled_stable_rank' was the default before."
                )

    @classmethod
    def paper(cls) -> "Cuttlefish":
        """The paper's own rule: one look an epoch, `|d rank / d epoch| ≤ 0.1` for every layer, prefix K at 1.5, no
        rounding, no deadline (Alg. 1 and 2).
        """
        return cls(
            test=SlopeDetector(epsilon=0.1, window=2, relative=False),
            samples="epoch",
            k_rule="prefix",
            **_PAPER,
        )

    @classmethod
    def transformer(cls, **options: Any) -> "Cuttlefish":
        """The papers' rule for Transformers: `max(scaled stable rank, accumulative rank at 0.8)`, layers whose rank saves
        nothing left full, the learning rate a third of the schedule's after the switch (Cuttlefish, appendix; 1/2 for
        ResMLP). `options` override any field; for a pretrained model add `xi="random"`.
        """
        chosen: dict[str, Any] = {
            "rank_metric": "max_scaled_accumulative",
            "share": 0.8,
            "lr_scale": 1 / 3,
            "speedup_threshold": PAPER_SPEEDUP,
            "earliest": 0.0,
            "latest": 0.5,
        }
        return cls(**(chosen | options))

    @classmethod
    def reference(cls) -> "Cuttlefish":
        """The reference code's detector on CIFAR: window 15, tail 11, relaxed for the last two layers,
        a second warm-up after the switch.
        """
        return cls(test=ReferenceDetector(), samples="epoch", k_rule="prefix", rewarmup=5 / 300, **_PAPER)

    @property
    def speedup_needed(self) -> float | None:
        return self.speedup_threshold

    @property
    def must_pay(self) -> bool | None:
        if self.speedup_threshold is None or (self.objective == "auto" and self.k_rule == "prefix"):
            return None
        return self.objective == "speed" or (self.objective == "auto" and self.budget is None)

    @property
    def keeps(self) -> float | None:
        return self.keep if self.rank_metric == OF_OUTPUTS and self.budget is None else None

    @property
    def by_weights(self) -> Policy:
        if self.keeps is None or self.factors == "data":
            return self
        threshold = PAPER_SPEEDUP if self.speedup_threshold == FULL_SPEED else self.speedup_threshold
        return replace(self, rank_metric="scaled_stable_rank", speedup_threshold=threshold)

    @property
    def probe(self) -> float:
        return self.probe_ratio

    def detector(self, clock: Clock) -> Detector | None:
        # ε is per 1/300 of the run; a sample is a little more or less than that when steps do not divide evenly.
        stretch = 300 * self.interval(clock) / clock.total_steps
        return self.test or SlopeDetector(self.epsilon * stretch, self.window)

    def interval(self, clock: Clock) -> int:
        return (
            clock.steps_per_epoch if isinstance(self.samples, str) else max(1, round(clock.total_steps / self.samples))
        )

    def eligible(self, scene: Scene) -> dict[str, str]:
        threshold = self.speedup_threshold
        if threshold is None or self.objective == "size":
            return {}
        slow = {n: p.speedup for n, p in scene.profiles.items() if p.speedup <= threshold}
        if self.k_rule == "prefix":
            leading = {}
            for layer in scene.layers:
                if layer.reason is None:
                    if layer.name not in slow:
                        break
                    leading[layer.name] = slow[layer.name]
            slow = leading
        return {
            name: f"a pair at {self.probe_ratio:g} of full rank is {speedup:.2f}x as fast, the threshold is {threshold:g}x"
            for name, speedup in slow.items()
        }

    def ready(self, clock: Clock, scene: Scene) -> str | None:
        assert scene.monitor is not None
        watched = scene.watched(self.eligible(scene))
        if not watched and self.budget is None:
            return "no layer is eligible"
        soon = clock.step < self.earliest * clock.total_steps
        if watched and watched <= scene.monitor.settled and not soon and (not self.wait or self._saves(watched, scene)):
            return f"the ranks of all {len(watched)} eligible layers have settled"
        if self.latest is not None and clock.step >= self.latest * clock.total_steps:
            if self.keeps is not None and _as_they_came(watched, scene.monitor):
                return f"deadline at {self.latest:g} of the run; most of {len(watched)} ranks are as they were at the start"
            unsettled = sorted(watched - scene.monitor.settled)
            return f"deadline at {self.latest:g} of the run; {len(unsettled)} of {len(watched)} layers had not settled"
        return None

    def _saves(self, watched: frozenset[str], scene: Scene) -> bool:
        """Whether a layer's rank is below break-even by now, as far as its stable rank tells."""
        assert scene.monitor is not None
        stable_ranks = scene.monitor.latest()
        if self.keeps is not None and _as_they_came(watched, scene.monitor):
            return False
        if self.rank_metric == OF_OUTPUTS:
            layers = [a for a in scene.layers if a.name in watched]
            return any(random_matrix_xi(a.rows, a.cols) * stable_ranks[a.name] < MOVED * a.full_rank for a in layers)
        if self.rank_metric not in ("scaled_stable_rank", "max_scaled_accumulative"):
            return True
        return any(
            whole_rank(max(self._xi_of(a, scene) * stable_ranks[a.name], self.min_ratio * a.full_rank), a.full_rank)
            < a.break_even_rank
            for a in scene.layers
            if a.name in watched
        )

    def decide(self, scene: Scene) -> list[LayerDecision]:
        slow = self.eligible(scene)
        if self.keeps is not None:
            self._time_chosen(scene)
        decisions = []
        for layer in scene.layers:
            reason = layer.reason or slow.get(layer.name)
            decision = keep(layer, reason) if reason else self._decide_one(layer, scene)
            profile = scene.profiles.get(layer.name)
            if profile is not None and decision.speedup is None:
                decision = replace(decision, speedup=round(profile.speedup, 4))
            decisions.append(decision)
        return decisions

    def _decide_one(self, layer: Layer, scene: Scene) -> LayerDecision:
        if self.keeps is not None:
            return self._as_chosen(layer, scene)
        spectrum = spectrum_of(layer, scene.model)
        rank_now = spectrum.stable_rank
        if rank_now == 0:
            return keep(layer, "its weight is zero (stable rank 0)")
        xi = self._xi_of(layer, scene)
        value = rank_rule(self.rank_metric)(Evidence(spectrum, xi, self.share, self.ratio))
        full_rank = layer.full_rank
        rank = whole_rank(max(value, self.min_ratio * full_rank), full_rank)
        known: dict[str, Any] = {"stable_rank": round(rank_now, 4), "xi": round(xi, 4)}
        if rank >= layer.break_even_rank:
            return replace(_unsaving(layer, rank), **known)
        layer, rank, spectrum = in_best_form(layer, rank, self.form, scene.model, spectrum)
        rank, timed, speedup = self._rounding.rounded(layer, rank, scene.profiler)
        if speedup is not None and speedup <= FULL_SPEED and self.objective != "size":
            return replace(_too_slow(rank, timed, layer, speedup), **known)
        scene.factors[layer.name] = spectrum.factors(rank)
        floor = f", raised to {self.min_ratio:g} of it" if self.min_ratio * full_rank > value else ""
        why = f"{self.rank_metric} {value:.1f} of {full_rank}{floor}"
        decision = take(layer, rank, why, extra_bn=self.extra_bn)
        return replace(
            decision,
            truncation_error=round(spectrum.truncation_error(rank), 6),
            speedup=None if speedup is None else round(speedup, 4),
            **known,
        )

    def _as_chosen(self, layer: Layer, scene: Scene) -> LayerDecision:
        """The pair that was chosen with those of all other layers, if it is faster; nothing is asked of the weight's spectrum, which takes
        as long as all else.
        """
        assert scene.monitor is not None
        known: dict[str, Any] = {"stable_rank": round(scene.monitor.latest()[layer.name], 4)}
        if layer.name not in scene.chosen:
            reason = why_dead(stack_of(layer, scene.model)) or f"worth its parameters where {scene.asked}"
            return replace(keep(layer, reason), **known)
        planned, rank = self._planned(layer.name, scene)
        if rank >= planned.break_even_rank:
            return replace(_unsaving(planned, rank), **known)
        rank, timed, speedup = self._rounding.rounded(planned, rank, scene.profiler)
        if speedup is not None and speedup <= FULL_SPEED and self.objective != "size":
            return replace(_too_slow(rank, timed, planned, speedup), **known)
        decision = take(planned, rank, f"rank {rank} of {planned.full_rank}: {scene.asked}", extra_bn=self.extra_bn)
        return replace(decision, speedup=None if speedup is None else round(speedup, 4), **known)

    def _planned(self, name: str, scene: Scene) -> tuple[Layer, int]:
        """A layer in its form and its rank, of those that were chosen."""
        planned, rank = scene.chosen[name]
        return planned, max(rank, whole_rank(self.min_ratio * planned.full_rank, planned.full_rank))

    def _time_chosen(self, scene: Scene) -> None:
        """The ranks of a stack beside each other, a few at a time: each has its own weights, inputs and gradients."""
        if scene.profiler is None:
            return
        planned = {name: self._planned(name, scene) for name in scene.chosen}
        for stack in stacks([layer for layer, rank in planned.values() if rank < layer.break_even_rank]):
            ranks = [self._rounding.timed(a, planned[a.name][1], scene.profiler) for a in stack.layers]
            all_ranks = sorted(set().union(*ranks))
            for first in range(0, len(all_ranks), BESIDE):
                scene.profiler.times_ms(stack.sample, all_ranks[first : first + BESIDE])

    @property
    def _rounding(self) -> Rounding:
        return Rounding(self.round_to, as_chosen=self.keeps is not None)

    def _xi_of(self, layer: Layer, scene: Scene) -> float:
        if isinstance(self.xi, Mapping):
            if layer.name not in self.xi:
                raise ValueError(
                    f"xi as a dict must name every layer to factorize; {layer.name!r} is missing. Add it, or use 'init' or 'random'."
                )
            return float(self.xi[layer.name])
        if not isinstance(self.xi, str):
            return float(self.xi)
        if self.xi == "random":
            return random_matrix_xi(layer.rows, layer.cols)
        assert scene.monitor is not None
        first = scene.monitor.curves[layer.name][0]
        return layer.full_rank / first if first > 0 else 1.0


def _as_they_came(watched: frozenset[str], monitor: RankMonitor) -> bool:
    curves = [monitor.curves[name] for name in watched]
    still = sum(abs(curve[-1] - curve[0]) <= STILL * curve[0] for curve in curves)
    return 2 * still > len(curves)


def _unsaving(layer: Layer, rank: int) -> LayerDecision:
    even = f"break-even is {layer.break_even_rank:.1f}"
    return keep(layer, f"rank {rank} of {layer.full_rank} would not save anything: {even}")


def _too_slow(rank: int, timed: int, layer: Layer, speedup: float) -> LayerDecision:
    how = "" if timed == rank else f", timed at {timed},"
    reason = f"at rank {rank}{how} a pair measured {speedup:.2f}x as fast as the layer"
    return replace(keep(layer, reason), speedup=round(speedup, 4))
