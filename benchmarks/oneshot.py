"""One-shot factorization of a trained network within a budget, beside other tools: what is left of its accuracy, by form, by what the
factors know, and by how ranks are chosen.

    python -m benchmarks.oneshot --source cifar10-jpeg.tar.xz --model resnet56     # trained there first, if there is no file of weights

Each row: accuracy as it comes, after BatchNorm is measured again, and after the same few steps of training; seconds of processor time that the
call took; the share of the dense model's time for a forward call (medians of interleaved calls), with its spread. Rows go into a ledger as they come, and a run that was
broken off goes on from there; `--no-timing` leaves the last column for a later run on a quiet machine. Other tools are tried if they are
installed (`benchmarks/subjects/peers.py`).
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fxrank
from benchmarks import record
from benchmarks.subjects.allocations import by_kl, weighted
from benchmarks.subjects.data import Cifar, DeviceLoader, cifar10
from benchmarks.subjects.models import build
from benchmarks.subjects.peers import PEERS, largest, size
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


def train(
    model: nn.Module, data: Cifar, *, epochs: int, subset: int, rate: float, batch: int = 128, steps: int | None = None
) -> None:
    """SGD with one cycle of the learning rate, in place; AdamW, with rates of a hundredth, for models without BatchNorm."""
    total = epochs * (subset // batch) if steps is None else steps
    optimizer: torch.optim.Optimizer
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    else:
        rate = rate / 100
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    model.train()
    step = 0
    for epoch in range(10**6):
        for x, y in batches(data.train_x, data.train_y, subset, batch, seed=epoch, augment=True):
            if step == total:
                model.eval()
                return
            if len(x) < batch:
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


def relative_time(dense: nn.Module, small: nn.Module, x: Tensor, repeats: int = 11) -> list[float]:
    """Quartiles of the forward time over the dense model's, calls of both in turn."""
    ratios = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            times = []
            for model in (dense, small):
                start = time.perf_counter()
                model(x)
                times.append(time.perf_counter() - start)
            ratios.append(times[1] / times[0])
    return [float(q) for q in torch.tensor(ratios[1:]).quantile(torch.tensor([0.5, 0.25, 0.75]))]


@dataclass(frozen=True)
class Way:
    """One way to make a model small: what a row says of it, how it is done, and whether it is trained for a few steps too."""

    about: dict[str, Any]
    make: Callable[[], nn.Module]
    heals: bool = True


def ours(dense: nn.Module, x: Tensor, calibration: Batches, budget: float, forms: Sequence[str]) -> Iterator[Way]:
    """Every form, with factors of the weight and of the data, ranks chosen for the model; and one ratio for all layers."""
    for form in forms:
        for factors, given in (("weight", None), ("data", calibration)):
            about = {"tool": "fxrank", "budget": budget, "form": form, "factors": factors}

            def chosen(form: str = form, given: Batches | None = given) -> nn.Module:
                return fxrank.factorize(dense, x, form=form, target_params=budget, calibration=given, recalibrate=False)

            yield Way(about | {"ranks": "chosen"}, chosen, heals=factors == "data" or form == "spatial")
            if form in ("channel", "spatial"):

                def evenly(form: str = form, given: Batches | None = given) -> nn.Module:
                    return uniform(dense, x, budget, form, given)

                yield Way(about | {"ranks": "one ratio"}, evenly, heals=False)


def by_other_losses(dense: nn.Module, calibration: Batches, budget: float) -> Iterator[Way]:
    """Ranks by what the layers lose by themselves, and by KL."""
    about = {"tool": "fxrank", "budget": budget, "form": "spatial", "factors": "data"}

    def by_own() -> nn.Module:
        options: dict[str, Any] = {"form": "spatial", "calibration": calibration, "recalibrate": False}
        return weighted({}, dense, calibration[0][0][:2], target_params=budget, **options)

    yield Way(about | {"ranks": "own losses"}, by_own, heals=False)
    for ranks, at in (("KL at a tenth of break-even", 0.1), ("KL at the chosen ranks", None)):

        def make(at: float | None = at) -> nn.Module:
            return by_kl(dense, calibration, budget, "spatial", at)

        yield Way(about | {"ranks": ranks}, make, heals=False)


def uniform(model: nn.Module, x: Tensor, share: float, form: str, calibration: Batches | None) -> nn.Module:
    """One ratio of full rank for all layers, the largest with which the model keeps to its share of the parameters."""
    found = 0.0

    def make(ratio: float) -> nn.Module:
        nonlocal found
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ranks at or above break-even")
            small = fxrank.factorize(model, x, ratio, form=form)
        found = ratio if size(small) <= share * size(model) else found
        return small

    small = largest(make, share * size(model))
    return (
        small
        if calibration is None
        else fxrank.factorize(model, x, found, form=form, calibration=calibration, recalibrate=False)
    )


def peers(dense: nn.Module, calibration: Batches, budget: float, names: Sequence[str]) -> Iterator[Way]:
    """Other tools, as they come; the one that searches does so at one budget only."""

    def score(model: nn.Module) -> float:
        return accuracy(model, calibration)

    for name in names:
        if "search" in name and budget != 0.5:
            continue
        about = {"tool": name, "budget": budget, "form": "-", "factors": "-", "ranks": "-"}
        yield Way(about, lambda name=name: PEERS[name](dense, calibration[0][0], budget, score))  # type: ignore[misc]


