"""How an optimizer decays its weights: added to the gradient (SGD, Adam), or taken from the weights (AdamW); and what it
keeps on them.

Torch's own say it by name and by option. Of all others a throwaway one makes a few steps on a small matrix, once with its own
decay and once with either way written out: what it does is what counts, not what it is called.
"""

import copy
import inspect
import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from fxrank.passes.model.restored import seed

Way = Literal["gradient", "weights"]
_FLAGS = ("decoupled_weight_decay", "decoupled_decay", "decoupled")
_DECOUPLED = {"AdamW", "Adafactor", "Muon", "Lion"}
_LR, _DECAY, _SHAPE, _DTYPE, _WARM, _STEPS = 0.0123, 0.1, (8, 12), torch.float32, 3, 2
"""Of a probe. A small decay, for implementations that differ in its square; steps before it, for those whose first do nothing;
a rate that is nobody's, because decay relative to the first rate (lr² / max_lr) must not pass for one of the two ways.
"""
_NONE = 1e-20
"""No decay, and still not 0, by which some choose another way to step (LAMB)."""
_TOLERANCE = 0.05
"""Relative, of the effect of the decay. What differs in principle differs by the size of the effect."""


def way_of_decay(optimizer: Optimizer, group: dict[str, Any], device: torch.device) -> Way | None:
    """How the optimizer decays the weights of a group; None if in neither way, or if it cannot be found out."""
    if _module(type(optimizer)).startswith("torch.optim."):
        return _declared(optimizer, group)
    if "weight_decay" not in group:
        return "gradient"  # there is none; the penalty's gradient is right for any optimizer
    try:
        return _probed(optimizer, group, device)
    except Exception:  # whatever a stranger's constructor or step may raise
        return _declared(optimizer, group)


def _module(cls: type) -> str:
    return f"{cls.__module__}."


def _declared(optimizer: Optimizer, group: dict[str, Any]) -> Way | None:
    flags = [bool(group[name]) for name in _FLAGS if group.get(name) is not None]
    if flags:
        return "weights" if any(flags) else "gradient"
    for cls in type(optimizer).__mro__:
        if _module(cls).startswith("torch.optim.") and cls is not Optimizer:
            return "weights" if cls.__name__ in _DECOUPLED else "gradient"
    return None


def _probed(optimizer: Optimizer, group: dict[str, Any], device: torch.device) -> Way | None:
    answers = set()
    cuda = [device] if device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=cuda), torch.enable_grad():
        warnings.simplefilter("ignore")
        for orthogonal in (False, True):  # the decay of some depends on the angle (AdamP), or on the norm (LAMB)
            runs = {
                way: _run(optimizer, group, device, way, orthogonal) for way in ("none", "own", "gradient", "weights")
            }
            plain = runs.pop("none")
            effects = {way: result - plain for way, result in runs.items()}
            own = effects.pop("own")
            size = float(own.norm())
            fits = {
                way for way, effect in effects.items() if size and float((effect - own).norm()) <= _TOLERANCE * size
            }
            answers.add(frozenset(fits))
    common = frozenset.intersection(*answers)
    # Both for plain SGD, where they are the same.
    return "gradient" if "gradient" in common else "weights" if "weights" in common else None


def _run(optimizer: Optimizer, group: dict[str, Any], device: torch.device, way: str, orthogonal: bool) -> Tensor:
    """A small matrix after a few steps with a decay: the optimizer's own, or one of the two ways by hand, or none."""
    seed(0)
    generator = torch.Generator().manual_seed(0)
    scale = 0.2 if orthogonal else 1.0
    weight = torch.nn.Parameter(torch.randn(_SHAPE, generator=generator, dtype=_DTYPE).mul_(scale).to(device))
    probe = _throwaway(optimizer, group, weight)
    sign = -1.0 if group.get("maximize") else 1.0
    for step in range(_WARM + _STEPS):
        gradient = torch.randn(_SHAPE, generator=generator, dtype=_DTYPE).to(device)
        if orthogonal:
            old = weight.detach()
            gradient -= (gradient * old).sum(1, keepdim=True) / old.square().sum(1, keepdim=True) * old
        weight.grad = gradient
        if step >= _WARM:
            with torch.no_grad():
                if way == "own":
                    probe.param_groups[0]["weight_decay"] = _DECAY
                elif way == "gradient":
                    weight.grad.add_(weight, alpha=sign * _DECAY)
                elif way == "weights":
                    weight.mul_(1 - _LR * _DECAY)
        probe.step()
    return weight.detach()


def _throwaway(optimizer: Optimizer, group: dict[str, Any], weight: torch.nn.Parameter) -> Any:
    """One of the same class and options, for a weight of ours."""
    options = {key: copy.deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}
    known = inspect.signature(type(optimizer)).parameters
    given = optimizer.defaults | {"lr": 2 * _LR, "weight_decay": _NONE}
    given = {key: copy.deepcopy(value) for key, value in given.items() if key in known}
    return type(optimizer)([options | {"params": [weight], "lr": _LR, "weight_decay": _NONE}], **given)


def put_on_parameters(optimizer: Optimizer) -> list[str]:
    """Names of what an optimizer keeps on its parameters themselves, where factors would not have it (AdaHessian)."""
    if _module(type(optimizer)).startswith("torch.optim."):
        return []
    weight = torch.nn.Parameter(torch.zeros(_SHAPE))
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            _throwaway(optimizer, optimizer.param_groups[0], weight)
    except Exception:  # a stranger's constructor, see above
        return []
    return sorted(vars(weight))
