import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxrank
from fxrank.passes.lanczos import StableRankTracker
from fxrank.passes.spectra import (
    accumulative,
    as_stack,
    decompose,
    energy,
    entropy,
    mean_over_groups,
    singular_values,
    stable,
    truncated_factors,
    truncation_error,
)


@st.composite
def stacks(draw, dtype=torch.float64):
    """Stacks with a drawn spectrum: flat, decaying, deficient, or with equal leading values."""
    groups, rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    size = min(rows, cols)
    seed = draw(st.integers(0, 1000))
    kind = draw(st.sampled_from(["flat", "decay", "deficient", "twins"]))
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(size, dtype=torch.float64)
    sigma = {
        "flat": torch.ones(size),
        "decay": 0.5**index,
        "deficient": (index < (size + 1) // 2).double(),
        "twins": torch.where(index < 2, 1.0, 0.1),
    }[kind]
    q = torch.linalg.qr(torch.randn(groups, rows, rows, dtype=torch.float64, generator=generator))[0][..., :size]
    p = torch.linalg.qr(torch.randn(groups, cols, cols, dtype=torch.float64, generator=generator))[0][..., :size]
    return ((q * sigma.double()) @ p.mT).to(dtype)


@given(stack=stacks())
def test_singular_values_are_those_of_a_full_svd(stack):
    expected = torch.linalg.svdvals(stack)
    # A Gram matrix squares: a singular value s carries an error of about 1e-16 σ_max² / s, at most 1e-8 σ_max at 0.
    torch.testing.assert_close(singular_values(stack), expected, rtol=1e-12, atol=2e-7 * float(expected.max()))
    torch.testing.assert_close(decompose(stack).sigma[:, 0], expected[:, 0], rtol=1e-12, atol=0)


@settings(max_examples=200)
@given(stack=stacks(), share=st.floats(0.01, 1))
def test_factors_are_optimal_and_balanced(stack, share):
    size = min(stack.shape[1:])
    rank = max(1, int(share * size))
    u, v = truncated_factors(stack, rank)
    assert u.shape == (len(stack), rank, stack.shape[2])
    assert v.shape == (len(stack), stack.shape[1], rank)
    sigma = torch.linalg.svdvals(stack)
    error = torch.linalg.matrix_norm(stack - v @ u)
    best = sigma[:, rank:].square().sum(1).sqrt()
    assert (error <= best + 1e-7 * sigma[:, 0]).all()
    torch.testing.assert_close(
        torch.linalg.vector_norm(u, dim=2), torch.linalg.vector_norm(v, dim=1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(1, 64, 576), (1, 576, 64), (2, 48, 48), (1, 128, 130)])
def test_float32_decomposition_meets_the_switch_targets(shape):
    weight = torch.randn(shape) * torch.logspace(0, -2, shape[2])
    exact = torch.linalg.svdvals(weight.double())
    found = decompose(weight)
    for row, sigma in zip(found.sigma, exact, strict=True):
        assert stable(row) == pytest.approx(stable(sigma), rel=1e-6)
    rank = min(shape[1:]) // 4
    u, v = found.factors(rank)
    error = float(torch.linalg.vector_norm(weight.double() - v.double() @ u.double()))
    best = float(exact[:, rank:].square().sum().sqrt())
    assert error - best <= 1e-6 * float(torch.linalg.vector_norm(exact))
    full_u, full_v = found.factors(min(shape[1:]))
    torch.testing.assert_close(full_v @ full_u, weight, rtol=0, atol=2e-5)  # sums of up to 576 float32 products


def test_half_precision_is_lifted_not_used():
    weight = torch.randn(1, 32, 48)
    u, v = truncated_factors(weight.bfloat16(), 32)
    assert u.dtype is torch.float32
    torch.testing.assert_close(v @ u, weight.bfloat16().float(), rtol=0, atol=2e-5)


def test_stable_rank_of_known_matrices():
    assert fxrank.stable_rank(torch.eye(5)) == pytest.approx(5, rel=1e-12)
    assert fxrank.stable_rank(torch.outer(torch.arange(1.0, 4), torch.ones(6))) == pytest.approx(1, rel=1e-6)
    assert fxrank.stable_rank(torch.zeros(3, 4)) == 0
    assert fxrank.stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(1.5, rel=1e-12)
    kernel = torch.randn(6, 4, 3, 3)
    assert fxrank.stable_rank(kernel) == pytest.approx(fxrank.stable_rank(kernel.reshape(6, 36)), rel=0)


def test_stable_rank_errors():
    with pytest.raises(ValueError, match=re.escape("needs at least 2 dimensions to have a rank; got shape (3,)")):
        fxrank.stable_rank(torch.ones(3))
    bad = torch.ones(3, 3)
    bad[0, 0] = math.nan
    with pytest.raises(fxrank.NonFiniteWeightError, match="'weight' holds 1 NaN or infinite value of 9"):
        fxrank.stable_rank(bad)


def test_metrics_on_a_known_spectrum():
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert stable(sigma) == 22 / 16
    assert accumulative(sigma, 0.5) == 1
    assert accumulative(sigma, 0.8) == 3
    assert accumulative(sigma, 1.0) == 4
    assert energy(sigma, 0.9) == 2
    assert entropy(torch.ones(7, dtype=torch.float64)) == pytest.approx(7)
    assert entropy(torch.tensor([1.0, 0.0], dtype=torch.float64)) == pytest.approx(1)
    for metric in (stable, accumulative, energy, entropy):
        assert metric(torch.zeros(3)) == 0
    assert truncation_error(sigma[None], 2) == pytest.approx(math.sqrt(2 / 22))
    assert truncation_error(torch.zeros(1, 3), 1) == 0
    assert mean_over_groups(stable, torch.stack([sigma, torch.ones(4, dtype=torch.float64)])) == (22 / 16 + 4) / 2


@given(stack=stacks(torch.float32))
def test_tracker_is_exact_on_small_matrices(stack):
    exact = mean_over_groups(stable, singular_values(stack))
    assert StableRankTracker()([stack], ["w"])[0] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_tracker_follows_a_new_leader(seed):
    """A hidden direction grows past the tracked one: the trap of a warm start."""
    generator = torch.Generator().manual_seed(seed)
    tracker = StableRankTracker(seed)
    noise = torch.randn(96, 400, generator=generator) / 20
    old, new = torch.randn(2, 96, 1, generator=generator), torch.randn(2, 1, 400, generator=generator)
    errors = []
    for step in range(60):
        weight = noise + old[0] @ new[0] / 60 + (step / 1000) * old[1] @ new[1] / 20
        exact = fxrank.stable_rank(weight)
        errors.append(abs(tracker([weight[None]], ["w"])[0] - exact) / exact)
    assert max(errors) <= 5e-3
    assert sum(e <= 1e-3 for e in errors) >= 0.99 * len(errors)


def test_tracker_edges():
    tracker = StableRankTracker()
    rank_one = torch.outer(torch.ones(30), torch.arange(40.0))[None]
    twins = torch.diag(torch.tensor([1.0, 1.0 - 1e-6, 0.1]))[None]
    grouped = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 0, 0, 0]))])
    ranks = tracker([rank_one, torch.zeros(1, 5, 6), twins, grouped, torch.ones(1, 1, 1)], list("abcde"))
    assert ranks == pytest.approx([1, 0, 2.01, 2.5, 1], rel=1e-3)
    bad = torch.ones(1, 3, 3)
    bad[0, 1, 1] = math.inf
    with pytest.raises(fxrank.NonFiniteWeightError, match="layer 'culprit' holds NaN or infinity"):
        StableRankTracker()([torch.ones(1, 2, 2), bad], ["fine", "culprit"])


def test_as_stack():
    assert as_stack(torch.zeros(5, 2, 3, 3)).shape == (1, 5, 18)
