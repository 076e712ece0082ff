"""Loaders by the names that the command line takes."""

from pathlib import Path
from typing import Any

import torch

from fxrank.cli.models import called

DATA_HELP = (
    "digits, an image folder with train/ and val/, or package.module:callable that returns both loaders: that module is imported and "
    "run, from the current folder first"
)


def build_loaders(spec: str, batch_size: int, image_size: int, seed: int) -> tuple[Any, Any]:
    """`(training, validation)` loaders for `--data`: digits, an image folder with train/ and val/ (or test/), or a callable that returns both."""
    if spec == "digits":
        from fxrank.demo import digits

        return digits(seed)
    folder = Path(spec)
    if folder.is_dir():
        from torchvision import datasets, transforms

        held_out = next((folder / n for n in ("val", "test") if (folder / n).is_dir()), None)
        if not (folder / "train").is_dir() or held_out is None:
            raise ValueError(
                f"an image folder must hold train/ and val/ (or test/), one folder per class in each; {spec} does not."
            )
        normalize = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        augment = [transforms.RandomResizedCrop(image_size, scale=(0.35, 1.0)), transforms.RandomHorizontalFlip()]
        plain = [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
        train = datasets.ImageFolder(str(folder / "train"), transforms.Compose(augment + normalize))
        val = datasets.ImageFolder(str(held_out), transforms.Compose(plain + normalize))
        make = torch.utils.data.DataLoader
        return make(train, batch_size, shuffle=True, drop_last=True, num_workers=2), make(
            val, batch_size, num_workers=2
        )
    if ":" in spec:
        loaders = called(spec, tuple, "a tuple (training loader, validation loader)")
        if len(loaders) != 2:
            raise ValueError(f"{spec} must return (training loader, validation loader); got {len(loaders)} values.")
        return loaders[0], loaders[1]
    raise ValueError(f"--data must be digits, an image folder, or package.module:callable; got {spec!r}.")
