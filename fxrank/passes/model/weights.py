"""Where a weight is: in a layer of torch's own, derived there from other parameters, or as a raw parameter of any
module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from fxrank.passes.errors import PlanMismatchError
from fxrank.torch_private.modules import own_buffers, own_parameters, pre_hooks


def weight_of(layer: nn.Module) -> Tensor:
    """The weight that the layer multiplies with; for layers that are known to have one.

    Of a parametrized layer, or one under `weight_norm` or `spectral_norm`, the derived weight, without an update of
    its power iteration; of a weight-standardized convolution the standardized one.
    """
    if parametrize.is_parametrized(layer, "weight"):
        with _evaluating(layer.get_submodule("parametrizations.weight")):
            return _tensor(layer.weight)
    hook = _old_norm(layer)
    if isinstance(hook, WeightNorm):
        return _tensor(hook.compute_weight(layer))
    if isinstance(hook, SpectralNorm):
        return _tensor(hook.compute_weight(layer, do_power_iteration=False))
    if standardizes(layer):
        return _weight_used(layer)
    return _tensor(layer.weight)


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


def _old_norm(layer: nn.Module) -> Any:
    norms = (WeightNorm, SpectralNorm)
    hooks = pre_hooks(layer).values()
    return next((h for h in hooks if isinstance(h, norms) and h.name == "weight"), None)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


# -- weight-standardized convolutions


class _Recorder(TorchFunctionMode):
    """Remembers the weights that convolutions are called with, and what is padded."""

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


def standardizes(layer: nn.Module) -> bool:
    """Whether a subclass of `Conv2d` convolves with a weight that it computes from its own, per output channel (Qiao et
    al. 2019, weight standardization; `StdConv2d` and `ScaledStdConv2d` in timm). Found out by calling it once.
    """
    kind = type(layer)
    own = own_parameters(layer).get("weight")  # reading `.weight` would leave a node in a graph being traced
    if not isinstance(layer, nn.Conv2d) or kind.forward is nn.Conv2d.forward or own is None:
        return False
    if kind not in _STANDARDIZING:
        try:
            used = _weight_used(layer)
        except Exception:
            _STANDARDIZING[kind] = False  # it does something else altogether, and is traced like any module
        else:
            _STANDARDIZING[kind] = used is not own and used.shape == own.shape
    return _STANDARDIZING[kind]


def _weight_used(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    weight = layer.weight
    x = torch.zeros(1, layer.in_channels, *reach, dtype=weight.dtype, device=weight.device)
    with _Recorder() as recorder, torch.random.fork_rng(devices=[]):
        type(layer).forward(layer, x)
    (used,) = recorder.weights
    return _tensor(used)
