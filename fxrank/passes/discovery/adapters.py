"""Adapters beside a model's own layers: small already, merged into its weights by their own code, and saved by the names of their
parameters, which factors do not have. They are left alone.

Known are PEFT's, of all its tuners; loralib's layers; and what others call `lora_…` (LoRA, Hu et al. 2021).
"""

from collections.abc import Iterator

from torch import nn

ADAPTER = "it belongs to an adapter, which is small already and saved by its names"


def in_adapter(model: nn.Module, path: str) -> bool:
    """Whether the weight at this path belongs to an adapter."""
    return any(_begins_adapter(owner, name) for owner, name in _steps(model, path))


def _begins_adapter(owner: nn.Module, name: str) -> bool:
    if name.startswith("lora_") or name in getattr(owner, "adapter_layer_names", ()):
        return True
    if hasattr(owner, "lora_A") and hasattr(owner, "merged") and not hasattr(owner, "base_layer"):
        return True  # loralib: in evaluation mode its layer adds the product of the two to its weight
    child = getattr(owner, name, None)
    return type(child).__module__.startswith("peft.tuners.") and not _wraps(child)


def _wraps(module: object) -> bool:
    """Whether a module of PEFT's has one of the model's own inside; its prompt encoders have not."""
    return any(hasattr(module, name) for name in ("base_layer", "original_module", "model"))


def _steps(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules on the way down to a path, with the name that follows."""
    owner: object = model
    for name in path.split("."):
        if not isinstance(owner, nn.Module):
            return
        yield owner, name
        owner = getattr(owner, name, None)
