"""The papers' comparison on jobs of minutes: what is compared, one line a row, and how one cell of it is trained."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxrank
from benchmarks.baselines.base import CPU, Baseline, Sizeable, Trained, sample
from benchmarks.baselines.registry import BASELINES
from benchmarks.cifar10 import LEADING
from benchmarks.real_runs import evaluate, trained
from benchmarks.subjects import cells, jobs
from benchmarks.subjects.jobs import Job, size
from benchmarks.subjects.rows import Setup, full
from benchmarks.subjects.tasks import METRICS, Task
from fxrank import Cuttlefish, LayerDecision, Pufferfish, SpectralInit
from fxrank.policies.ranks import ratio_rank
from fxrank.training.batches import model_inputs

MATCHED = "cuttlefish"
"""The row whose size others are to have, as the papers chose theirs (Cuttlefish §4.1, Table 1)."""
EPOCHS = 300
"""Of the papers' runs on CIFAR-10; what they do after so many of them is done after the same share of a run here."""
PUFFERFISH_E = 80 / EPOCHS
CUTTLEFISH_E = {"resnet18-cifar10": 82.3 / EPOCHS, "vgg19-cifar10": 97.3 / EPOCHS}
"""Where Cuttlefish switched (Table 8)."""
CUTTLEFISH_DENSE = {"resnet18-cifar10": ("layer1.*",), "vgg19-cifar10": ("conv2", "conv3", "conv4")}
"""What it left dense beside the first layer and the last: K = 5 and K = 4 (Table 8)."""
K = {"resnet18-cifar10": LEADING["resnet18"], "vgg19-cifar10": LEADING["vgg19_bn"]}

JOBS: dict[str, Job] = {
    "resnet18-cifar10": jobs.JOBS["resnet18-cifar10"],
    "vgg19-cifar10": Job(
        "vgg19-cifar10",
        jobs.vgg_cifar10,
        {"side": jobs.SIDE, "width": 16},
        6,
        (),
        planar=True,
        small={"train": 256, "test": 500},
    ),
}
"""The papers' two networks at a quarter of their width, on images of half the side, for six epochs."""


@dataclass(frozen=True)
class Trial:
    """A job trained by a baseline, of the size of another row if it is `like` one."""

    baseline: Baseline
    like: str | None = None


@dataclass(frozen=True, kw_only=True)
class SpectralInitOfSize:
    """Spectral initialization and Frobenius decay (SI&FD; Khodak et al. 2021) with the largest ratio for all layers but the first that leaves no
    more than the share `share` of all parameters.
    """

    share: float = 0.5
    exclude: tuple[str, ...] = ()

    def sized(self, share: float) -> "SpectralInitOfSize":
        """With no more than this share of all parameters."""
        return replace(self, share=share)

    def __call__(self, task: Task, epochs: int, seed: int, device: torch.device = CPU) -> Trained:
        """`facts`: the ratio and the ranks."""
        started = time.perf_counter()
        model = task.build(seed).to(device)
        dense = size(model)
        ratio = self.ratio(model, sample(task, device))
        chosen = time.perf_counter() - started
        result = trained(task, model, epochs, seed, device, policy=SpectralInit(K=1, ratio=ratio), exclude=self.exclude)
        seconds = result.report.seconds
        facts = {"ratio": ratio, "ranks": result.plan.R}
        return Trained(model, dense, size(model), chosen + seconds["total"] - seconds["evaluation"], facts)

    def ratio(self, model: nn.Module, batch: Any) -> float:
        """The largest in thousandths of the full ranks. `ValueError` if even the smallest leaves more parameters."""
        plan = fxrank.plan_of(fxrank.factorize(model, model_inputs(model, batch), 1, exclude=self.exclude))
        layers, dense = [d for d in plan.layers if d.factorized], size(model)
        saved = {p / 1000: sum(_saved(d, p / 1000) for d in layers) for p in range(1, 1001)}
        fitting = [ratio for ratio, numbers in saved.items() if dense - numbers <= self.share * dense]
        if not fitting:
            least = (dense - max(saved.values())) / dense
            raise ValueError(
                f"pairs of rank 1 leave {least:.3f} of the parameters; the share given is {self.share:.3f}. Raise share."
            )
        return max(fitting)


def _saved(layer: LayerDecision, ratio: float) -> int:
    """Parameters that a pair at a ratio of the full rank saves; none where it would save nothing, as the layer stays dense then."""
    assert layer.pair_parameters is not None  # of rank 1
    return max(0, layer.parameters - ratio_rank(layer.full_rank, ratio) * layer.pair_parameters)


def cuttlefish(job: Job) -> Setup:
    """The paper's rule with the scaled stable rank, E and K as its runs had them (Table 8): six epochs give its test nothing to settle, and in
    networks so narrow few pairs are 1.5 times as fast on a CPU.
    """
    policy = replace(Cuttlefish.paper(), latest=CUTTLEFISH_E[job.name], speedup_threshold=None)
    return Setup(policy, {"exclude": (*job.exclude, *CUTTLEFISH_DENSE[job.name])})


def pufferfish(job: Job) -> Setup:
    """A quarter of the full rank after 80 of 300 epochs, the first K layers dense."""
    return Setup(Pufferfish(E=PUFFERFISH_E * job.epochs, K=K[job.name], ratio=0.25), {"exclude": job.exclude})


def by(name: str, matched: bool) -> Callable[[Job], Trial]:
    """A baseline with its defaults, of the size of Cuttlefish's model if it is `matched`."""
    return lambda job: Trial(BASELINES[name], MATCHED if matched else None)


ROWS: dict[str, Callable[[Job], Setup | Trial]] = {
    "full": full,
    "cuttlefish": cuttlefish,
    "fxrank": lambda job: Setup(Cuttlefish()),
    "pufferfish": pufferfish,
    "si-fd": lambda job: Trial(SpectralInitOfSize(exclude=job.exclude), MATCHED),
    "lc": by("lc", matched=False),
    "imp": by("imp", matched=True),
    "grasp": by("grasp", matched=True),
    "early-bird": by("early-bird", matched=True),
    "xnor": by("xnor", matched=False),
}
"""Rows by name, in the order in which they are run."""


def train(
    job: Job, setup: Setup | Trial, seed: int, data: Path, cache: Path | None, share: float | None
) -> dict[str, Any]:
    """Train a cell, as plain data; `share` is that of the model that it is to be as large as. `refused` says why there is nothing."""
    if isinstance(setup, Setup):
        found = cells.train(job, setup, seed, data, cache)
        seconds = found.get("seconds", {})
        return found | {"training_seconds": seconds.get("total", 0.0) - seconds.get("evaluation", 0.0), "facts": {}}
    started, worked = time.perf_counter(), time.process_time()
    baseline = setup.baseline
    if share is not None:
        if share >= 1:
            return {"refused": f"the row {setup.like} is dense: there is no size to match"}
        assert isinstance(baseline, Sizeable), baseline
        baseline = baseline.sized(share)
    task = job.task(data, cache)
    came = baseline(task, job.epochs, seed)
    loss, accuracy = evaluate(came.model, task.loaders(seed)[1], CPU)
    return {
        "data": task.data,
        "dense_parameters": came.dense_parameters,
        "dense_fixed": 0,
        "scores": {task.metric: METRICS[task.metric](loss, accuracy)},
        "validation_loss": loss,
        "parameters": came.remaining,
        "epochs": job.epochs,
        "training_seconds": came.seconds,
        "baseline": repr(baseline),
        "facts": came.facts,
        "cell_seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - worked,
        "load": round(os.getloadavg()[0], 2),
    }
