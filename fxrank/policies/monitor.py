"""E: stable ranks of the live weights, sampled by optimizer step, and the test whether they have settled.

Ranks are sampled at even steps, 300 times in a run unless that takes too long (the papers' runs have 300 epochs and look once an epoch), so
that one rule serves 10 epochs, 300 epochs, or one long epoch: a slope is measured per sample, that is per 1/300 of
the training.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.errors import CheckpointError
from fxrank.passes.spectra.exact import check_finite, stable_rank_of
from fxrank.passes.spectra.tracked import NARROW, StableRankTracker


@dataclass(frozen=True)
class Detector(ABC):
    """Says which layers' rank curves have settled."""

    @abstractmethod
    def settled(
        self, curves: dict[str, list[float]], full_ranks: dict[str, int], before: frozenset[str]
    ) -> frozenset[str]:
        """Names of the settled layers. `curves` hold one value per sample, the first at initialization; `before` is
        the last answer.
        """

    def spaced(self, factor: float) -> "Detector | None":
        """The test for samples so many times as far apart, None if there is none."""
        return None


@dataclass(frozen=True)
class SlopeDetector(Detector):
    """A layer has settled when a straight line through its last `window` samples is flat.

    Flat means `|slope| ≤ epsilon` ranks per sample if `relative` is false (the paper's criterion, Cuttlefish Alg.
    1, with ε in ranks per epoch), or `|slope| ≤ epsilon` percent of the layer's full rank per sample if it is true:
    an absolute slope asks more of wide layers than of narrow ones. A least-squares slope does not mistake jitter
    for movement or a slow ramp for rest. A verdict lasts only while it is true.
    """

    epsilon: float = 0.1
    window: int = 25
    relative: bool = True

    def settled(
        self, curves: dict[str, list[float]], full_ranks: dict[str, int], before: frozenset[str]
    ) -> frozenset[str]:
        result = set()
        for name, curve in curves.items():
            if len(curve) < self.window + 1:  # the sample at initialization is not part of the curve's own movement
                continue
            slope = abs(float(np.polyfit(np.arange(self.window), curve[-self.window :], 1)[0]))
            limit = self.epsilon * full_ranks[name] / 100 if self.relative else self.epsilon
            if slope <= limit:
                result.add(name)
        return frozenset(result)

    def spaced(self, factor: float) -> Detector:
        """Over as many steps, but at least `LEAST_WINDOW` samples."""
        window = min(self.window, max(LEAST_WINDOW, round(self.window / factor)))
        return replace(self, epsilon=self.epsilon * factor, window=window)


@dataclass(frozen=True)
class ReferenceDetector(Detector):
    """The detector of the reference code, kept for comparison: rounded-down ranks, an exponential
    moving average, sticky verdicts.

    With `w = 2/(window + 1)` the average is `ema = w·x + (1-w)·ema`; a layer settles when the mean of the last
    `tail` values of `|gradient of ema|` is at most `epsilon`, times `relax[n]` when only `n` layers are left. No
    verdict before sample `window` (the first sample is number 0).
    """

    epsilon: float = 0.1
    window: int = 15
    tail: int = 11
    relax: tuple[tuple[int, float], ...] = ((1, 5.0), (2, 2.5))
    """(largest number of layers left, factor), the first that fits counts."""

    def settled(
        self, curves: dict[str, list[float]], full_ranks: dict[str, int], before: frozenset[str]
    ) -> frozenset[str]:
        remaining = len(curves) - len(before)
        factor = next((f for left, f in self.relax if remaining <= left), 1.0)
        result = set(before)
        for name, curve in curves.items():
            if name not in before and self.statistic(curve) <= self.epsilon * factor:
                result.add(name)
        return frozenset(result)

    def statistic(self, curve: Sequence[float]) -> float:
        """Mean of the last `tail` absolute gradients of the moving average; infinite before there are `window + 1`
        samples.
        """
        if len(curve) <= self.window:
            return float("inf")
        return float(np.abs(np.gradient(moving_average(np.floor(curve), self.window)))[-self.tail :].mean())


def moving_average(values: Sequence[float] | np.ndarray[Any, Any], window: int) -> np.ndarray[Any, Any]:
    """Exponential moving average with weight `2/(window + 1)`, started at the first value."""
    weight = 2 / (window + 1)
    out = [float(values[0])]
    for value in values[1:]:
        out.append(weight * float(value) + (1 - weight) * out[-1])
    return np.array(out)


LEAST_WINDOW = 8
SHARE = 0.01
"""Of the time of the steps between two samples, what a sample may take, as far as counting tells."""
FEWEST = 60
"""Samples of a run are not spaced so that it has fewer."""
PRODUCTS = 300
"""Multiply-adds of a training step in the time that one number of a weight takes in a sample: some twenty products of a matrix with a
vector, which wait for memory (2.5 ms for 512 x 512 on one core).
"""
CALLS = 4e6, 20e6
"""Multiply-adds of a training step in the time that a sample takes for a layer at least, narrow or not: 0.1 and 0.6 ms."""


