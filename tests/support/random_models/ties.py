"""Weights in more than one place: a module that is called again, parameters under several names, views of one memory."""

import torch
import torch.nn.functional as F
from torch import nn

from random_models.drawn import part


@part("tokens", "vectors")
class CalledAgain(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.layer, self.times = nn.Linear(width, width), draw.randint(2, 3)

    def forward(self, x):
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return x


@part("tokens", "vectors")
class SharedWeight(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self, draw, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width, bias=draw.flip())
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@part("images")
class SharedKernel(nn.Module):
    """Two convolutions with one kernel, of another dilation, or of another number of groups, which reads it otherwise."""

    def __init__(self, draw, width):
        super().__init__()
        self.a = nn.Conv2d(width, width // 2, 3, padding=1)
        far = draw.choice([1, 2])
        groups = draw.choice([1, 1, 2]) if width % 4 == 0 else 1
        self.b = nn.Conv2d(width * groups, width // 2, 3, padding=far, dilation=far, groups=groups, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return torch.cat([self.a(x), self.b(torch.cat([x] * self.b.groups, 1))], 1)


@part("tokens", "vectors", "images")
class TwoNames(nn.Module):
    """One module under two names, and called by either."""

    def __init__(self, draw, width):
        super().__init__()
        self.a = nn.Linear(width, width)
        self.group = nn.ModuleDict({"b": self.a})

    def forward(self, x):
        if x.ndim == 4:
            return self.group["b"](torch.tanh(self.a(x.movedim(1, -1)))).movedim(-1, 1)
        return self.group["b"](torch.tanh(self.a(x)))


@part("tokens", "vectors")
class ParameterOfTwo(nn.Module):
    """A layer's weight that is also a parameter of the module around it."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.matrix = self.layer.weight
        self.read = draw.choice([lambda x, w: F.linear(x, w), lambda x, w: x @ w, lambda x, w: x * w[0]])

    def forward(self, x):
        return self.layer(x) + self.read(torch.tanh(x), self.matrix)


@part("tokens", "vectors")
class ThereAndBack(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def __init__(self, draw, width):
        super().__init__()
        self.encode = nn.Linear(width, width // 2)
        self.bias = nn.Parameter(torch.randn(width))
        self.turn = draw.choice([lambda w: w.t(), lambda w: w.T, lambda w: w.transpose(0, 1)])

    def forward(self, x):
        return F.linear(torch.tanh(self.encode(x)), self.turn(self.encode.weight), self.bias)


@part("tokens", "vectors")
class OneMemory(nn.Module):
    """Two parameters on one storage, one of them transposed or not."""

    def __init__(self, draw, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.b.weight = nn.Parameter(self.a.weight.t() if draw.flip() else self.a.weight.view(width, width))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@part("tokens")
class TableAndHead(nn.Module):
    """Scores of each entry of a table, mixed back through the table: an embedding, and a head with its weight."""

    def __init__(self, draw, width):
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.head = nn.Linear(width, 7, bias=draw.flip())
        self.head.weight = self.table.weight
        self.soft = draw.flip()

    def forward(self, x):
        scores = self.head(x)
        if self.soft:
            return x + scores.softmax(-1) @ self.table.weight
        return x * scores.mean(-1, keepdim=True) + self.table(scores.argmax(-1))
