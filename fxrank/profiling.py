"""`fxrank.profile`: the profiling pass as a call of its own."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fxrank.page.profiles import profile_page
from fxrank.page.render import in_notebook
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.selection import Selector, candidates, require_some
from fxrank.passes.discovery.stacks import Stack, stacks
from fxrank.passes.model.calls import Example
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.device import known_device
from fxrank.passes.pairs.registry import check_form
from fxrank.passes.profiling.roofline import PASSES, Roofline, roofline
from fxrank.passes.profiling.timing import Profiler, StackProfile
from fxrank.passes.tracing.trace import trace
from fxrank.policies.cuttlefish import FULL_SPEED
from fxrank.switch.trial import misfits, with_reasons
from fxrank.torch_private import pytree

BUDGETS = 0.5, 0.3
"""Shares of their layers' parameters that pairs are tried with."""


@dataclass(frozen=True)
class Outcome:
    """What pairs of `share` of their layers' parameters would do, measured layer by layer: `faster` of `layers` would be faster as such a pair.
    With these pairs the model has `parameters` of its own, and what all layers that may be pairs take, forward and backward, is `time` of what they take
    now, both as shares.
    """

    share: float
    faster: int
    layers: int
    parameters: float
    time: float

    def __str__(self) -> str:
        pairs = (
            f"pairs of {self.share:g} of their layers' parameters: {self.faster} of {self.layers} layers are faster so"
        )
        if not self.faster:
            return pairs
        return f"{pairs}; with these the model has {self.parameters:.2f} of its parameters, and all these layers together take {self.time:.2f} of their time"


