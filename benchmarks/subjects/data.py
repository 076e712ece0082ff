"""CIFAR-10 as tensors, and a loader that lives wholly on the device."""

import copy
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Per-channel statistics of the training images in [0, 1]."""


@dataclass(frozen=True)
class Cifar:
    """Images `(N, 3, 32, 32)` uint8, labels `(N,)` int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def cifar10(root: str | Path, source: str | Path | None = None, cache: str | Path | None = None) -> Cifar:
    """CIFAR-10 from torchvision's own download to `root`, or from `source`, an image folder packed as `.tar.xz` (`train/<class>/<n>.jpg`, `test/…`).

    A packed source is decoded once and kept in `cache`, a file of plain tensors.
    """
    if source is None:
        from torchvision.datasets import CIFAR10

        splits = [CIFAR10(str(root), train=train, download=True) for train in (True, False)]
        parts = [
            t
            for s in splits
            for t in (torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets))
        ]
        return Cifar(*parts)
    if cache is not None and Path(cache).is_file():
        stored = torch.load(cache, weights_only=True)
        return Cifar(**stored)
    decoded = _decode(Path(source))
    if cache is not None:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(decoded), cache)
    return decoded


def _decode(archive: Path) -> Cifar:
    images: dict[str, list[Tensor]] = {"train": [], "test": []}
    names: dict[str, list[str]] = {"train": [], "test": []}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if not member.isfile() or len(parts) < 3 or parts[-3] not in images:
                continue
            file = tar.extractfile(member)
            assert file is not None
            pixels = numpy.asarray(Image.open(file).convert("RGB"))
            images[parts[-3]].append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
            names[parts[-3]].append(parts[-2])
    if not images["train"] or not images["test"]:
        raise ValueError(f"the archive must hold train/<class>/*.jpg and test/<class>/*.jpg; {archive.name} does not.")
    classes = {name: i for i, name in enumerate(sorted(set(names["train"])))}
    tensors = [
        t for s in ("train", "test") for t in (torch.stack(images[s]), torch.tensor([classes[n] for n in names[s]]))
    ]
    return Cifar(*tensors)


def reduced(data: Cifar, side: int) -> Cifar:
    """The same with images `(N, 3, side, side)`, means over squares; `side` divides 32."""
    if side == data.train_x.shape[-1]:
        return data
    small = [
        torch.cat([F.adaptive_avg_pool2d(part.float(), side).round().to(torch.uint8) for part in images.split(5000)])
        for images in (data.train_x, data.test_x)
    ]
    return Cifar(small[0], data.train_y, small[1], data.test_y)


class DeviceLoader:
    """Batches `(inputs (B, 3, 32, 32) normalized, labels (B,))`, shuffled and augmented on the device.

    With `augment`, every epoch draws a new order, and per image a crop of the image padded by an eighth of its side and a flip. The stream depends on `seed` alone. `subset` takes
    the first images of a seeded permutation. `channels_last` sets the memory format of the inputs.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch: int,
        *,
        augment: bool,
        seed: int = 0,
        subset: int | None = None,
        drop_last: bool = False,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        if subset is not None:
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:subset]
            images, labels = images[chosen], labels[chosen]
        self._images, self._labels = images.to(device), labels.to(device)
        self._batch, self._augment, self._drop_last, self._channels_last = batch, augment, drop_last, channels_last
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._mean = torch.tensor(MEAN, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(STD, device=device).view(1, 3, 1, 1) * 255

    def __len__(self) -> int:
        return len(self._images) // self._batch if self._drop_last else -(-len(self._images) // self._batch)

    def share(self, part: int, parts: int) -> "DeviceLoader":
        """The part of one of several processes: every `parts`-th image from number `part` on, in batches of a `parts`-th, with a stream of
        its own. All parts have equally many images. Raises `ValueError` for a batch that does not divide.
        """
        if self._batch % parts:
            raise ValueError(f"the batch must divide among the processes; got {self._batch} images for {parts}.")
        chosen = slice(part, part + len(self._images) // parts * parts, parts)
        mine = copy.copy(self)
        mine._images, mine._labels = self._images[chosen], self._labels[chosen]
        mine._batch = self._batch // parts
        seed = self._generator.initial_seed() + part
        mine._generator = torch.Generator(device=self._images.device).manual_seed(seed)
        return mine

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device, count = self._images.device, len(self._images)
        order = (
            torch.randperm(count, generator=self._generator, device=device)
            if self._augment
            else torch.arange(count, device=device)
        )
        for start in range(0, len(self) * self._batch, self._batch):
            chosen = order[start : start + self._batch]
            x = (self._images[chosen].float() - self._mean) / self._std
            if self._augment:
                x = self._cropped(x)
            if self._channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            yield x, self._labels[chosen]

    def _cropped(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        pad = height // 8  # 4 of 32, as in the papers
        draw = torch.randint(0, 2 * pad + 1, (2, count), generator=self._generator, device=x.device)
        flip = torch.rand(count, generator=self._generator, device=x.device) < 0.5
        padded = F.pad(x, (pad, pad, pad, pad))
        rows = torch.arange(height, device=x.device) + draw[0][:, None]
        columns = torch.arange(width, device=x.device) + draw[1][:, None]
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        index = torch.arange(count, device=x.device)[:, None, None]
        return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
