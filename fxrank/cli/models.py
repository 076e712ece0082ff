"""Models by the names that the command line takes, and an input for each."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxrank.passes.errors import unknown_name

MODEL_HELP = (
    "torchvision:NAME, timm:NAME, hf:MODEL_TYPE (its default configuration) or hf:FOLDER (with a config.json), digits "
    "(the demo's network), or package.module:callable that returns a model: that module is imported and run, from the current "
    "folder first"
)


def build_model(spec: str, classes: int | None = None) -> nn.Module:
    """The model that `--model` names, untrained. Raises `ValueError` that lists the forms, `ImportError` for a missing package."""
    source, _, name = spec.partition(":")
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if spec == "digits":
        from fxrank.demo import DigitsNet

        return DigitsNet()
    if source == "torchvision" and name:
        models = importlib.import_module("torchvision.models")
        if name not in models.list_models():
            raise unknown_name("torchvision model", name, models.list_models())
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None  # nothing is downloaded
        model: nn.Module = models.get_model(name, **options)
        return model
    if source == "timm" and name:
        timm = importlib.import_module("timm")
        if not timm.is_model(name):
            raise unknown_name("timm model", name, timm.list_models())
        created: nn.Module = timm.create_model(name, **options)
        return created
    if source == "hf" and name:
        return _hugging_face(name, classes)
    if name:
        found: nn.Module = called(spec, nn.Module, "a model")
        return found
    raise ValueError(f"--model must be {MODEL_HELP}; got {spec!r}.")


def on_meta_where_possible(build: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
    """What `build` makes, a model and an example for it, on the meta device, where they take no memory; for real if that
    fails, as it does for a model that computes while it is built.
    """
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:  # an operation without a meta kernel is a NotImplementedError, one of these too
        return build()


def _hugging_face(name: str, classes: int | None) -> nn.Module:
    """A transformers model of that type, the class that its configuration names, else the bare model."""
    transformers = importlib.import_module("transformers")
    options = {} if classes is None else {"num_labels": classes}
    if Path(name).is_dir():
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, **options)
    else:
        types = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
        if name not in types:
            raise unknown_name("hf model type, or folder with a config.json", name, types)
        config = transformers.AutoConfig.for_model(name, **options)
    classes_named = [getattr(transformers, n) for n in config.architectures or () if hasattr(transformers, n)]
    model: nn.Module = classes_named[0](config) if classes_named else transformers.AutoModel.from_config(config)
    return model


def example_for(spec: str, model: nn.Module, shape: str | None) -> Any:
    """One call's inputs: of the shape asked for, or the model's own usual one, a batch of 1."""
    if shape is not None:
        return _example(shape)
    source, _, name = spec.partition(":")
    if source == "timm":
        usual = getattr(model, "pretrained_cfg", None) or {}
        return torch.randn(1, *(usual.get("input_size") or (3, 224, 224)))
    if source == "torchvision":
        if any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd")):
            return ([torch.rand(3, 320, 320)],)
        if name.startswith("raft"):
            return torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)
        video = {
            "mvit": (16, 224),
            "s3d": (16, 224),
            "swin3d": (16, 224),
            "r3d": (8, 112),
            "mc3": (8, 112),
            "r2plus1d": (8, 112),
        }
        frames = next((sizes for prefix, sizes in video.items() if name.startswith(prefix)), None)
        if frames is not None:
            return torch.randn(1, 3, frames[0], frames[1], frames[1])
        side = 299 if "inception" in name else 224
        return torch.randn(1, 3, side, side)
    if source == "hf":
        config: Any = model.config
        dummy = getattr(model, "dummy_inputs", None) or {}
        inputs = {k: v.to("meta") if _on_meta(model) else v for k, v in dummy.items() if isinstance(v, torch.Tensor)}
        main = getattr(model, "main_input_name", "input_ids")
        if main == "pixel_values" and main not in inputs:
            size = getattr(config, "image_size", 224)
            sides = size if isinstance(size, (list, tuple)) else (size, size)
            inputs = {main: torch.randn(1, getattr(config, "num_channels", 3), *sides)}
        elif main == "input_features":
            decoder = torch.ones(1, 4, dtype=torch.long)
            inputs = {
                main: torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions),
                "decoder_input_ids": decoder,
            }
        elif main not in inputs or "decoder_input_ids" not in inputs:
            inputs = {main: torch.ones(1, 32, dtype=torch.long)}
            if getattr(config, "is_encoder_decoder", False):
                inputs["decoder_input_ids"] = torch.ones(1, 8, dtype=torch.long)
            if getattr(config, "model_type", "") == "clip":
                side = config.vision_config.image_size
                inputs["pixel_values"] = torch.randn(1, 3, side, side)
        return inputs
    raise ValueError(f"--input is needed for the model {spec!r}, as 32x3x224x224 (batch first).")


def _on_meta(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def called(spec: str, kind: type, what: str) -> Any:
    """Import `package.module:callable`, call it, check what it returns."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name, None)
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ValueError(f"{spec} must name a callable; module {module!r} has none called {name!r}.")
    result = function()
    if not isinstance(result, kind):
        raise ValueError(f"{spec} must return {what}; got {type(result).__name__}.")
    return result


def _example(shape: str) -> torch.Tensor:
    try:
        sizes = [int(n) for n in shape.split("x")]
        if not sizes or min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--input must be positive sizes joined by x, batch first, as 32x3x224x224; got {shape!r}."
        ) from None
    return torch.randn(sizes)
