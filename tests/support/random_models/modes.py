"""What differs by mode, by chance, by the calls before, or in the gradient alone."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from random_models.drawn import part


@part("tokens", "vectors")
class ByMode(nn.Module):
    """Another layer in each mode, or one more while it is trained."""

    def __init__(self, draw, width):
        super().__init__()
        self.a, self.b, self.more = nn.Linear(width, width), nn.Linear(width, width), draw.flip()

    def forward(self, x):
        if self.training:
            return self.b(torch.tanh(self.a(x))) if self.more else self.b(x)
        return self.a(x)


@part("tokens", "vectors", "images")
class DropPath(nn.Module):
    """A residual branch that is left out for some examples."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer, self.keep = nn.Linear(width, width), 0.7

    def forward(self, x):
        y = self.layer(x) if x.ndim < 4 else self.layer(x.movedim(1, -1)).movedim(-1, 1)
        if self.training:
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
            y = y * (torch.rand(shape, dtype=x.dtype) < self.keep) / self.keep
        return x + y


@part("tokens", "vectors")
class Noise(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.layer, self.p, self.how = nn.Linear(width, width), 0.2, draw.choice(["dropout", "alpha", "noise", "like"])

    def forward(self, x):
        if self.how == "dropout":
            x = F.dropout(x, self.p, self.training)
        elif self.how == "alpha":
            x = F.alpha_dropout(x, self.p, training=self.training)
        elif self.training:
            x = x + (torch.randn(x.shape[-1], dtype=x.dtype) if self.how == "noise" else torch.randn_like(x))
        return self.layer(x)


@part("tokens", "vectors")
class RunningMean(nn.Module):
    """Buffers that a forward updates, in place or anew, and a counter."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.in_place, self.seen = draw.flip(), 0

    def forward(self, x):
        if self.training:
            now = x.detach().flatten(0, -2).mean(0)
            if self.in_place:
                self.mean.mul_(0.9).add_(now, alpha=0.1)
            else:
                self.mean = 0.9 * self.mean + 0.1 * now
            self.calls += 1
            self.seen += 1
        return self.layer(x - self.mean)


@part("vectors", "images")
class BatchStatistics(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, momentum=draw.choice([0.1, None]), affine=draw.flip())

    def forward(self, x):
        if x.ndim == 2:
            return self.norm(self.layer(x))
        return self.norm(self.layer(x.movedim(1, -1)).movedim(-1, 1).flatten(2)).view(x.shape)


@part("tokens", "vectors")
class Codebook(nn.Module):
    """Vector quantization with averages for entries, which the forward writes while it is trained."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.codes = nn.Parameter(torch.randn(4, width), requires_grad=False)

    def forward(self, x):
        y = self.layer(x)
        nearest = torch.cdist(y.detach().reshape(-1, y.shape[-1]), self.codes).argmin(-1)
        codes = F.embedding(nearest, self.codes).view_as(y)
        if self.training:
            with torch.no_grad():
                self.codes.lerp_(y.detach().reshape(-1, y.shape[-1]).mean(0).expand_as(self.codes), 0.01)
        return y + (codes - y).detach()


@part("tokens", "vectors")
class Momentum(nn.Module):
    """A slow copy of a layer, which follows it."""

    def __init__(self, draw, width):
        super().__init__()
        self.fast, self.slow = nn.Linear(width, width), nn.Linear(width, width)
        self.slow.requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
        return self.fast(x) + self.slow(x)


@part("tokens", "vectors")
class Cached(nn.Module):
    """Keeps something of the call in an attribute."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer, self.cache, self.history = nn.Linear(width, width), {}, []

    def forward(self, x):
        self.cache["last"] = x.detach().mean()
        self.features = x
        key = x.shape[-1]
        if key not in self.cache:
            self.cache[key] = torch.arange(key, dtype=x.dtype)
        return self.layer(x + self.cache[key])


@part("tokens", "vectors")
class Checkpointed(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Straight(torch.autograd.Function):
    """The sign, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def without(layer, x):
    with torch.no_grad():
        return layer(x)


def disabled(layer, x):
    with torch.set_grad_enabled(False):
        return layer(x)


def swapped(layer, x):
    y = layer(x)
    return y + (y.sign() - y).detach()


GRADIENTS = {
    "no_grad": without,
    "disabled": disabled,
    "detached": lambda layer, x: layer(x).detach(),
    "detached input": lambda layer, x: layer(x.detach()),
    "reversed": lambda layer, x: Reverse.apply(layer(x)),
    "straight": lambda layer, x: Straight.apply(layer(x)),
    "swapped": swapped,
}


@part("tokens", "vectors")
class Gradients(nn.Module):
    """What the graph of outputs does not show."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.how = draw.choice(sorted(GRADIENTS))

    def forward(self, x):
        return self.out(GRADIENTS[self.how](self.layer, x) + x)


@part("tokens", "vectors")
class AsksForData(nn.Module):
    """Goes where a number of the input says, or a module inside it does."""

    def __init__(self, draw, width):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(width, width), nn.Linear(width, width), draw.choice(["if", "item", "some"])

    def forward(self, x):
        if self.how == "if":
            return self.a(x) if x.flatten()[0] > 0 else self.b(x)
        if self.how == "item":
            return self.b(self.a(x)) * round(1 + float(x.detach().flatten()[0]))
        rows = x.reshape(-1, x.shape[-1])
        chosen = rows[:, 0] > 0  # a mean, behind a norm, is rounding
        out = self.b(rows)
        out[chosen] = self.a(rows[chosen])
        return out.view_as(x)
