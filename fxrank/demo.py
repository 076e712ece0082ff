"""The demo: a small residual CNN on scikit-learn's scans of handwritten digits, with its full-rank twin on the same budget."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.auto import RESULTS, Result, auto_lowrank, write_somewhere
from fxrank.policies.cuttlefish import Cuttlefish
from fxrank.policies.fixed import FullRank
from fxrank.saving.places import put, try_places

BATCH, EPOCHS, SEED = 64, 30, 0


class Residual(nn.Module):
    """Two 3×3 convolutions around a shortcut, `(N, m, h, w)` to `(N, n, h/stride, w/stride)`."""

    def __init__(self, m: int, n: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(m, n, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n)
        self.conv2 = nn.Conv2d(n, n, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n)
        same = stride == 1 and m == n
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(nn.Conv2d(m, n, 1, stride, bias=False), nn.BatchNorm2d(n))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        out: Tensor = torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return out


class DigitsNet(nn.Module):
    """A residual CNN for `(N, 1, 8, 8)` images and 10 classes."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = nn.Sequential(Residual(width, width), Residual(width, width))
        self.stage2 = nn.Sequential(Residual(width, 2 * width, 2), Residual(2 * width, 2 * width))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))
        return out


class Batches:
    """Shuffled batches with random one-pixel shifts, from tensors in memory; a new order every pass, the same orders for the same seed."""

    def __init__(self, images: Tensor, labels: Tensor, batch: int, seed: int | None) -> None:
        self._images, self._labels, self._batch, self._seed = images, labels, batch, seed
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def share(self, part: int, parts: int) -> "Batches":
        """One of `parts` equal shares of the data."""
        even = len(self._images) - len(self._images) % parts
        return Batches(self._images[part:even:parts], self._labels[part:even:parts], self._batch, self._seed)

    def __len__(self) -> int:
        return len(self._images) // self._batch if self._generator is not None else -(-len(self._images) // self._batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self._images)
        generator = self._generator
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for start in range(0, len(self) * self._batch, self._batch):
            chosen = order[start : start + self._batch]
            images = self._images[chosen]
            if generator is not None:
                dx, dy = torch.randint(-1, 2, (2,), generator=generator).tolist()
                images = images.roll((dx, dy), (2, 3))
            yield images, self._labels[chosen]


def digits(seed: int = SEED) -> tuple[Batches, Batches]:
    """Training and validation batches of `sklearn.datasets.load_digits`: 1,797 real 8×8 scans, every fifth held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "the demo's images ship with scikit-learn, which is not installed; pip install 'fxrank[demo]'"
        ) from None

    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(data.target)
    held_out = torch.arange(len(images)) % 5 == 0
    return (
        Batches(images[~held_out], labels[~held_out], BATCH, seed),
        Batches(images[held_out], labels[held_out], 512, None),
    )


@dataclass
class Demo:
    """Both runs, by the same calls with the same budget and seed."""

    lowrank: Result
    twin: Result

    def comparison(self) -> dict[str, Any]:
        """Accuracy, size and time of both, plain data."""
        low, full = self.lowrank.report, self.twin.report
        return {
            name: {
                "val_accuracy": report.val_accuracy,
                "parameters": report.parameters_after,
                "macs": report.macs_after,
                "seconds": report.seconds["total"],
            }
            for name, report in (("full-rank twin", full), ("fxrank", low))
        }

    def __str__(self) -> str:
        low, full = self.lowrank.report, self.twin.report
        assert low.val_accuracy is not None
        assert full.val_accuracy is not None
        return (
            f"full-rank twin, same budget: validation accuracy {100 * full.val_accuracy:.2f} %, {full.parameters_after:,} parameters\n"
            f"fxrank:                      validation accuracy {100 * low.val_accuracy:.2f} %, {low.parameters_after:,} parameters "
            f"({100 * (low.val_accuracy - full.val_accuracy):+.2f} points, {full.parameters_after / low.parameters_after:.2f}x smaller)"
        )


def run(output_dir: str | os.PathLike[str], *, epochs: int = EPOCHS, seed: int = SEED, progress: bool = True) -> Demo:
    """Train the twin and the factorized network; write report, plan, model and figure to `output_dir`."""
    try_places(Path(output_dir), [*RESULTS, "comparison.txt"])
    results = []
    for policy in (FullRank(), Cuttlefish()):
        train, val = digits(seed)
        torch.manual_seed(seed)
        model = DigitsNet()
        # The usual recipe for residual CNNs: SGD with momentum, weight decay 5e-4, one cycle of the learning rate.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        steps = epochs * len(train)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.1)
        results.append(
            auto_lowrank(
                model,
                train,
                val_loader=val,
                epochs=epochs,
                optimizer=optimizer,
                scheduler=scheduler,
                scheduler_per="batch",
                policy=policy,
                seed=seed,
                device="cpu",
                progress=progress,
            )
        )
    demo = Demo(twin=results[0], lowrank=results[1])
    folder = write_somewhere(demo.lowrank, Path(output_dir), len(digits(seed)[0]))
    if folder is not None:
        put(folder / "comparison.txt", lambda partial: partial.write_text(f"{demo}\n", encoding="utf-8"))
    return demo
