"""What watching the ranks costs: the warm-started tracker against `scipy.linalg.svdvals` per layer, on ResNet-18 in training.

python -m benchmarks.rank_tracking --source cifar10-jpeg.tar.xz
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import record
from benchmarks.subjects.data import DeviceLoader, cifar10
from benchmarks.subjects.models import resnet18
from fxrank.passes.spectra.exact import as_stack, singular_values, stable
from fxrank.passes.spectra.tracked import StableRankTracker

WARM_AFTER = 3
"""Samples after which the tracker counts as warm: the first two follow the chaos of the first optimizer steps."""


def batches(options: argparse.Namespace) -> Any:
    """Endless `(inputs, labels)` on the device: CIFAR-10, or class prototypes with noise if there is no data."""
    if options.synthetic:
        generator = torch.Generator().manual_seed(0)
        prototypes = torch.randn(10, 3, 32, 32, generator=generator)
        while True:
            y = torch.randint(0, 10, (options.batch,), generator=generator)
            x = prototypes[y] + torch.randn(options.batch, 3, 32, 32, generator=generator)
            yield x.to(options.device), y.to(options.device)
    cache = Path(options.root) / "cifar10-jpeg.pt" if options.source else None
    data = cifar10(options.root, source=options.source, cache=cache)
    loader = DeviceLoader(
        data.train_x, data.train_y, options.batch, augment=True, drop_last=True, device=options.device
    )
    while True:
        yield from loader


def convolutions(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all convolutions, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim == 4}


def full_spectrum(weight: Tensor) -> Any:
    """The reference's way: all singular values of one layer in float32 (on a GPU by torch)."""
    matrix = weight.reshape(len(weight), -1)
    return torch.linalg.svdvals(matrix).cpu().numpy() if weight.is_cuda else scipy.linalg.svdvals(matrix.numpy())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", default=None, help="cifar10-jpeg.tar.xz; default: torchvision's own download")
    p.add_argument("--root", default="data")
    p.add_argument("--synthetic", action="store_true", help="no data set: class prototypes with noise")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--interval", type=int, default=8, help="optimizer steps between two samples")
    p.add_argument("--samples", type=int, default=20)
    p.add_argument("--lr", type=float, default=0.05)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    return p


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = resnet18().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    tracker = StableRankTracker()
    stream = batches(options)
    exact_error = 0.0
    for weight in convolutions(model).values():
        sigma = np.linalg.svd(weight.cpu().reshape(len(weight), -1).double().numpy(), compute_uv=False)
        reference = float((sigma**2).sum() / sigma[0] ** 2)
        exact_error = max(exact_error, abs(stable(singular_values(as_stack(weight))[0]) - reference) / reference)
    rows: list[dict[str, Any]] = []
    for sample in range(options.samples):
        weights = convolutions(model)
        stacks = [as_stack(w) for w in weights.values()]
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        found = tracker(stacks, list(weights))
        middle = time.perf_counter()
        spectra = [full_spectrum(w) for w in weights.values()]
        end = time.perf_counter()
        exact = [stable(singular_values(s)[0]) for s in stacks]
        errors = [abs(a - b) / b for a, b in zip(found, exact, strict=True)]
        rows.append({"sample": sample, "tracker_s": middle - start, "svdvals_s": end - middle, "errors": errors})
        del spectra
        for _ in range(options.interval):
            x, y = next(stream)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    warm = rows[WARM_AFTER:]
    errors = [e for row in warm for e in row["errors"]]
    results = {
        "speedup_median": statistics.median(r["svdvals_s"] / r["tracker_s"] for r in warm),
        "within_1e-3": sum(e <= 1e-3 for e in errors) / len(errors),
        "worst_error": max(errors),
        "exact_path_error": exact_error,
        "targets": {
            "speedup_median": ">= 25",
            "within_1e-3": ">= 0.99",
            "worst_error": "<= 5e-3",
            "exact_path_error": "<= 1e-6",
        },
        "samples": rows,
    }
    print({k: v for k, v in results.items() if k not in ("samples", "targets")})
    configuration = {k: v for k, v in vars(options).items() if k not in ("source", "root", "results")}
    return record.write(
        "rank_tracking", {"configuration": configuration, "results": results}, device=device, folder=options.results
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
