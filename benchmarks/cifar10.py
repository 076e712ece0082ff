"""CIFAR-10: full-rank, Cuttlefish, Pufferfish and spectral initialization with Frobenius decay, all as policies of `auto_lowrank`.

    python -m benchmarks.cifar10 --source cifar10-jpeg.tar.xz --model resnet20 --epochs 20 --subset 10000
    python -m benchmarks.cifar10 --model resnet18 --paper --device cuda

One JSON per call holds every method: accuracy, parameters, MACs, E, K, R, wall-clock by phase, overheads, hardware, versions, command.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxrank
from benchmarks import record
from benchmarks.subjects.data import Cifar, DeviceLoader, cifar10
from benchmarks.subjects.models import build


def policies(epochs: int, leading: int, ratio: float) -> dict[str, fxrank.Policy]:
    """The methods. Pufferfish switches at 80/300 of the run, as in its paper (spec: E = 80 of 300, ratio 1/4)."""
    return {
        "full-rank": fxrank.FullRank(),
        "cuttlefish": fxrank.Cuttlefish(rank_metric="scaled_stable_rank", speedup_threshold=1.5),
        "outputs": fxrank.Cuttlefish(),
        "pufferfish": fxrank.Pufferfish(E=max(1, round(epochs * 80 / 300)), K=leading, ratio=ratio),
        "spectral-init": fxrank.SpectralInit(K=leading, ratio=ratio),
    }


LEADING = {"resnet18": 3, "vgg19_bn": 9}
"""K of Pufferfish, counted as the number of leading layers left alone (Cuttlefish Table 1); 1 for other models."""


def learning_rate(step: int, total: int, *, warmup: int, start: float) -> float:
    """The papers' schedule as a factor of the peak: linear warm-up from `start`, then x0.1 at 50 % and again at 75 % (Cuttlefish, appendix)."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 1.0 if step < total / 2 else 0.1 if step < 0.75 * total else 0.01


def run(name: str, policy: fxrank.Policy, data: Cifar, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train one model with one policy. Returns plain data."""
    device = torch.device(options.device)
    torch.manual_seed(seed)
    model = build(options.model).to(device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    common: dict[str, Any] = {"device": device, "channels_last": options.channels_last}
    train = DeviceLoader(
        data.train_x,
        data.train_y,
        options.batch,
        augment=True,
        seed=seed,
        subset=options.subset,
        drop_last=True,
        **common,
    )
    val = DeviceLoader(
        data.test_x, data.test_y, 1000, augment=False, seed=seed, subset=options.test_subset, drop_last=False, **common
    )
    total = len(train) * options.epochs
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=options.weight_decay)
    warmup = max(1, round(total * 5 / 300))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(step, total, warmup=warmup, start=0.125)
    )
    result = fxrank.auto_lowrank(
        model,
        train,
        epochs=options.epochs,
        val_loader=val,
        optimizer=optimizer,
        scheduler=scheduler,
        scheduler_per="batch",
        device=device,
        amp=options.amp,
        policy=policy,
        exclude=[pattern for pattern in ("*shortcut*", "*downsample*") if _has(model, pattern)],
        seed=seed,
        progress=options.progress,
    )
    report = result.report.to_dict()
    accuracies = [row["val_accuracy"] for row in result.history]
    return (
        {"method": name, "seed": seed, "best_val_accuracy": max(accuracies), "val_accuracies": accuracies}
        | report
        | {"curves": result.curves}
    )


def _has(model: torch.nn.Module, pattern: str) -> bool:
    """Whether the model has a projection shortcut of that name: the papers leave them dense on CIFAR (spec of both, §4)."""
    part = pattern.strip("*")
    return any(
        part in name and getattr(module, "weight", torch.empty(0)).ndim == 4 for name, module in model.named_modules()
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--source", default=None, help="cifar10-jpeg.tar.xz in image-folder layout; default: torchvision's own download"
    )
    p.add_argument("--root", default="data", help="folder for the download and the decoded cache (default %(default)s)")
    p.add_argument("--model", default="resnet20", help="resnet18, vgg19_bn, resnet20, torchvision:NAME or timm:NAME")
    p.add_argument("--methods", nargs="+", default=["full-rank", "cuttlefish", "pufferfish", "spectral-init"])
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--batch", type=int, default=128)
    p.add_argument("--lr", type=float, default=0.1, help="peak learning rate, reached after 5/300 of the run")
    p.add_argument("--weight-decay", type=float, default=5e-4)
    p.add_argument("--ratio", type=float, default=0.25, help="rank ratio of Pufferfish and spectral initialization")
    p.add_argument("--subset", type=int, default=None, help="train on this many images")
    p.add_argument("--test-subset", type=int, default=None, help="test on this many images")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--amp", default=None, choices=("bfloat16", "float16"))
    p.add_argument("--channels-last", action="store_true")
    p.add_argument(
        "--paper",
        action="store_true",
        help="the papers' recipe: 300 epochs, batch 1,024, peak 0.8, weight decay 1e-4, bf16, channels_last",
    )
    p.add_argument("--progress", action="store_true")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    return p


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    options = parser().parse_args(arguments)
    if options.paper:
        options.epochs, options.batch, options.lr, options.weight_decay = 300, 1024, 0.8, 1e-4
        options.amp, options.channels_last = "bfloat16", True
    available = policies(options.epochs, LEADING.get(options.model, 1), options.ratio)
    if unknown := sorted(set(options.methods) - set(available)):
        raise SystemExit(f"--methods must be among {', '.join(available)}; got {', '.join(unknown)}")
    start = time.perf_counter()
    cache = Path(options.root) / "cifar10-jpeg.pt" if options.source else None
    data = cifar10(options.root, source=options.source, cache=cache)
    loading = time.perf_counter() - start
    runs = [run(name, available[name], data, options, seed) for seed in options.seeds for name in options.methods]
    print(table(runs))
    configuration = {k: v for k, v in vars(options).items() if k not in ("source", "root", "results")}
    slug = f"cifar10_{options.model.replace(':', '-')}_{options.epochs}ep"
    return record.write(
        slug,
        {
            "configuration": configuration | {"data": "jpeg" if options.source else "original"},
            "results": {"loading_s": loading, "runs": runs},
        },
        device=torch.device(options.device),
        folder=options.results,
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One row per run."""
    rows = []
    for r in runs:
        low = r["step_ms"].get("low-rank")
        full = r["step_ms"].get("full-rank")
        rows.append(
            (
                r["method"],
                f"{100 * r['val_accuracy']:.2f}",
                f"{r['parameters_after']:,}",
                f"{r['macs_after'] / r['macs_before']:.2f}",
                "-" if r["E"] is None else f"{r['E']:.1f}",
                r["K"],
                "-" if full is None else f"{full:.0f}",
                "-" if low is None else f"{low:.0f}",
                f"{r['seconds']['total']:.0f}",
                f"{100 * r['overhead']:.2f}" if not math.isnan(r["overhead"]) else "-",
            )
        )
    headers = (
        "method",
        "accuracy %",
        "parameters",
        "MACs ratio",
        "E",
        "K",
        "full step ms",
        "low step ms",
        "seconds",
        "overhead %",
    )
    return tabulate(rows, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    print(f"written: {main().name}")