def spacing(layers: Sequence[Layer], interval: int, total_steps: int) -> int:
    """The interval at which samples take their `SHARE` of the steps, at least the one that is wanted, and at most that of `FEWEST`."""
    step = 3 * sum(layer.macs for layer in layers)
    sample = 0.0
    for layer in layers:
        if layer.supported:
            narrow = layer.full_rank <= NARROW
            sample += (
                layer.groups * CALLS[not narrow] + (layer.full_rank if narrow else PRODUCTS) * layer.rows * layer.cols
            )
    affordable = math.ceil(sample / (SHARE * step)) if step else interval
    return max(interval, min(affordable, total_steps // FEWEST))


class RankMonitor:
    """Histories of the stable ranks of all `layers` whose kind is supported, weights read live from `model`.

    `interval` is in optimizer steps. `steps[i]` is the number of optimizer steps before sample `i`;
    `curves[name][i]` the stable rank then. The sample at step 0 is exact (it makes ξ); later ones come from the
    warm-started Lanczos tracker.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        model: nn.Module,
        detector: Detector,
        interval: int,
        *,
        seed: int = 0,
        agree: Callable[[Callable[[], list[float]]], list[float]] = lambda measure: measure(),
    ) -> None:
        """`agree` gives all processes of a distributed run what the first one measured."""
        self._agree = agree
        self._layers = [layer for layer in layers if layer.supported]
        self._model = model
        self._detector = detector
        self.interval = max(1, interval)
        self._tracker = StableRankTracker(seed)
        self.steps: list[int] = []
        self.curves: dict[str, list[float]] = {layer.name: [] for layer in self._layers}
        self.settled: frozenset[str] = frozenset()
        self.full_ranks = {layer.name: layer.full_rank for layer in self._layers}

    def observe(self, step: int, *, exact: bool = False, judged: frozenset[str] | None = None) -> None:
        """Take a sample after `step` optimizer steps. `judged` are the layers the detector looks at (default all).

        Raises `NonFiniteWeightError` that names the layer.
        """
        values = self._agree(lambda: self._measure(exact))
        self.steps.append(step)
        for layer, value in zip(self._layers, values, strict=True):
            self.curves[layer.name].append(value)
        watched = {n: c for n, c in self.curves.items() if judged is None or n in judged}
        self.settled = self._detector.settled(watched, self.full_ranks, self.settled)

    @torch.no_grad()
    def _measure(self, exact: bool) -> list[float]:
        if any(
            p.is_meta for p in self._model.parameters()
        ):  # one that stands for weights in shards: gather one at a time
            return [self._measure_one(number, exact) for number in range(len(self._layers))]
        stacks = [stack_of(layer, self._model) for layer in self._layers]
        if not exact:
            return self._tracker(stacks, [layer.name for layer in self._layers])
        for layer, stack in zip(self._layers, stacks, strict=True):
            check_finite(stack, layer.name)
        return [stable_rank_of(stack) for stack in stacks]

    def _measure_one(self, number: int, exact: bool) -> float:
        layer = self._layers[number]
        stack = stack_of(layer, self._model)
        if not exact:
            return self._tracker([stack], [layer.name], first=number)[0]
        check_finite(stack, layer.name)
        return stable_rank_of(stack)

    def due(self, step: int) -> bool:
        """Whether a sample belongs after this step."""
        return step % self.interval == 0

    def latest(self) -> dict[str, float]:
        """The last sample of each layer."""
        return {name: curve[-1] for name, curve in self.curves.items() if curve}

    def state_dict(self) -> dict[str, Any]:
        """Histories, verdicts and the tracker's state, plain data and tensors."""
        return {
            "steps": list(self.steps),
            "curves": {n: list(c) for n, c in self.curves.items()},
            "settled": sorted(self.settled),
            "tracker": self._tracker.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a state without the tracker's is continued by a fresh one. Raises `CheckpointError`
        for the histories of another model, and for damaged ones.
        """
        self.check_state(state)
        self.steps = list(state["steps"])
        self.curves = {n: list(c) for n, c in state["curves"].items()}
        self.settled = frozenset(state["settled"])
        if "tracker" in state:
            self._tracker.load_state_dict(state["tracker"])

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise `CheckpointError` unless `load_state_dict` can take this state."""
        steps, curves, settled = (state.get(name) for name in ("steps", "curves", "settled"))
        if isinstance(curves, dict) and (strange := [*(curves.keys() ^ self.curves.keys())]):
            raise CheckpointError(
                f"saved rank histories must be of the layers of this model; {min(map(str, strange))!r} is only in one of them. Build the model that was saved."
            )
        whole = (
            isinstance(steps, list)
            and all(type(step) is int for step in steps)
            and isinstance(curves, dict)
            and all(
                isinstance(curve, list)
                and len(curve) == len(steps) > 0
                and all(isinstance(rank, (int, float)) for rank in curve)
                for curve in curves.values()
            )
            and isinstance(settled, list)
            and all(isinstance(name, str) and name in curves for name in settled)
        )
        if not whole:
            raise CheckpointError(
                "saved rank histories must have one value per layer and sample; these have not. Load another copy, or start afresh."
            )
        if "tracker" in state:
            self._tracker.check_state(state["tracker"], [layer.full_rank for layer in self._layers])
