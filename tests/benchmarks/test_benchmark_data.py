"""The benchmark's data: the decoded archive, its cache, torchvision's download, and the loader on the device."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.subjects.data import MEAN, STD, Cifar, DeviceLoader, cifar10

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Random images `(count, 3, 32, 32)` uint8; image `i` has label `i`, so that a batch tells which images it holds."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count)


def normalized(images: Tensor) -> Tensor:
    """The images in [0, 1], with the channels' mean taken off and divided by their standard deviation."""
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def epoch(loader: DeviceLoader) -> tuple[Tensor, Tensor]:
    """All batches of one pass, joined."""
    inputs, labels = zip(*loader, strict=True)
    return torch.cat(inputs), torch.cat(labels)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_seed_gives_the_same_stream(device: str) -> None:
    first, second = (DeviceLoader(*pictures(20), 8, augment=True, seed=3, device=device) for _ in range(2))
    for _ in range(2):
        for (x, y), (x2, y2) in zip(first, second, strict=True):
            assert x.device.type == y.device.type == device
            assert torch.equal(x, x2) and torch.equal(y, y2)


def test_the_stream_does_not_depend_on_the_global_generator() -> None:
    first = epoch(DeviceLoader(*pictures(20), 8, augment=True, seed=3))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = epoch(DeviceLoader(*pictures(20), 8, augment=True, seed=3))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert torch.equal(state, torch.get_rng_state())


def test_seeds_and_epochs_differ_in_order_and_in_augmentation() -> None:
    images, labels = pictures(20)
    loader = DeviceLoader(images, labels, 8, augment=True, seed=3)
    passes = [epoch(loader), epoch(loader), epoch(DeviceLoader(images, labels, 8, augment=True, seed=4))]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        (x, y), (x2, y2) = passes[i], passes[j]
        assert not torch.equal(y, y2)
        # Sorted by image, so that the order is out of the comparison.
        assert not torch.equal(x[y.argsort()], x2[y2.argsort()])


def test_every_epoch_holds_every_image_once() -> None:
    loader = DeviceLoader(*pictures(21), 8, augment=True)
    for _ in range(3):
        assert torch.equal(epoch(loader)[1].sort().values, torch.arange(21))


@pytest.mark.parametrize("device", DEVICES)
def test_without_augmentation_the_data_are_normalized_and_in_order(device: str) -> None:
    images, labels = pictures(20)
    loader = DeviceLoader(images, labels, 8, augment=False, device=device)
    for _ in range(2):
        x, y = epoch(loader)
        assert torch.equal(y.cpu(), labels)
        # float32: the loader normalizes 0-255, the test 0-1, and values reach 2.1.
        torch.testing.assert_close(x.cpu(), normalized(images), rtol=0, atol=2e-6)


def test_augmented_images_are_crops_of_the_padded_image_half_of_them_flipped() -> None:
    images, _ = pictures(1)
    x, _ = epoch(DeviceLoader(images.expand(600, -1, -1, -1), torch.zeros(600, dtype=torch.int64), 64, augment=True))
    padded = F.pad(epoch(DeviceLoader(images, torch.zeros(1), 1, augment=False))[0][0], (4, 4, 4, 4))
    crops = torch.stack([padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)])
    candidates = torch.cat([crops, crops.flip(3)]).flatten(1)
    # Two images are equal exactly where their rows are; a random image has 162 different variants.
    number = {row.numpy().tobytes(): i for i, row in enumerate(candidates)}
    assert len(number) == 162
    drawn = torch.tensor([number[row.numpy().tobytes()] for row in x.flatten(1)])
    rows, columns, flipped = drawn % 81 // 9, drawn % 9, drawn >= 81
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(9))
    assert 0.4 < flipped.float().mean() < 0.6
    # Rows, columns and flips are drawn apart from each other: 162 variants, 600 draws, 158 expected.
    assert len(set(drawn.tolist())) > 145


@pytest.mark.parametrize(
    ("count", "batch", "drop_last", "sizes"),
    [
        (20, 8, False, [8, 8, 4]),
        (20, 8, True, [8, 8]),
        (16, 8, False, [8, 8]),
        (16, 8, True, [8, 8]),
        (5, 8, False, [5]),
        (5, 8, True, []),
    ],
)
@pytest.mark.parametrize("augment", [False, True])
def test_length_and_batch_sizes(count: int, batch: int, drop_last: bool, sizes: list[int], augment: bool) -> None:
    loader = DeviceLoader(*pictures(count), batch, augment=augment, drop_last=drop_last)
    assert len(loader) == len(sizes)
    assert [len(y) for _, y in loader] == sizes


