"""`fxrank compress FOLDER`: models as Transformers saves them, whole or in several files."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from fxrank.cli.data import build_loaders, text_batches
from fxrank.cli.models import build_model, example_for
from fxrank.large.stream import compress_shards
from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.device import known_device
from fxrank.policies.budget import asked_budget
from fxrank.saving.model_files import WEIGHTS
from fxrank.saving.shards import INDEX, check_empty
from fxrank.saving.unfilled import built_unfilled
from fxrank.training.measure import parameter_count

OF_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx"}
"""Files with these endings are not copied beside the small model."""


def model_folder(spec: str) -> Path | None:
    """The folder that is meant by `FOLDER` or `hf:FOLDER`, if it is one with a configuration."""
    folder = Path(spec.removeprefix("hf:"))
    return folder if (folder / "config.json").is_file() else None


def is_in_shards(folder: Path | None) -> bool:
    """Whether the folder's weights lie in several files."""
    return folder is not None and (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file()


def trained(model: nn.Module, folder: Path) -> nn.Module:
    """A model of the same class with the weights in the folder; the model as it is if there are none. Raises `CheckpointError` unless
    they are all of the model's.
    """
    if not (folder / WEIGHTS).is_file():
        return model
    cls: Any = type(model)
    found, said = cls.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    if lost := sorted({*said["missing_keys"], *(str(m[0]) for m in said["mismatched_keys"])}):
        raise CheckpointError(
            f"a folder must hold every weight of its model; {lost[0]!r} of {cls.__name__} is missing in {folder}, or of another shape. Name in the "
            "architectures of its config.json the class that was saved, or save it again."
        )
    loaded: nn.Module = found
    return loaded


def compress_by_shards(options: argparse.Namespace, folder: Path) -> None:
    """One weight at a time, with data one block, and print what became of every layer."""
    run = ("weights", "input", "target_step_time", "target_latency", "keep")
    given = [f"--{name.replace('_', '-')}" for name in run if getattr(options, name) is not None]
    if given:
        raise ValueError(
            f"a model in several files is read a part at a time, from {INDEX} alone, and never timed or called as a whole; got {' and '.join(given)}. Leave them "
            "out, or, where the model fits into memory, use fxrank.factorize(model, batch, …)."
        )
    spec = f"hf:{folder}"

    model = built_unfilled(lambda: build_model(spec, options.classes))
    example = example_for(spec, model, None)
    before = parameter_count(model)
    calibration = None
    if options.data is not None:
        check_empty(Path(options.output))
        calibration = calibration_loaders(options, model, folder)[0]
    plan = compress_shards(
        model,
        example,
        folder,
        options.output,
        options.rank,
        budget=asked_budget(options.rank, params=options.target_params, macs=options.target_macs),
        include=options.include,
        exclude=options.exclude,
        form=options.form,
        calibration=calibration,
        calibration_batches=None if calibration is None else options.calibration_batches,
        device=known_device(options.device or "cpu"),
    )
    copy_settings(folder, options.output)
    after = parameter_count(model)
    print(plan)
    known = f"know {plan.calibration_batches} batches" if plan.calibration_batches else "are of the weights alone"
    print(f"\n{after:,} of {before:,} parameters ({after / before:.3f}); factors {known}")
    print(f"written to {options.output}: " + ", ".join(sorted(p.name for p in Path(options.output).iterdir())))


def calibration_loaders(options: argparse.Namespace, model: nn.Module, folder: Path | None) -> tuple[Any, Any]:
    """`(training, validation)` loaders for `compress --data`; of a text, for a model in a folder, there is no validation."""
    text = Path(options.data)
    if folder is None or not text.is_file():
        return build_loaders(options.data, options.batch_size or 128, options.image_size, seed=0)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    length = options.tokens or min(512, longest or 512)
    return text_batches(text, folder, options.calibration_batches, options.batch_size or 8, length), None


def copy_settings(folder: Path, output: str | Path) -> None:
    """What lies beside a model's weights: its configuration, that of `generate`, the tokenizer."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix not in OF_WEIGHTS and file.name not in ("plan.json", INDEX):
            shutil.copyfile(file, Path(output) / file.name)
