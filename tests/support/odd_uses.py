"""Parts, examples and options as nobody expects them, for tests that ask only for one thing: an error of ours, or a right result."""

import linecache
import math
import threading
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fxrank

PACKAGE = str(Path(fxrank.__file__).parent)


class Part(nn.Module):
    """`(N, 8)` to `(N, 8)`, with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x)


class Sparse(Part):
    """Multiplies a sparse tensor with a raw weight, and gives one to its layer."""

    layout = "to_sparse"

    def forward(self, x):
        return torch.sparse.mm(getattr(x, self.layout)(), self.layer.weight) + self.layer(x)


class Rows(Sparse):
    layout = "to_sparse_csr"


class SparseToLayer(Part):
    def forward(self, x):
        return self.layer(x.to_sparse())


class SparseWeight(Part):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.eye(8).to_sparse(), requires_grad=False)

    def forward(self, x):
        return self.layer(torch.sparse.mm(self.table, x.t()).t())


class SparseGradient(Part):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 8, sparse=True)

    def forward(self, x):
        return self.layer(x + self.table(x.argmax(1)))


class Nested(Part):
    def forward(self, x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nested = torch.nested.nested_tensor([x[:1], x], layout=torch.jagged)
            return self.layer(nested).to_padded_tensor(0.0)[1]


class Mapped(Part):
    def forward(self, x):
        return torch.func.vmap(self.layer)(x)


class MappedWeights(Part):
    """An ensemble: one function over stacked parameters."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 8, 8) / 8)

    def forward(self, x):
        return torch.func.vmap(lambda w: x @ w)(self.weights).mean(0) + self.layer(x)


class Slope(Part):
    def forward(self, x):
        return torch.func.vmap(torch.func.grad(lambda row: self.layer(row).square().sum()))(x)


class OfWeights(Part):
    """Calls a part with weights that it computes."""

    def forward(self, x):
        own = {name: value * 2 for name, value in self.layer.named_parameters()}
        return torch.func.functional_call(self.layer, own, (x,))


class OfOwnWeights(Part):
    def forward(self, x):
        return torch.func.functional_call(self.layer, dict(self.layer.named_parameters()), (x,))


class PastAttributes(Part):
    def forward(self, x):
        parameters = dict(self.named_parameters())
        return F.linear(x, parameters["layer.weight"]) + next(self.layer.parameters()).sum()


class Empty(Part):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.into, self.out = nn.Linear(8, 0), nn.Linear(0, 8)
        self.raw = nn.Parameter(torch.zeros(8, 0))

    def forward(self, x):
        return self.layer(self.out(self.into(x) + x @ self.raw) + x)


def scripted(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def recorded(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, torch.randn(4, 8))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.layer = inner, nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.inner(x))


class HoldsItself(Part):
    def __init__(self):
        super().__init__()
        self.me = [self, {"again": self}]


class CallsItself(Part):
    def forward(self, x, depth=3):
        return self.layer(self(x, depth - 1)) if depth else x


