"""What a run did: one table to read, JSON to keep, a figure of the rank curves."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from tabulate import tabulate

from fxrank.page.render import in_notebook
from fxrank.page.runs import run_page
from fxrank.plan import Plan


@dataclass
class Report:
    """Numbers of one run, measured unless the name says otherwise; None where nothing was measured.

    `step_ms` are medians of the real training step, data loading included, by phase. `memory_bytes` is the peak
    training memory by phase (see `StepMemory`), `gradient_bytes` one set of gradients, which several processes average in
    each step. `macs` are per forward call at the training batch size.
    `accuracy_*_switch` come from `val_loader`, just before and just after the weights were split. `seconds` holds
    wall-clock time by purpose.
    """

    plan: Plan
    parameters_before: int
    parameters_after: int
    macs_before: int
    macs_after: int
    epochs: int
    settings: dict[str, Any]
    step_ms: dict[str, float | None] = field(default_factory=dict)
    memory_bytes: dict[str, int | None] = field(default_factory=dict)
    gradient_bytes: dict[str, int | None] = field(default_factory=dict)
    predicted_speedup: float | None = None
    loss: float | None = None
    accuracy: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    accuracy_before_switch: float | None = None
    accuracy_after_switch: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """What the run's page draws, as plain data: epochs, rank curves, timed stacks, spectra, the graph (see `details.details_of`)."""

    @property
    def measured_speedup(self) -> float | None:
        """Median full-rank step over median low-rank step."""
        full, low = self.step_ms.get("full-rank"), self.step_ms.get("low-rank")
        return full / low if full and low else None

    @property
    def overhead(self) -> float:
        """Monitor, profile and switch as a share of the whole run."""
        total = self.seconds.get("total", 0.0)
        return sum(self.seconds.get(k, 0.0) for k in ("monitor", "profile", "switch")) / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the plan in its own JSON form."""
        data = {k: v for k, v in vars(self).items() if k != "plan"}
        derived = {
            "measured_speedup": self.measured_speedup,
            "overhead": self.overhead,
            "E": self.plan.E,
            "K": self.plan.K,
            "R": self.plan.R,
        }
        return data | derived | {"plan": asdict(self.plan)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, default=str) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path`, or, if that ends in `.html`, the page. Raises as `to_html`."""
        html = str(path).lower().endswith((".html", ".htm"))
        Path(path).write_text(self.to_html() if html else self.to_json(), encoding="utf-8")

    def to_html(self, title: str = "fxrank") -> str:
        """One page with the run's curves, ranks, times, spectra, decisions and graph, which needs no network; about a megabyte. Raises
        `ImportError` that says what to install where the libraries for it are missing.
        """
        return run_page(self.to_dict(), title)

    def _repr_html_(self) -> str:
        return in_notebook(self.to_html())

    def __str__(self) -> str:
        return f"{self.plan}\n\n{self.summary()}"

    def summary(self) -> str:
        """The totals, without the table of layers."""
        plan = self.plan
        count = len(plan.R)
        switched = f"E = {plan.E:g} of {self.epochs} epochs" if plan.E is not None else "no switch"
        lines = [
            f"policy {plan.policy}: {switched}, K = {plan.K}, {count} of {len(plan.layers)} layers factorized ({plan.note})"
        ]
        if plan.budget is not None:
            lines.append(f"budget: {plan.budget}")
        if not count and plan.policy != "FullRank":
            lines.append("NOTHING WAS FACTORIZED: the model is full-rank; the table says why, layer by layer.")
        full_memory, low_memory = self.memory_bytes.get("full-rank"), self.memory_bytes.get("low-rank")
        gradients = self.gradient_bytes
        rows = [
            (
                "parameters",
                f"{self.parameters_before:,}",
                f"{self.parameters_after:,}",
                _ratio(self.parameters_before, self.parameters_after),
            ),
            (
                "MACs per call",
                f"{self.macs_before:,}",
                f"{self.macs_after:,}",
                _ratio(self.macs_before, self.macs_after),
            ),
            (
                "training step",
                _ms(self.step_ms.get("full-rank")),
                _ms(self.step_ms.get("low-rank")),
                _times(self.measured_speedup),
            ),
            ("as predicted", "", "", _times(self.predicted_speedup)),
            ("training memory", _mib(full_memory), _mib(low_memory), _ratio(full_memory, low_memory)),
            (
                "accuracy at the switch",
                _percent(self.accuracy_before_switch if count else None),
                _percent(self.accuracy_after_switch if count else None),
                "",
            ),
        ]
        if gradients:
            full, low = gradients.get("full-rank"), gradients.get("low-rank")
            rows.insert(-1, ("gradients", _mib(full), _mib(low), _ratio(full, low)))
        lines.append(
            tabulate(
                rows,
                headers=("", "full-rank", "low-rank", "ratio"),
                disable_numparse=True,
                colalign=("left", "right", "right", "right"),
            )
        )
        final = [f"final loss {self.loss:.4f}" if self.loss is not None else ""]
        final += [f"training accuracy {_percent(self.accuracy)}"] if self.accuracy is not None else []
        final += [f"validation loss {self.val_loss:.4f}"] if self.val_loss is not None else []
        final += [f"validation accuracy {_percent(self.val_accuracy)}"] if self.val_accuracy is not None else []
        lines.append(", ".join(part for part in final if part))
        parts = ", ".join(f"{k} {v:.2f} s" for k, v in self.seconds.items())
        lines.append(f"time: {parts}; monitor + profile + switch = {100 * self.overhead:.2f} % of the run")
        return "\n".join([*lines, *self.notes])


def figure(
    curves: dict[str, list[float]],
    steps: list[int],
    plan: Plan,
    steps_per_epoch: int,
    path: str | os.PathLike[str] | IO[bytes],
) -> None:
    """Stable-rank curves over epochs with the switch marked, as PNG or SVG by the suffix of `path`, as PNG into a file. Needs
    matplotlib (`pip install fxrank[figures]`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    epochs = [step / steps_per_epoch for step in steps]
    kept = {d.name for d in plan.layers if not d.factorized}
    for name, curve in curves.items():
        axes.plot(epochs, curve, label=name, linestyle=":" if name in kept else "-", linewidth=1.2)
    if plan.E is not None:
        axes.axvline(plan.E, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"switch, E = {plan.E:.3g} ", (plan.E, axes.get_ylim()[1]), va="top", ha="right")
    axes.set(xlabel="epoch", ylabel="stable rank", title="Stable rank of every layer (dotted: kept dense)")
    if len(curves) <= 24:
        axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    drawing.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def _ratio(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}x" if before and after else "-"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
