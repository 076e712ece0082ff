"""Spatial factors that know the patches: never worse than the weight's own, and what is said to be lost is what is lost."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxrank.passes.calibration.collect import Watch, collect
from fxrank.passes.calibration.spatial import SpatialProjection
from fxrank.passes.pairs.convolution import LowRankSpatialConv2d

GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1)},
    {"kernel_size": (1, 3), "groups": 2, "dilation": 2},
    {"kernel_size": 3, "padding": "same", "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "groups": 2},
    {"kernel_size": (3, 4), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
]


def layer_and_images(geometry, seed=0):
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 6, **geometry).double()
    smooth = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    return conv, nn.functional.interpolate(smooth, size=(9, 8), mode="bilinear") + 0.1 * torch.randn(
        6, 4, 9, 8
    ).double() + 0.5


def fitted(conv, images):
    stack = LowRankSpatialConv2d.unroll(conv, conv.weight.detach())
    groups, _, cols = stack.shape
    watch = Watch("conv", LowRankSpatialConv2d, (conv,), "patches", (groups, cols * conv.kernel_size[1]))
    moments, _ = collect(conv, {0: watch}, lambda: [((images,), {})])
    return SpatialProjection(stack, moments[0], conv.kernel_size[1], centred=True)


def outputs_lost(conv, images, factors):
    pair = LowRankSpatialConv2d(conv, factors[0].shape[1])
    pair.fill(*factors[:2])
    with torch.no_grad():
        off = conv(images) - pair(images)
        # The best bias, for factors that come without.
        off = off - (factors[2] if len(factors) > 2 else off.mean((0, 2, 3))).reshape(-1, 1, 1)
    return float(off.square().sum(1).mean())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_what_is_lost_is_measured_and_less_than_by_the_weight_alone(geometry):
    conv, images = layer_and_images(geometry)
    found = fitted(conv, images)
    full = min(found.stack.shape[1:])
    for rank in range(1, full):
        factors = found.factors(rank)
        lost = outputs_lost(conv, images, factors)
        assert found.lost(rank) == pytest.approx(lost, rel=1e-6, abs=1e-12)
        plain = LowRankSpatialConv2d(conv, rank)
        plain.fill_from(conv.weight.detach())
        weight_alone = plain.unfold_u(plain.u.weight.detach()), plain.unfold_v(plain.v.weight.detach())
        assert lost <= outputs_lost(conv, images, weight_alone) * (1 + 1e-9)
        assert lost <= outputs_lost(conv, images, found._start.factors(rank)[:2]) * (1 + 1e-9)
    assert outputs_lost(conv, images, found.factors(full)) < 1e-18


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**16), st.integers(1, 8))
def test_no_other_second_factor_is_better(seed, rank):
    """Least squares: the gradient in `V` is nought, and more rounds of both lose ever less."""
    conv, images = layer_and_images({"kernel_size": 3, "padding": 1}, seed)
    found = fitted(conv, images)

    def error(u, v):
        kernel = found._kernel - (v @ u).reshape(1, -1, 3, u.shape[2]).transpose(2, 3)
        flat = kernel.flatten(2)
        return ((flat @ found._seen) * flat).sum()

    u, v = found._fit(rank)
    v = v.clone().requires_grad_()
    error(u, v).backward()
    start = found._start.factors(rank)[1].clone().requires_grad_()
    error(found._start.factors(rank)[0], start).backward()
    assert v.grad.norm() < 1e-5 * start.grad.norm() + 1e-9
    with torch.no_grad():
        better = found._best_u(u, v)
        assert error(better, v) <= error(u, v) * (1 + 1e-9)
        assert error(better, found._best_v(better)) <= error(better, v) * (1 + 1e-9)


def test_few_patches_constant_ones_and_none_that_vary():
    conv, images = layer_and_images({"kernel_size": 3, "padding": 1})
    for seen in (images[:1, :, :3, :3], torch.ones_like(images), torch.zeros_like(images)):
        found = fitted(conv, seen)
        for rank in (1, 4, 12):
            factors = found.factors(rank)
            assert all(torch.isfinite(t).all() for t in factors)
            assert found.lost(rank) <= found.energy * (1 + 1e-9)
        assert outputs_lost(conv, images, found.factors(12)) < 1e-12


def test_with_and_without_a_bias_are_two_fits():
    """What one of them has found is not taken for the other's."""
    conv, images = layer_and_images({"kernel_size": 3, "padding": 1, "bias": False})
    with_bias = fitted(conv, images + 2)
    without = replace(with_bias, centred=False)
    alone = SpatialProjection(with_bias.stack, with_bias.moments, with_bias.width, centred=False)
    for rank in (1, 3):
        best = with_bias.lost(rank)
        assert without.lost(rank) == pytest.approx(alone.lost(rank), rel=1e-9)
        assert with_bias.lost(rank) == best < without.lost(rank)
