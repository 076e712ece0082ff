"""Whether a layer computes what its pair does: both are called on random numbers, in both modes, before the layer is taken.

Layers of torch's own that hold their weight are known to. What a subclass, a class of a user's own or a derived weight makes of
its input is not: its kernel may depend on the input, on the mode, on chance, or on code that takes no pair for a weight.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from types import MethodType

import torch
from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.model.restored import modes_put_back, randoms_put_back, restored, seed, unwritten
from fxrank.passes.model.weights import derives_weight, is_derived, numbers_of, weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.parameter import RawWeight
from fxrank.passes.pairs.registry import dense_type
from fxrank.passes.tracing.compare import largest_difference
from fxrank.torch_private import pytree
from fxrank.torch_private.modules import all_hooks, made_of, own_buffers, own_children, own_parameters, pre_hooks

_ROWS = 2
"""Rows of the first random input; the second one has one more."""
_PLACES = 4
"""How many tokens it has, and how many kernels fit into it."""


class Alike:
    """What was found out about the layers of one model, so that each kind of layer is asked once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, str | None] = {}

    def checked(self, layer: Layer, module: nn.Module, attribute: str = "") -> Layer:
        """The layer, with the reason if its pair would not compute what it does. `module` is what is called: the layer itself, or
        the owner of the parameter `attribute`, which the pair would stand for.
        """
        if layer.reason is not None or (not attribute and _is_torchs(module)):
            return layer
        key = (
            type(module),
            attribute,
            layer.form,
            layer.weight_shape,
            layer.input_shape,
            layer.dtype,
            _described(module),
        )
        if key not in self._known:
            self._known[key] = _difference(layer, module, attribute)
        reason = self._known[key]
        return layer if reason is None else layer.kept_for(reason)


def _is_torchs(layer: nn.Module) -> bool:
    """Whether this is a layer of torch's, whatever it is called, with a parameter for its weight."""
    kind = dense_type(layer)
    return kind is not None and kind.__module__.startswith("torch.nn.") and not is_derived(layer)


def _described(module: nn.Module) -> Hashable:
    """What may tell layers of one class apart, as text."""
    plain = {n: repr(v) for n, v in vars(module).items() if isinstance(v, (int, float, str, bool, tuple, type(None)))}
    held = [n for own in (own_parameters, own_buffers, own_children) for n, v in own(module).items() if v is not None]
    return (*sorted((n, v) for n, v in plain.items() if n != "training"), *held)


def _difference(layer: Layer, module: nn.Module, attribute: str) -> str | None:
    """Why a pair does not compute what this module does; None if it does, or nobody knows: it lies on the meta device, or does
    not take such random numbers.
    """
    if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        return None
    dense = RawWeight(module, attribute) if attribute else module
    place = weight_of(dense).device
    drawn = torch.random.fork_rng(devices=[place] if place.type == "cuda" else [])
    plain = torch.autocast(place.type, enabled=False), torch.enable_grad()
    with drawn, randoms_put_back(module), restored(module), unwritten(module), plain[0], plain[1]:
        try:
            pair = _at_full_rank(layer, dense)
        except Exception as error:
            return f"it cannot have a pair: {_said(error)}"
        bare = _without_hooks(module, {})
        other = _without_hooks(module, {attribute: pair}) if attribute else pair
        for training in (True, False):
            for x in _inputs(layer, dense, bare):
                with _in_mode(bare, training), _in_mode(other, training):
                    try:
                        seed(0)
                        expected = _outputs_and_gradient(bare, x)
                    except Exception:
                        return None
                    try:
                        seed(0)
                        found = _outputs_and_gradient(other, x)
                        far = largest_difference(expected, found)
                    except Exception as error:
                        return f"its forward fails with a pair: {_said(error)}"
                if far > _tolerance(x if x.is_floating_point() else weight_of(dense)):
                    mode = "training" if training else "evaluation"
                    return f"it computes more than its weight: its pair differs by {far:.1g} in {mode} mode"
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _at_full_rank(layer: Layer, dense: nn.Module) -> FactorPair:
    """The pair that is the layer: one factor is the weight itself, the other one the identity."""
    cls = layer.unrolled.pair
    assert cls is not None
    pair = cls(dense, layer.full_rank)
    stack = cls.unroll(dense, numbers_of(weight_of(dense)).detach())
    one = torch.eye(layer.full_rank, dtype=stack.dtype, device=stack.device).expand(len(stack), -1, -1)
    pair.fill(*((one, stack) if layer.cols <= layer.rows else (stack, one)))
    return pair


def _without_hooks(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """The same module without the user's hooks, which go on with a pair, and with these children in the places of parameters. What
    it assigns to itself is not assigned to the module.
    """
    parameters = {n: p for n, p in own_parameters(module).items() if n not in children}
    twin = made_of(module, parameters, dict(own_buffers(module)), {**own_children(module), **children})
    own = vars(twin)
    own.update({n: type(hooks)() for n, hooks in all_hooks(module).items() if isinstance(hooks, dict)})
    pre_hooks(twin).update({key: hook for key, hook in pre_hooks(module).items() if derives_weight(hook)})
    bound = {
        n: MethodType(v.__func__, twin) for n, v in own.items() if isinstance(v, MethodType) and v.__self__ is module
    }
    own.update(bound)
    return twin


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """In this mode, without a call of `train`, which may write into weights."""
    with modes_put_back(module):
        for m in module.modules():
            m.training = training
        yield


def _inputs(layer: Layer, dense: nn.Module, module: nn.Module) -> Iterator[Tensor]:
    """Two random inputs, of different sizes and scales: small ones, if the module takes them."""
    cls, weight = layer.unrolled.pair, weight_of(dense)
    assert cls is not None
    for scale, rows in ((1, _ROWS), (3, _ROWS + 1)):
        for shape in (_small(layer, weight, rows), layer.input_shape):
            x = cls.probe_input(dense, shape, weight.dtype, weight.device)
            x = x * scale if x.is_floating_point() else x
            with suppress(Exception), torch.no_grad():
                module(x)
                break
        yield x


def _small(layer: Layer, weight: Tensor, rows: int) -> tuple[int, ...]:
    """The shape of the layer's input with so many rows, and few places for a kernel, or few tokens."""
    shape = layer.input_shape
    if weight.ndim > 2:
        dims = weight.ndim - 2
        kept = (*(() if len(shape) < weight.ndim else (rows,)), *shape[:-dims][-1:])
        return *kept, *(
            min(size, _PLACES * kernel) for size, kernel in zip(shape[-dims:], weight.shape[2:], strict=True)
        )
    lead = [rows, *(min(size, _PLACES) for size in shape[1:-1])] if len(shape) > 1 else []
    return *lead, *shape[-1:]


def _outputs_and_gradient(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What the module returns, and the gradient of a random sum of it with respect to the input."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    outputs = [t for t in pytree.tree_leaves(module(x)) if isinstance(t, Tensor)]
    summed = [t for t in outputs if t.requires_grad]
    if not summed or not x.requires_grad:
        return [t.detach() for t in outputs]
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) for t in summed]
    (gradient,) = torch.autograd.grad(summed, x, weights, allow_unused=True)
    return [*(t.detach() for t in outputs), torch.zeros_like(x) if gradient is None else gradient]


def _tolerance(x: Tensor) -> float:
    """Both do the same sums in another order; half precision rounds between the factors, and so does a GPU in its fast modes."""
    eps = torch.finfo(x.dtype).eps
    if x.device.type != "cpu" and x.dtype == torch.float32:
        return 1e-2
    return max(16 * eps, min(1e-4, 1000 * eps))
