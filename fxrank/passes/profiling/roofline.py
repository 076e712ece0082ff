"""What a layer would take on this device at the device's best: the roofline model (Williams, Waterman & Patterson, CACM 2009).

A piece of work takes as long as its multiplications at the peak rate, or as its bytes at the full bandwidth, whichever is longer. Both
rates are measured here, once, not looked up: `torch` at its best is what a layer can reach. What a measurement says beyond it is the cost
of small pieces: calls, and kernels that do not fill the device.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.profiling.clock import Stopwatch, compare

SIDE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product tells the peak."""
BYTES = {"cpu": 2**26, "cuda": 2**30}
"""That are copied to tell the bandwidth: more than a cache holds."""
PASSES = 3
"""A training step multiplies three times: forward, for the gradient of the input, and for that of the weight."""


class Roofline(NamedTuple):
    """The best rates of a device in a dtype: FLOP per second and bytes per second."""

    flops: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """FLOP per byte from which on multiplications are what counts."""
        return self.flops / self.bandwidth

    def ms(self, flops: float, bytes_moved: float) -> float:
        """The least milliseconds of a forward and backward, of which the forward has so many."""
        return PASSES * 1e3 * max(flops / self.flops, bytes_moved / self.bandwidth)

    def speedup(self, layer: Layer, rank: int, itemsize: int) -> float:
        """Dense over pair."""
        return self.ms(*cost(layer, None, itemsize)) / self.ms(*cost(layer, rank, itemsize))

    def largest_rank(self, layer: Layer, itemsize: int) -> int:
        """The largest rank whose pair is faster than the layer; 0 if none is."""
        low, high = 0, layer.full_rank  # the time of a pair rises with its rank
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.speedup(layer, middle, itemsize) > 1 else (low, middle - 1)
        return low


def cost(layer: Layer, rank: int | None, itemsize: int) -> tuple[int, int]:
    """FLOP (two per multiply-add) and bytes of one forward of the layer, or of its pair of a rank: input, weights, output, and what lies
    between the factors, which is written and read.
    """
    through = torch.Size(layer.input_shape).numel() + layer.outputs
    if rank is None:
        return 2 * layer.macs, itemsize * (through + layer.parameters)
    middle = round(layer.groups * rank * layer.unrolled.positions[0])
    return 2 * layer.pair_macs(rank), itemsize * (through + layer.pair_parameters(rank) + 2 * middle)


@cache
def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """That of a device, measured by a product of matrices and by a copy, with as many threads as torch has now; remembered."""
    kind = device.type if device.type in SIDE else "cuda"
    side, count = SIDE[kind], BYTES[kind] // dtype.itemsize
    drawn = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with drawn, torch.no_grad():
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        source = torch.zeros(count, dtype=dtype, device=device)
        target = torch.zeros_like(source)
        product = _best_ms(lambda: torch.mm(a, b), device)
        copied = _best_ms(lambda: target.copy_(source), device)
    return Roofline(2e3 * side**3 / product, 2e3 * count * dtype.itemsize / copied)


def _best_ms(step: Callable[[], object], device: torch.device) -> float:
    def once() -> None:
        step()

    return min(compare([once], Stopwatch(device), 1, 0.0, 1).ms[0] for _ in range(5))
