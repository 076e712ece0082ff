"""How long a layer takes, dense and as a factor pair, on this device: the measurement behind K and behind "never
slower".

Forward and backward of the layer alone are timed (Cuttlefish Alg. 2 times training iterations of the whole net with
one stack factorized; timing the stack itself takes seconds instead of minutes and is not drowned by the rest).
What was measured once is remembered: layers of a stack share it, and so do attach and switch.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.made import Made
from fxrank.passes.discovery.stacks import Stack, interchangeable
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.pairs.registry import pair_class
from fxrank.passes.profiling.clock import Share, Stopwatch, Times, compare
from fxrank.passes.profiling.roofline import cost, roofline

SHARE = 0.01
"""Of the time of a training, what profiling may take beyond the first rounds."""
CLEAR = 0.2
"""A speed-up this share of the threshold away from it needs no more rounds."""
WIDE = 0.25
"""A spread above this share of a median tells of others on the device."""


def autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager[Any]:
    """The job's autocast region, or nothing."""
    return torch.autocast(device.type, dtype=amp) if amp is not None else nullcontext()


@dataclass(frozen=True)
class StackProfile:
    """Measured and counted cost of one layer of a stack, forward + backward for times, forward for the counts.

    `probe_rank` is the rank of the measured pair; `speedup = dense_ms / pair_ms`, with half the distance of its quartiles as `spread`;
    `how` is what it was measured by (see `clock.Times`). `flops` are 2 per multiply-add;
    `bytes_moved` counts input, weight and output once; `intensity = flops / bytes_moved` (FLOP per byte; Williams
    et al., the roofline model).
    """

    names: tuple[str, ...]
    kind: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    probe_rank: int
    dense_ms: float
    pair_ms: float
    flops: int
    bytes_moved: int
    pair_flops: int
    pair_bytes_moved: int
    spread: float = 0.0
    how: str = "clock"

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.pair_ms

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes_moved

    @property
    def pair_intensity(self) -> float:
        return self.pair_flops / self.pair_bytes_moved

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "speedup": self.speedup,
            "intensity": self.intensity,
            "pair_intensity": self.pair_intensity,
        }


@dataclass
class _Known:
    """What was measured of interchangeable layers: milliseconds of the dense one, and the share of them that a pair takes, by rank."""

    dense_ms: float
    shares: dict[int, Share] = field(default_factory=dict)
    how: str = "clock"


