"""Weights that are computed: parametrizations, normalizations of older torch, pruning, and layers with forwards of their own."""

import types
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from random_models.drawn import part


class Lower(nn.Module):
    def forward(self, w):
        return w.tril()


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).transpose(-1, -2)


class Positive(nn.Module):
    def forward(self, w):
        return F.softplus(w)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, w):
        return w * self.scale


def custom(make):
    def wrap(layer):
        parametrize.register_parametrization(layer, "weight", make())
        return layer

    return wrap


def old(normalize):
    def wrap(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch has newer ones
            return normalize(layer)

    return wrap


def pruned_for_good(layer):
    return prune.remove(prune.random_unstructured(layer, "weight", 0.5), "weight")


ANY = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": old(nn.utils.weight_norm),
    "old spectral_norm": old(nn.utils.spectral_norm),
    "scaled": custom(Scaled),
    "positive": custom(Positive),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "pruned rows": lambda layer: prune.ln_structured(layer, "weight", 0.3, 2, 0),
    "pruned for good": pruned_for_good,
}
SQUARE = ANY | {
    "orthogonal": parametrizations.orthogonal,
    "lower": custom(Lower),
    "symmetric": custom(Symmetric),
    "two": lambda layer: custom(Symmetric)(custom(Scaled)(layer)),
}


@part("tokens", "vectors")
class DerivedLinear(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.layer = SQUARE[draw.choice(sorted(SQUARE))](nn.Linear(width, width))

    def forward(self, x):
        return self.layer(x)


@part("images")
class DerivedConv(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        conv = nn.Conv2d(width, width, draw.choice([1, 3]), padding="same", groups=draw.choice([1, 2]))
        self.layer = ANY[draw.choice(sorted(ANY))](conv)

    def forward(self, x):
        return self.layer(x)


@part("tokens")
class DerivedInside(nn.Module):
    """A parametrization of a layer whose weight another module reads. (Torch's recurrent layers do not notice one.)"""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.MultiheadAttention(width, 2, batch_first=True)
        ANY[draw.choice(["weight_norm", "scaled", "spectral_norm"])](self.layer.out_proj)

    def forward(self, x):
        return self.layer(x, x, x)[0]


class Masked(nn.Linear):
    def __init__(self, width):
        super().__init__(width, width)
        self.register_buffer("mask", torch.ones(width, width).tril())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class MaskedInPlace(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.tril_()
        return super().forward(x)


class Equalized(nn.Linear):
    """StyleGAN's: the scale is in the forward."""

    def __init__(self, width):
        super().__init__(width, width)
        self.gain = width**-0.5

    def forward(self, x):
        return F.linear(x, self.weight * self.gain, self.bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class Penalized(nn.Linear):
    """Inherits the forward, and has a method that other code calls."""

    def penalty(self):
        return self.weight.abs().mean()


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Adapted(nn.Linear):
    """A low-rank adapter in a subclass, as loralib has it."""

    def __init__(self, width):
        super().__init__(width, width)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(width, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class ByMode(nn.Linear):
    """Another kernel in each mode."""

    def forward(self, x):
        return F.linear(x, self.weight if self.training else self.weight.round(decimals=1), self.bias)


class Wrapping(nn.Linear):
    """Calls through `__call__`, not `forward`."""

    def __call__(self, x):
        return super().__call__(x) + 1


LINEARS = {
    "masked": Masked,
    "masked in place": MaskedInPlace,
    "equalized": Equalized,
    "cosine": Cosine,
    "penalized": Penalized,
    "doubled": Doubled,
    "adapted": Adapted,
    "by mode": ByMode,
    "wrapping": Wrapping,
}
OWN_INIT = (Masked, Equalized, Adapted)


@part("tokens", "vectors")
class OwnLinear(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        kind = LINEARS[draw.choice(sorted(LINEARS))]
        self.layer = kind(width) if kind in OWN_INIT else kind(width, width)

    def forward(self, x):
        y = self.layer(x)
        return y * (1 + self.layer.penalty()) if hasattr(self.layer, "penalty") else y


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class MaskedConv(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        mask = torch.ones_like(self.weight)
        mask[:, :, self.kernel_size[0] // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class InnerConv(nn.Conv2d):
    """Overrides what the inherited forward calls."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / 2, bias)


class Rounded(nn.Conv2d):
    """Quantization-aware: rounded, with a straight gradient."""

    def forward(self, x):
        w = self.weight + (self.weight.round(decimals=2) - self.weight).detach()
        return self._conv_forward(x, w, self.bias)


class Dynamic(nn.Conv2d):
    """A kernel that depends on the input."""

    def forward(self, x):
        return self._conv_forward(x, self.weight * torch.sigmoid(x.mean()), self.bias)


@part("images")
class OwnConv(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        kind = draw.choice([Standardized, MaskedConv, InnerConv, Rounded, Dynamic])
        self.layer = kind(width, width, 3, padding=1, groups=draw.choice([1, 1, 2]))

    def forward(self, x):
        return self.layer(x)


def patched(layer):
    layer.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * 0.5, layer)
    return layer


def adapted(layer):
    """Patched by an adapter whose layers are registered."""
    layer.down, layer.up = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
    layer.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) + self.up(self.down(x)), layer)
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, args, out: out * 0.5)
    return layer


def fed(layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    return layer


def watched(layer):
    layer.register_forward_hook(lambda module, args, out: None)
    return layer


HUNG = {"patched": patched, "adapted": adapted, "hooked": hooked, "fed": fed, "watched": watched}


@part("tokens", "vectors")
class HungOn(nn.Module):
    """A patch of one layer's forward, or a hook on it."""

    def __init__(self, draw, width):
        super().__init__()
        self.layer = HUNG[draw.choice(sorted(HUNG))](nn.Linear(width, width))

    def forward(self, x):
        return self.layer(x)
