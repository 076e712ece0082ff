"""Layers as they come: linear, convolutions of any geometry, tables, and the usual blocks of them."""

import torch
import torch.nn.functional as F
from torch import nn

from random_models.drawn import SIDE, TOKENS, part


@part("tokens", "vectors")
class Dense(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=draw.flip())

    def forward(self, x):
        return self.layer(x)


@part("tokens", "vectors")
class FeedForward(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        inner = draw.choice([width // 2, 2 * width])
        self.norm = nn.LayerNorm(width)
        self.net = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, width))

    def forward(self, x):
        return x + self.net(self.norm(x))


@part("tokens", "vectors")
class Gated(nn.Module):
    """One projection for values and gates."""

    def __init__(self, draw, width):
        super().__init__()
        self.both, self.out = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width)
        self.apart = draw.flip()

    def forward(self, x):
        both = self.both(x)
        value, gate = both.chunk(2, -1) if self.apart else (both[..., 0::2], both[..., 1::2])
        return self.out(value * F.silu(gate))


@part("tokens", "vectors")
class TwoInputs(nn.Module):
    """A layer that has no pair."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Bilinear(width, width, width)

    def forward(self, x):
        return self.layer(x, torch.tanh(x)) + x


@part("tokens")
class Positions(nn.Module):
    """A table read by an index, or as a whole."""

    def __init__(self, draw, width):
        super().__init__()
        self.table, self.whole = nn.Embedding(TOKENS, width), draw.flip()

    def forward(self, x):
        if self.whole:
            return x + self.table.weight
        return x + self.table(torch.arange(x.shape[1], device=x.device))


@part("tokens")
class AlongTokens(nn.Module):
    """A causal convolution, or a layer over the tokens where their number is known."""

    def __init__(self, draw, width):
        super().__init__()
        self.reach = draw.randint(1, 3)
        self.conv = nn.Conv1d(width, width, self.reach, groups=draw.choice([1, 1, 2]), bias=draw.flip())
        self.mix = nn.Linear(TOKENS, TOKENS) if draw.flip() else None

    def forward(self, x):
        if self.mix is not None and x.shape[1] == self.mix.in_features:
            x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.conv(F.pad(x.transpose(1, 2), (self.reach - 1, 0))).transpose(1, 2)


def geometry(draw, width, modes=("zeros", "zeros", "reflect", "replicate", "circular")):
    """Options of a convolution that keeps the shape of its input."""
    kernel, dilation = draw.choice([1, 3, 3, 5]), draw.choice([1, 1, 2])
    return {
        "kernel_size": kernel,
        "padding": draw.choice([dilation * (kernel // 2), "same"]),
        "dilation": dilation,
        "groups": draw.choice([1, 1, 1, 2, width]),
        "bias": draw.flip(),
        "padding_mode": draw.choice(modes),
    }


@part("images")
class Conv(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, **geometry(draw, width))
        self.norm = draw.choice([nn.BatchNorm2d(width), nn.GroupNorm(2, width), nn.Identity()])

    def forward(self, x):
        return self.norm(self.conv(x))


@part("images")
class OddKernel(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        high, wide = draw.sample([1, 3, 5], 2)
        self.conv = nn.Conv2d(width, width, (high, wide), padding=(high // 2, wide // 2))

    def forward(self, x):
        return self.conv(x)


@part("images")
class DownAndUp(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        groups = draw.choice([1, 1, 2])
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2, groups=groups, bias=draw.flip())
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2, groups=groups, bias=draw.flip())

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


@part("images")
class Separable(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.depth = nn.Conv2d(width, 2 * width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        return self.point(F.relu6(self.depth(x)))


@part("images")
class Branches(nn.Module):
    """Concatenated branches, then a gate of each channel."""

    def __init__(self, draw, width):
        super().__init__()
        sizes = [1, 3, draw.choice([1, 3, 5])]
        self.branches = nn.ModuleList(nn.Conv2d(width, width, k, padding=k // 2) for k in sizes)
        self.join = nn.Conv2d(3 * width, width, 1, bias=False)
        self.squeeze, self.excite = nn.Linear(width, width // 2), nn.Linear(width // 2, width)

    def forward(self, x):
        x = self.join(torch.cat([branch(x) for branch in self.branches], 1))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


@part("images")
class AsLines(nn.Module):
    """One-dimensional convolutions over all pixels, a transposed one too."""

    def __init__(self, draw, width):
        super().__init__()
        options = {"kernel_size": 3, "padding": 1, "groups": draw.choice([1, 2])}
        self.there = nn.Conv1d(width, width, **options)
        self.back = nn.ConvTranspose1d(width, width, **options)

    def forward(self, x):
        return self.back(torch.tanh(self.there(x.flatten(2)))).reshape(x.shape)


@part("images")
class AsVolumes(nn.Module):
    """Three-dimensional convolutions, two rows of pixels as the depth."""

    def __init__(self, draw, width):
        super().__init__()
        options = {"kernel_size": (1, 3, 3), "padding": (0, 1, 1), "groups": draw.choice([1, 2])}
        self.there = nn.Conv3d(width, width, **options)
        self.back = nn.ConvTranspose3d(width, width, **options) if draw.flip() else nn.Identity()

    def forward(self, x):
        n, c, h, w = x.shape
        return self.back(self.there(x.view(n, c, 2, h // 2, w))).reshape(n, c, h, w)


@part("images")
class AlongRows(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(SIDE, SIDE)

    def forward(self, x):
        return x + self.layer(x)