@dataclass(frozen=True)
class Bench:
    """The network, the data, and what is known of each way already, in a ledger."""

    dense: nn.Module
    data: Cifar
    options: argparse.Namespace
    ledger: record.Ledger

    def rows(self, ways: Sequence[Way]) -> list[dict[str, Any]]:
        """One for each way; of those that cannot be gone it says why not."""
        rows = []
        for way in ways:
            found = self.ledger.found(way.about) or {}
            if "failed" not in found and ("raw" not in found or (self.options.timing and "forward" not in found)):
                found = self._row(way, found)
                self.ledger.add(way.about, found)
            rows.append(way.about | found)
        return rows

    def _row(self, way: Way, known: dict[str, Any]) -> dict[str, Any]:
        o = self.options
        torch.manual_seed(0)
        start = time.process_time()
        try:
            small = way.make()
            seconds = time.process_time() - start
            with torch.no_grad():
                small.eval()(
                    batches(self.data.test_x, self.data.test_y, 8, 8, seed=0)[0][0]
                )  # what came may not compute
        except Exception as error:  # another tool's may be of any kind
            if way.about["tool"] == "fxrank":
                raise
            return {"failed": f"{type(error).__name__}: {error}"[:200]}
        row: dict[str, Any] = {"parameters": size(small), "cpu_seconds": seconds}
        if known.get("parameters") == row["parameters"]:  # else fxrank has another answer now
            row = known | row
        if o.timing:
            x = batches(self.data.train_x, self.data.train_y, 128, 128, seed=1)[0][0]
            row["forward"] = relative_time(self.dense, small.eval(), x)
        if "raw" in row:
            return row
        test = batches(self.data.test_x, self.data.test_y, o.test_subset, 500, seed=0)
        again = batches(self.data.train_x, self.data.train_y, 2000, 250, seed=2)
        row["raw"] = accuracy(small, test)
        measure_batchnorms(small, lambda: [((images,), {}) for images, _ in again])
        row["batchnorm"] = accuracy(small, test)
        if o.steps and way.heals:
            train(small, self.data, epochs=1, subset=o.subset, rate=0.02, batch=64, steps=o.steps)
            row["healed"] = accuracy(small, test)
        return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row."""
    columns = (
        "tool",
        "budget",
        "form",
        "factors",
        "ranks",
        "parameters",
        "raw",
        "batchnorm",
        "healed",
        "forward",
        "cpu_seconds",
    )

    def shown(row: dict[str, Any], column: str) -> str:
        value = row.get(column)
        if value is None:
            return "-"
        if column in ("raw", "batchnorm", "healed"):
            return f"{100 * value:.1f}"
        return f"{value[0]:.2f}" if column == "forward" else f"{value:.1f}" if column == "cpu_seconds" else str(value)

    return tabulate([[shown(r, c) for c in columns] for r in rows], headers=columns, disable_numparse=True)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", default=None, help="cifar10-jpeg.tar.xz; default: torchvision's own download")
    p.add_argument("--root", default="data", help="folder for the download and the decoded cache (default %(default)s)")
    p.add_argument("--model", default="resnet56")
    p.add_argument(
        "--weights",
        default=None,
        help="state dict, written after training if it is not there (default data/oneshot_MODEL.pt)",
    )
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--subset", type=int, default=20000, help="train on this many images")
    p.add_argument("--test-subset", type=int, default=2000)
    p.add_argument("--calibration", type=int, default=512, help="images")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    p.add_argument("--forms", nargs="+", default=["channel", "spatial", "gauge", "auto"])
    p.add_argument("--peers", nargs="*", default=list(PEERS))
    p.add_argument("--steps", type=int, default=100, help="of training for the last accuracy; 0 leaves it out")
    p.add_argument("--no-timing", dest="timing", action="store_false")
    p.add_argument("--output", default="run/oneshot", help="folder for the ledger")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    torch.manual_seed(0)
    cache = Path(options.root) / "cifar10-jpeg.pt" if options.source else None
    data = cifar10(options.root, source=options.source, cache=cache)
    model = build(options.model)
    weights = Path(options.weights or f"data/oneshot_{options.model}.pt")
    if weights.is_file():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        train(model, data, epochs=options.epochs, subset=options.subset, rate=0.2)
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), weights)
    model.eval()
    calibration = batches(data.train_x, data.train_y, options.calibration, 128, seed=1)
    ways = [
        Way({"tool": "dense", "budget": 1.0, "form": "-", "factors": "-", "ranks": "-"}, lambda: copy.deepcopy(model))
    ]
    for budget in options.budgets:
        ways += ours(model, calibration[0][0][:2], calibration, budget, options.forms)
        if "spatial" in options.forms:
            ways += by_other_losses(model, calibration, budget)
        ways += peers(model, calibration, budget, options.peers)
    left_out = ("source", "root", "results", "weights", "output")
    kept = {k: v for k, v in vars(options).items() if k not in left_out} | {
        "data": "jpeg" if options.source else "original"
    }
    of_rows = {k: v for k, v in kept.items() if k not in ("budgets", "forms", "peers", "timing")}
    ledger = record.Ledger(Path(options.output) / f"{options.model}.jsonl", of_rows)
    rows = Bench(model, data, options, ledger).rows(ways)
    print(table(rows))
    return record.write(
        f"oneshot_{options.model}",
        {"configuration": kept, "results": rows},
        device=torch.device("cpu"),
        folder=options.results,
    )


if __name__ == "__main__":
    print(main())