class Attributes(Part):
    """Answers for any name."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("odd"):
                raise KeyError(name) from None
            raise


class OddNames(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("a*", "[b", "0", "weight", "u", "class", "é"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x):
        for child in self.children():
            x = torch.tanh(child(x))
        return x


class NoTensors(Part):
    """Parameters of no dimension, of none, and of numbers that no gradient has."""

    def __init__(self):
        super().__init__()
        self.scale, self.nothing = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(0))
        self.whole = nn.Parameter(torch.arange(64).view(8, 8), requires_grad=False)
        self.register_parameter("none", None)
        self.register_buffer("nil", None)

    def forward(self, x):
        return self.layer(x) * self.scale + self.nothing.sum() + x @ self.whole.to(x.dtype)


class FullOf(Part):
    number = math.nan

    def __init__(self):
        super().__init__()
        nn.init.constant_(self.layer.weight, self.number)


class Infinite(FullOf):
    number = math.inf


class Zeros(FullOf):
    number = 0.0


class Tiny(FullOf):
    number = 1e-38


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.layer = nn.LazyLinear(8)

    def forward(self, x):
        return self.layer(x)


class Raises(Part):
    """Fails where it is traced, or always."""

    error = KeyError

    def forward(self, x):
        if type(x) is not torch.Tensor:
            raise self.error("odd")
        return self.layer(x)


class RaisesAlways(Part):
    error = IndexError

    def forward(self, x):
        raise self.error("odd")


def raising(kind, error):
    return type(f"{kind.__name__}{error.__name__}", (kind,), {"error": error})


class Locked(Part):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Generates(Part):
    def forward(self, x):
        return sum(self.layer(row[None]) for row in x) + x


class Words(Part):
    """Asks all kinds of things."""

    def forward(self, x):
        text = f"{x.shape} {x.dtype}"
        assert text and x is not None and hash(x) and str(x.device)
        names = [name for name, _ in self.named_modules()]
        assert "layer" in names and type(self.layer) is not None
        return self.layer(x)


class Numpy(Part):
    def forward(self, x):
        return self.layer(x) + torch.from_numpy(np.abs(x.detach().numpy()))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.Linear(8, 8)
        for _ in range(90):
            inner = nn.Sequential(inner)
        self.inner, self.layer = inner, nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(self.inner(x))


class Unused(Part):
    def __init__(self):
        super().__init__()
        self.never, self.list = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])


class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = self.two = nn.Linear(8, 8)

    def forward(self, x):
        return self.two(self.one(x))


class Weightless(nn.Module):
    def forward(self, x):
        return x.tanh()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, dtype=torch.complex64)

    def forward(self, x):
        return self.layer(x.to(torch.complex64)).real.to(x.dtype)


class Bytes(Part):
    def __init__(self):
        super().__init__()
        self.small = nn.Parameter(torch.randn(8, 8).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return self.layer(x) @ self.small.to(x.dtype)


class Property(Part):
    @property
    def weight(self):
        raise AttributeError("no weight here")

    @property
    def in_features(self):
        return {}["odd"]


class Own(torch.Tensor):
    pass


class OfOwnClass(Part):
    def __init__(self):
        super().__init__()
        self.layer.weight = nn.Parameter(self.layer.weight.detach().as_subclass(Own))


class Slots(Part):
    def forward(self, x, *rest, **named):
        return {"out": self.layer(x), "rest": rest, "named": named, "none": None, "text": "odd"}


class Yields(Part):
    def forward(self, x):
        return (self.layer(x) for _ in range(2))


PARTS = {
    kind.__name__: kind
    for kind in (
        *(Part, Sparse, Rows, SparseToLayer, SparseWeight, SparseGradient, Nested, Mapped, MappedWeights, Slope),
        *(OfOwnWeights, PastAttributes, Empty, HoldsItself, CallsItself, Attributes, OddNames, NoTensors),
        *(FullOf, Infinite, Zeros, Tiny, Lazy, Locked, Generates, Words, Numpy, Deep, Unused, Same, Weightless),
        *(Complex, Bytes, Property, OfOwnClass),
        *(
            raising(kind, error)
            for kind in (Raises, RaisesAlways)
            for error in (KeyError, IndexError, AttributeError, NameError, RecursionError, StopIteration)
        ),
    )
} | {
    "scripted": lambda: scripted(Part()),
    "recorded": lambda: recorded(Part()),
    "around scripted": lambda: Around(scripted(Part())),
    "compiled": lambda: torch.compile(Part(), backend="eager"),
}
"""By name, what makes one."""

OUTPUTS = {"Slots": Slots, "Yields": Yields}
"""Parts that return no tensor: the last of a model only."""


def is_own(error):
    """Whether fxrank raised this on purpose: in its own code, by a `raise`."""
    if isinstance(error, fxrank.FxrankError):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = (linecache.getline(frame.filename, frame.lineno or 0)).strip()
    return isinstance(error, (TypeError, ValueError, OSError)) and (
        frame.filename.startswith(PACKAGE) and line.startswith("raise ")
    )
