"""What `torch.compile` adds to a factorized model, and what the switch costs a compiled one.

    python -m benchmarks.compiled

ResNet-18 in the CIFAR shape and timm's ViT-tiny on 32×32 images, full-rank and with pairs at a quarter of full rank, each
eager and compiled by inductor. A lap is one training step (forward, backward, SGD) or one evaluation. The four models take
their laps in turn, each round from another one on; ratios are within a round, medians over the rounds.

Before that, for each model, a session switches a compiled model in training: graphs, graph breaks and seconds of
compilation before the switch and by it, with empty caches; and the compiled low-rank model is held against the eager one.
"""

import argparse
import importlib
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxrank
from benchmarks import record
from benchmarks.subjects.models import resnet18
from benchmarks.switch_cost import NAMES, training_step
from fxrank.oneshot import copied
from fxrank.passes.profiling.clock import Stopwatch

RATIO = 0.25
STEPS = 4
"""Steps before the switch, and after it. The first of them compiles."""


def vit_tiny(depth: int) -> nn.Module:
    """timm's ViT-tiny with patches of 4×4 for 32×32 images."""
    sizes = {"img_size": 32, "patch_size": 4, "num_classes": 10, "depth": depth}
    model: nn.Module = importlib.import_module("timm").create_model("vit_tiny_patch16_224", **sizes)
    return model


def pair_of_models(full: nn.Module, x: Tensor, ranks: Mapping[str, float] | float) -> dict[str, nn.Module]:
    """The model and its factorization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"full-rank": full, "low-rank": fxrank.factorize(full, x[:2].cpu(), rank=ranks)}


def switch(models: Mapping[str, nn.Module], x: Tensor, y: Tensor, backend: str) -> dict[str, Any]:
    """A session's switch to the low-rank model's plan, in a compiled copy of the full-rank one."""
    torch._dynamo.reset()
    counters.clear()
    model = copied(models["full-rank"]).to(x.device)
    model.compile(backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    plan = replace(fxrank.plan_of(models["low-rank"]), switch_step=STEPS)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=2 * STEPS, policy=fxrank.FixedPlan(given=plan)
    )
    seconds: list[float] = []
    graphs: list[int] = []
    counters.clear()  # attaching compiles nothing, but it may look
    for _ in range(2 * STEPS):
        watch = Stopwatch(x.device)
        watch.mark()
        F.cross_entropy(model(x), y).backward()
        watch.mark()
        seconds.append(watch.laps()[0].ms / 1000)
        graphs.append(counters["stats"]["unique_graphs"])
        optimizer.step()  # the switch is in one of these
        optimizer.zero_grad(set_to_none=True)
    assert session.finish().R == plan.R
    return {
        "graphs_before": graphs[STEPS - 1],
        "graphs_by_the_switch": graphs[-1] - graphs[STEPS - 1],
        "graph_breaks": sum(counters["graph_break"].values()),
        "compile_s_before": seconds[0] - statistics.median(seconds[1:STEPS]),
        "compile_s_by_the_switch": seconds[STEPS] - statistics.median(seconds[STEPS + 1 :]),
    }


def compare(model: nn.Module, x: Tensor, y: Tensor, backend: str) -> dict[str, float]:
    """Worst relative difference of a compiled copy: of the outputs in training, and of the gradients, parameter by
    parameter. In float64: in float32 rounding moves activations over the kinks of ReLU, and gradients jump by per cents.
    """
    eager, compiled = (copied(model).to(x.device, torch.float64).train() for _ in range(2))
    compiled.compile(backend=backend)
    outputs = [twin(x.double()) for twin in (compiled, eager)]
    gradients = [
        torch.autograd.grad(F.cross_entropy(out, y), [*twin.parameters()])
        for twin, out in zip((compiled, eager), outputs, strict=True)
    ]
    return {
        "float64": relative(*outputs),
        "float64_gradients": max(relative(a, b) for a, b in zip(*gradients, strict=True)),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def laps(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Median ms of each, and of its ratio to the first one, after one warm-up of each."""
    for run in runs.values():
        run()
    watch = Stopwatch(device)
    found: list[dict[str, float]] = []
    names = list(runs)
    for i in range(rounds):
        turn = names[i % len(names) :] + names[: i % len(names)]
        watch.mark()
        for name in turn:
            runs[name]()
            watch.mark()
        found.append(dict(zip(turn, (lap.ms for lap in watch.laps()), strict=True)))
    return {
        name: {
            "ms": statistics.median(lap[name] for lap in found),
            "of_full_rank_eager": statistics.median(lap[name] / lap[names[0]] for lap in found),
            "of_eager": statistics.median(lap[name] / lap[name.replace("compiled", "eager")] for lap in found),
            "of_full_rank": statistics.median(lap[name] / lap[name.replace("low", "full")] for lap in found),
        }
        for name in names
    }


