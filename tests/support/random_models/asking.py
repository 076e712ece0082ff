"""Code that asks what its parts are: their class, attributes, parameters and state, and calls them with parameters of its own."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from random_models.derived import Penalized
from random_models.drawn import part

QUESTIONS = {
    "isinstance": lambda layer, x: layer(x) if isinstance(layer, nn.Linear) else x,
    "isinstance of several": lambda layer, x: layer(x) if isinstance(layer, (nn.Conv2d, nn.Linear)) else x,
    "type": lambda layer, x: layer(x) if type(layer) is nn.Linear else x,
    "class's name": lambda layer, x: layer(x) * len(layer.__class__.__name__),
    "hasattr": lambda layer, x: layer(x) * (0.5 if hasattr(layer, "in_features") else 1),
    "features": lambda layer, x: layer(x) * layer.in_features**-0.5,
    "out": lambda layer, x: F.pad(layer(x), (0, layer.out_features)),
    "shape": lambda layer, x: layer(x) * layer.weight.shape[0] ** -0.5,
    "size": lambda layer, x: layer(x) / layer.weight.size(1),
    "numel": lambda layer, x: layer(x) / layer.weight.numel(),
    "ndim": lambda layer, x: layer(x) / layer.weight.ndim,
    "dtype": lambda layer, x: layer(x.to(layer.weight.dtype)),
    "device": lambda layer, x: layer(x.to(layer.weight.device)),
    "finfo": lambda layer, x: layer(x).clamp(min=torch.finfo(layer.weight.dtype).min),
    "requires_grad": lambda layer, x: layer(x) * (1 if layer.weight.requires_grad else 2),
    "bias": lambda layer, x: layer(x) if layer.bias is None else layer(x) + layer.bias,
    "norm": lambda layer, x: layer(x) / layer.weight.norm(),
    "largest": lambda layer, x: layer(x) / layer.weight.abs().max(),
    "new_zeros": lambda layer, x: layer(x) + layer.weight.new_ones(x.shape[-1]),
    "zeros_like": lambda layer, x: layer(x) + torch.ones_like(layer.weight)[0],
    "state_dict": lambda layer, x: F.linear(x, layer.state_dict()["weight"]) + layer(x),
    "state_dict's names": lambda layer, x: layer(x) * len(layer.state_dict()),
    "next parameter": lambda layer, x: layer(x.to(next(layer.parameters()).dtype)),
    "parameters": lambda layer, x: layer(x) * (1 + 0.1 * sum(p.square().mean() for p in layer.parameters())),
    "named parameters": lambda layer, x: layer(x) / (1 + dict(layer.named_parameters())["weight"].abs().sum()),
    "number of parameters": lambda layer, x: layer(x) / sum(p.numel() for p in layer.parameters()),
    "buffers": lambda layer, x: layer(x) * (1 + len(list(layer.buffers()))),
    "functional": lambda layer, x: functional_call(layer, dict(layer.named_parameters()), (x,)),
    "functional, halved": lambda layer, x: functional_call(
        layer, {n: p / 2 for n, p in layer.named_parameters()}, (x,)
    ),
    "functional, weight only": lambda layer, x: functional_call(layer, {"weight": torch.ones_like(layer.weight)}, x),
    "F.linear": lambda layer, x: F.linear(x, layer.weight, layer.bias),
    "F.linear, halved": lambda layer, x: F.linear(x, layer.weight / 2, layer.bias),
    "forward": lambda layer, x: layer.forward(x),
    "unbound": lambda layer, x: nn.Linear.forward(layer, x),
    "repr": lambda layer, x: layer(x) * (2 if "in_features" in repr(layer) else 1),
    "parameter's class": lambda layer, x: layer(x) * (2 if isinstance(layer.weight, nn.Parameter) else 1),
    "getattr": lambda layer, x: F.linear(x, getattr(layer, "weight"), getattr(layer, "nothing", None)),  # noqa: B009
    "vars": lambda layer, x: layer(x) * len(layer._parameters),
}


@part("tokens", "vectors")
class Asks(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.how = draw.choice(sorted(QUESTIONS))
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        y = QUESTIONS[self.how](self.layer, x)
        return y[..., : x.shape[-1]]


@part("tokens", "vectors")
class AsksItself(nn.Module):
    """A module that goes through its own parts."""

    def __init__(self, draw, width):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width, bias=False)
        self.how = draw.choice(["children", "classes", "names", "device", "penalty", "first parameter"])

    def forward(self, x):
        if self.how == "children":
            for child in self.children():
                x = child(x)
            return x
        if self.how == "classes":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    x = torch.tanh(module(x))
            return x
        if self.how == "names":
            for name, module in self.named_modules():
                x = module(x) if name in ("a", "b") else x
            return x
        if self.how == "device":
            first = next(self.parameters())
            x = x + torch.ones(x.shape[-1], device=first.device, dtype=first.dtype)
        elif self.how == "penalty":
            x = x * (1 + sum(p.abs().mean() for p in self.parameters() if p.ndim > 1))
        elif self.how == "first parameter":
            x = x + self.get_parameter("a.weight").mean()
        return self.b(self.act(self.a(x)))


@part("tokens", "vectors")
class AsksForMethods(nn.Module):
    """Sums what layers of one class say."""

    def __init__(self, draw, width):
        super().__init__()
        self.layers = nn.ModuleList(Penalized(width, width) for _ in range(2))
        self.by_class = draw.flip()

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        found = self.modules() if self.by_class else self.layers
        return x * (1 + sum(m.penalty() for m in found if isinstance(m, Penalized)))


@part("tokens", "vectors")
class Noted(nn.Module):
    """An attribute that the user has put on a plain layer."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.layer.gain = draw.choice([0.5, torch.tensor(0.5)])

    def forward(self, x):
        return self.layer(x) * self.layer.gain
