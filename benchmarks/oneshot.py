"""One-shot factorization of a trained network within a budget: what is left of its accuracy, by form, by what the factors know, and by
how ranks are chosen.

    python -m benchmarks.oneshot --source cifar10-jpeg.tar.xz --weights resnet20.pt     # trained there first, if there is no such file

Each row: accuracy as it comes, after BatchNorm is measured again, and after the same few steps of training; the share of the dense
model's time for a forward call (medians of interleaved calls); seconds that the call took.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fxrank
from benchmarks import record
from benchmarks.subjects.data import Cifar, DeviceLoader, cifar10
from benchmarks.subjects.models import build
from fxrank.passes.calibration.batchnorm import measure_batchnorms

Batches = list[tuple[Tensor, Tensor]]


def batches(x: Tensor, y: Tensor, count: int, size: int, seed: int, augment: bool = False) -> Batches:
    """A fixed list of batches of so many images."""
    loader = DeviceLoader(
        x,
        y,
        size,
        augment=augment,
        seed=seed,
        subset=count,
        drop_last=False,
        device=torch.device("cpu"),
        channels_last=False,
    )
    return list(loader)


def train(model: nn.Module, data: Cifar, *, epochs: int, subset: int, rate: float, steps: int | None = None) -> None:
    """SGD with one cycle of the learning rate, in place."""
    total = epochs * (subset // 128) if steps is None else steps
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    model.train()
    step = 0
    for epoch in range(10**6):
        for x, y in batches(data.train_x, data.train_y, subset, 128, seed=epoch, augment=True):
            if step == total:
                model.eval()
                return
            if len(x) < 128:
                continue
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1


def accuracy(model: nn.Module, test: Batches) -> float:
    """Share of images that are told right."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    return right / sum(len(y) for _, y in test)


def relative_time(dense: nn.Module, small: nn.Module, x: Tensor, repeats: int = 7) -> float:
    """Median forward time over the dense model's, calls of both in turn."""
    times: dict[int, list[float]] = {0: [], 1: []}
    with torch.no_grad():
        for _ in range(repeats):
            for i, model in enumerate((dense, small)):
                start = time.perf_counter()
                model(x)
                times[i].append(time.perf_counter() - start)
    return sorted(times[1][1:])[repeats // 2 - 1] / sorted(times[0][1:])[repeats // 2 - 1]


def uniform(model: nn.Module, x: Tensor, share: float, form: str, calibration: Any) -> nn.Module:
    """One ratio of full rank for all layers, the largest with which the model keeps to its share of the parameters."""
    low, high = 0.0, 1.0
    total = sum(p.numel() for p in model.parameters())
    for _ in range(12):
        ratio = (low + high) / 2
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ranks at or above break-even")
            small = fxrank.factorize(model, x, ratio, form=form)
        fits = sum(p.numel() for p in small.parameters()) <= share * total
        low, high = (ratio, high) if fits else (low, ratio)
    return fxrank.factorize(model, x, low, form=form, calibration=calibration, recalibrate=False)


def measure(dense: nn.Module, data: Cifar, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row, the dense model's first."""
    test = batches(data.test_x, data.test_y, options.test_subset, 500, seed=0)
    calibration = batches(data.train_x, data.train_y, options.calibration, 128, seed=1)
    again = batches(data.train_x, data.train_y, 2000, 250, seed=2)
    x = calibration[0][0][:2]

    def row(name: dict[str, Any], make: Callable[[], nn.Module]) -> dict[str, Any]:
        start = time.perf_counter()
        small = make()
        seconds = time.perf_counter() - start
        raw = accuracy(small, test)
        measured = copy.deepcopy(small)
        measure_batchnorms(measured, lambda: [((images,), {}) for images, _ in again])
        found = name | {
            "raw": raw,
            "batchnorm": accuracy(measured, test),
            "parameters": sum(p.numel() for p in small.parameters()),
            "forward": relative_time(dense, small, calibration[0][0]),
            "seconds": seconds,
        }
        if options.steps:
            train(measured, data, epochs=1, subset=options.subset, rate=0.02, steps=options.steps)
            found["healed"] = accuracy(measured, test)
        print(found, flush=True)
        return found

    rows = [row({"budget": 1.0, "form": "dense", "factors": "-", "ranks": "-"}, lambda: copy.deepcopy(dense))]
    for budget in options.budgets:
        for form in ("channel", "spatial", "auto"):
            for factors in ("weight", "data"):
                given = calibration if factors == "data" else None
                about = {"budget": budget, "form": form, "factors": factors}
                if form != "auto":

                    def evenly(form: str = form, budget: float = budget, given: Any = given) -> nn.Module:
                        return uniform(dense, x, budget, form, given)

                    rows.append(row(about | {"ranks": "uniform"}, evenly))

                def chosen(form: str = form, budget: float = budget, given: Any = given) -> nn.Module:
                    return fxrank.factorize(
                        dense, x, form=form, target_params=budget, calibration=given, recalibrate=False
                    )

                rows.append(row(about | {"ranks": "chosen"}, chosen))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row."""
    columns = [
        c
        for c in ("budget", "form", "factors", "ranks", "raw", "batchnorm", "healed", "forward", "seconds")
        if c in rows[0]
    ]
    percent = {"raw", "batchnorm", "healed"}
    lines = [[f"{100 * r[c]:.1f}" if c in percent else r[c] for c in columns] for r in rows]
    return tabulate(lines, headers=columns, floatfmt=".2f")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", default=None, help="cifar10-jpeg.tar.xz; default: torchvision's own download")
    p.add_argument("--root", default="data", help="folder for the download and the decoded cache (default %(default)s)")
    p.add_argument("--model", default="resnet20")
    p.add_argument(
        "--weights", default="data/oneshot_resnet20.pt", help="state dict, written after training if it is not there"
    )
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--subset", type=int, default=12000, help="train on this many images")
    p.add_argument("--test-subset", type=int, default=2000)
    p.add_argument("--calibration", type=int, default=512, help="images")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    p.add_argument("--steps", type=int, default=100, help="of training for the last column; 0 leaves it out")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    torch.manual_seed(0)
    cache = Path(options.root) / "cifar10-jpeg.pt" if options.source else None
    data = cifar10(options.root, source=options.source, cache=cache)
    model = build(options.model)
    weights = Path(options.weights)
    if weights.is_file():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        train(model, data, epochs=options.epochs, subset=options.subset, rate=0.2)
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)
    rows = measure(model.eval(), data, options)
    print(table(rows))
    kept = {k: v for k, v in vars(options).items() if k not in ("source", "root", "results", "weights")}
    return record.write(
        f"oneshot_{options.model}",
        {"configuration": kept | {"data": "jpeg" if options.source else "original"}, "results": rows},
        device=torch.device("cpu"),
        folder=options.results,
    )


if __name__ == "__main__":
    print(main())
