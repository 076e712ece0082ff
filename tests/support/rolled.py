"""A layer class of a user's own, with its pair."""

import torch
import torch.nn.functional as F
from torch import nn

import fxrank


class RolledLinear(nn.Module):
    """A linear layer on its input, rolled: `(…, in)` to `(…, out)`."""

    def __init__(self, in_features, out_features, shift, bias=True, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.shift = in_features, out_features, shift
        self.weight = nn.Parameter(
            torch.randn(out_features, in_features, device=device, dtype=dtype) / in_features**0.5
        )
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, x):
        return F.linear(x.roll(self.shift, -1), self.weight, self.bias)


class LowRankRolledLinear(fxrank.FactorPair):
    """`RolledLinear(in, r)`, then `Linear(r, out)`."""

    kind = "rolled_linear"
    geometry = ("in_features", "out_features", "shift")

    def make_layers(self, dense, place, extra_bn):
        first = RolledLinear(self.in_features, self.rank, self.shift, bias=False, **place)
        return first, None, nn.Linear(self.rank, self.out_features, bias=False, **place)

    def empty_dense(self, place):
        return RolledLinear(self.in_features, self.out_features, self.shift, bias=False, **place)


class RolledNet(nn.Module):
    """`(N, 12)` to `(N, 4)`."""

    def __init__(self):
        super().__init__()
        for i, (n, m) in enumerate([(12, 16), (16, 16), (16, 16), (16, 4)]):
            setattr(self, f"l{i}", RolledLinear(n, m, 3))

    def forward(self, x):
        for i in range(3):
            x = torch.relu(getattr(self, f"l{i}")(x))
        return self.l3(x)
