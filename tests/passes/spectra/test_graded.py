"""Weights whose singular values span many orders of magnitude, and weights that are very small or very large."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxrank
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.spectra.exact import decompose, energy, singular_values, stable, truncated_factors, truncation_error
from fxrank.passes.spectra.tracked import StableRankTracker

BITS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def graded(shape, span, scale=1.0, dtype=torch.float32, seed=0):
    """A stack whose singular values fall evenly, on a logarithmic scale, over `span` orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    size = min(shape[1:])
    q, p = (
        torch.linalg.qr(torch.randn(shape[0], n, size, dtype=torch.float64, generator=generator)).Q for n in shape[1:]
    )
    sigma = torch.logspace(0, -span, size, dtype=torch.float64)
    return ((q * (scale * sigma)) @ p.mT).to(dtype)


def check_optimal(stack, rank):
    """The error of the factors is that of the best ones of their rank, but for the rounding of the factors themselves."""
    u, v = truncated_factors(stack, rank)
    factors = torch.float64 if stack.dtype == torch.float64 else torch.float32
    assert u.dtype == v.dtype == factors
    scale = stack.double().abs().max()
    exact = stack.double() / scale
    residual = exact - v.double() @ (u.double() / scale)
    sigma = torch.linalg.svdvals(exact)
    best = sigma[:, rank:].square().sum(1).sqrt()
    following = sigma[:, rank] if rank < sigma.shape[1] else sigma.new_zeros(len(sigma))
    # Each singular direction is rounded once in U and once in V.
    rounding = 2 * BITS[factors] * torch.linalg.vector_norm(sigma, dim=1)
    assert (torch.linalg.matrix_norm(residual) <= (1 + 1e-5) * best + rounding).all()
    assert (torch.linalg.matrix_norm(residual, 2) <= (1 + 1e-5) * following + rounding).all()


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    span=st.floats(0, 8),
    exponent=st.integers(-24, 20),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 100),
)
def test_factors_are_the_best_ones_for_any_spectrum_and_scale(shape, span, exponent, share, dtype, seed):
    stack = graded(shape, span, 10.0**exponent, dtype, seed)
    check_optimal(stack, max(1, round(share * min(shape[1:]))))


@settings(max_examples=50, deadline=None)
@given(span=st.floats(0, 4), exponent=st.integers(-4, 4), rank=st.integers(1, 20), seed=st.integers(0, 100))
def test_factors_of_float16_are_the_best_ones(span, exponent, rank, seed):
    check_optimal(graded((1, 20, 30), span, 10.0**exponent, torch.float16, seed), rank)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e160, 1e200])
@pytest.mark.parametrize("span", [2, 12])
def test_float64_keeps_directions_whose_squares_are_lost(scale, span):
    stack = graded((2, 12, 18), span, scale, torch.float64)
    check_optimal(stack, 8)
    sigma = singular_values(stack) / scale
    torch.testing.assert_close(
        sigma, torch.logspace(0, -span, 12, dtype=torch.float64).expand(2, 12), rtol=0, atol=1e-14
    )
    flat = graded((1, 12, 18), 1, 1.0, torch.float64)
    large = scale * flat
    assert truncation_error(singular_values(large), 5) == pytest.approx(truncation_error(singular_values(flat), 5))
    assert energy(singular_values(large)[0], 0.7) == energy(singular_values(flat)[0], 0.7) > 1
    assert StableRankTracker()([large], ["w"])[0] == pytest.approx(stable(singular_values(flat)[0]), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-40, 1e-24, 1e-18, 1e18, 1e20, 1e35])
@pytest.mark.parametrize("shape", [(1, 30, 50), (3, 20, 10)])
def test_stable_ranks_know_no_scale(scale, shape):
    """In float32 the squares of these weights are zero, or infinite."""
    stack = graded(shape, 1)
    expected = sum(stable(s) for s in singular_values(stack)) / len(stack)
    scaled = (stack.double() * scale).float()
    assert StableRankTracker()([scaled], ["w"])[0] == pytest.approx(expected, rel=1e-3)  # the tracker's own promise
    assert sum(stable(s) for s in singular_values(scaled)) / len(stack) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(40, 30),
        lambda: nn.Conv2d(8, 40, 3),
        lambda: nn.Conv2d(8, 40, 3, groups=2),
        lambda: nn.ConvTranspose2d(8, 40, 3),
        lambda: nn.Embedding(60, 30),
    ],
    ids=["linear", "conv", "grouped", "transposed", "embedding"],
)
@pytest.mark.parametrize("scale", [1e-24, 1.0, 1e20])
@pytest.mark.parametrize("span", [3, 5])
def test_pairs_of_all_kinds_are_the_best_ones(layer, scale, span):
    layer = layer()
    weight = layer.weight
    weight.data = graded((1, weight.shape[0], weight[0].numel()), span, scale).reshape(weight.shape)
    full = type(make_pair(layer, 1)).full_rank_of(layer)
    for rank in (1, full // 2, full):
        error = pair_error(layer, make_pair(layer, rank))
        assert error.relative <= (1 + 1e-5) * error.relative_bound + 3e-7  # float32
        assert error.spectral <= (1 + 1e-5) * error.bound + 3e-7 * scale
    assert pair_error(layer, make_pair(layer, 1)).relative > 0


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_error_of_a_pair_is_measured_whatever_its_scale(scale):
    layer = nn.Linear(20, 12, dtype=torch.float64)
    layer.weight.data = graded((1, 12, 20), 3, scale, torch.float64)[0]
    error = pair_error(layer, make_pair(layer, 4))
    assert error.relative == pytest.approx(error.relative_bound) and 1e-3 < error.relative < 1
    assert error.spectral == pytest.approx(error.bound) and error.spectral > 1e-3 * scale


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
def test_what_a_dominant_direction_hides_is_kept(offset):
    """A weight of rank 7 with an offset common to all outputs, before a LayerNorm that removes it."""
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = (
        torch.randn(64, 6) @ torch.randn(6, 64) / 8 + offset * torch.ones(64, 1) @ torch.randn(1, 64) / 8
    )
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), layer, nn.LayerNorm(64), nn.Linear(64, 4))
    x = torch.randn(256, 8)
    u, s, v = torch.linalg.svd(layer.weight.data)
    plain = copy.deepcopy(model)
    plain[2].weight.data = (u[:, :7] * s[:7]) @ v[:7]
    found, by_svd = (
        float((m(x) - model(x)).detach().norm() / model(x).detach().norm())
        for m in (fxrank.factorize(model, x, rank={"2": 7}), plain)
    )
    assert found < 4 * by_svd  # both are one rounding in float32


@pytest.mark.parametrize("span", [0, 5])
def test_the_spectrum_is_that_of_a_full_svd(span):
    stack = graded((2, 30, 50), span)
    expected = torch.linalg.svdvals(stack.double())
    for found in (singular_values(stack), decompose(stack).sigma):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # eps · (σ_max/σ)² at 1e-5
