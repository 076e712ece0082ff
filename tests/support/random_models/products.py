"""Parameters that the code multiplies with by itself: products, stacks of experts, heads, views, kernels."""

import torch
import torch.nn.functional as F
from torch import nn

from random_models.drawn import part


def matrix(*shape):
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


PRODUCTS = {
    "matmul": lambda x, w: x @ w,
    "torch.matmul": torch.matmul,
    "linear": F.linear,
    "transposed": lambda x, w: F.linear(x, w.t()),
    "mT": lambda x, w: x @ w.mT,
    "einsum": lambda x, w: torch.einsum("ni,io->no", x, w),
    "einsum back": lambda x, w: torch.einsum("oi,ni->no", w, x),
    "from the left": lambda x, w: (w @ x.t()).t(),
    "mm": lambda x, w: x.mm(w),
    "addmm": lambda x, w: torch.addmm(x, x, w),
    "addmm scaled": lambda x, w: torch.addmm(x, x, w, beta=0.5, alpha=2),
    "halves": lambda x, w: torch.cat([F.linear(x, half) for half in w.chunk(2)], -1),
    "split": lambda x, w: torch.cat([x @ part for part in w.split(w.shape[1] // 2, 1)], -1),
    "narrow": lambda x, w: x @ w.narrow(0, 0, x.shape[-1]),
    "sliced": lambda x, w: F.pad(x @ w[:, :-1], (0, 1)),
    "half the rows": lambda x, w: x[:, : x.shape[-1] // 2] @ w[: x.shape[-1] // 2],
    "tensordot": lambda x, w: torch.tensordot(x, w, 1),
    "inner": torch.inner,
    "scaled": lambda x, w: x @ (w * 0.5),
    "symmetric": lambda x, w: x @ (w + w.t()),
    "twice": lambda x, w: torch.tanh(x @ w) @ w.t(),
    "squared": lambda x, w: x @ (w @ w),
    "detached": lambda x, w: x @ w + F.linear(x, w.detach()),
    "cast": lambda x, w: x @ w.to(x.dtype),
    "typed": lambda x, w: x @ w.type_as(x),
    "rows": lambda x, w: x * w[torch.arange(len(w)).flip(0)].mean(0),
    "sum of rows": lambda x, w: x @ w + w.sum(0),
    "contiguous": lambda x, w: x @ w.t().contiguous(),
    "reshaped": lambda x, w: x @ w.reshape(2, -1, w.shape[1]).reshape(w.shape),
    "looked up": lambda x, w: x + F.embedding(x.argmax(-1), w),
    "mv": lambda x, w: torch.stack([w.mv(row) for row in x.unbind(0)]) if len(x) else x,
}


@part("tokens", "vectors")
class Product(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.w, self.how = matrix(width, width), draw.choice(sorted(set(PRODUCTS) - {"mv"}))

    def forward(self, x):
        return PRODUCTS[self.how](x.reshape(-1, x.shape[-1]), self.w).reshape(x.shape)


@part("tokens", "vectors")
class OneByOne(nn.Module):
    """A loop over the rows of a batch, whose number a graph cannot know."""

    def __init__(self, draw, width):
        super().__init__()
        self.w = matrix(width, width)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        return torch.stack([self.w.mv(row) for row in rows.unbind(0)]).reshape(x.shape)


@part("tokens", "vectors")
class RectangularProduct(nn.Module):
    """Down and up by parameters, with a bias or not."""

    def __init__(self, draw, width):
        super().__init__()
        inner = draw.choice([width // 2, 2 * width])
        self.down, self.up = matrix(inner, width), matrix(inner, width)
        self.bias = nn.Parameter(torch.randn(inner)) if draw.flip() else None

    def forward(self, x):
        return torch.tanh(F.linear(x, self.down, self.bias)) @ self.up


EXPERTS = 3
MIXTURES = {
    "bmm": lambda x, w, gate: (torch.bmm(x.expand(len(w), *x.shape), w) * gate.t()[:, :, None]).sum(0),
    "matmul": lambda x, w, gate: (torch.matmul(x, w) * gate.t()[:, :, None]).sum(0),
    "einsum": lambda x, w, gate: torch.einsum("nei,ne->ni", torch.einsum("nd,edi->nei", x, w), gate),
    "einsum transposed": lambda x, w, gate: torch.einsum("nei,ne->ni", torch.einsum("nd,eid->nei", x, w), gate),
    "one equation": lambda x, w, gate: torch.einsum("nd,edi,ne->ni", x, w, gate),
    "bank": lambda x, w, gate: torch.bmm(x[:, None], torch.einsum("ne,edi->ndi", gate, w))[:, 0],
    "loop": lambda x, w, gate: sum((x @ w[e]) * gate[:, e : e + 1] for e in range(len(w))),
    "loop of linear": lambda x, w, gate: sum(F.linear(x, m) * gate[:, e : e + 1] for e, m in enumerate(w.unbind(0))),
    "best": lambda x, w, gate: torch.einsum("nd,ndi->ni", x, w[gate.argmax(-1)]),
    "mean": lambda x, w, gate: x @ w.mean(0),
    "baddbmm": lambda x, w, gate: torch.baddbmm(x.expand(len(w), *x.shape), x.expand(len(w), *x.shape), w).mean(0),
}


@part("tokens", "vectors")
class Experts(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.route, self.w = nn.Linear(width, EXPERTS), matrix(EXPERTS, width, width)
        self.how = draw.choice(sorted(MIXTURES))

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        return MIXTURES[self.how](rows, self.w, self.route(rows).softmax(-1)).reshape(x.shape)


HEADS = {
    "per head": ("ndhk", lambda x, w: torch.einsum("nd,dhk->nhk", x, w).flatten(1)),
    "heads first": ("hdk", lambda x, w: torch.einsum("nd,hdk->nhk", x, w).flatten(1)),
    "heads as a stack": ("hdk", lambda x, w: torch.matmul(x[:, None, None], w)[:, :, 0].flatten(1)),
    "block diagonal": ("hkk", lambda x, w: torch.einsum("nhk,hkj->nhj", x.view(len(x), 2, -1), w).flatten(1)),
    "block diagonal, bmm": (
        "hkk",
        lambda x, w: torch.bmm(x.view(len(x), 2, -1).transpose(0, 1), w).transpose(0, 1).flatten(1),
    ),
}


@part("tokens", "vectors")
class Heads(nn.Module):
    """A weight that is laid out as two heads."""

    def __init__(self, draw, width):
        super().__init__()
        self.how = draw.choice(sorted(HEADS))
        shapes = {"ndhk": (width, 2, width // 2), "hdk": (2, width, width // 2), "hkk": (2, width // 2, width // 2)}
        self.w = matrix(*shapes[HEADS[self.how][0]])

    def forward(self, x):
        return HEADS[self.how][1](x.reshape(-1, x.shape[-1]), self.w).reshape(x.shape)


@part("tokens", "vectors")
class ManyMatrices(nn.Module):
    """Parameters in torch's own lists and dicts of them."""

    def __init__(self, draw, width):
        super().__init__()
        matrices = [matrix(width, width) for _ in range(2)]
        self.named = draw.flip()
        self.all = (
            nn.ParameterDict(dict(zip("ab", matrices, strict=True))) if self.named else nn.ParameterList(matrices)
        )

    def forward(self, x):
        for w in self.all.values() if self.named else self.all:
            x = torch.tanh(x @ w)
        return x


@part("tokens", "vectors")
class Delta(nn.Module):
    """A weight and an update of low rank."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.a, self.b, self.before = matrix(2, width), matrix(width, 2), draw.flip()

    def forward(self, x):
        if self.before:
            return F.linear(x, self.layer.weight + self.b @ self.a, self.layer.bias)
        return self.layer(x) + x @ self.a.t() @ self.b.t()


@part("images")
class Kernel(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.groups = draw.choice([1, 1, 2])
        size = draw.choice([1, 3])
        self.kernel = nn.Parameter(torch.randn(width, width // self.groups, size, size) / size / width**0.5)
        self.shift = nn.Parameter(torch.randn(width)) if draw.flip() else None

    def forward(self, x):
        return F.conv2d(x, self.kernel, self.shift, padding=self.kernel.shape[-1] // 2, groups=self.groups)


@part("images")
class OverChannels(nn.Module):
    """The channels of an image multiplied with a matrix, three ways."""

    def __init__(self, draw, width):
        super().__init__()
        self.w = matrix(width, width)
        self.how = draw.choice(["einsum", "matmul", "kernel"])

    def forward(self, x):
        if self.how == "einsum":
            return torch.einsum("nchw,cd->ndhw", x, self.w)
        if self.how == "matmul":
            return (self.w @ x.flatten(2)).view_as(x)
        return F.conv2d(x, self.w[:, :, None, None])
