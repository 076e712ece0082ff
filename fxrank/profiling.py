"""`fxrank.profile`: the profiling pass as a call of its own."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.selection import Selector, candidates, require_some
from fxrank.passes.discovery.stacks import stacks
from fxrank.passes.model.calls import Example
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.device import known_device
from fxrank.passes.pairs.registry import check_form
from fxrank.passes.profiling.timing import Profiler, StackProfile
from fxrank.passes.tracing.trace import trace
from fxrank.switch.trial import misfits, with_reasons
from fxrank.torch_private import pytree


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

    @property
    def K(self) -> int:
        """Number of leading layers left alone: up to the first layer whose stack is faster than the threshold."""
        fast = {name for stack in self.stacks if stack.speedup > self.threshold for name in stack.names}
        return next((i for i, layer in enumerate(self.layers) if layer.name in fast), len(self.layers))

    @property
    def kept(self) -> tuple[str, ...]:
        """Layers of stacks that are not faster than the threshold."""
        return tuple(name for stack in self.stacks if stack.speedup <= self.threshold for name in stack.names)

    def to_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "threshold": self.threshold,
            "K": self.K,
            "kept": list(self.kept),
            "stacks": [s.to_dict() for s in self.stacks],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [
            (
                s.names[0] + (f" +{len(s.names) - 1}" if len(s.names) > 1 else ""),
                "x".join(map(str, s.weight_shape)),
                "x".join(map(str, s.input_shape)),
                s.probe_rank,
                f"{s.dense_ms:.3f}",
                f"{s.pair_ms:.3f}",
                f"{s.speedup:.2f}x",
                f"{s.flops / 1e9:.3f}",
                f"{s.intensity:.1f}",
                f"{s.pair_intensity:.1f}",
                "factorize" if s.speedup > self.threshold else "keep",
            )
            for s in self.stacks
        ]
        headers = (
            "stack",
            "weight",
            "input",
            "rank",
            "dense ms",
            "pair ms",
            "speed-up",
            "GFLOP",
            "FLOP/B",
            "pair FLOP/B",
            "verdict",
        )
        table = tabulate(rows, headers=headers, disable_numparse=True)
        summary = f"K = {self.K} at threshold {self.threshold:g}x on {self.device}; measured in {self.seconds:.1f} s"
        return "\n".join([table, summary, *self.notes])


def profile(
    model: nn.Module,
    example_inputs: Example,
    *,
    device: str | torch.device | None = None,
    amp: torch.dtype | None = None,
    probe_ratio: float = 0.25,
    speedup_threshold: float = 1.5,
    include: Iterable[Selector] | Selector = (),
    exclude: Iterable[Selector] | Selector = (),
    form: str = "channel",
) -> Profile:
    """Time every layer stack, dense and as a factor pair at `probe_ratio` of its full rank, forward and backward,
    on `device` (default: the model's).

    `example_inputs` sets batch size and shapes. The model is neither moved nor changed. Times are medians in ms;
    FLOPs and bytes are per forward call. Layers that have pairs of this `form` are timed in it, the others in their own. Raises
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
    measured = tuple(profiler.stack(stack, probe_ratio) for stack in stacks(layers))
    return Profile(measured, tuple(layers), speedup_threshold, profiler.seconds, str(place), tuple(notes))
