"""Copies of a part of the model inside the model that are not trained themselves: momentum encoders (MoCo, BYOL), target networks.

Code of the user's moves them towards the part that is trained, parameter by parameter. From a switch on it would meet factors
that are written in different bases, or factors on one side only, and average what cannot be averaged. Nothing that can be seen
before says when and where it does so; so weights that are such copies of each other stay dense on both sides. An average
outside of the model goes through the switch: `followers=`, see `fxrank.switch.averages`.

A copy is told from another layer of the same shape by its numbers: those of two layers that were drawn, or trained, by
themselves have a cosine near 0, and an average stays near what it follows.
"""

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.model.names import own_name
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.locate import dense_at
from fxrank.torch_private.modules import own_parameters
from fxrank.torch_private.writes import memory_of

_NEAR = 0.5
"""The cosine above which one weight is taken for a copy of another."""
_SAMPLE = 256
"""How many numbers of each weight are compared first, so that the work grows linearly with the layers."""


def without_followed(layers: Iterable[Layer], model: nn.Module, trained: Container[int] | None = None) -> list[Layer]:
    """The layers, with a reason for those that a copy in the model follows, and for the copies. `trained` has the `id`s of the
    parameters that an optimizer holds; without it, all that require gradients are trained.
    """
    layers = list(layers)
    weights: dict[int, tuple[str, Tensor]] = {}
    for path, module in model.named_modules():
        for name, p in own_parameters(module).items() if not isinstance(module, FactorPair) else ():
            if p is not None and p.ndim >= 2 and p.is_floating_point() and memory_of(p)[2]:
                weights.setdefault(id(p), (own_name(f"{path}.{name}".lstrip(".")), p))

    def trains(p: Tensor) -> bool:
        return p.requires_grad and (trained is None or id(p) in trained)

    candidates = {
        id(p): i for i, x in enumerate(layers) if x.reason is None for p in dense_at(model, x.name).parameters()
    }
    leaders = [named for key, named in weights.items() if key in candidates and trains(named[1])]
    others = [named for named in weights.values() if not trains(named[1])]
    for copied, original in _copies(others, leaders):
        for weight, what in (
            (original[1], f"{copied[0]!r} is a copy of its weight in the model that is not trained itself"),
            (copied[1], f"its weight is a copy of {original[0]!r} that is not trained itself"),
        ):
            at = candidates.get(id(weight))
            if at is not None and layers[at].reason is None:
                reason = f"{what}: an average of it, it seems, and factors cannot be averaged with a weight. Hold the copy outside of the model, and give it as followers="
                layers[at] = layers[at].kept_for(reason)
    return layers


Named = tuple[str, Tensor]


@torch.no_grad()
def _copies(others: list[Named], leaders: list[Named]) -> list[tuple[Named, Named]]:
    """Each of `others` with the one of `leaders` whose numbers are near its own."""
    found = []
    groups: dict[object, tuple[list[Named], list[Named]]] = {}
    for side, listed in enumerate((others, leaders)):
        for named in listed:
            key = named[1].shape, named[1].dtype, named[1].device
            groups.setdefault(key, ([], []))[side].append(named)
    for copies, originals in groups.values():
        if copies and originals:
            cosines = _directions(copies) @ _directions(originals).T
            for i, j in (cosines > _NEAR).nonzero().tolist():
                if float(_cosine(copies[i][1], originals[j][1])) > _NEAR:
                    found.append((copies[i], originals[j]))
    return found


def _directions(named: list[Named]) -> Tensor:
    """Of each weight some numbers, evenly spread, as a vector of length 1; zeros if they are."""
    flat = [p.detach().flatten() for _, p in named]
    drawn = torch.stack([f[:: max(1, len(f) // _SAMPLE)][:_SAMPLE] for f in flat]).double()
    return torch.nn.functional.normalize(drawn, dim=1)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one.detach().double().flatten(), other.detach().double().flatten(), 0)
