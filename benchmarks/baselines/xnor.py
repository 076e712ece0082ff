"""XNOR-Net: convolutions with weights and inputs of one bit (Rastegari et al. 2016), simulated in float.

    W ≈ α · sign(W)               α = mean |W| of each output channel: the scale with the least error (eq. 6)
    x * W ≈ (sign(x) * sign(W)) ⊙ K α      K = mean |x| of the channels, averaged over each window (§3.2)

torch has no kernels for single bits: this is slower than float convolutions, here as in Cuttlefish's Table 1, and nothing is smaller in memory.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.base import CPU, Run, Trained, sample, weight_layers
from benchmarks.subjects.jobs import size
from benchmarks.subjects.tasks import Task

BITS = 32
"""Of a number that is not binary."""


class _Sign(torch.autograd.Function):
    """1 or -1, 1 for 0; the gradient passes where `|x| ≤ 1` (the straight-through estimator, §3.1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        passed: Tensor = grads[0] * (x.abs() <= 1)
        return passed


def sign(x: Tensor) -> Tensor:
    """1 or -1, of any shape, with a straight-through gradient."""
    out: Tensor = _Sign.apply(x)
    return out


def binary(weight: Tensor) -> Tensor:
    """`α · sign(W)` of a weight `(out, …)`, differentiated through the sign and through `α` (eq. 11)."""
    alpha = weight.abs().flatten(1).mean(1).view(-1, *[1] * (weight.ndim - 1))
    return alpha * sign(weight)


class BinaryConv2d(nn.Module):
    """A convolution of binary inputs with a binary weight, `(N, m, h, w)` to `(N, n, h', w')`, in place of a dense one, whose weight and
    bias it takes. A BatchNorm of its own comes before the sign (§3.2, "B-A-C-P"): the outputs of a ReLU all have one sign.
    """

    box: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"XNOR-Net pads with zeros; got padding_mode={conv.padding_mode!r}. Leave such a layer dense."
            )
        self.norm = nn.BatchNorm2d(conv.in_channels)
        self.weight, self.bias = conv.weight, conv.bias
        self.groups = conv.groups
        self.geometry: Any = conv.stride, conv.padding, conv.dilation, conv.groups
        height, width = conv.kernel_size
        box = torch.full((conv.groups, 1, height, width), 1 / (height * width))
        self.register_buffer("box", box, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized, binarized, convolved, scaled."""
        x = self.norm(x)
        near = x.abs().unflatten(1, (self.groups, -1)).mean(2)
        scale = F.conv2d(near, self.box, None, *self.geometry).repeat_interleave(len(self.weight) // self.groups, 1)
        out = F.conv2d(sign(x), binary(self.weight), None, *self.geometry) * scale
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


@dataclass(frozen=True)
class XNOR:
    """Train a model of two-dimensional convolutions as XNOR-Net, all but the first and the last of its Linear and convolutional layers
    binary; Linear layers in between stay as they are. `remaining` counts a binary weight as a 32nd of a number (Cuttlefish's Table 1).
    """

    def __call__(self, task: Task, epochs: int, seed: int, device: torch.device = CPU) -> Trained:
        """`facts`: the binary layers and the number of their weights."""
        started = time.perf_counter()
        model = task.build(seed).to(device)
        dense = size(model)
        inner = list(weight_layers(model, sample(task, device)).items())[1:-1]
        convolutions = {name: layer for name, layer in inner if isinstance(layer, nn.Conv2d)}
        if not convolutions:
            raise ValueError(
                f"XNOR-Net makes two-dimensional convolutions between the first and the last layer binary; {type(model).__name__} has none. "
                "Choose a convolutional model."
            )
        for name, layer in convolutions.items():
            model.set_submodule(name, BinaryConv2d(layer).to(device))
        run = Run(task, model, epochs, seed, device)
        run.train()
        ones = sum(layer.weight.numel() for layer in convolutions.values())
        scales = sum(len(layer.weight) for layer in convolutions.values())
        facts = {"binary_layers": list(convolutions), "binary_weights": ones, "simulated": "in float"}
        left = size(model) - ones + ones / BITS + scales
        return Trained(model, dense, left, time.perf_counter() - started, facts)
