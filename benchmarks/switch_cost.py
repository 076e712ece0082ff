"""What the switch and Frobenius decay cost, and how a rewritten model compares to a handwritten one, on ResNet-18.

    python -m benchmarks.switch_cost

Three measurements in one run, all as ratios of interleaved times: `decompose(W)` with its factors against `torch.linalg.svd` per layer; the decay's
share of a training step; the step of the rewritten model against `handwritten_lowrank_resnet18` with the same ranks.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrank
from benchmarks import record
from benchmarks.subjects.models import handwritten_lowrank_resnet18, resnet18
from fxrank.passes.model.weights import weight_of
from fxrank.passes.profiling.clock import Stopwatch
from fxrank.passes.profiling.timing import autocast
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.spectra.exact import as_stack, decompose
from fxrank.switch.apply_plan import Replacement
from fxrank.switch.later_steps import FactorRegime

RANKS = (40, 44, 44, 44, 64, 60, 56, 48, 60, 50, 40, 30)
NAMES = [f"layer{stage}.{block}.conv{conv}" for stage in (2, 3, 4) for block in (0, 1) for conv in (1, 2)]


def ratio(a: Callable[[], None], b: Callable[[], None], device: torch.device, rounds: int) -> dict[str, float]:
    """Median of `a/b`, pair by pair, and both medians in ms; one warm-up of each."""
    a()
    b()
    watch = Stopwatch(device)
    laps = []
    for i in range(rounds):
        first, second = (a, b) if i % 2 == 0 else (b, a)
        watch.mark()
        first()
        watch.mark()
        second()
        watch.mark()
        pair = [lap.ms for lap in watch.laps()]
        laps.append(pair if i % 2 == 0 else pair[::-1])
    return {
        "ratio": statistics.median(x / y for x, y in laps),
        "first_ms": statistics.median(x for x, _ in laps),
        "second_ms": statistics.median(y for _, y in laps),
    }


def splitting(device: torch.device, rounds: int, steps: int) -> dict[str, Any]:
    """Decomposition and split of every layer against a full SVD of every layer, and the excess error."""
    model = resnet18().to(device)
    step = training_step(
        model, torch.randn(16, 3, 32, 32, device=device), torch.randint(0, 10, (16,), device=device), None
    )
    for _ in range(steps):
        step()
    weights = {name: weight_of(model.get_submodule(name)).detach() for name in NAMES}
    stacks = [as_stack(w) for w in weights.values()]
    ranks = [len(w) // 4 for w in weights.values()]

    def ours() -> None:
        for stack, rank in zip(stacks, ranks, strict=True):
            decompose(stack).factors(rank)

    def full() -> None:
        for stack in stacks:
            torch.linalg.svd(stack[0], full_matrices=False)

    excess = 0.0
    for stack, rank in zip(stacks, ranks, strict=True):
        u, v = decompose(stack).factors(rank)
        sigma = torch.linalg.svdvals(stack[0].double())
        error = torch.linalg.vector_norm((stack - v @ u).double())
        best = sigma[rank:].square().sum().sqrt()
        excess = max(excess, float((error - best) / torch.linalg.vector_norm(sigma)))
    measured = ratio(full, ours, device, rounds)
    return {
        "speedup": measured["ratio"],
        "full_svd_ms": measured["first_ms"],
        "ours_ms": measured["second_ms"],
        "excess_error": excess,
    }


def training_step(model: nn.Module, x: Tensor, y: Tensor, amp: torch.dtype | None) -> Callable[[], None]:
    """One SGD step of the job, as a function."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with autocast(x.device, amp):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--rounds", type=int, default=7, help="interleaved measurements")
    p.add_argument(
        "--steps", type=int, default=10, help="training steps before the split, so that spectra are not random"
    )
    p.add_argument("--amp", default=None, choices=("bfloat16",))
    p.add_argument("--channels-last", action="store_true")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    device = torch.device(options.device)
    amp = torch.bfloat16 if options.amp else None
    torch.manual_seed(0)
    split = splitting(device, options.rounds, options.steps)
    x = torch.randn(options.batch, 3, 32, 32, device=device)
    y = torch.randint(0, 10, (options.batch,), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = fxrank.factorize(resnet18(), x[:2].cpu(), rank=dict(zip(NAMES, RANKS, strict=True))).to(device)
    hand: nn.Module = handwritten_lowrank_resnet18(RANKS).to(device)
    if options.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        small, hand = (m.to(memory_format=torch.channels_last) for m in (small, hand))
    small_step = training_step(small, x, y, amp)
    against_hand = ratio(small_step, training_step(hand, x, y, amp), device, options.rounds)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01, weight_decay=1e-4)
    replacements = [Replacement(n, (nn.Parameter(torch.empty(0)),), pair) for n, pair in pairs_in(small).items()]
    regime = FactorRegime(optimizer, replacements, "auto")
    small_step()
    decay = ratio(regime.decay, small_step, device, options.rounds)
    results = {
        "split": split | {"target": "speedup >= 8, excess_error <= 1e-6"},
        "frobenius_decay": {
            "share_of_step": decay["ratio"],
            "ms": decay["first_ms"],
            "step_ms": decay["second_ms"],
            "target": "< 0.003",
        },
        "handwritten": {
            "step_ratio": against_hand["ratio"],
            "ours_ms": against_hand["first_ms"],
            "handwritten_ms": against_hand["second_ms"],
            "target": "<= 1.02",
        },
    }
    for name, numbers in results.items():
        print(name, numbers)
    configuration = {k: v for k, v in vars(options).items() if k != "results"} | {"ranks": RANKS}
    return record.write(
        "switch_cost", {"configuration": configuration, "results": results}, device=device, folder=options.results
    )


if __name__ == "__main__":
    start = time.perf_counter()
    print(f"written: {main().name} in {time.perf_counter() - start:.0f} s")
