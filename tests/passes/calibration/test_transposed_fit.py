"""Factors of transposed convolutions that know the data: what is said to be lost is lost in the output, and less than by the weight alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxrank

pytestmark = pytest.mark.filterwarnings("ignore:ranks at or above break-even")
KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def geometries(draw):
    """A layer, and an input with or without a batch dimension."""
    dims = draw(st.integers(1, 3))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation = each(1, 4 - dims // 2), each(1, 3), each(1, 2)
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple(draw(st.integers(0, max(r // 2, 0))) for r in reach)
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    groups = draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": more, "groups": groups}
    layer = KINDS[dims](4, 6, kernel, bias=draw(st.booleans()), **options)
    size = each(3, 5)
    x = torch.randn(*((2,) if draw(st.booleans()) else ()), 4, *size).double()
    mixed = torch.einsum("...c,cd->...d", x.movedim(-1 - dims, -1), torch.randn(4, 4).double())
    return nn.Sequential(layer).double(), mixed.movedim(-1, -1 - dims)


def lost(model, small, x):
    with torch.no_grad():
        whole, bias = (
            model(x),
            0 if model[0].bias is None else model[0].bias.reshape(-1, *[1] * (model[0].weight.ndim - 2)),
        )
        return float((small(x) - whole).square().sum() / (whole - bias).square().sum()) ** 0.5


@settings(deadline=None, max_examples=80)
@given(geometries(), st.data())
def test_the_error_is_that_of_the_output_and_no_more_than_by_the_weights_own_factors(problem, data):
    model, x = problem
    full = min(4 // model[0].groups, 6 // model[0].groups * math.prod(model[0].kernel_size))
    rank = data.draw(st.integers(1, full))
    small = fxrank.factorize(model, x, rank, include="*", calibration=[x])
    decision = fxrank.plan_of(small).layer("0")
    error = lost(model, small, x)
    assert decision.reason == f"rank {rank} as given"
    assert decision.output_error == pytest.approx(error, rel=1e-5, abs=2e-6)
    assert error <= lost(model, fxrank.factorize(model, x, rank, include="*"), x) * (1 + 1e-9) + 1e-9
    assert (small[0].bias is None) == (model[0].bias is None)
    if rank == full:
        assert error < 1e-9


def smooth(channels, size):
    coarse = torch.randn(8, channels, 3, 3, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").double()


def test_much_less_is_lost_of_a_decoder():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(16, 12, 4, 2, 1)).double()
    x = torch.einsum("nchw,cd->ndhw", smooth(16, 6), torch.randn(16, 16).double() * 2.0 ** (-torch.arange(16) / 2))
    for rank in (2, 4, 8):
        known = lost(model, fxrank.factorize(model, x, rank, include="*", calibration=[x]), x)
        assert known < 0.8 * lost(model, fxrank.factorize(model, x, rank, include="*"), x)


def test_a_size_that_is_asked_for_is_seen():
    class Asked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(4, 6, 3, 3, 1)

        def forward(self, x):
            return self.up(x, output_size=[15])

    torch.manual_seed(0)
    model, x = Asked().double(), torch.randn(5, 4, 5).double()
    small = fxrank.factorize(model, x, 2, include="*", calibration=[x])
    with torch.no_grad():
        whole, bias = model(x), model.up.bias[:, None]
        error = float((small(x) - whole).norm() / (whole - bias).norm())
    assert fxrank.plan_of(small).layer("up").output_error == pytest.approx(error, abs=2e-6)
