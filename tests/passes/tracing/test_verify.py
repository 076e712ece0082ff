"""The comparisons that prove a rewrite: they must be able to fail."""

import math
import re

import pytest
import torch
from torch import nn

import fxrank
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.tracing.compare import largest_difference, output_difference

NAN, INF = float("nan"), float("inf")


def test_differences_are_relative_to_the_largest_number_of_the_first():
    assert largest_difference((torch.ones(2), 3), (torch.ones(2), 3)) == 0
    assert largest_difference(torch.tensor([2.0, 0]), torch.tensor([2.0, 1])) == 0.5
    assert largest_difference(torch.zeros(2), torch.tensor([0.0, 3])) == 3
    assert largest_difference([torch.ones(2), torch.ones(1)], [torch.ones(2), torch.tensor([1.5])]) == 0.5
    assert largest_difference(torch.ones(0), torch.ones(0)) == 0


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, NAN], [1.0, NAN], 0),
        ([1.0, INF], [1.0, INF], 0),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, 2.0], [1.0, INF], INF),
        ([1.0, INF], [2.0, INF], 1),
        ([NAN, NAN], [NAN, NAN], 0),
    ],
)
def test_nan_and_infinity_never_pass_for_equal(a, b, difference):
    assert largest_difference(torch.tensor(a), torch.tensor(b)) == difference


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ([3 + 4j, 1], [3 + 4j, 1], 0),
        ([3 + 4j, 1], [3 + 4j, 1 + 1j], 0.2),
        ([3 + 4j, 0], [0, 0], 1),
        ([1 + NAN * 1j], [1 + 1j], INF),
        ([1j], [complex(NAN, 1)], INF),
        ([complex(NAN, 1)], [complex(NAN, 1)], 0),
        ([complex(INF, 1), 1j], [complex(INF, 1), 2j], 1),
        ([complex(INF, 1)], [complex(-INF, 1)], INF),
        ([1j], [complex(0, INF)], INF),
    ],
)
def test_complex_numbers_differ_by_their_distance(a, b, difference, dtype):
    """Not by one bit of it: a Fourier layer behind a pair."""
    a, b = (torch.tensor(x, dtype=torch.complex128).to(dtype) for x in (a, b))
    assert largest_difference(a, b) == pytest.approx(difference, rel=1e-6)


def test_a_pair_before_a_fourier_transform_is_compared_by_its_numbers():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)

        def forward(self, x):
            return torch.fft.fft(self.b(torch.tanh(self.a(x))))

    model, x = Fourier(), torch.randn(4, 8)
    with pytest.warns(UserWarning, match="break-even"):
        exact = fxrank.factorize(model, x, rank={"b": 16})
    rough = fxrank.factorize(model, x, rank={"b": 2})
    assert model(x).is_complex()
    assert 0 < output_difference(model, exact, x) < 1e-5  # float32, sums of 16
    assert 1e-3 < output_difference(model, rough, x) < 10


def test_whole_numbers_must_be_equal():
    assert largest_difference(torch.tensor([1]), torch.tensor([1])) == 0
    assert largest_difference(torch.tensor([1]), torch.tensor([2])) == INF
    assert largest_difference(torch.tensor([True]), torch.tensor([False])) == INF


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (
            torch.ones(2),
            torch.ones(3),
            "both outputs must have one shape; got Tensor(2,) float32 and Tensor(3,) float32.",
        ),
        ([torch.ones(2)], torch.ones(2), "both outputs must have one structure"),
        ({"a": 1}, {"b": 1}, "both outputs must have one structure"),
        (torch.ones(2), 1.0, "both outputs must have one structure; got Tensor(2,) float32 and float."),
    ],
)
def test_unlike_outputs_are_refused(a, b, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        largest_difference(a, b)


@pytest.mark.parametrize("groups", [1, 2])
def test_pair_error_against_a_full_svd(groups):
    dense = nn.Conv2d(4, 6, 3, groups=groups, dtype=torch.float64)
    pair = make_pair(dense, 2)
    stack = dense.weight.detach().reshape(groups, 6 // groups, -1)
    sigma = torch.linalg.svdvals(stack)
    error = pair_error(dense, pair)
    tail = math.sqrt(float(sigma[:, 2:].square().sum() / sigma.square().sum()))
    # float64, through a Gram matrix
    assert error.bound == pytest.approx(float(sigma[:, 2].max()), rel=1e-10)
    assert error.spectral == pytest.approx(error.bound, rel=1e-10)
    assert error.relative == pytest.approx(tail, rel=1e-10)
    assert error.relative_bound == pytest.approx(tail, rel=1e-10)


def test_pair_error_shows_factors_that_are_not_the_best():
    dense = nn.Linear(8, 6, dtype=torch.float64)
    pair = make_pair(dense, 3)
    with torch.no_grad():
        pair.v.weight.mul_(2)
    error = pair_error(dense, pair)
    assert error.spectral > 1.01 * error.bound
    assert error.relative > 1.01 * error.relative_bound


def test_pair_error_at_full_rank_and_of_zero():
    dense = nn.Linear(5, 3, dtype=torch.float64)
    error = pair_error(dense, make_pair(dense, 3))
    assert error.bound == error.relative_bound == 0
    assert error.spectral <= 1e-14
    nn.init.zeros_(dense.weight)
    error = pair_error(dense, make_pair(dense, 2))
    assert (error.spectral, error.bound, error.relative, error.relative_bound) == (0, 0, 0, 0)


class Noisy(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.norm, self.drop, self.scale = nn.BatchNorm1d(4), nn.Dropout(0.5), scale

    def forward(self, x, *, fail=False):
        x = x.mul_(self.scale)
        if fail:
            self.norm(x)
            raise RuntimeError("as asked")
        return {"out": self.drop(self.norm(x)), "raw": x}


def test_output_difference_compares_like_with_like():
    one, other = Noisy(1.0), Noisy(1.0)
    x = torch.randn(8, 4)
    kept, state = x.clone(), torch.random.get_rng_state()
    assert output_difference(one, other, x) == 0  # the same dropout mask for both
    assert output_difference(one, Noisy(1.5), x) == pytest.approx(0.5, rel=1e-6)
    assert torch.equal(x, kept)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.norm.running_mean, torch.zeros(4))
    assert one.norm.num_batches_tracked == 0


def test_output_difference_puts_buffers_back_when_a_model_fails():
    model = Noisy(1.0)
    with pytest.raises(RuntimeError, match="as asked"):
        output_difference(model, Noisy(1.0), {"x": torch.randn(8, 4), "fail": True})
    assert model.norm.num_batches_tracked == 0