@dataclass(frozen=True)
class Profile:
    """Measured stacks in graph order, and what follows from them at `threshold`: `K` (prefix rule: leading layers
    left alone) and the layers kept by the per-stack rule.
    """

    stacks: tuple[StackProfile, ...]
    layers: tuple[Layer, ...]
    threshold: float
    seconds: float
    device: str
    notes: tuple[str, ...] = ()
    """What could not be checked before the layers were listed."""
    roofline: Roofline | None = None
    """The best rates of the device in the dtype of the job."""
    outlook: tuple[tuple[float, int], ...] = ()
    """Of each stack, by the roofline: the speed-up at the probe rank, and the largest rank whose pair is faster than the layer."""
    outcomes: tuple[Outcome, ...] = ()
    """What pairs of each of `BUDGETS` would do."""

    @property
    def K(self) -> int:
        """Number of leading layers left alone: up to the first layer whose stack is faster than the threshold."""
        fast = {name for stack in self.stacks if stack.speedup > self.threshold for name in stack.names}
        return next((i for i, layer in enumerate(self.layers) if layer.name in fast), len(self.layers))

    @property
    def kept(self) -> tuple[str, ...]:
        """Layers of stacks that are not faster than the threshold."""
        return tuple(name for stack in self.stacks if stack.speedup <= self.threshold for name in stack.names)

    @property
    def verdict(self) -> str:
        """Whether pairs pay on this device, and why, in a sentence."""
        if not self.stacks:
            return "Not worth it here: no layer can be a pair; the table says why, layer by layer."
        count = sum(len(stack.names) for stack in self.stacks)
        paying = [one for one in self.outcomes if one.faster]
        if not paying:
            best = max(self.stacks, key=lambda stack: stack.speedup)
            why = "pairs would be smaller and not faster" if self.outcomes else "no pair was tried"
            return (
                f"Not worth it here for time: none of {count} layers is faster as a pair of the sizes tried (at best {best.speedup:.2f}x, {best.names[0]}); {why}. "
                'For size alone ask for it: objective="size", or a target_params.'
            )
        best_of_all = min(paying, key=lambda one: one.time)
        return (
            f"Worth it here: as pairs of {best_of_all.share:g} of their parameters {best_of_all.faster} of {count} layers are faster; the model would have "
            f"{best_of_all.parameters:.2f} of its parameters, and these layers would take {best_of_all.time:.2f} of their time. Whether it stays as accurate, training tells."
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to `path`, or, if that ends in `.html`, a page with the stacks, the roofline and what budgets would do."""
        html = str(path).lower().endswith((".html", ".htm"))
        text = profile_page(self.to_dict()) if html else json.dumps(self.to_dict(), indent=1) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    def _repr_html_(self) -> str:
        return in_notebook(profile_page(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        stacks = [s.to_dict() for s in self.stacks]
        for stack, (predicted, largest) in zip(stacks, self.outlook, strict=False):
            stack |= {"roofline_speedup": predicted, "largest_rank": largest}
        return {
            "device": self.device,
            "threshold": self.threshold,
            "roofline": None if self.roofline is None else self.roofline._asdict(),
            "K": self.K,
            "kept": list(self.kept),
            "stacks": stacks,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "weight_shape": list(layer.weight_shape),
                    "full_rank": layer.full_rank,
                    "break_even_rank": layer.break_even_rank if layer.unrolled.pair else None,
                    "parameters": layer.parameters,
                    "reason": layer.reason,
                }
                for layer in self.layers
            ],
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "verdict": self.verdict,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = []
        for i, s in enumerate(self.stacks):
            predicted, largest = self.outlook[i] if self.outlook else (None, None)
            rows.append(
                (
                    s.names[0] + (f" +{len(s.names) - 1}" if len(s.names) > 1 else ""),
                    "x".join(map(str, s.weight_shape)),
                    "x".join(map(str, s.input_shape)),
                    s.probe_rank,
                    f"{s.dense_ms:.3f}",
                    f"{s.pair_ms:.3f}",
                    f"{s.speedup:.2f}x ± {s.spread:.2f}",
                    "-" if predicted is None else f"{predicted:.2f}x",
                    "-" if largest is None else str(largest),
                    f"{s.flops / 1e9:.3f}",
                    f"{s.intensity:.1f}",
                    f"{s.pair_intensity:.1f}",
                    "factorize" if s.speedup > self.threshold else "keep",
                )
            )
        headers = (
            "stack",
            "weight",
            "input",
            "rank",
            "dense ms",
            "pair ms",
            "speed-up",
            "roofline",
            "faster up to",
            "GFLOP",
            "FLOP/B",
            "pair FLOP/B",
            "verdict",
        )
        table = tabulate(rows, headers=headers, disable_numparse=True)
        summary = f"K = {self.K} at threshold {self.threshold:g}x on {self.device}; measured in {self.seconds:.1f} s"
        lines = [table, summary]
        if (roof := self.roofline) is not None:
            best = f"{roof.flops / 1e9:.0f} GFLOP/s and {roof.bandwidth / 1e9:.1f} GB/s at best"
            lines.append(f"roofline: {best}, even at {roof.ridge:.1f} FLOP/B; it knows nothing of calls and kernels")
        stood_in = Counter(s.how for s in self.stacks if s.how != "clock")
        lines += [
            f"the machine is busy: {count} of {len(self.stacks)} stacks by {how}" for how, count in stood_in.items()
        ]
        lines += [str(outcome) for outcome in self.outcomes]
        return "\n".join([*lines, self.verdict, *self.notes])

    def figure(self, path: str | os.PathLike[str]) -> None:
        """Every stack, dense and as a pair, under the roofline: FLOP per second over FLOP per byte, both axes logarithmic, to a PNG or
        SVG by the suffix of `path`. Needs matplotlib (`pip install fxrank[figures]`). Source: Cuttlefish Fig. 6.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        drawing = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(drawing)
        axes = drawing.add_subplot(xscale="log", yscale="log")
        for s in self.stacks:
            dense = s.intensity, PASSES * s.flops / s.dense_ms / 1e6
            pair = s.pair_intensity, PASSES * s.pair_flops / s.pair_ms / 1e6
            (line,) = axes.plot(*zip(dense, pair, strict=True), linewidth=0.8, alpha=0.6)
            axes.plot(*dense, "o", color=line.get_color(), label=f"{s.names[0]} {s.speedup:.2f}x")
            axes.plot(*pair, "^", color=line.get_color())
        if (roof := self.roofline) is not None:
            low, high = axes.get_xlim()
            ends = [min(low, roof.ridge / 4), roof.ridge, max(high, roof.ridge * 4)]
            axes.plot(ends, [min(roof.flops, x * roof.bandwidth) / 1e9 for x in ends], color="black", linewidth=1)
        axes.set(
            xlabel="FLOP per byte",
            ylabel="GFLOP/s, forward and backward",
            title="Layer stacks: dense (o), as pairs (^), the roofline",
        )
        if len(self.stacks) <= 24:
            axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
        drawing.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def profile(
    model: nn.Module,
    example_inputs: Example,
    *,
    device: str | torch.device | None = None,
    amp: torch.dtype | None = None,
    probe_ratio: float = 0.25,
    speedup_threshold: float = FULL_SPEED,
    include: Iterable[Selector] | Selector = (),
    exclude: Iterable[Selector] | Selector = (),
    form: str = "channel",
) -> Profile:
    """Time every layer stack, dense and as a factor pair at `probe_ratio` of its full rank, forward and backward,
    on `device` (default: the model's).

    `example_inputs` sets batch size and shapes. The model is neither moved nor changed. Times are medians in ms;
    FLOPs and bytes are per forward call. Beside what is measured stands what the roofline of the device says, with the largest rank that is
    still faster by it. Layers that have pairs of this `form` are timed in it, the others in their own. Raises
    `TraceError`, `NothingToFactorizeError`, `ValueError` for an unknown form. Source: Cuttlefish Alg. 2, per stack.
    """
    check_form(form)
    numbers = isinstance(probe_ratio, Real) and isinstance(speedup_threshold, Real)
    if not numbers or not 0 < probe_ratio <= 1 or math.isnan(speedup_threshold):
        raise ValueError(
            f"probe_ratio must be above 0 and at most 1, and speedup_threshold a number; got {probe_ratio} and {speedup_threshold}."
        )
    model = uncompiled(model)
    here = next((p.device for p in model.parameters()), torch.device("cpu"))
    place = here if device is None else known_device(device)
    inputs = pytree.tree_map(lambda x: x.to(here) if isinstance(x, torch.Tensor) else x, example_inputs)
    gm = trace(model, inputs)
    found = [layer.if_in_form(form) for layer in discover(gm, model)]
    gm.let_go()
    layers = candidates(found, model, include=include, exclude=exclude)
    notes: list[str] = []
    layers = with_reasons(layers, misfits(layers, model, inputs, gm, notes, form))
    require_some(layers)
    profiler = Profiler(model, place, amp=amp)
    found_stacks = stacks(layers)
    measured = tuple(profiler.stack(stack, probe_ratio) for stack in found_stacks)
    if not found_stacks:
        return Profile((), tuple(layers), speedup_threshold, 0.0, str(place), tuple(notes))
    dtype = amp or found_stacks[0].sample.dtype
    roof = roofline(place, dtype)
    outlook = tuple(
        (roof.speedup(s.sample, m.probe_rank, dtype.itemsize), roof.largest_rank(s.sample, dtype.itemsize))
        for s, m in zip(found_stacks, measured, strict=True)
    )
    outcomes = tuple(_outcome(share, found_stacks, profiler, model) for share in BUDGETS)
    return Profile(
        measured, tuple(layers), speedup_threshold, profiler.seconds, str(place), tuple(notes), roof, outlook, outcomes
    )


def _outcome(share: float, found: Sequence[Stack], profiler: Profiler, model: nn.Module) -> Outcome:
    faster, saved, before, after = 0, 0, 0.0, 0.0
    for stack in found:
        layer = stack.sample
        rank = layer.rank_within(int(share * layer.parameters))
        uses = sum(max(1, len(one.nodes)) for one in stack.layers)
        times = profiler.times(layer, [rank] if rank else [])
        dense, pair = times.ms[0], times.ms[-1]
        pays = rank > 0 and pair < dense
        faster += pays * len(stack.layers)
        saved += pays * len(stack.layers) * (layer.parameters - layer.pair_parameters(rank))
        before += uses * dense
        after += uses * (pair if pays else dense)
    whole = sum(p.numel() for p in model.parameters())
    count = sum(len(stack.layers) for stack in found)
    return Outcome(share, faster, count, (whole - saved) / whole, after / before)
