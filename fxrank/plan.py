"""A plan: every decision about every layer, as plain data with JSON in and out."""

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxrank.passes.errors import PlanMismatchError, unknown_name

PLAN_VERSION = 3
"""Files of earlier versions are read: those of version 1 know no calibration and no budget, those of 2 no budget of time."""
SHARES = ("params", "macs", "step_time", "latency")
"""What a budget may be of."""


@dataclass(frozen=True)
class LayerDecision:
    """What was decided about one weight, and why.

    `rank` is None for a layer kept dense. `full_rank` counts one group. Measured fields are None where nothing was
    measured: `stable_rank` and `xi` at the switch, `speedup` dense over pair at the rank chosen (at the probe rank
    for a layer kept), `truncation_error` of the weight, relative in the Frobenius norm, `output_error` the root of the share of the
    layer's mean squared output that its pair lost on the calibration data. `gains_bias`: the pair has a bias and the layer none.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    full_rank: int
    rank: int | None
    reason: str
    form: str = "channel"
    extra_bn: bool = False
    parameters: int = 0
    pair_parameters: int | None = None
    macs: int = 0
    pair_macs: int | None = None
    stable_rank: float | None = None
    xi: float | None = None
    speedup: float | None = None
    truncation_error: float | None = None
    gains_bias: bool = False
    output_error: float | None = None

    @property
    def factorized(self) -> bool:
        return self.rank is not None

    @property
    def ratio(self) -> float | None:
        """Rank over full rank; None if kept."""
        return None if self.rank is None else self.rank / self.full_rank


@dataclass(frozen=True)
class Training:
    """How a run goes on after the switch: the options of its `Policy` by the same names, which says what they mean.

    Raises `ValueError` or `TypeError` for one that is out of bounds.
    """

    frobenius_decay: float | str | None = "auto"
    lr_scale: float = 1.0
    rewarmup: float = 0.0
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        decay = self.frobenius_decay
        if isinstance(decay, str) and decay != "auto":
            raise unknown_name("frobenius_decay (or a number, or None)", decay, ["auto"])
        if isinstance(decay, (int, float)) and not decay >= 0:
            raise ValueError(f"frobenius_decay must not be negative; got {decay}. None switches it off.")
        if not self.lr_scale > 0:
            raise ValueError(f"lr_scale must be above 0; got {self.lr_scale}. 1.0 keeps the schedule.")
        if isinstance(self.freeze, str):
            raise TypeError(
                f"freeze takes a tuple of globs of parameter names; got the string {self.freeze!r}. Write ({self.freeze!r},)."
            )
        if not isinstance(self.freeze, (tuple, list)) or not all(isinstance(glob, str) for glob in self.freeze):
            raise TypeError(
                f"freeze takes a tuple of globs of parameter names; got {self.freeze!r}. () freezes nothing."
            )
        if not 0 <= self.rewarmup < 1:
            raise ValueError(f"rewarmup is a share of the run in [0, 1); got {self.rewarmup}. 0 switches it off.")


@dataclass(frozen=True)
class Budget:
    """What all layers together may cost, as a share of the dense model's: of its `"params"`, of its `"macs"`, or, measured on a `device`,
    of the milliseconds of its `"step_time"` (forward and backward in training) or of its `"latency"` (forward in evaluation); and the
    share that the plan takes. `spread` is half the distance between the quartiles of a measured share.

    Raises `ValueError` for one that is out of bounds.
    """

    of: str
    target: float
    reached: float
    spread: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.of not in SHARES:
            raise unknown_name("a budget's quantity", self.of, SHARES)
        if not 0 < self.target <= 1:
            raise ValueError(f"target_{self.of} is a share in (0, 1]; got {self.target}. 0.5 halves them.")

    @property
    def is_time(self) -> bool:
        """Whether it is measured, not counted."""
        return self.of in ("step_time", "latency")

    def __str__(self) -> str:
        measured = "" if self.spread is None else f" ± {self.spread:.4f}, measured on {self.device}"
        return f"target_{self.of}={self.target:g}, reached {self.reached:.4f}{measured}"


@dataclass(frozen=True)
class Plan:
    """All decisions of one run. `layers` are in graph order.

    `switch_step` counts optimizer steps made before the switch, `switch_epoch` (E) is the same in epochs; None for
    a one-shot rewrite or if nothing was factorized. `training` is None for a one-shot rewrite, and in files of an earlier
    fxrank. `budget` is what the ranks were chosen for, None if there was none; `calibration_batches` how many batches the factors
    know, None if they are of the weights alone.
    """

    policy: str
    layers: tuple[LayerDecision, ...]
    switch_step: int | None = None
    switch_epoch: float | None = None
    note: str = ""
    training: Training | None = None
    budget: Budget | None = None
    calibration_batches: int | None = None

    @property
    def E(self) -> float | None:
        """Switch epoch; None where nothing is factorized."""
        return self.switch_epoch if self.R else None

    @property
    def K(self) -> int:
        """Number of leading layers left alone; all of them if nothing is factorized."""
        return next((i for i, layer in enumerate(self.layers) if layer.factorized), len(self.layers))

    @property
    def R(self) -> dict[str, int]:
        """Rank per factorized layer."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def layer(self, name: str) -> LayerDecision:
        """The decision about one layer, whether it is about the layer or about its weight alone (`"fc.weight"`). Raises `KeyError`."""
        by_name = {layer.name: layer for layer in self.layers}
        return by_name[name if name in by_name or f"{name}.weight" not in by_name else f"{name}.weight"]

    def with_layers(self, changed: Iterable[LayerDecision]) -> "Plan":
        """The plan with some decisions replaced, by name."""
        by_name = {layer.name: layer for layer in changed}
        return replace(self, layers=tuple(by_name.get(layer.name, layer) for layer in self.layers))

    def to_json(self) -> str:
        """Human-readable JSON; `from_json` is its inverse."""
        data = {"format": "fxrank-plan", "version": PLAN_VERSION} | asdict(self)
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan. Raises `PlanMismatchError` that names the first thing wrong with it."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanMismatchError(f"a plan must be JSON; {error}. Use the file that Plan.save wrote.") from error
        if not isinstance(data, dict) or data.get("format") != "fxrank-plan":
            raise PlanMismatchError(
                'a plan must be a JSON object with "format": "fxrank-plan"; this one is not. Use the file that Plan.save wrote.'
            )
        if data.get("version") not in range(1, PLAN_VERSION + 1):
            raise PlanMismatchError(
                f"this fxrank reads plans up to version {PLAN_VERSION}; got version {data.get('version')!r}. Install the fxrank that wrote it."
            )
        layers = data.get("layers")
        if not isinstance(layers, list):
            raise PlanMismatchError(f"a plan's layers must be a list; got {type(layers).__name__}.")
        step = _typed(data, "switch_step", int, "plan", optional=True)
        epoch = _typed(data, "switch_epoch", float, "plan", optional=True)
        for name, value in (("switch_step", step), ("switch_epoch", epoch)):
            if value is not None and value < 0:
                raise PlanMismatchError(f"plan: {name} must be at least 0, or null; got {value}.")
        return cls(
            policy=_typed(data, "policy", str, "plan"),
            layers=tuple(_read_layer(entry, i) for i, entry in enumerate(layers)),
            switch_step=step,
            switch_epoch=epoch,
            note=_typed(data, "note", str, "plan"),
            training=_read_training(data.get("training")),
            budget=_read_budget(data.get("budget")),
            calibration_batches=_typed(data, "calibration_batches", int, "plan", optional=True),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read JSON from `path`. Raises `PlanMismatchError`, or `FileNotFoundError`."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PlanMismatchError(
                f"a plan must be UTF-8 JSON; {path} is not: {error}. Use the file that Plan.save wrote."
            ) from error

    def __str__(self) -> str:
        by_weight = any(layer.truncation_error is not None for layer in self.layers)
        by_output = any(layer.output_error is not None for layer in self.layers)
        shown: dict[str, Callable[[LayerDecision], object]] = {
            "layer": lambda layer: layer.name,
            "kind": lambda layer: layer.kind,
            "weight": lambda layer: "x".join(map(str, layer.weight_shape)),
            "full": lambda layer: layer.full_rank,
            "rank": lambda layer: "-" if layer.rank is None else layer.rank,
            "ratio": lambda layer: "-" if layer.ratio is None else f"{layer.ratio:.2f}",
            "error": lambda layer: _error(layer.truncation_error),
            "output error": lambda layer: _error(layer.output_error),
            "speed-up": lambda layer: "-" if layer.speedup is None else f"{layer.speedup:.2f}x",
            "reason": lambda layer: layer.reason,
        }
        left_out = {"error": by_output and not by_weight, "output error": not by_output}
        columns = {name: cell for name, cell in shown.items() if not left_out.get(name)}
        rows = [[cell(layer) for cell in columns.values()] for layer in self.layers]
        return tabulate(rows, headers=list(columns), disable_numparse=True)