def study(
    full: nn.Module, ranks: Mapping[str, float] | float, x: Tensor, y: Tensor, backend: str, rounds: int
) -> dict[str, Any]:
    """All measurements of one model."""
    models = pair_of_models(full, x, ranks)
    results: dict[str, Any] = {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "switch": switch(models, x, y, backend),
    }
    results["difference"] = compare(models["low-rank"], x, y, backend)
    torch._dynamo.reset()  # a code object keeps few compiled forms
    contenders: dict[str, nn.Module] = {}
    for name, model in models.items():
        for way in ("eager", "compiled"):
            contenders[f"{name}, {way}"] = copied(model).to(x.device)
        contenders[f"{name}, compiled"].compile(backend=backend)
    steps = {name: training_step(model.train(), x, y, None) for name, model in contenders.items()}
    results["train"] = laps(steps, x.device, rounds)
    for model in contenders.values():
        model.eval()

    def evaluation(model: nn.Module) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: model(x))

    twins = [contenders[f"low-rank, {way}"] for way in ("compiled", "eager")]
    for twin in twins:  # the laps have trained each on its own; here they are to be the same model
        twin.load_state_dict(models["low-rank"].state_dict())
    results["difference"]["float32"] = relative(*(evaluation(twin)() for twin in twins))
    results["eval"] = laps({n: evaluation(model) for n, model in contenders.items()}, x.device, rounds)
    return results


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--rounds", type=int, default=11)
    p.add_argument("--models", nargs="+", default=["resnet18", "vit_tiny"], choices=("resnet18", "vit_tiny"))
    p.add_argument("--depth", type=int, default=6, help="blocks of the ViT; ViT-tiny has 12")
    p.add_argument("--backend", default="inductor")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32, device=device)
    y = torch.randint(0, 10, (options.batch,), device=device)
    results = {}
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=empty):
        # What the compiler does once in a new cache (a precompiled header, its workers) is not the models'.
        torch.compile(nn.Linear(2, 2).to(device), backend=options.backend)(x.new_ones(2, 2)).sum().backward()
        for name in options.models:
            start = time.perf_counter()
            if name == "resnet18":
                found = study(resnet18(), dict.fromkeys(NAMES, RATIO), x, y, options.backend, options.rounds)
            else:
                found = study(vit_tiny(options.depth), RATIO, x, y, options.backend, options.rounds)
            results[name] = found
            show(name, found, time.perf_counter() - start)
    configuration = {k: v for k, v in vars(options).items() if k != "results"} | {"ratio": RATIO, "steps": STEPS}
    return record.write(
        "compiled", {"configuration": configuration, "results": results}, device=device, folder=options.results
    )


def show(name: str, found: Mapping[str, Any], seconds: float) -> None:
    """Print one model's results."""
    for phase in ("train", "eval"):
        for variant, row in found[phase].items():
            print(f"{name:10} {phase:6} {variant:20} {row['ms']:8.1f} ms  {row['of_full_rank_eager']:.2f}")
    print(f"{name:10} switch {found['switch']}\n{name:10} difference {found['difference']}  ({seconds:.0f} s)")


if __name__ == "__main__":
    print(f"written: {main().name}")
