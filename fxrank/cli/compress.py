"""`fxrank compress`: a trained model made smaller without training."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from fxrank.cli.data import DATA_HELP
from fxrank.cli.folders import (
    calibration_loaders,
    compress_by_shards,
    copy_settings,
    is_in_shards,
    model_folder,
    trained,
)
from fxrank.cli.models import MODEL_HELP, build_model, example_for
from fxrank.oneshot import RATIO, factorize
from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.device import known_device
from fxrank.saving.model_files import save
from fxrank.switch.plan_of import plan_of
from fxrank.training.batches import first_batch, model_inputs, run_batch, to_device
from fxrank.training.measure import parameter_count, planned_macs


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of this command alone."""
    parser.add_argument(
        "spec",
        metavar="MODEL",
        help=f"{MODEL_HELP}; a folder as Transformers saves it, with or without hf:, brings its weights. In several files they are "
        "read a part at a time",
    )
    parser.add_argument(
        "--weights", default=None, help="state dict of the trained model: .safetensors, or a file that torch.save wrote"
    )
    parser.add_argument("--target-params", type=float, default=None, help="share of all parameters to keep, as 0.5")
    parser.add_argument("--target-macs", type=float, default=None, help="share of all multiply-adds to keep")
    parser.add_argument(
        "--target-step-time",
        type=float,
        default=None,
        help="share to keep of the milliseconds of forward and backward, measured on this device",
    )
    parser.add_argument(
        "--target-latency",
        type=float,
        default=None,
        help="share to keep of the milliseconds of the forward alone, measured",
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=None,
        help="share to keep of what the model gives on the --data, as 0.98, with as few parameters as it takes",
    )
    parser.add_argument(
        "--rank",
        type=lambda text: int(text) if text.isdigit() else float(text),
        default=None,
        help=f"of every layer, or, with a point in it, ratio of its full rank (default {RATIO}, without a target)",
    )
    parser.add_argument("--form", default="auto", help="channel, spatial, qkv, … (default: whichever loses least)")
    parser.add_argument(
        "--data",
        default=None,
        help=f"to calibrate on, and to compare on: {DATA_HELP}. For a folder with a tokenizer also a text file, to calibrate on alone. A "
        "model in several files is calibrated one block at a time",
    )
    parser.add_argument("--calibration-batches", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=None, help="(default 128, of texts 8)")
    parser.add_argument(
        "--tokens", type=int, default=None, help="of one sequence of a text (default 512, or what the model takes)"
    )
    parser.add_argument("--image-size", type=int, default=224, help="for an image folder (default %(default)s)")
    parser.add_argument("--output", default="run/small", help="folder for model and plan (default %(default)s)")


def run(options: argparse.Namespace) -> None:
    """Build, factorize, save, and print what became of every layer, and of the accuracy if there are data."""
    folder = model_folder(options.spec)
    if folder is not None and is_in_shards(folder):
        compress_by_shards(options, folder)
        return
    spec = options.spec if folder is None else f"hf:{folder}"
    model = build_model(spec, options.classes)
    if options.weights is not None:
        load_weights(model, options.weights)
    elif folder is not None:
        model = trained(model, folder)
    device = known_device(options.device or "cpu")
    model = model.to(device).eval()
    train = val = None
    if options.data is not None:
        train, val = calibration_loaders(options, model, folder)
        example = to_device(model_inputs(model, first_batch(train)), device)
    else:
        example = to_device(example_for(spec, model, options.input), device)
    small = factorize(
        model,
        example,
        options.rank,
        include=options.include,
        exclude=options.exclude,
        form=options.form,
        target_params=options.target_params,
        target_macs=options.target_macs,
        target_step_time=options.target_step_time,
        target_latency=options.target_latency,
        keep=options.keep,
        calibration=train,
        calibration_batches=None if train is None else options.calibration_batches,
    )
    save(small, options.output)
    if folder is not None:
        copy_settings(folder, options.output)
    plan = plan_of(small)
    before, after = parameter_count(model), parameter_count(small)
    dense, planned = planned_macs(plan)
    print(plan)
    print(
        f"\n{after:,} of {before:,} parameters ({after / before:.3f}), {planned / max(1, dense):.3f} of the multiply-adds"
    )
    said = [] if plan.budget is None else [f"budget: {plan.budget}"]
    if said or plan.note:
        print("; ".join([*said, *([plan.note] if plan.note else [])]))
    if val is not None:
        print(f"dense: {accuracy(model, val, device)}\ncompressed: {accuracy(small, val, device)}")
    print(f"written to {options.output}: " + ", ".join(sorted(p.name for p in Path(options.output).iterdir())))


def load_weights(model: nn.Module, path: str) -> None:
    """A state dict from a file, names and shapes as the model has them. Raises `CheckpointError` for what is none."""
    try:
        if path.endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except FileNotFoundError:
        raise
    except (SafetensorError, UnpicklingError, RuntimeError, AttributeError, TypeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"--weights must be a state dict of the model, {type(model).__name__}; {path} is not: {str(error).partition(chr(10))[0]}"
        ) from error


def accuracy(model: nn.Module, batches: Iterable[Any], device: torch.device) -> str:
    """Loss and accuracy over a loader, in words."""
    loss, correct, predictions, examples = 0.0, 0, 0, 0
    with torch.no_grad():
        for batch in batches:
            outcome = run_batch(model, to_device(batch, device), None)
            loss += float(outcome.loss) * outcome.examples
            examples += outcome.examples
            correct += 0 if outcome.correct is None else int(outcome.correct)
            predictions += int(outcome.predictions)
    right = f", accuracy {100 * correct / predictions:.2f} %" if predictions else ""
    return f"loss {loss / max(1, examples):.4f}{right} on {examples} examples"
