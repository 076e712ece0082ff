"""IMP: iterative magnitude pruning with rewinding, or the search for a lottery ticket (Frankle & Carbin 2019; Frankle et al. 2020)."""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch.nn.utils import prune

from benchmarks.baselines.base import CPU, Layers, Run, Trained, prunable, remaining, settle
from benchmarks.subjects.jobs import size
from benchmarks.subjects.tasks import Task


@dataclass(frozen=True, kw_only=True)
class IMP:
    """Train, mask the share `rate` of the remaining weights, the smallest of all layers together, go back to the weights of an early step,
    and train again: `rounds` times. The weights are those of Linear and convolutional layers. `rewind` is how early, as a share of the run.

    The defaults are Cuttlefish's (§4.1): a fifth a round, rewound to the sixth of 300 epochs; 8 rounds leave 17 % of ResNet-18 (its Table 1).
    """

    rounds: int = 8
    rate: float = 0.2
    rewind: float = 6 / 300

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 < self.rate < 1 or not 0 < self.rewind < 1:
            raise ValueError(
                f"rounds must be at least 1, rate and rewind shares between 0 and 1; got {self.rounds}, {self.rate} and {self.rewind}."
            )

    def sized(self, share: float) -> "IMP":
        """With as many rounds as leave no more than this share of the weights."""
        return replace(self, rounds=max(1, math.ceil(math.log(share) / math.log(1 - self.rate) - 1e-9)))

    def __call__(self, task: Task, epochs: int, seed: int, device: torch.device = CPU) -> Trained:
        """`facts`: the step that is rewound to, and of every round the parameters that remained and the seconds since the start."""
        started = time.perf_counter()
        run = Run(task, task.build(seed), epochs, seed, device)
        dense, layers = size(run.model), prunable(run, "IMP")
        for layer in layers.values():
            prune.identity(layer, "weight")  # a mask of ones: every round has the same names
        run.train(until=max(1, round(self.rewind * run.total)))
        early = run.snapshot()
        run.train()
        rounds = []
        for _ in range(self.rounds):
            prune_smallest(layers, self.rate)
            run.rewind(early)
            run.train()
            rounds.append({"remaining": remaining(run.model), "seconds": time.perf_counter() - started})
        left = remaining(run.model)
        settle(layers)
        seconds = time.perf_counter() - started
        return Trained(run.model, dense, left, seconds, {"rewound_to": early.step, "rounds": rounds})


def prune_smallest(layers: Layers, rate: float) -> None:
    """Mask this share of the weights that no mask holds yet, the smallest of all masked layers together."""
    weights = [(layer, "weight") for layer in layers.values()]
    # `weight` is what the last forward call made of it, before the last step
    scores = {key: key[0].get_parameter("weight_orig").detach() for key in weights}
    prune.global_unstructured(weights, prune.L1Unstructured, importance_scores=scores, amount=rate)
