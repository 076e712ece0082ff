"""Ideas from elsewhere about training towards and with pairs, through what fxrank shows of itself: tried in the decision table, no part of the product."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fxrank.passes.pairs.base import FactorPair

Idea = Callable[[nn.Module, int], AbstractContextManager[dict[str, Any]]]
"""While it is entered with a model and the number of steps of its training, the idea is at work; what it gives are further arguments of `auto_lowrank`."""
SMALLEST = 16
"""Layers of lower rank have nothing to lose."""


def pairs_of(model: nn.Module) -> dict[str, FactorPair]:
    """By name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FactorPair)}


@dataclass(frozen=True)
class _Heard:
    """A logger: what it does at each look at the ranks, the last one of which comes just before the switch, and after the switch."""

    look: Callable[[], object]
    switched: Callable[[], object]

    def log(self, step: int, values: dict[str, float]) -> None:
        """Ranks were looked at, or chosen."""
        if any(name.startswith("stable_rank/") for name in values):
            self.look()

    def event(self, step: int, text: str) -> None:
        """The switch was made."""
        self.switched()


def soft_switch(share: float) -> Idea:
    """For this share of the training after the switch a pair gives `α · dense + (1 - α) · pair` where it is trained, α from 1 to 0 by a cosine, with
    the weight that the layer had (self-guided training, 2406.16450).
    """

    @contextmanager
    def at_work(model: nn.Module, steps: int) -> Iterator[dict[str, Any]]:
        kept: dict[str, nn.Module] = {}
        made = 0

        def keep() -> None:
            layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
            kept.update({name: copy.deepcopy(layer).requires_grad_(False) for name, layer in layers.items()})

        def count(*_: object) -> None:
            nonlocal made
            made += 1

        def begin() -> None:
            nonlocal made
            made = -1  # the step of the switch is counted after it
            for name, pair in pairs_of(model).items():
                if name in kept:
                    around.callback(pair.register_forward_hook(mixed(kept[name])).remove)

        def mixed(dense: nn.Module) -> Callable[..., Tensor | None]:
            def hook(pair: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
                alpha = (1 + math.cos(math.pi * min(1.0, made / (share * steps)))) / 2
                return torch.lerp(output, dense(*args), alpha) if pair.training and alpha > 0 else None

            return hook

        with ExitStack() as around:
            around.callback(register_optimizer_step_post_hook(count).remove)
            yield {"logger": _Heard(keep, begin)}

    return at_work


@contextmanager
def scaled_gradients(model: nn.Module, steps: int) -> Iterator[dict[str, Any]]:
    """Steps that do not depend on how a product is divided between its factors: the gradient of each is divided by the other's Gram matrix, at the
    length that it had (ScaledGD, Tong et al. 2021).
    """

    def scale(*_: object) -> None:
        for pair in pairs_of(model).values():
            weights = pair.u.weight, pair.v.weight
            if any(w.grad is None for w in weights):
                continue
            u, v = pair.unfold_u(weights[0].detach()), pair.unfold_v(weights[1].detach())
            of_u, of_v = pair.unfold_u(weights[0].grad), pair.unfold_v(weights[1].grad)
            scaled = _divided(of_u, v.mT @ v), _divided(of_v.mT, u @ u.mT).mT
            for weight, fold, old, new in zip(weights, (pair.fold_u, pair.fold_v), (of_u, of_v), scaled, strict=True):
                length = torch.linalg.vector_norm(new)
                if length > 0:
                    weight.grad.copy_(fold(new * (torch.linalg.vector_norm(old) / length)))

    handle = register_optimizer_step_pre_hook(scale)
    try:
        yield {}
    finally:
        handle.remove()


def _divided(gradient: Tensor, gram: Tensor) -> Tensor:
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damped = gram + 1e-3 * mean * torch.eye(gram.shape[-1])
    divided: Tensor = torch.linalg.solve(damped, gradient)
    return divided


@contextmanager
def decay_as_dense(model: nn.Module, steps: int) -> Iterator[dict[str, Any]]:
    """Weight decay of the factors at half its strength: each of a product's two then brings half of what the weight had. To be used where the
    optimizer decays the factors by itself, without Frobenius decay, with which a singular value σ falls by `2 λ σ²` where it fell by `λ σ`.
    """

    def each(optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, float, float]]:
        weights = {id(w) for pair in pairs_of(model).values() for w in (pair.u.weight, pair.v.weight)}
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) in weights and weight.grad is not None:
                    yield weight, float(group["lr"]), float(group["weight_decay"])

    def before(optimizer: Optimizer, *_: object) -> None:
        for weight, _rate, decay in () if isinstance(optimizer, torch.optim.AdamW) else each(optimizer):
            assert weight.grad is not None
            weight.grad.sub_(weight.detach(), alpha=decay / 2)

    def after(optimizer: Optimizer, *_: object) -> None:
        for weight, rate, decay in each(optimizer) if isinstance(optimizer, torch.optim.AdamW) else ():
            weight.data.mul_((1 - rate * decay / 2) / (1 - rate * decay))

    with ExitStack() as around:
        around.callback(register_optimizer_step_pre_hook(before).remove)
        around.callback(register_optimizer_step_post_hook(after).remove)
        yield {}


def spectral_decay(strength: float, every: int = 10) -> Idea:
    """Before the switch all singular values of the layers' weights fall by `strength` a step at the highest learning rate, in proportion at others,
    by Newton-Schulz iterations every few steps (spectral weight decay, 2026).
    """

    @contextmanager
    def at_work(model: nn.Module, steps: int) -> Iterator[dict[str, Any]]:
        weights = [
            m.weight
            for m in model.modules()
            if isinstance(m, (nn.Linear, nn.Conv2d)) and min(m.weight.flatten(1).shape) > SMALLEST
        ]
        made, highest = 0, 0.0

        def decay(optimizer: Optimizer, *_: object) -> None:
            nonlocal made, highest
            made += 1
            rate = float(optimizer.param_groups[0]["lr"])
            highest = max(highest, rate)
            if made % every or pairs_of(model) or not highest:
                return
            for weight in weights:
                fall = every * strength * rate / highest
                weight.data -= fall * nearest_orthogonal(weight.data.flatten(1)).view_as(weight)

        handle = register_optimizer_step_post_hook(decay)
        try:
            yield {}
        finally:
            handle.remove()

    return at_work


def nearest_orthogonal(matrix: Tensor, iterations: int = 12) -> Tensor:
    """The polar factor of a matrix: its singular vectors with singular values of 1, those near 0 apart; by `X ← 1.5 X - 0.5 X Xᵀ X`."""
    x: Tensor = matrix / torch.linalg.matrix_norm(matrix)
    for _ in range(iterations):
        x = 1.5 * x - 0.5 * (x @ x.mT) @ x
    return x
