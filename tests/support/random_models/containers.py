"""Layers that a forward reaches otherwise than as an attribute: lists, dicts, tuples, partials, methods, objects."""

import functools
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from random_models.drawn import part

Held = namedtuple("Held", "layer")


@dataclass
class Record:
    layer: nn.Module


class Holder:
    """An object of the user's own that calls the layer."""

    def __init__(self, layer):
        self.inside = {"layer": layer}

    def __call__(self, x):
        return self.inside["layer"](x)


WAYS = {
    "list": (lambda layer: [layer], lambda held: held[0]),
    "tuple": (lambda layer: (layer,), lambda held: held[0]),
    "dict": (lambda layer: {"layer": layer}, lambda held: held["layer"]),
    "nest": (lambda layer: {"all": [(1, layer)]}, lambda held: held["all"][0][1]),
    "OrderedDict": (lambda layer: OrderedDict(layer=layer), lambda held: held["layer"]),
    "namedtuple": (Held, lambda held: held.layer),
    "dataclass": (Record, lambda held: held.layer),
    "namespace": (lambda layer: SimpleNamespace(layer=layer), lambda held: held.layer),
    "object": (Holder, lambda held: held),
    "partial": (functools.partial, lambda held: held),
    "bound method": (lambda layer: layer.forward, lambda held: held),
    "list of partials": (lambda layer: [functools.partial(layer)], lambda held: held[0]),
}


@part("tokens", "vectors")
class HeldAside(nn.Module):
    """A registered layer that is called through something else that holds it."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer, self.other = nn.Linear(width, width), nn.Linear(width, width)
        self.way = draw.choice(sorted(WAYS))
        self.held = WAYS[self.way][0](self.layer)
        self.both = draw.flip(0.3)

    def forward(self, x):
        y = torch.tanh(WAYS[self.way][1](self.held)(x))
        return self.other(y + self.layer(x) if self.both else y)


@part("tokens", "vectors")
class WeightsAside(nn.Module):
    """Parameters in plain lists and dicts beside their modules."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.pairs = draw.choice([[("w", self.layer.weight)], OrderedDict(w=self.layer.weight)])

    def forward(self, x):
        return self.layer(x) + torch.tanh(x) @ dict(self.pairs)["w"]


@part("tokens", "vectors")
class Containers(nn.Module):
    """Torch's own lists and dicts, indexed, sliced, zipped, looked up by name."""

    def __init__(self, draw, width):
        super().__init__()
        self.row = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.named = nn.ModuleDict({"act": nn.Tanh(), "gate": nn.Linear(width, width)})
        self.how = draw.choice(["all", "last", "slice", "reversed", "getattr"])

    def forward(self, x):
        chosen = {
            "all": lambda: list(self.row),
            "last": lambda: [self.row[-1], self.row[0]],
            "slice": lambda: self.row[1:],
            "reversed": lambda: reversed(self.row),
            "getattr": lambda: [self.get_submodule(f"row.{i}") for i in (0, 2)],
        }[self.how]()
        for layer in chosen:
            x = self.named["act"](layer(x))
        return x * self.named["gate"](x).sigmoid()


@part("tokens", "vectors", "images")
class Blocks(nn.Module):
    """A Sequential of Sequentials, indexed and unpacked."""

    def __init__(self, draw, width):
        super().__init__()
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Sequential(nn.Linear(width, width), nn.Tanh())]
        self.net = nn.Sequential(OrderedDict(zip("abc", layers, strict=True)))
        self.whole = draw.flip()

    def forward(self, x):
        images = x.ndim == 4
        x = x.movedim(1, -1) if images else x
        if self.whole:
            x = self.net(x)
        else:
            first, act, last = self.net
            x = last(act(first(x))) + self.net[2][0](x)
        return x.movedim(-1, 1) if images else x
