"""What becomes of a weight that is read as a tensor: the products it ends up in, seen in a traced graph.

The same functions as in `products`: a view is followed, a product counts, anything else needs the numbers themselves.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxrank.passes.discovery.made import Made
from fxrank.torch_private import pytree
from fxrank.torch_private.kernels import GROUPED


@dataclass(frozen=True)
class Product:
    """One product: the node, the shape of the other operand, the multiply-adds of the dense product, whether it is a
    convolution, and whether it mixes the matrices of a stack.
    """

    node: str
    input_shape: tuple[int, ...]
    macs: int
    convolution: bool = False
    mixes: bool = False


@dataclass(frozen=True)
class Uses:
    """The products that a weight is used in, directly or through views, the names of the nodes that need its numbers otherwise,
    and the products as code, None where they cannot be cut out of the graph.
    """

    products: list[Product]
    others: list[str]
    made: Made | None


def uses(read: fx.Node) -> Uses:
    """What becomes of the weight that this node reads. Nodes that only look at its shape or dtype count for nothing."""
    products: list[Product] = []
    others: list[str] = []
    todo = [read]
    seen = {read}
    while todo:
        node = todo.pop(0)
        for user in node.users:
            if only_looks(user, node):
                continue
            use = _product(user, node)
            if use is not None:
                products.append(use)
            elif _is_view(user, node):
                if user not in seen:
                    seen.add(user)
                    todo.append(user)
            else:
                others.append(user.name)
    names = {product.node for product in products}
    multiply = {node for node in read.graph.nodes if node.name in names}
    grouped = any(node.target in GROUPED for node in multiply)  # its sizes are in numbers, which a graph has not
    steps = [node for node in read.graph.nodes if node in multiply or (node in seen and node is not read)]
    return Uses(products, sorted(others), None if grouped or not multiply else Made(read, steps, multiply))


def only_looks(node: fx.Node, weight: fx.Node) -> bool:
    """Whether a reader of a weight takes its dtype, device or shape only, which a pair tells as well: no tensor comes of
    it, and it is no assignment.
    """
    if node.op == "call_method" and node.target in ("to", "type_as") and node.args[0] is not weight:
        return True  # `x.to(weight)` asks for its dtype and device
    value = node.meta.get("val")
    return value is not None and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


_VIEW_METHODS = {
    *("t", "transpose", "permute", "chunk", "split", "unbind", "narrow", "to", "float", "half", "bfloat16", "double"),
    *("type_as", "detach", "swapaxes", "cuda", "cpu"),
}
_VIEW_FUNCTIONS: set[Any] = {
    *(torch.t, torch.transpose, torch.permute, torch.chunk, torch.split, torch.unbind, torch.narrow),
    *(torch.detach, operator.getitem),
}
_VIEW_ATTRIBUTES = {"T", "mT", "data"}


def _is_view(user: fx.Node, weight: fx.Node) -> bool:
    if user.op == "call_method":
        return user.target in _VIEW_METHODS and user.args[0] is weight
    if user.op != "call_function":
        return False
    if user.target is getattr:
        return user.args[1] in _VIEW_ATTRIBUTES
    if user.target is operator.getitem:
        value, index = weight.meta["val"], user.args[1]
        if user.args[0] is not weight:
            return False
        if not isinstance(value, Tensor):
            return True
        return isinstance(index, slice) or (value.ndim == 3 and isinstance(index, (int, fx.Node)))
    return user.target in _VIEW_FUNCTIONS


def _product(user: fx.Node, weight: fx.Node) -> Product | None:
    """How this node multiplies with the weight, None if it does not."""
    value, out = weight.meta["val"], user.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(out, Tensor) or user.op not in ("call_function", "call_method"):
        return None
    find = _METHODS.get(str(user.target)) if user.op == "call_method" else _FUNCTIONS.get(user.target)
    other = None if find is None else find(user, weight)
    if not isinstance(other, fx.Node) or not isinstance(other.meta.get("val"), Tensor) or other is weight:
        return None
    x = other.meta["val"]
    if user.target is F.embedding:
        return Product(user.name, tuple(x.shape), 0)
    if user.target in _CONVOLUTIONS:
        return Product(user.name, tuple(x.shape), value.numel() * out.numel() // value.shape[0], True)
    # Of a product every number of `out` is a sum over one dimension of the weight.
    summed = value.numel() / max(1, _kept(user, weight))
    return Product(user.name, tuple(x.shape), round(out.numel() * summed), mixes=_mixes(user, weight))


def _mixes(user: fx.Node, weight: fx.Node) -> bool:
    """Whether an einsum sums over the matrices of a stack and over nothing in them."""
    if user.target is not torch.einsum or weight.meta["val"].ndim != 3:
        return False
    own, others, output = _letters(user, weight)
    return own[0] not in output and not set(own[1:]) & set(others)


def _letters(user: fx.Node, weight: fx.Node) -> tuple[str, str, str]:
    """The letters of the weight, of the other operand and of the output in the equation of an einsum of two."""
    inputs, _, output = str(user.args[0]).replace(" ", "").partition("->")
    operands = user.args[1:] if isinstance(user.args[1], fx.Node) else user.args[1]
    assert isinstance(operands, (tuple, list))
    at = next(i for i, operand in enumerate(operands) if operand is weight)
    terms = inputs.split(",")
    return terms[at], terms[1 - at], output


def _kept(user: fx.Node, weight: fx.Node) -> int:
    """How many of the weight's numbers each summed index has: stack and output dimensions."""
    value: Tensor = weight.meta["val"]
    if user.target is torch.einsum:
        own, _, output = _letters(user, weight)
        return math.prod(size for letter, size in zip(own, value.shape, strict=True) if letter in output)
    stack = value.shape[0] if value.ndim == 3 else 1
    if user.target in (F.linear,):
        return stack * int(value.shape[-2])
    operands = [a for a in (*user.args, *user.kwargs.values()) if isinstance(a, fx.Node)]
    left = operands[1 if user.target in _ADDMM else 0]
    assert isinstance(left, fx.Node)
    is_left = left.meta["val"] is value
    return stack * int(value.shape[-2] if is_left else value.shape[-1])


