"""LC compression: weights and the ranks of their pairs learned together (Idelbayev & Carreira-Perpiñán 2020).

    min over W, Θ, r of   L(W) + λ Σ C(r_l)   with  W = Θ,  rank Θ_l ≤ r_l

by an augmented Lagrangian with multipliers β and a penalty μ that grows, in turns:

    L step   W ← argmin L(W) + μ/2 ‖W - Θ - β/μ‖²                                   training with a penalty
    C step   Θ, r ← argmin λ C(r) + μ/2 ‖W - β/μ - Θ‖²,  β ← β - μ (W - Θ)         each layer by itself, by its spectrum, exactly

`C(r)` is the share of all layers' parameters that a pair of rank r has, or, from break-even on, the dense layer, which loses nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fxrank
from benchmarks.baselines.base import CPU, Run, Trained, sample
from benchmarks.subjects.jobs import size
from benchmarks.subjects.tasks import Task
from fxrank.passes.spectra.exact import decompose
from fxrank.training.batches import model_inputs


@dataclass
class Coupled:
    """A layer that is to become a pair: its live weight, of which `matrix` is the view `(rows, cols)`, what a rank costs and the dense layer,
    and Θ and β of the same shape as the matrix. `rank` None: dense.
    """

    name: str
    weight: nn.Parameter
    rank_cost: float
    dense_cost: float
    theta: Tensor = field(init=False)
    beta: Tensor = field(init=False)
    rank: int | None = None

    def __post_init__(self) -> None:
        self.theta, self.beta = self.matrix.clone(), torch.zeros_like(self.matrix)

    @property
    def matrix(self) -> Tensor:
        """`(rows, cols)`, rows are output channels."""
        return self.weight.detach().flatten(1)

    def push(self, mu: float) -> None:
        """Add the penalty's gradient `μ (W - Θ) - β`."""
        assert self.weight.grad is not None
        gradient = mu * (self.matrix - self.theta) - self.beta
        self.weight.grad += gradient.view_as(self.weight)

    def compress(self, price: float, mu: float) -> None:
        """The C step and the multipliers' step."""
        target = self.matrix - self.beta / mu
        spectrum = decompose(target[None])
        self.rank = best_rank(spectrum.sigma[0], self.rank_cost, self.dense_cost, price, mu)
        if self.rank is None:
            self.theta = target
        else:
            u, v = spectrum.factors(self.rank)
            self.theta = (v @ u)[0]
        self.beta = self.beta - mu * (self.matrix - self.theta)

    @property
    def gap(self) -> float:
        """`‖W - Θ‖ / ‖W‖`."""
        return float((self.matrix - self.theta).norm() / self.matrix.norm().clamp_min(1e-12))


def best_rank(sigma: Tensor, rank_cost: float, dense_cost: float, price: float, mu: float) -> int | None:
    """The rank, at least 1, with the least `price · r · rank_cost + μ/2 Σ_{i>r} σ_i²`, or None if `price · dense_cost` is no more: the layer
    as it is. `sigma` are all singular values, descending.
    """
    lost = sigma.square().flip(0).cumsum(0).flip(0)  # at r - 1: what is lost below rank r - 1
    tail = torch.cat([lost[1:], lost.new_zeros(1)])
    ranks = torch.arange(1, len(sigma) + 1, dtype=sigma.dtype, device=sigma.device)
    totals = price * rank_cost * ranks + mu / 2 * tail
    rank = int(totals.argmin())
    return None if price * dense_cost <= float(totals[rank]) else rank + 1


@dataclass(frozen=True, kw_only=True)
class LC:
    """Train the dense model for the task's epochs, then by LC steps `length` times as long: `rounds` of them, μ from `mu` by a factor of
    `growth`, in one more run of the task's schedule, whose learning rate is cut to 1/μ. At the end Θ takes the weights' place, as pairs.

    `price` is λ: what all layers' parameters cost together, in units of the loss; more of it leaves fewer. Layers are the Linear and ungrouped
    convolutional ones that `fxrank.factorize` may factorize, but those that `exclude` names. Cuttlefish's Table 1 has it at 12 times the full-rank
    training's time.
    """

    price: float = 1.0
    mu: float = 1e-3
    growth: float = 1.4
    rounds: int = 30
    length: float = 2.0
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.price <= 0 or self.mu <= 0 or self.growth < 1 or self.rounds < 1 or self.length <= 0:
            raise ValueError(
                f"price, mu and length must be above 0, growth and rounds at least 1; got {self.price}, {self.mu}, {self.length}, {self.growth} and {self.rounds}."
            )

    def __call__(self, task: Task, epochs: int, seed: int, device: torch.device = CPU) -> Trained:
        """`facts`: ranks by layer, None for dense, and of every round μ, the layers' share of their parameters, and how far W is from Θ."""
        started = time.perf_counter()
        reference = Run(task, task.build(seed), epochs, seed, device)
        reference.train()
        trained = time.perf_counter() - started
        model, example = reference.model, model_inputs(reference.model, sample(task, device))
        layers = self.coupled(model, example)
        for layer in layers:
            layer.compress(self.price, self.mu)
            layer.beta.zero_()
        run = Run(task, model, max(1, round(self.length * epochs)), seed, device)
        mu, rounds = self.mu, []

        def push() -> None:
            for layer in layers:
                layer.push(mu)
            for group in run.optimizer.param_groups:
                group["lr"] = min(group["lr"], 1 / mu)  # a larger one overshoots Θ

        run.before_step.append(push)
        for i in range(self.rounds):
            run.train(until=round((i + 1) / self.rounds * run.total))
            for layer in layers:
                layer.compress(self.price, mu)
            rounds.append({"mu": mu, "share": _share(layers), "gap": max(layer.gap for layer in layers)})
            mu *= self.growth
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(layer.theta.view_as(layer.weight))
        ranks = {layer.name: layer.rank for layer in layers}
        given = {name: rank for name, rank in ranks.items() if rank is not None}
        dense = size(model)
        if given:
            model = fxrank.factorize(model, example, given)
        facts = {"ranks": ranks, "rounds": rounds, "reference_seconds": trained}
        return Trained(model, dense, size(model), time.perf_counter() - started, facts)

    def coupled(self, model: nn.Module, example: Any) -> list[Coupled]:
        """The layers. `NothingToFactorizeError` if there are none."""
        plan = fxrank.plan_of(fxrank.factorize(model, example, 1, exclude=self.exclude))
        modules = dict(model.named_modules())
        taken = [d for d in plan.layers if d.factorized and _is_plain(modules.get(d.name))]
        total = sum(d.parameters for d in taken)
        return [
            Coupled(
                d.name,
                modules[d.name].get_parameter("weight"),
                (d.pair_parameters or 0) / total,
                d.parameters / total,
            )
            for d in taken
        ]


def _is_plain(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear) or (isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.groups == 1)


def _share(layers: Sequence[Coupled]) -> float:
    return sum(a.dense_cost if a.rank is None else a.rank * a.rank_cost for a in layers)
