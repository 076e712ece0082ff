"""The products that a model makes with one weight, cut out of its graph: they are counted and timed as the model makes them, in the
same equation and order.
"""

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.reading.products import factored
from fxrank.torch_private.multiply_adds import MultiplyAdds

Input = torch.device | tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""A device that the code asks for, or an operand: its shape, strides and dtype."""


class Made:
    """`function(weight, *inputs)` returns the products; `inputs` says what the other operands are."""

    def __init__(self, read: fx.Node, nodes: Iterable[fx.Node], wanted: Container[fx.Node]) -> None:
        """Of the weight that `read` reads, through `nodes`, in the order of their graph: the `wanted` products with it, and views
        of it.
        """
        graph = fx.Graph()
        known = {read: graph.placeholder("weight")}
        self.inputs: list[Input] = []
        last = next(iter(known.values()))

        def operand(node: fx.Node) -> Any:
            nonlocal last
            if node in known:
                return known[node]
            value = node.meta.get("val")
            if not isinstance(value, (Tensor, torch.device)):
                return value
            with graph.inserting_after(last):
                last = known[node] = graph.placeholder(f"input_{len(self.inputs)}")
            self.inputs.append(value if isinstance(value, torch.device) else _described(value))
            return known[node]

        products = []
        for number, node in enumerate(nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
            # Names of ours: those of the model's graph count its nodes.
            known[node] = graph.create_node(node.op, node.target, args, kwargs, f"step_{number}")
            if node in wanted:
                products.append(known[node])
        graph.output(tuple(products))
        self.function = fx.GraphModule(nn.Module(), graph)

    @property
    def code(self) -> str:
        """What is done, and with what: the same for layers that take the same time."""
        return f"{self.function.code}{self.inputs}"

    def random_inputs(self, device: torch.device) -> list[Any]:
        """Operands on this device: random numbers, and zeros where whole numbers choose among rows or matrices."""
        return [device if isinstance(one, torch.device) else _filled(*one, device) for one in self.inputs]

    def multiply_adds(self, dense: nn.Module, pair: type[FactorPair] | None = None, rank: int = 0) -> int:
        """How many the products take with the weight of `dense`, or with that of its pair of this form and rank. Nothing is computed."""
        with torch.no_grad(), MultiplyAdds() as count:
            weight = _on_meta(weight_of(dense)) if pair is None else _weight_on_meta(pair(dense, rank))
            self.function(weight, *self.random_inputs(torch.device("meta")))
        return int(count.total)


def _described(value: Tensor) -> Input:
    return tuple(value.shape), tuple(value.stride()), value.dtype


def _filled(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = torch.empty_strided(shape, strides, dtype=dtype, device=device)
    return tensor.normal_() if dtype.is_floating_point or dtype.is_complex else tensor.zero_()


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _weight_on_meta(pair: FactorPair) -> Any:
    """The pair's `weight`, without numbers."""
    u, v = pair.unfold_u(_on_meta(pair.u.weight)), pair.unfold_v(_on_meta(pair.v.weight))
    return factored(u, v, pair.dense_shape) if pair.multiplies_when_read else pair.fold_dense(v @ u)