def _argument(user: fx.Node, position: int, name: str) -> Any:
    return user.args[position] if len(user.args) > position else user.kwargs.get(name)


def _second(x: str, w: str) -> Callable[[fx.Node, fx.Node], Any]:
    """The operand `x` of a function whose second argument `w` is the weight."""

    def find(user: fx.Node, weight: fx.Node) -> Any:
        return _argument(user, 0, x) if _argument(user, 1, w) is weight else None

    return find


def _either(first: int) -> Callable[[fx.Node, fx.Node], Any]:
    """The other one of the two operands that start at this position."""

    def find(user: fx.Node, weight: fx.Node) -> Any:
        operands = [a for a in (*user.args, *user.kwargs.values()) if isinstance(a, fx.Node)][first : first + 2]
        others = [a for a in operands if a is not weight]
        return others[0] if len(operands) == 2 and len(others) == 1 else None

    return find


def _convolution(user: fx.Node, weight: fx.Node) -> Any:
    groups = user.args[6] if len(user.args) > 6 else user.kwargs.get("groups", 1)
    return _second("input", "weight")(user, weight) if groups == 1 else None


def _grouped(user: fx.Node, weight: fx.Node) -> Any:
    return user.args[0] if len(user.args) > 1 and user.args[1] is weight else None


def _einsum(user: fx.Node, weight: fx.Node) -> Any:
    operands = user.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    plain = isinstance(user.args[0], str) and "." not in user.args[0] and "->" in user.args[0]
    others = [a for a in operands if a is not weight]
    if not plain or len(operands) != 2 or len(others) != 1 or weight.meta["val"].ndim not in (2, 3):
        return None
    own, rest, output = _letters(user, weight)
    return others[0] if set(own) & set(rest) - set(output) else None  # else nothing is summed


_CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d)
_ADDMM = (torch.addmm,)
_FUNCTIONS: dict[Any, Callable[[fx.Node, fx.Node], Any]] = {
    F.linear: _second("input", "weight"),
    F.embedding: _second("input", "weight"),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, operator.matmul), _either(0)),
    torch.addmm: _either(1),
    torch.einsum: _einsum,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}
_FUNCTIONS |= dict.fromkeys(GROUPED, _grouped)
_METHODS = dict.fromkeys(("matmul", "mm", "bmm", "mv"), _either(0))
