"""Where a weight is: in a layer of torch's own, derived there from other parameters, or as a raw parameter of any
module.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from fxrank.passes.errors import PlanMismatchError
from fxrank.passes.model.restored import modes_put_back
from fxrank.torch_private.modules import own_buffers, own_parameters, pre_hooks


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that the layer multiplies with; for layers that are known to have one.

    Of a parametrized layer, or one under `weight_norm` or `spectral_norm`, the derived weight, without an update of
    its power iteration; of a weight-standardized convolution the standardized one.
    """
    if parametrize.is_parametrized(layer, "weight"):
        steps = layer.get_submodule("parametrizations.weight")
        with modes_put_back(steps):
            steps.eval()
            return _tensor(layer.weight)
    hook = _old_norm(layer)
    if isinstance(hook, WeightNorm):
        return _tensor(hook.compute_weight(layer))
    if isinstance(hook, SpectralNorm):
        return _tensor(hook.compute_weight(layer, do_power_iteration=False))
    if standardizes(layer):
        return _weight_used(layer)
    return _tensor(layer.weight)


def made_in_inference(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that was made in `torch.inference_mode()`, which nothing outside of it can
    write into.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    return next((name for name, tensor in tensors if tensor.is_inference()), None)


def stands_for(stand_in: nn.Parameter, read: Callable[[], Tensor]) -> nn.Parameter:
    """The parameter, marked as standing for the numbers that `read` gets."""
    setattr(stand_in, _READ, read)
    return stand_in


def numbers_of(weight: Tensor) -> Tensor:
    """The weight, or what it stands for."""
    read = getattr(weight, _READ, None)
    return weight if read is None else _tensor(read())


_READ = "_fxrank_read"


def is_derived(layer: nn.Module) -> bool:
    """Whether the layer's weight is computed from other parameters."""
    return parametrize.is_parametrized(layer, "weight") or _old_norm(layer) is not None or standardizes(layer)


def computed_part(layer: nn.Module) -> str | None:
    """Which of weight and bias the layer multiplies with and does not hold as a parameter, as after pruning; a weight that
    `is_derived` is none of them. Nothing is read: that would leave a node in a graph being traced.
    """
    for name in ("weight", "bias"):
        computed = vars(layer).get(name) is not None or own_buffers(layer).get(name) is not None
        if (computed or parametrize.is_parametrized(layer, name)) and (name == "bias" or not is_derived(layer)):
            return name
    return None


def check_not_computed(layer: nn.Module, name: str) -> None:
    """Raise `PlanMismatchError` for a layer with a `computed_part`."""
    if (part := computed_part(layer)) is not None:
        raise PlanMismatchError(
            f"a layer must hold the parameters that its pair replaces; the {part} of {name!r} is none, as after pruning. Make it one first, after "
            "pruning with prune.remove."
        )


def drop_norm_hooks(layer: nn.Module) -> None:
    """Take off the forward pre-hooks that derive a weight."""
    hooks = pre_hooks(layer)
    for key in [k for k, hook in hooks.items() if derives_weight(hook)]:
        del hooks[key]


def derives_weight(hook: object) -> bool:
    """Whether a forward pre-hook is torch's own, which makes a layer's weight of other parameters."""
    return isinstance(hook, (WeightNorm, SpectralNorm))


def spectral_norm_of(layer: nn.Module) -> SpectralNorm | None:
    """The hook by which older torch divides the layer's weight by its norm, None if there is none."""
    hook = _old_norm(layer)
    return hook if isinstance(hook, SpectralNorm) else None


def _old_norm(layer: nn.Module) -> Any:
    norms = (WeightNorm, SpectralNorm)
    hooks = pre_hooks(layer).values()
    return next((h for h in hooks if isinstance(h, norms) and h.name == "weight"), None)


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


# -- weight-standardized convolutions


class _Recorder(TorchFunctionMode):
    """Remembers the weights that convolutions are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d:
            self.weights.append(args[1] if len(args) > 1 else (kwargs or {})["weight"])
        return func(*args, **(kwargs or {}))


_STANDARDIZING: dict[type[nn.Module], bool] = {}


def declare_plain(kind: type[nn.Module]) -> None:
    """Take the word of whoever registers a class that its layers multiply with the parameter `weight` itself."""
    _STANDARDIZING[kind] = False


def standardizes(layer: nn.Module) -> bool:
    """Whether a subclass of `Conv2d` convolves with its own weight, standardized per output channel (Qiao et al. 2019;
    `StdConv2d` and `ScaledStdConv2d` in timm): whatever the weight, each channel of what is used has the mean 0. A kernel that is
    computed otherwise, masked say, is none. Found out by calling it once, on a weight of random numbers.
    """
    kind = type(layer)
    own = own_parameters(layer).get("weight")  # reading `.weight` would leave a node in a graph being traced
    if not isinstance(layer, nn.Conv2d) or kind.forward is nn.Conv2d.forward or own is None:
        return False
    if kind not in _STANDARDIZING:
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                given = nn.Parameter(1 + torch.randn(own.shape, device=own.device).to(own.dtype))
                used = _weight_used(layer, given)
        except Exception:
            _STANDARDIZING[kind] = False  # it does something else altogether, and is traced like any module
        else:
            computed = used is not given and used.shape == own.shape
            if computed and used.is_meta:
                return True  # there are no numbers to look at; the next one may have some
            _STANDARDIZING[kind] = computed and _has_no_means(used)
    return _STANDARDIZING[kind]


def _has_no_means(weight: Tensor) -> bool:
    channels = weight.flatten(1).double()
    return bool((channels.mean(1).abs() <= 1e-2 * channels.std(1)).all())  # half precision rounds; a mask makes a tenth


def _weight_used(layer: nn.Module, given: nn.Parameter | None = None) -> Tensor:
    """What the layer convolves with, with another weight if one is given. Its hooks are not called."""
    assert isinstance(layer, nn.Conv2d)
    reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    weight, held = layer.weight, own_parameters(layer)
    x = torch.zeros(1, layer.in_channels, *reach, dtype=weight.dtype, device=weight.device)
    own = held.get("weight")
    try:
        if given is not None:
            held["weight"] = given
        with _Recorder() as recorder, torch.random.fork_rng(devices=[]):
            type(layer).forward(layer, x)
    finally:
        if given is not None:
            held["weight"] = own
    (used,) = recorder.weights
    return _tensor(used)
