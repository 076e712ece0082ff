"""A network of many kinds of layers that have pairs, and what its files of an earlier fxrank were written from."""

import warnings

import torch
from torch import nn

import fxrank


class Mixed(nn.Module):
    """`(N, 3, 8, 8)` and indices `(N, 5)` to `(N, 4)`."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.line = nn.Conv1d(8, 8, 3)
        self.table = nn.Embedding(20, 16)
        self.qkv = nn.Linear(16, 48)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.recurrent = nn.LSTM(16, 16, batch_first=True)
        self.raw = nn.Parameter(torch.randn(16, 16) / 4)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.head = nn.Linear(24, 4)

    def forward(self, x, indices):
        x = self.up(torch.relu(self.grouped(torch.relu(self.conv(x)))))
        x = self.line(x.flatten(2))
        q, k, v = self.qkv(self.table(indices)).chunk(3, -1)
        y = self.attention(q, k, v)[0]
        y = self.recurrent(y)[0].mean(1) @ self.raw
        return self.head(torch.cat([x.mean(2), self.b(torch.tanh(self.a(y)))], 1))


def mixed_inputs():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 3, 8, 8, generator=generator), torch.randint(20, (2, 5), generator=generator)


def factorized():
    """All of it at half the rank, the fused projection as three pairs, a BatchNorm inside the convolution's."""
    model, inputs = Mixed().eval(), mixed_inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        small = fxrank.factorize(model, inputs, rank=0.5, include="*", form="qkv", extra_bn=True)
    return small
