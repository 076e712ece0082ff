"""What keeps a graph's gradients those of its model: where the forward switches them off, and functions with a backward of
their own.

    with torch.no_grad():            is_grad_enabled = torch.is_grad_enabled()
        h = self.body(x)             _set_grad_enabled = torch._C._set_grad_enabled(False)
    return self.head(h)         →    body = self.body(x)
                                     _set_grad_enabled_1 = torch._C._set_grad_enabled(is_grad_enabled)
                                     head = self.head(body)

Run without gradients, a graph makes none, also where its model's forward would switch them on.

It knows torch's inside; tried on torch 2.8.0 and 2.14.1.
"""

import inspect
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

from fxrank.torch_private import pytree
from fxrank.torch_private.kernels import set_gradients

OFF = "gradients_off"
"""In the `meta` of a node that the forward computes with gradients switched off."""
NEEDED = "requires_grad"
"""In the `meta` of a node: whether the model's tensor would require a gradient."""


@dataclass(frozen=True)
class Applied:
    """`function.apply` as the target of a node: by itself it is a method of C++, of which a graph could not write the call."""

    function: type[Function]

    @property
    def __name__(self) -> str:
        """By this the graph calls its node."""
        return self.function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, with its own backward."""
        return self.function.apply(*args, **kwargs)


def applied_as_node(tracer: Any) -> Any:
    """What stands in for `Function.apply`: a node, where there is a proxy among the arguments; else the very method."""
    original = vars(Function)["apply"]

    def apply(function: type[Function], *args: Any, **kwargs: Any) -> Any:
        if any(issubclass(type(leaf), fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", Applied(function), args, kwargs)
        return original.__get__(None, function)(*args, **kwargs)

    return classmethod(apply)


def function_around() -> str | None:
    """The name of the `autograd.Function` whose forward is calling this. Torch switches the gradients off in it, as `no_grad`
    does, and calls it from C++, where it cannot be met if somebody has taken the bound `apply` along before the trace.
    """
    codes: dict[Any, str] = {}
    todo = Function.__subclasses__()
    while todo:
        function = todo.pop()
        codes[getattr(inspect.unwrap(function.forward), "__code__", None)] = function.__name__
        todo += function.__subclasses__()
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return None if frame is None else codes[frame.f_code]


def needs_gradient(node: fx.Node, root: nn.Module) -> bool:
    """Whether the model's tensor would require a gradient, as its parameters and inputs do now. Writing into a tensor, or asking
    it to require one, makes it so for later nodes.
    """
    if node.op == "get_attr":
        return bool(operator.attrgetter(str(node.target))(root).requires_grad)
    inputs = node.all_input_nodes
    for given in inputs:
        if NEEDED not in given.meta:  # fx reads a parameter that the forward holds aside past the tracer
            given.meta[NEEDED] = given.op == "get_attr" and needs_gradient(given, root)
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.target == "requires_grad_":
        needed = bool(node.args[1] if len(node.args) > 1 else node.kwargs.get("requires_grad", True))
    elif node.target in ("detach", "detach_") or (node.target is getattr and node.args[1:2] == ("data",)):
        needed = False
    else:
        needed = OFF not in node.meta and any(given.meta[NEEDED] for given in inputs)
        if node.op == "call_module" and OFF not in node.meta:
            needed = needed or any(p.requires_grad for p in root.get_submodule(str(node.target)).parameters())
    if first is not None and (node.target in ("requires_grad_", "detach_") or (needed and _writes(node))):
        first.meta[NEEDED] = needed
    return needed and _differentiable(node)


def switch_as_the_forward(graph: fx.Graph, root: nn.Module) -> None:
    """Add the nodes that switch gradients off and back on around what the forward computes without them; not around what has
    none anyhow, as masks and tables made of no input.
    """
    depends: set[fx.Node] = set()
    before: fx.Node | None = None
    off = False
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            if node.op == "placeholder" or isinstance(operator.attrgetter(node.target)(root), nn.Parameter):
                depends.update([node] if _differentiable(node) else [])
            continue
        has_weights = node.op == "call_module" and any(True for _ in root.get_submodule(node.target).parameters())
        touched = has_weights or not depends.isdisjoint(node.all_input_nodes)
        if touched and _writes(node) and isinstance(node.args[0], fx.Node):
            depends.add(node.args[0])
        matters = touched and (_differentiable(node) or _writes(node))
        if matters:
            depends.add(node)
        if node.op != "output" and (not matters or (OFF in node.meta) is off):
            continue
        if node.op == "output" and not off:
            continue
        with graph.inserting_before(node):
            if before is None:
                before = graph.call_function(torch.is_grad_enabled)
                before.meta["val"] = True
            off = not off
            switch = graph.call_function(set_gradients, (False if off else before,))
            switch.meta["val"] = None


def _differentiable(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in leaves)


def _writes(node: fx.Node) -> bool:
    """Whether a node may write into its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    return in_place or node.target in _WRITING or (node.op == "call_function" and name.endswith("_"))


_WRITING = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}


# -- of real runs


def way_back(outputs: Iterable[Any], names: dict[int, str]) -> Iterator[str]:
    """Where a backward from these tensors would come by: the names of the parameters, by `id`, and of functions with a backward
    of their own.
    """
    seen: set[Any] = set()
    todo: list[Any] = []
    for tensor in outputs:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            if tensor.grad_fn is not None:
                todo.append(tensor.grad_fn)
            elif id(tensor) in names:
                yield names[id(tensor)]
    while todo:
        step = todo.pop()
        if step in seen:
            continue
        seen.add(step)
        todo += [following for following, _ in step.next_functions if following is not None]
        variable = getattr(step, "variable", None)
        if variable is not None and id(variable) in names:
            yield names[id(variable)]
        elif isinstance(step, BackwardCFunction):
            yield type(step).__name__.removesuffix("Backward")


def unlike(expected: Iterable[str], found: Iterable[str]) -> str | None:
    """How the gradients of a graph differ from the model's, both told by `way_back`; None if they do not."""
    of_model, of_graph = Counter(expected), Counter(found)
    for less, more, text in (
        (of_graph, of_model, "the graph's gradients do not come by {}, as the model's do"),
        (of_model, of_graph, "the graph's gradients come by {}, which the model's do not"),
    ):
        if missing := sorted(more - less):
            return text.format(", ".join(missing[:3]) + (", …" if missing[3:] else ""))
    return None
