"""The roofline: counts, its shape, and what stands in for a clock on a shared device."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxrank.passes.discovery.discover import discover
from fxrank.passes.profiling import timing
from fxrank.passes.profiling.clock import Share, times_of
from fxrank.passes.profiling.roofline import Roofline, cost, roofline
from fxrank.passes.profiling.timing import Profiler
from fxrank.passes.tracing.trace import trace

CPU = torch.device("cpu")


def layer_of(module, x):
    return next(iter(discover(trace(module, x), module)))


LAYERS = [
    layer_of(nn.Sequential(nn.Linear(24, 40)), torch.randn(7, 24)),
    layer_of(nn.Sequential(nn.Conv2d(8, 12, 3, padding=1)), torch.randn(2, 8, 6, 6)),
    layer_of(nn.Sequential(nn.Conv2d(8, 16, 3, groups=2)), torch.randn(2, 8, 6, 6)),
]


def test_what_is_counted():
    linear, conv, _ = LAYERS
    assert cost(linear, None, 4) == (2 * 7 * 24 * 40, 4 * (7 * 24 + 24 * 40 + 7 * 40))
    assert cost(linear, 5, 2) == (2 * 7 * 5 * 64, 2 * (7 * 24 + 5 * 64 + 7 * 40 + 2 * 7 * 5))
    assert cost(conv, 3, 4)[0] == 2 * 2 * 36 * 3 * (72 + 12)


def test_the_longer_of_both_counts():
    roof = Roofline(flops=2e9, bandwidth=1e9)
    assert roof.ridge == 2.0
    assert roof.ms(4e6, 1e6) == pytest.approx(3 * 2.0)
    assert roof.ms(4e6, 5e6) == pytest.approx(3 * 5.0)


@given(
    layer=st.sampled_from(LAYERS),
    flops=st.floats(1e8, 1e14),
    bandwidth=st.floats(1e8, 1e13),
    size=st.sampled_from([2, 4]),
)
def test_the_largest_rank_is_the_last_that_is_faster(layer, flops, bandwidth, size):
    roof = Roofline(flops, bandwidth)
    speedups = [roof.speedup(layer, rank, size) for rank in range(1, layer.full_rank + 1)]
    assert all(a >= b * (1 - 1e-12) for a, b in itertools.pairwise(speedups))
    faster = [rank for rank, speedup in enumerate(speedups, 1) if speedup > 1]
    assert roof.largest_rank(layer, size) == max(faster, default=0)


def test_the_rates_are_measured_once_and_draw_nothing():
    before = torch.get_rng_state()
    found = roofline(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert roofline(CPU, torch.float32) is found
    assert found.flops > 1e8 and found.bandwidth > 1e8


@pytest.mark.parametrize(("spread", "how"), [(0.3, "roofline"), (0.1, "clock")])
def test_on_a_shared_device_the_roofline_stands_in_for_wide_times(monkeypatch, spread, how):
    """Its logic, on a device that is said to be another."""
    model = nn.Sequential(nn.Linear(24, 40))
    roof = Roofline(1e9, 1e12)
    rounds = [[10.0, 5.0 * (1 + 2 * step * spread)] for step in (-1, 0, 1)]
    monkeypatch.setattr(Profiler, "_measured", lambda self, layer, ranks: times_of(rounds, "clock"))
    monkeypatch.setattr(timing, "roofline", lambda device, dtype: roof)
    profiler = Profiler(model, CPU)
    assert profiler.times(LAYERS[0], [4]).how == "clock"
    profiler = Profiler(model, torch.device("cuda"), amp=torch.bfloat16)
    times = profiler.times(LAYERS[0], [4])
    assert times.how == how
    assert times.ms[0] == 10.0
    expected = Share(1 / roof.speedup(LAYERS[0], 4, 2), 0.0) if how == "roofline" else Share(0.5, pytest.approx(0.05))
    assert times.shares[1] == expected


def test_of_several_pairs_only_the_one_whose_times_are_wide_is_modelled(monkeypatch):
    model = nn.Sequential(nn.Linear(24, 40))
    roof = Roofline(1e9, 1e12)
    rounds = [[10.0, 5.0, 8.0 * (1 + 0.6 * step)] for step in (-1, 0, 1)]
    monkeypatch.setattr(Profiler, "_measured", lambda self, layer, ranks: times_of(rounds, "clock"))
    monkeypatch.setattr(timing, "roofline", lambda device, dtype: roof)
    times = Profiler(model, torch.device("cuda"), amp=torch.bfloat16).times(LAYERS[0], [4, 6])
    modelled = 1 / roof.speedup(LAYERS[0], 6, 2)
    assert times.shares == [Share(1.0, 0.0), Share(0.5, 0.0), Share(modelled, 0.0)]
    assert times.ms == [10.0, 5.0, 10.0 * modelled]
    assert times.how == "roofline"
