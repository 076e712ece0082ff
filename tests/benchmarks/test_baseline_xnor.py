"""XNOR-Net: the best scales, straight-through gradients, and a convolution that is what the paper says."""

import pytest
import torch
import torch.nn.functional as F
from digit_tasks import VggDigits, digits, perceptron
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.baselines.base import CPU
from benchmarks.baselines.xnor import XNOR, BinaryConv2d, binary, sign
from benchmarks.real_runs import evaluate
from benchmarks.subjects.jobs import size

NUMBERS = st.floats(-4, 4, width=32)


@given(st.lists(NUMBERS, min_size=1, max_size=12), NUMBERS, st.data())
def test_no_other_scale_or_signs_have_less_error(values, scale, data):
    w = torch.tensor(values, dtype=torch.float64)[None]
    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=w.numel(), max_size=w.numel()))
    best = (w - binary(w)).square().sum()
    assert best <= (w - scale * torch.tensor(signs)).square().sum() + 1e-9
    assert best <= (w - scale * sign(w)).square().sum() + 1e-9


def test_each_output_channel_has_its_scale():
    w = torch.randn(3, 2, 3, 3)
    found = binary(w)
    for channel in range(3):
        assert torch.allclose(found[channel].abs(), w[channel].abs().mean().expand(2, 3, 3))
    assert torch.equal(found > 0, w > 0)


def test_the_gradient_of_the_sign_goes_straight_through_near_zero():
    x = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.4, 1.0, 1.1], requires_grad=True)
    y = sign(x)
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    given = torch.arange(1.0, 8.0)
    y.backward(given)
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 0]


def test_the_gradient_of_a_binary_weight_is_that_of_sign_and_scale():
    w = (2 * torch.randn(2, 5, dtype=torch.float64)).requires_grad_()
    given = torch.randn(2, 5, dtype=torch.float64)
    binary(w).backward(given)
    for row in range(2):
        v, g = w.detach()[row], given[row]
        alpha = v.abs().mean()
        wanted = v.sign() * (g * v.sign()).sum() / 5 + alpha * g * (v.abs() <= 1)
        torch.testing.assert_close(w.grad[row], wanted)


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation", "bias"),
    [(1, 1, 1, 1, False), (2, 2, 1, 1, True), (1, 1, 2, 2, True), (4, 1, 0, 1, False)],
)
def test_a_binary_convolution_is_signs_times_scales(groups, stride, padding, dilation, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, stride, padding, dilation, groups, bias)
    layer = BinaryConv2d(conv).eval()
    layer.norm.running_mean.uniform_(-1, 1)
    layer.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 7, 7)
    got = layer(x)
    h = layer.norm(x)
    size, own = 4 // groups, 8 // groups
    around = (padding,) * 4
    signs, sizes = (F.pad(t, around) for t in (torch.where(h >= 0, 1.0, -1.0), h.abs()))
    assert got.shape == conv(x).shape
    for channel in range(8):
        inputs = slice(channel // own * size, (channel // own + 1) * size)
        w = conv.weight[channel]
        for i in range(got.shape[2]):
            for j in range(got.shape[3]):
                rows, cols = (torch.arange(3) * dilation + at * stride for at in (i, j))
                window = signs[:, inputs][:, :, rows][..., cols]
                k = sizes[:, inputs][:, :, rows][..., cols].mean((1, 2, 3))
                wanted = (window * w.sign()).sum((1, 2, 3)) * k * w.abs().mean()
                wanted = wanted if conv.bias is None else wanted + conv.bias[channel]
                torch.testing.assert_close(got[:, channel, i, j], wanted, rtol=1e-4, atol=1e-5)


def test_other_paddings_are_refused():
    with pytest.raises(ValueError, match="XNOR-Net pads with zeros; got padding_mode='reflect'"):
        BinaryConv2d(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))


def test_the_first_and_the_last_layer_are_left_and_bits_are_counted():
    task = digits(VggDigits)
    found = XNOR()(task, 2, 0)
    model = found.model
    assert [type(model.get_submodule(f"conv{i}")).__name__ for i in (1, 2, 3)] == [
        "Conv2d",
        "BinaryConv2d",
        "BinaryConv2d",
    ]
    assert isinstance(model.classifier, nn.Linear)
    assert found.facts["binary_layers"] == ["conv2", "conv3"]
    ones, scales = 9 * (8 * 16 + 16 * 16), 32
    assert found.facts["binary_weights"] == ones
    more = 2 * (8 + 16)  # a BatchNorm before each
    assert size(model) == found.dense_parameters + more
    assert found.remaining == pytest.approx(found.dense_parameters + more - ones + ones / 32 + scales)


def test_binary_networks_learn():
    task = digits(lambda: VggDigits(16), images=1024)
    found = XNOR()(task, 4, 0)
    assert evaluate(found.model, task.loaders(0)[1], CPU)[1] > 0.6


def test_models_without_convolutions_inside_are_refused():
    with pytest.raises(
        ValueError, match=r"two-dimensional convolutions between the first and the last layer .* Sequential has none"
    ):
        XNOR()(digits(perceptron), 2, 0)