def test_a_subset_is_the_beginning_of_a_seeded_permutation() -> None:
    images, labels = pictures(40)

    def chosen(subset: int, seed: int) -> list[int]:
        x, y = epoch(DeviceLoader(images, labels, 8, augment=False, subset=subset, seed=seed))
        torch.testing.assert_close(x, normalized(images)[y], rtol=0, atol=2e-6)  # as above
        found: list[int] = y.tolist()
        return found

    assert len(set(chosen(12, 0))) == 12
    assert chosen(12, 0) == chosen(12, 0) == chosen(20, 0)[:12]
    assert chosen(12, 0) != chosen(12, 1)
    assert len(DeviceLoader(images, labels, 8, augment=True, subset=12)) == 2


@pytest.mark.parametrize("augment", [False, True])
def test_channels_last_changes_the_layout_and_not_the_values(augment: bool) -> None:
    plain, last = (DeviceLoader(*pictures(8), 8, augment=augment, channels_last=flag) for flag in (False, True))
    (x, _), (y, _) = next(iter(plain)), next(iter(last))
    assert x.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
    assert x.dtype == y.dtype == torch.float32
    assert torch.equal(x, y)


CLASSES = ("airplane", "bird", "truck")


def archive(path: Path, splits: dict[str, int]) -> Path:
    """A packed image folder of one-coloured JPEGs: class `c`, image `i` has red 40·c, green 20·i, blue 10 (train) or 200."""
    with tarfile.open(path, "w:xz") as tar:
        for split, count in splits.items():
            # Not in the order of the labels: these follow the alphabet.
            for label in reversed(range(len(CLASSES))):
                for i in range(count):
                    colour = (40 * label, 20 * i, 10 if split == "train" else 200)
                    encoded = io.BytesIO()
                    Image.new("RGB", (32, 32), colour).save(encoded, "JPEG", quality=95)
                    member = tarfile.TarInfo(f"{split}/{CLASSES[label]}/{i:04d}.jpg")
                    member.size = len(encoded.getvalue())
                    encoded.seek(0)
                    tar.addfile(member, encoded)
    return path


def equal(a: Cifar, b: Cifar) -> bool:
    return all(torch.equal(vars(a)[name], vars(b)[name]) for name in vars(a))


def test_an_archive_is_decoded_with_the_labels_of_its_folders(tmp_path: Path) -> None:
    data = cifar10(tmp_path, source=archive(tmp_path / "tiny.tar.xz", {"train": 4, "test": 2}))
    for x, y, count, blue in ((data.train_x, data.train_y, 4, 10), (data.test_x, data.test_y, 2, 200)):
        assert x.shape == (3 * count, 3, 32, 32) and x.dtype == torch.uint8 and x.is_contiguous()
        assert y.dtype == torch.int64 and torch.bincount(y).tolist() == [count] * 3
        green = 20 * torch.arange(count).repeat(3)
        expected = torch.stack([40 * y, green, torch.full_like(y, blue)], 1)[:, :, None, None]
        # JPEG rounds colours to luma and chroma.
        assert (x.int() - expected).abs().max() <= 3


def test_the_archive_is_decoded_once(tmp_path: Path) -> None:
    source, cache = archive(tmp_path / "tiny.tar.xz", {"train": 2, "test": 1}), tmp_path / "new" / "folder" / "tiny.pt"
    first = cifar10(tmp_path, source=source, cache=cache)
    source.unlink()
    assert equal(first, cifar10(tmp_path, source=source, cache=cache))
    stored = torch.load(cache, weights_only=True)
    assert set(stored) == {"train_x", "train_y", "test_x", "test_y"}


@pytest.mark.parametrize("splits", [{}, {"train": 1}, {"test": 1}, {"other": 1}])
def test_an_archive_of_another_layout_is_refused(tmp_path: Path, splits: dict[str, int]) -> None:
    source, cache = archive(tmp_path / "odd.tar.xz", splits), tmp_path / "odd.pt"
    with pytest.raises(ValueError, match=r"must hold train/<class>/\*\.jpg and test/<class>/\*\.jpg; odd\.tar\.xz"):
        cifar10(tmp_path, source=source, cache=cache)
    assert not cache.exists()


def test_without_a_source_the_data_come_from_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Download:
        """What `torchvision.datasets.CIFAR10` offers: `data` `(N, 32, 32, 3)` uint8 and a list of labels."""

        def __init__(self, root: str, train: bool, download: bool) -> None:
            calls.append({"root": root, "train": train, "download": download})
            count = 3 if train else 2
            self.data = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            self.targets = list(range(count))

    monkeypatch.setattr(pytest.importorskip("torchvision").datasets, "CIFAR10", Download)
    data = cifar10(tmp_path)
    assert calls == [{"root": str(tmp_path), "train": train, "download": True} for train in (True, False)]
    assert data.train_x.shape == (3, 3, 32, 32) and data.train_x.dtype == torch.uint8
    assert data.test_y.tolist() == [0, 1] and data.test_y.dtype == torch.int64
    image = Download("", True, True).data[2]
    assert torch.equal(data.train_x[2], torch.from_numpy(image).permute(2, 0, 1))
