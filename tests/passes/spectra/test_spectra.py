import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxrank
from fxrank.passes.spectra import exact
from fxrank.passes.spectra.exact import (
    METRICS,
    accumulative,
    as_stack,
    check_finite,
    decompose,
    energy,
    entropy,
    gram,
    mean_over_groups,
    metric_named,
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
    for found in (singular_values(stack), decompose(stack).sigma):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14 * float(expected.max()))  # float64


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
    assert (error <= best + 1e-14 * sigma[:, 0]).all()  # float64
    torch.testing.assert_close(
        torch.linalg.vector_norm(u, dim=2), torch.linalg.vector_norm(v, dim=1), rtol=1e-12, atol=1e-30
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


def test_as_stack():
    assert as_stack(torch.zeros(5, 2, 3, 3)).shape == (1, 5, 18)
    kernel = torch.randn(5, 2, 3, 3, requires_grad=True)
    assert torch.equal(as_stack(kernel)[0], kernel.detach().flatten(1))
    assert not as_stack(kernel).requires_grad


@pytest.mark.parametrize("shape", [(1, 3, 5), (2, 5, 3), (3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block", [1, 10, 1 << 19])
def test_gram_is_of_the_short_side_and_in_float64(shape, dtype, block, monkeypatch):
    monkeypatch.setattr(exact, "BLOCK", block)
    stack = torch.randn(shape, dtype=dtype)
    found = gram(stack)
    wide = (stack if shape[1] <= shape[2] else stack.mT).double()
    assert found.dtype is torch.float64
    torch.testing.assert_close(
        found.tril(), (wide @ wide.mT).tril(), rtol=0, atol=1e-14
    )  # sums of at most 5 numbers of order 1


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last", "gradient"])
def test_any_layout_gives_the_same_numbers(layout):
    weight = torch.randn(8, 4, 3, 3, dtype=torch.float64)
    stack = {
        "transposed": weight.reshape(8, 36).t().contiguous().t()[None],
        "strided": torch.stack([weight.reshape(8, 36), weight.reshape(8, 36)], 2)[..., 0][None],
        "channels_last": weight.to(memory_format=torch.channels_last).reshape(1, 8, 36),
        "gradient": weight.reshape(1, 8, 36).clone().requires_grad_(),
    }[layout]
    expected = torch.linalg.svdvals(weight.reshape(8, 36))
    torch.testing.assert_close(singular_values(stack.detach())[0], expected, rtol=1e-12, atol=0)  # float64, condition 5
    u, v = truncated_factors(stack, 8)
    assert not u.requires_grad
    torch.testing.assert_close((v @ u)[0], weight.reshape(8, 36), rtol=0, atol=1e-13)  # float64, sums of 8


@settings(max_examples=100)
@given(stack=stacks(torch.float32), share=st.floats(0.01, 1))
def test_float32_factors_are_optimal_whatever_the_spectrum(stack, share):
    """Equal, vanishing and decaying values: the error is that of the projection, not of the eigenvalues."""
    rank = max(1, int(share * min(stack.shape[1:])))
    found = decompose(stack)
    u, v = found.factors(rank)
    exact = stack.double()
    sigma = torch.linalg.svdvals(exact)
    norm = torch.linalg.vector_norm(exact, dim=(1, 2))
    error = torch.linalg.vector_norm(exact - v.double() @ u.double(), dim=(1, 2))
    best = sigma[:, rank:].square().sum(1).sqrt()
    assert (error <= best + 2e-6 * norm).all()  # a dozen roundings to float32
    torch.testing.assert_close(
        found.sigma, sigma, rtol=0, atol=1e-7 * float(sigma.max())
    )  # √ of a few roundings in float64
    torch.testing.assert_close(found.sigma[:, 0], sigma[:, 0], rtol=1e-14, atol=0)
    assert (found.sigma.diff(dim=1) <= 1e-12).all()
    torch.testing.assert_close(found.sigma.square().sum(1), norm.square(), rtol=1e-14, atol=0)
    assert truncation_error(found.sigma, rank) == pytest.approx(truncation_error(sigma, rank), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 9), (2, 9, 6), (1, 1, 1)])
def test_zero_matrices_have_zero_factors(shape, dtype):
    found = decompose(torch.zeros(shape, dtype=dtype))
    u, v = found.factors(min(shape[1:]))
    assert not u.any()
    assert not v.any()
    assert not found.sigma.any()
    assert not singular_values(torch.zeros(shape, dtype=dtype)).any()


def test_truncated_factors_are_those_of_the_decomposition():
    stack = torch.randn(2, 6, 9)
    found = decompose(stack)
    for rank in (1, 3, 6):
        assert all(torch.equal(a, b) for a, b in zip(found.factors(rank), truncated_factors(stack, rank), strict=True))


def test_metrics_by_name():
    assert metric_named("stable") is stable
    assert sorted(METRICS) == ["accumulative", "energy", "entropy", "stable"]
    with pytest.raises(
        ValueError,
        match=re.escape(
            "spectrum metric must be one of 'accumulative', 'energy', 'entropy', 'stable'; got 'stabel'. Did you mean 'stable'?"
        ),
    ):
        metric_named("stabel")


@settings(max_examples=100)
@given(
    values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), share=st.floats(0.05, 1), factor=st.floats(0.1, 10)
)
def test_metrics_stay_in_range_and_know_no_scale(values, share, factor):
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    for metric in (stable, entropy, lambda s: accumulative(s, share), lambda s: energy(s, share)):
        assert 1 - 1e-12 <= metric(sigma) <= len(sigma) * (1 + 1e-12)
    assert stable(factor * sigma) == pytest.approx(stable(sigma), rel=1e-12)
    assert entropy(factor * sigma) == pytest.approx(entropy(sigma), rel=1e-12)
    rank = int(energy(sigma, share))
    assert truncation_error(sigma[None], rank) <= math.sqrt(1 - share) + 1e-6  # √ of a slack of 1e-12
    assert sigma[: int(accumulative(sigma, share))].sum() >= share * sigma.sum() * (1 - 1e-12)


def test_check_finite_counts_and_names():
    check_finite(torch.ones(2, 2))
    text = (
        "weights must be finite to have singular values; 'a.b' holds 2 NaN or infinite values of 4. "
        "Lower the learning rate or restore an earlier checkpoint."
    )
    with pytest.raises(fxrank.NonFiniteWeightError, match=f"^{re.escape(text)}$"):
        check_finite(torch.tensor([[math.nan, 1], [1, -math.inf]]), "a.b")
    with pytest.raises(fxrank.NonFiniteWeightError, match="holds 1 NaN or infinite value of 1"):
        check_finite(torch.tensor([math.nan]))
