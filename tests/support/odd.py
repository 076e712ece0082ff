"""Small models whose forward does what graphs find hard."""

import torch
from torch import nn


class Plain(nn.Module):
    """What the small models below share: two layers and a place to put things."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.middle(self.first(x)))

    def middle(self, x):
        return x


class AsksForTypes(Plain):
    def middle(self, x):
        if isinstance(x, torch.Tensor):
            x = [x]
        assert isinstance(x[0].shape, tuple)
        assert isinstance(x[0].shape[0], int)
        assert not isinstance(x[0], (int, nn.Parameter))
        assert isinstance(self.first.weight.dtype, torch.dtype)
        return x[0]


class MakesTensors(Plain):
    def middle(self, x):
        n, width = x.shape
        x = x + torch.arange(width, device=x.device) + torch.zeros(n, width) + torch.ones((n, 1), dtype=x.dtype)
        x = x + torch.full((n, width), 2.0) + torch.eye(width)[0] + torch.linspace(0, 1, width)
        return x.clamp(min=torch.finfo(x.dtype).min) + torch.tensor(width) + torch.empty(n, 0).sum()


class TakesApart(Plain):
    def middle(self, x):
        n, *rest = x.shape
        (size,) = rest
        total = 0
        for i, row in enumerate(x.unbind(1)):
            total = total + row * i
        chunks = dict(zip("ab", x.chunk(2, dim=-1), strict=True))
        joined = torch.cat([*chunks.values(), *(chunks[k] for k in chunks)], -1)[..., : max(size, 2)]
        top, index = x.topk(k=min(3, size), dim=1)
        return joined * total.view(n, 1) + top.sum() + index.max() + len(chunks)


class HoldsAside(Plain):
    def __init__(self):
        super().__init__()
        self.row = [self.first, self.second]
        object.__setattr__(self, "act", nn.SiLU())

    def forward(self, x):
        for layer in self.row:
            x = self.act(layer(x))
        return x


class Buffers(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("table", None)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def middle(self, x):
        if self.table is None or self.table.shape[0] != x.shape[1]:
            self.table = torch.arange(x.shape[1]) + 1.0
        self.mean = self.mean + x.detach().mean(0)
        self.calls += 1
        return x - self.mean + self.table


class AutocastRegion(Plain):
    def middle(self, x):
        with torch.no_grad():
            scale = x.abs().amax(-1, keepdim=True)
        return x / scale


class CatchesErrors(Plain):
    def middle(self, x):
        try:
            return self.second(x[:, :2])
        except RuntimeError:
            return x


ODD = [AsksForTypes, MakesTensors, TakesApart, HoldsAside, Buffers, AutocastRegion, CatchesErrors]


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x