class Profiler:
    """Times layers of `model` under the job's conditions.

    `amp` is the autocast dtype or None; `rounds` how many interleaved measurements the median is over; `budget_ms`
    bounds the time for one comparison (at least 3 rounds are made). Inputs are random; the model's weights are
    neither read nor changed. Without `backward` it is the forward alone, in evaluation mode and without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        amp: torch.dtype | None = None,
        rounds: int = 11,
        budget_ms: float = 200.0,
        backward: bool = True,
    ) -> None:
        if amp is not None and not (isinstance(amp, torch.dtype) and amp.is_floating_point):
            raise TypeError(f"amp must be a floating-point dtype or None; got {amp!r}. torch.bfloat16 is one.")
        self._model, self._device, self.amp = model, device, amp
        self._rounds, self._backward = rounds, backward
        self._known: dict[tuple[object, ...], _Known] = {}
        self.budget_ms = budget_ms
        self.seconds = 0.0
        """Wall-clock time spent measuring so far."""

    @property
    def on_cpu(self) -> bool:
        """Whether it is a CPU that is timed."""
        return self._device.type == "cpu"

    def stacks(self, found: Sequence[Stack], probe_ratio: float, threshold: float, steps: int) -> list[StackProfile]:
        """Each as by `stack`, in a training of so many steps: few rounds at first, and more for those whose speed-up is not clearly above
        or below the `threshold`, while `SHARE` of what the steps take at least, the time in these layers, is not spent.
        """
        most, self.budget_ms = self.budget_ms, 0.0
        profiles = [self.stack(stack, probe_ratio) for stack in found]
        uses = [sum(max(1, len(layer.nodes)) for layer in stack.layers) for stack in found]
        run_ms = steps * sum(p.dense_ms * n for p, n in zip(profiles, uses, strict=True))
        unclear = [i for i, p in enumerate(profiles) if abs(p.speedup - threshold) <= max(CLEAR * threshold, p.spread)]
        self.budget_ms = min(most, (SHARE * run_ms - 1e3 * self.seconds) / max(1, len(unclear)))
        for i in unclear if self.budget_ms > 0 else ():
            del self._known[interchangeable(found[i].sample)]
            profiles[i] = self.stack(found[i], probe_ratio)
        self.budget_ms = most
        return profiles

    def stack(self, stack: Stack, probe_ratio: float) -> StackProfile:
        """Dense against a pair at `probe_ratio` of the full rank (at least rank 1)."""
        layer = stack.sample
        rank = max(1, int(layer.full_rank * probe_ratio))
        times = self.times(layer, [rank])
        dense_ms, pair_ms = times.ms
        size = (self.amp or layer.dtype).itemsize
        flops, bytes_moved = cost(layer, None, size)
        pair_flops, pair_bytes_moved = cost(layer, rank, size)
        return StackProfile(
            names=tuple(a.name for a in stack.layers),
            kind=layer.kind,
            weight_shape=layer.weight_shape,
            input_shape=layer.input_shape,
            probe_rank=rank,
            dense_ms=dense_ms,
            pair_ms=pair_ms,
            flops=flops,
            bytes_moved=bytes_moved,
            pair_flops=pair_flops,
            pair_bytes_moved=pair_bytes_moved,
            spread=times.shares[1].spread / times.shares[1].median ** 2,
            how=times.how,
        )

    def times_ms(self, layer: Layer, ranks: Sequence[int]) -> list[float]:
        """Median milliseconds, forward + backward, of the dense layer, then of a pair of each rank."""
        return self.times(layer, ranks).ms

    def times(self, layer: Layer, ranks: Sequence[int]) -> Times:
        """The dense layer, then a pair of each rank, forward + backward; ranks that were measured before, of this layer or of another of
        its stack, are not measured again.
        """
        known = self._known.get(interchangeable(layer))
        missing = [rank for rank in ranks if known is None or rank not in known.shares]
        if missing or known is None:
            times = self._steady(self._measured(layer, missing), layer, missing)
            known = known or self._known.setdefault(interchangeable(layer), _Known(times.ms[0]))
            known.shares.update(zip(missing, times.shares[1:], strict=True))
            known.how = times.how if known.how == "clock" else known.how
        shares = [Share(1.0, 0.0), *(known.shares[rank] for rank in ranks)]
        return Times([known.dense_ms * share.median for share in shares], shares, known.how)

    def _steady(self, times: Times, layer: Layer, ranks: Sequence[int]) -> Times:
        """As measured, or, on a device whose time others share unseen and where a spread is wide, as the roofline has it."""
        wide = [share.spread > WIDE * share.median for share in times.shares]
        if self.on_cpu or not any(wide):
            return times
        dtype = self.amp or layer.dtype
        roof = roofline(self._device, dtype)
        modelled = [Share(1.0, 0.0), *(Share(1 / roof.speedup(layer, rank, dtype.itemsize), 0.0) for rank in ranks)]
        shares = [m if w else share for m, w, share in zip(modelled, wide, times.shares, strict=True)]
        return Times([times.ms[0] * share.median for share in shares], shares, "roofline")

    def _measured(self, layer: Layer, ranks: Sequence[int]) -> Times:
        start = time.perf_counter()
        source = dense_at(self._model, layer.name)
        cls = pair_class(source, layer.form)
        assert cls is not None
        drawn = torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else [])
        with drawn, torch.inference_mode(False), torch.enable_grad():
            pairs: list[FactorPair] = [cls(source, rank) for rank in ranks]
            for pair in pairs:
                _own_weights(pair, self._device)
            dense = cls(source, 1).dense_layer()
            _own_weights(dense, self._device)
            modules: list[nn.Module] = [dense, *pairs]
            if layer.made:
                modules = [_Products(module, layer.made) for module in modules]
                inputs = [x for made in layer.made for x in made.random_inputs(self._device)]
            else:
                inputs = [cls.probe_input(source, layer.input_shape, layer.dtype, self._device)]
            steps = [self._step(module.train(self._backward), *inputs) for module in modules]
            times = compare(steps, Stopwatch(self._device), self._rounds, self.budget_ms)
        self.seconds += time.perf_counter() - start
        return times

    def _step(self, module: nn.Module, *inputs: Any) -> Callable[[], None]:
        given = [x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs]
        operands = [x for x in given if isinstance(x, Tensor)]
        if not self._backward:

            def forward() -> None:
                with torch.no_grad(), autocast(self._device, self.amp):
                    module(*given)

            return forward
        with autocast(self._device, self.amp):
            gradients = [torch.randn_like(out) for out in _listed(module(*given))]

        def step() -> None:
            for x in operands:
                x.grad = None
            module.zero_grad(set_to_none=True)
            with autocast(self._device, self.amp):
                outs = _listed(module(*given))
            torch.autograd.backward(outs, gradients)

        return step


class _Products(nn.Module):
    """What a model multiplies with the weight of a layer, or of its pair, where code of its own reads it."""

    def __init__(self, layer: nn.Module, made: Sequence[Made]) -> None:
        super().__init__()
        self.layer, self.made = layer, made

    def forward(self, *inputs: Any) -> list[Tensor]:
        outs: list[Tensor] = []
        for made in self.made:
            outs += made.function(self.layer.weight, *inputs[: len(made.inputs)])
            inputs = inputs[len(made.inputs) :]
        return outs


def _listed(out: Tensor | list[Tensor]) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else out


def _own_weights(module: nn.Module, device: torch.device) -> None:
    """Own random parameters: nothing is shared with the user's layer. Scaled so that no number overflows or becomes
    subnormal.
    """
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 1
            fresh = torch.randn_like(parameter, requires_grad=False, device=device) / fan_in**0.5
            setattr(child, name, nn.Parameter(fresh))
