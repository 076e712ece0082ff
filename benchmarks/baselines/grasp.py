"""GraSP: weights pruned before training so that the gradient's flow is kept (Wang, Zhang & Grosse 2020)."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from benchmarks.baselines.base import CPU, Run, Trained, prunable, remaining, settle
from benchmarks.subjects.jobs import size
from benchmarks.subjects.tasks import Task
from fxrank.training.batches import LossFn, run_batch, to_device


@dataclass(frozen=True, kw_only=True)
class GraSP:
    """Mask weights of Linear and convolutional layers before the training, so that the share `share` of all parameters is left, and train
    once. Masked are those with the highest scores `-θ ⊙ H g` (eq. 8), of all layers together: without them the gradient is the largest.

    `batches` of the training data are looked at; the paper takes ten images of each class, which is about one batch. Logits are divided by
    the `temperature` meanwhile (§5.1), which needs a task with a loss function of its own and logits as the model's output.
    """

    share: float = 0.4
    batches: int = 1
    temperature: float = 200.0

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.batches < 1 or self.temperature <= 0:
            raise ValueError(
                f"share must be between 0 and 1, batches at least 1 and temperature above 0; got {self.share}, {self.batches} and {self.temperature}."
            )

    def sized(self, share: float) -> "GraSP":
        """With this share of all parameters."""
        return replace(self, share=share)

    def __call__(self, task: Task, epochs: int, seed: int, device: torch.device = CPU) -> Trained:
        """`facts`: the seconds of the scores, and the layers of which no weight is left."""
        started = time.perf_counter()
        run = Run(task, task.build(seed), epochs, seed, device)
        dense, layers = size(run.model), prunable(run, "GraSP")
        batches = [to_device(batch, device) for batch in islice(task.loaders(seed)[0], self.batches)]
        loss_fn = at_temperature(task.loss_fn, self.temperature)
        masks = keep_lowest(scores(run.model, list(layers), batches, loss_fn), dense - round(self.share * dense))
        scored = time.perf_counter() - started
        for name, layer in layers.items():
            prune.custom_from_mask(layer, "weight", masks[name])
        run.train()
        left = remaining(run.model)
        settle(layers)
        empty = [name for name, mask in masks.items() if not mask.any()]
        return Trained(run.model, dense, left, time.perf_counter() - started, {"score_seconds": scored, "empty": empty})


def at_temperature(loss_fn: LossFn | None, temperature: float) -> LossFn | None:
    """The loss of the logits, divided. `ValueError` for a model's own loss, which nothing can be divided in."""
    if temperature == 1:
        return loss_fn
    if loss_fn is None:
        raise ValueError(
            f"GraSP divides the logits by its temperature before the loss; got temperature={temperature:g} and a task whose model makes its own loss. "
            "Set temperature=1."
        )
    given: Callable[[Any, Any], Tensor] = loss_fn
    return lambda outputs, targets: given(outputs / temperature, targets)


def scores(model: nn.Module, names: Sequence[str], batches: Iterable[Any], loss_fn: LossFn | None) -> dict[str, Tensor]:
    """`-θ ⊙ H g` of the weights of the layers with these names, each of its weight's shape: `g` and `H` are the gradient and the Hessian
    of the mean loss of the batches in training mode with respect to these weights alone. The model stays as it is.
    """
    own = copy.deepcopy(model).train()
    weights = [own.get_submodule(name).get_parameter("weight") for name in names]
    batches = list(batches)

    def mean(of: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        torch.manual_seed(0)  # what is dropped out is the same for the gradient and for the Hessian
        total = [torch.zeros_like(w) for w in weights]
        for batch in batches:
            for sum_, part in zip(total, of(run_batch(own, batch, loss_fn).loss), strict=True):
                sum_ += part / len(batches)
        return total

    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # attention's other kernels have no second derivative
        gradient = mean(lambda loss: torch.autograd.grad(loss, weights))

        def of_hessian(loss: Tensor) -> Sequence[Tensor]:
            there = torch.autograd.grad(loss, weights, create_graph=True)
            product = torch.stack([(g * h).sum() for g, h in zip(gradient, there, strict=True)]).sum()
            return torch.autograd.grad(product, weights)

        return {n: -w.detach() * h for n, w, h in zip(names, weights, mean(of_hessian), strict=True)}


def keep_lowest(scores: dict[str, Tensor], pruned: int) -> dict[str, Tensor]:
    """Masks, 1 for kept, that leave out the so many weights with the highest scores. `ValueError` if there are not more than so many."""
    flat = torch.cat([s.flatten() for s in scores.values()])
    if not 0 <= pruned < len(flat):
        raise ValueError(
            f"GraSP must leave some of the {len(flat)} weights of Linear and convolutional layers; the share given asks for {pruned} fewer. Raise share."
        )
    mask = torch.ones_like(flat)
    mask[flat.argsort(descending=True, stable=True)[:pruned]] = 0
    parts = mask.split([s.numel() for s in scores.values()])
    return {name: part.view_as(s) for (name, s), part in zip(scores.items(), parts, strict=True)}
