"""Loaders by the names that the command line takes."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    raise ValueError(
        f"--data must be digits, an image folder, or package.module:callable; got {spec!r}. A text file is for fxrank compress FOLDER alone."
    )


def text_batches(text: Path, folder: Path, batches: int, batch_size: int, length: int) -> list[dict[str, Tensor]]:
    """Batches `{"input_ids": (batch_size, length)}` of sequences that are evenly spaced in a text, tokenized as the model in the folder has
    it; no more than lie side by side. Raises `ValueError` for a text that is too short, or no UTF-8, and a folder without a tokenizer.
    """
    for name, value in (("calibration-batches", batches), ("batch-size", batch_size), ("tokens", length)):
        if value < 1:
            raise ValueError(f"--{name} must be above 0; got {value}.")
    transformers = importlib.import_module("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"a text is tokenized by what lies beside the model; AutoTokenizer finds nothing in {folder}: {str(error).partition(chr(10))[0]} "
            "Save the tokenizer there, or name in --data a package.module:callable that returns loaders of token ids."
        ) from error
    try:
        written = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a text must be UTF-8; {text} is not: {error}.") from error
    ids = torch.tensor(tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    count = min(batches * batch_size, len(ids) // length)
    if not count:
        raise ValueError(
            f"a text must have at least one sequence of {length} tokens; {text} has {len(ids)}. Give a longer one, or fewer --tokens."
        )
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    sequences = torch.stack([ids[start : start + length] for start in starts])
    return [{"input_ids": some} for some in sequences.split(batch_size)]
