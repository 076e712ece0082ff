"""When to switch: every convergence test replayed on the same recorded rank curves.

    python -m benchmarks.convergence

Trains the demo's residual network on the embedded digits with two optimizers, watching only, and asks each detector when it would have switched
(as a share of the run) and how large the model would have been (share of the weights, at the scaled stable ranks of that moment).
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import fxrank
from benchmarks import record
from fxrank.demo import DigitsNet, digits
from fxrank.policies.monitor import Detector, ReferenceDetector, SlopeDetector
from fxrank.policies.ranks import whole_rank

DETECTORS: dict[str, Detector] = {
    **{f"slope, window {w}, {e:g} %": SlopeDetector(e, w) for w in (15, 25, 40) for e in (0.05, 0.1, 0.2)},
    "slope, absolute 0.1 (paper), window 2": SlopeDetector(0.1, 2, relative=False),
    "slope, absolute 0.1, window 15": SlopeDetector(0.1, 15, relative=False),
    "reference code": ReferenceDetector(),
}


def record_curves(optimizer_name: str, epochs: int) -> fxrank.Result:
    """Train full-rank and watch."""
    train, val = digits(0)
    torch.manual_seed(0)
    model = DigitsNet()
    steps = epochs * len(train)
    if optimizer_name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        peak = 0.1
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        peak = 2e-3
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    watch_only = fxrank.Cuttlefish(epsilon=1e-12, latest=None, speedup_threshold=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        return fxrank.auto_lowrank(
            model, train, val_loader=val, epochs=epochs, policy=watch_only, optimizer=optimizer, scheduler=scheduler,
            scheduler_per="batch", seed=0, device="cpu", progress=False,
        )  # fmt: skip


def replay(detector: Detector, result: fxrank.Result, total: int) -> dict[str, Any]:
    """The first sample at which all inner layers have settled: its share of the run, and the size of the model then."""
    layers = [d for d in result.plan.layers if "left dense" not in d.reason]
    curves = {d.name: result.curves[d.name] for d in layers}
    full = {d.name: d.full_rank for d in layers}
    settled: frozenset[str] = frozenset()
    for i in range(2, len(result.curves["steps"])):
        settled = detector.settled({n: c[: i + 1] for n, c in curves.items()}, full, settled)
        if len(settled) == len(layers):
            size = 0.0
            for d in layers:
                rows, columns = d.weight_shape[0], d.parameters // d.weight_shape[0]
                rank = whole_rank(d.full_rank * curves[d.name][i] / curves[d.name][0], d.full_rank)
                size += min(d.parameters, rank * (rows + columns))
            return {
                "switch_share": result.curves["steps"][i] / total,
                "weights_share": size / sum(d.parameters for d in layers),
            }
    return {"switch_share": None, "weights_share": None, "settled": len(settled), "layers": len(layers)}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    found: dict[str, Any] = {}
    for name in ("sgd", "adamw"):
        result = record_curves(name, options.epochs)
        total = options.epochs * len(digits(0)[0])
        found[name] = {
            "val_accuracy": result.report.val_accuracy,
            "detectors": {key: replay(d, result, total) for key, d in DETECTORS.items()},
            "curves": result.curves,
        }
        rows = [(key, v["switch_share"], v["weights_share"]) for key, v in found[name]["detectors"].items()]
        print(tabulate(rows, headers=(name, "switch at (share of run)", "weights left"), floatfmt=".3f"))
    return record.write(
        "convergence",
        {"configuration": {"epochs": options.epochs}, "results": found},
        device=torch.device("cpu"),
        folder=options.results,
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
