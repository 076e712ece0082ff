"""What quantizers make of weights: modules that pack them (torch's own), and tensors that stand for numbers of fewer bits (torchao's)."""

from types import MethodType
from typing import Any

from torch import Tensor, nn


def is_quantized(value: object) -> bool:
    """Whether a tensor stands for numbers that it holds in fewer bits."""
    if type(value) in (Tensor, nn.Parameter):
        return isinstance(value, Tensor) and value.is_quantized
    return isinstance(value, Tensor) and type(value).dequantize is not Tensor.dequantize


def packs_its_weight(module: nn.Module) -> bool:
    """Whether a module is one of torch's quantized ones."""
    ours = type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized"))
    return ours and hasattr(module, "_packed_params")


def check_not_quantized(model: nn.Module, what: str) -> None:
    """Raise `TypeError` if a weight of the model is quantized; `what` is to be done before."""
    packed = (name for name, module in model.named_modules() if packs_its_weight(module))
    name = next(packed, None) or next((n for n, p in model.named_parameters() if is_quantized(p)), None)
    if name is not None:
        raise TypeError(
            f"{what} must come before quantizing, which does not keep the numbers of the factors; {name!r} of this {type(model).__name__} is quantized. "
            "Do it with the model as it was, and quantize the result."
        )


def numbers_in(layer: nn.Module, name: str = "weight") -> Any:
    """The parameter that a layer multiplies with, or None; where a quantizer has taken it, the numbers that it stands for."""
    value = getattr(layer, name, None)
    if isinstance(value, MethodType):  # as torch's quantized layers have it
        value = value()
    return value.dequantize() if isinstance(value, Tensor) and is_quantized(value) else value
