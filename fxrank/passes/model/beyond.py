"""What a layer does beyond multiplying with its weight, and what is kept true of its weight: a pair in its place would do
neither, and nobody would notice.

Nothing is called here but `isinstance`: classes, instances and code are looked at.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxrank.passes.model.code import functions, held_by, is_function, names, writes
from fxrank.passes.model.weights import computed_part, derives_weight, is_derived, spectral_norm_of, standardizes
from fxrank.torch_private.modules import (
    WEIGHT_HOOKS,
    keeps_nothing,
    own_buffers,
    own_children,
    own_parameters,
    post_hooks,
    pre_hooks,
)


def constraint(layer: nn.Module) -> str | None:
    """What is made of the layer's weight, by name, if it makes something true that would not stay true of the product of two
    factors in training: a norm of 1, orthogonality, zeros. None if nothing does.

    Weight norm makes nothing true (any matrix is a direction and a length).
    """
    if parametrize.is_parametrized(layer, "weight"):
        steps = layer.get_submodule("parametrizations.weight").children()
        kept = [type(step).__name__.lstrip("_") for step in steps if not keeps_nothing(step)]
        return " and ".join(kept) or None
    return "SpectralNorm" if spectral_norm_of(layer) is not None else None


def beyond_weight(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """What a layer does that its class `kind` does not, or has that others may ask it for: a clause that follows its name. None
    if it only multiplies with its weight and adds its bias.

    Hooks are none of it: they move to the pair. Numbers that the user has put on the layer move as well.
    """
    own = vars(layer)
    if patched := [name for name in _RUN if name in own]:
        return f"has a {patched[0]} that was put on the layer"
    if type(layer) is kind and not _is_torchs(kind):
        return None  # the class is what its pair was registered for
    bound = next(
        (name for name, value in own.items() if is_function(value) and any(thing is layer for thing in held_by(value))),
        None,
    )
    if bound is not None:
        return f"has a function {bound} that is bound to it"
    if not is_derived(layer) and computed_part(layer) is None:
        more = (
            n for held in (own_parameters, own_buffers, own_children) for n, v in held(layer).items() if v is not None
        )
        strange = next((name for name in more if name not in ("weight", "bias")), None)
        if strange is not None:
            return f"holds {strange} beside its weight"
    for cls, name, _ in _additions(type(layer), kind):
        if not (standardizes(layer) and name in {"forward", *names(type(layer).forward)}):
            return f"has {cls.__name__}.{name}, which a pair has not"
    return None


def runs_others(layer: nn.Module) -> bool:
    """Whether a forward that was put on the layer holds modules or tensors by itself, as a closure does: they may be of another model,
    and a copy of the layer goes on with those of the original.
    """
    patches = [vars(layer)[name] for name in _RUN if name in vars(layer)]
    return any(
        isinstance(thing, (nn.Module, Tensor)) for patch in patches for f in functions(patch) for thing in held_by(f)
    )


_RUN = ("forward", "_call_impl", "_conv_forward")
"""What is run where a layer is called."""


def written_by(owner: nn.Module, attribute: str) -> str | None:
    """What may write into a parameter outside of the forward: a method of the owner's class (`LoRALayer.train`), or a hook before
    or after its forward. Into the product of two factors nobody can write. None if nothing does.

    The code is looked at for the parameter and for operations in place. What makes a weight anew (`init…`, `reset…`) does not count.
    """
    used = names(type(owner).forward)
    for cls, name, value in _additions(type(owner), nn.Module):
        if name != "forward" and name not in used and any(writes(f, attribute) for f in functions(value)):
            return f"{cls.__name__}.{name}"
    for hook in (*pre_hooks(owner).values(), *post_hooks(owner).values()):
        if not derives_weight(hook) and any(writes(f, attribute) for f in functions(hook)):
            return f"the hook {getattr(hook, '__name__', type(hook).__name__)}"
    return None


def masks_gradient(weight: Tensor) -> bool:
    """Whether a hook on the weight's gradient holds something of the weight's own shape, a mask say: it fits no factor's gradient."""
    hooks = [hook for name in WEIGHT_HOOKS for hook in (getattr(weight, name, None) or {}).values()]
    return any(_like(thing, weight) for hook in hooks for thing in held_by(hook))


def _like(thing: object, weight: Tensor) -> bool:
    if isinstance(thing, nn.Module):
        return any(p is weight for p in own_parameters(thing).values())
    if not isinstance(thing, Tensor) or thing.numel() < 2 or thing.ndim > weight.ndim:
        return False
    sizes = zip(reversed(thing.shape), reversed(weight.shape), strict=False)
    return all(own in (1, size) for own, size in sizes)


_PLAIN = {"extra_repr", "__init__", "__repr__", "__constants__", "__doc__", "__module__", "__qualname__", "__dict__"} | {
    "__weakref__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__firstlineno__",
    "__static_attributes__", "__orig_bases__", "__parameters__", "__slots__", "__abstractmethods__", "_abc_impl", "_version",
}  # fmt: skip
"""What a class has that nobody asks its layers for."""


def _additions(cls: type, base: type) -> Iterator[tuple[type, str, Any]]:
    """What the classes between these two define, torch's own left out: class, name and value. What only makes a layer, or its
    weight anew, is left out too.
    """
    for one in cls.__mro__:
        if one is base:
            return
        for name, value in () if _is_torchs(one) or one is object else list(vars(one).items()):
            makes = name.lstrip("_").startswith(("init", "reset")) and any(functions(value))
            if name not in _PLAIN and not makes:
                yield one, name, value


def _is_torchs(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "torch"