def _error(relative: float | None) -> str:
    return "-" if relative is None else f"{relative:.3f}"


_TYPES: dict[str, tuple[type, bool]] = {
    "name": (str, False),
    "kind": (str, False),
    "full_rank": (int, False),
    "rank": (int, True),
    "reason": (str, False),
    "form": (str, False),
    "extra_bn": (bool, False),
    "parameters": (int, False),
    "pair_parameters": (int, True),
    "macs": (int, False),
    "pair_macs": (int, True),
    "stable_rank": (float, True),
    "xi": (float, True),
    "speedup": (float, True),
    "truncation_error": (float, True),
    "gains_bias": (bool, False),
    "output_error": (float, True),
}
_VERSION_1 = {"gains_bias": False}
"""What layers of version 1 do not say."""
_VERSION_2 = {"spread": None, "device": None}
"""What budgets of version 2 do not say."""


def _read_layer(entry: Any, index: int) -> LayerDecision:
    where = f"layer {index} of the plan"
    if not isinstance(entry, dict):
        raise PlanMismatchError(f"{where} must be an object; got {type(entry).__name__}.")
    known = {f.name for f in fields(LayerDecision)}
    if unknown := sorted(set(entry) - known):
        raise PlanMismatchError(f"{where} has unknown fields {unknown}; known are {sorted(known)}.")
    shape = entry.get("weight_shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
        raise PlanMismatchError(f"{where}: weight_shape must be a list of whole numbers; got {shape!r}.")
    values = {
        name: _typed(_VERSION_1 | entry, name, kind, where, optional) for name, (kind, optional) in _TYPES.items()
    }
    decision = LayerDecision(weight_shape=tuple(shape), **values)
    if decision.rank is not None and not 1 <= decision.rank <= decision.full_rank:
        raise PlanMismatchError(
            f"{where} ({decision.name}): rank must be in 1 … {decision.full_rank}; got {decision.rank}."
        )
    return decision


def _read_training(entry: Any) -> Training | None:
    if entry is None:
        return None
    where, known = "the plan's training", [f.name for f in fields(Training)]
    if not isinstance(entry, dict) or set(entry) != set(known):
        raise PlanMismatchError(f"{where} must be an object with {', '.join(known)}; got {entry!r:.200}.")
    decay, freeze = entry["frobenius_decay"], entry["freeze"]
    if decay != "auto":
        decay = _typed(entry, "frobenius_decay", float, where, optional=True)
    if not isinstance(freeze, list) or not all(isinstance(glob, str) for glob in freeze):
        raise PlanMismatchError(f"{where}: freeze must be a list of globs; got {freeze!r:.200}.")
    scale, ramp = (_typed(entry, name, float, where) for name in ("lr_scale", "rewarmup"))
    try:
        return Training(decay, scale, ramp, tuple(freeze))
    except ValueError as error:
        raise PlanMismatchError(
            f"{where} needs lr_scale above 0, rewarmup in [0, 1) and no negative frobenius_decay; got {scale}, {ramp} and {decay}."
        ) from error


def _read_budget(entry: Any) -> Budget | None:
    if entry is None:
        return None
    where, known = "the plan's budget", [f.name for f in fields(Budget)]
    if isinstance(entry, dict):
        entry = _VERSION_2 | entry
    if not isinstance(entry, dict) or set(entry) != set(known):
        raise PlanMismatchError(f"{where} must be an object with {', '.join(known)}; got {entry!r:.200}.")
    target, reached = (_typed(entry, name, float, where) for name in ("target", "reached"))
    try:
        return Budget(
            _typed(entry, "of", str, where),
            target,
            reached,
            _typed(entry, "spread", float, where, optional=True),
            _typed(entry, "device", str, where, optional=True),
        )
    except ValueError as error:
        raise PlanMismatchError(f"{where}: {error}") from error


def _typed(data: dict[str, Any], name: str, kind: type, where: str, optional: bool = False) -> Any:
    value = data.get(name)
    if value is None and optional:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if (
        not isinstance(value, kind)
        or (isinstance(value, bool) and kind is not bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise PlanMismatchError(
            f"{where}: {name} must be {kind.__name__}{' or null' if optional else ''}; got {value!r}."
        )
    return value
