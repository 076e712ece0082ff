"""Model and one example call → `GraphModule` in which every node knows its value's shape and dtype and its owner.

The tracer's proxies carry a value: a fake tensor (shape, dtype, device; no data), or a plain Python number, tuple
or dict. Questions that Python must have answered on the spot (`bool`, `len`, iteration, `int`, `isinstance`) are
answered from the value; everything else stays a node, so `x.shape[0]` remains symbolic, also as a size of
`torch.zeros(x.shape[0], 4)`, and the graph runs at other batch sizes. That is what lets it go through shape tests,
keyword and nested inputs, and decorated forwards where `torch.fx.symbolic_trace` stops. Shapes come for free:
`node.meta["val"]`. What a forward makes of no input at all, `torch.randn(4)`, is a constant of the graph.

A module that reads `self.training` and owns no matrix (Dropout, DropPath, a fused BatchNorm and activation) stays
one node, so that the graph follows `train()` and `eval()`.
"""

import builtins
import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from fxrank.passes.errors import TraceError
from fxrank.passes.proxies import ValueProxy, python_asks_the_values, values_of

Example = Any
"""One call's inputs: a tensor (the only argument), a tuple or list (positional), or a mapping (keywords); values
may nest.
"""


def call_arguments(model: nn.Module, example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example` as `(args, kwargs)` of one call.

    A tensor is the only positional argument, a tuple or list are the positional arguments, a mapping the keyword
    arguments. A tuple or list that does not fit the signature of `model.forward` while its first element does (a
    batch `(inputs, targets)`) stands for that element. Raises `TypeError` if nothing fits.
    """
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a C++ forward: nothing to check against
        signature = None

    def fits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if signature is None:
            return True
        try:
            signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    candidates: list[tuple[tuple[Any, ...], dict[str, Any]]]
    if isinstance(example, Mapping):
        candidates = [((), {str(k): v for k, v in example.items()}), ((example,), {})]
    elif isinstance(example, (tuple, list)):
        candidates = [(tuple(example), {})]
        if example:
            candidates.append(
                call_arguments(model, example[0]) if isinstance(example[0], Mapping) else ((example[0],), {})
            )
        candidates.append(((example,), {}))
    else:
        candidates = [((example,), {})]
    for args, kwargs in candidates:
        if fits(args, kwargs):
            return args, kwargs
    raise TypeError(
        f"the batch must fit {type(model).__name__}.forward{signature}; got {describe(example)}. "
        "Pass a tensor, a tuple of positional inputs, or a dict of keyword inputs."
    )


def describe(value: object) -> str:
    """Shapes and types of a nested value, for messages."""
    if isinstance(value, Tensor):
        return f"Tensor{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {describe(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(describe(v) for v in value)})"
    return type(value).__name__


def trace(model: nn.Module, example: Example, *, leaf_modules: tuple[type[nn.Module], ...] = ()) -> fx.GraphModule:
    """One graph of `model` for the example call, in the model's present mode, sharing its submodules and
    parameters.

    The result's placeholders are the tensors of the example call under their parameter names. `node.meta["val"]` is
    a fake tensor (or tuple, number, …) with the shape and dtype at the example's sizes;
    `node.meta["nn_module_stack"]` names the owner. `leaf_modules` are classes to keep as one node. Nothing of the
    model is changed and no random number is drawn.

    Raises `TraceError`, naming the innermost module at fault, where Python needs a tensor's *data* (`if x.sum() >
    0`) or the model refuses the example.
    """
    args, kwargs = call_arguments(model, example)
    tracer = _ValueTracer(args, kwargs, leaf_modules)
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with _restored(model), torch.random.fork_rng(devices=list(devices)):
        try:
            with python_asks_the_values(tracer):
                graph = tracer.trace(model)
        except Exception as error:
            where = tracer.blame_for(error)
            raise TraceError(
                f"every operation of a traced model must be a graph node; {type(model).__name__} failed in "
                f"{where or 'its own forward'} with {type(error).__name__}: {str(error).partition(chr(10))[0]}. "
                "Check that the example fits the model, or pass that module's class in leaf_modules to keep it as one node."
            ) from error
        # Inside: tensors that the forward made are attributes of the model until it is put back.
        return fx.GraphModule(model, graph, type(model).__name__)


def _reads_mode(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names and all(p.ndim < 2 for p in module.parameters())


class _ValueTracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._call = (args, kwargs)
        self._leaves = leaves
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._evaluating = False
        self._inside: list[str] = []
        self._visits: Counter[nn.Module] = Counter()
        self._buffers: dict[tuple[nn.Module, str], Tensor | None] = {}
        self._blame: tuple[Exception | None, str] = (None, "")

    # -- the entry point: one placeholder per tensor of the example call, whatever the signature says

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        args, kwargs = self._call
        leaves, spec = pytree.tree_flatten((args, kwargs))
        names = self._input_names(args, kwargs, leaves)
        self._buffers = {(m, name): b for m in self.root.modules() for name, b in m._buffers.items()}
        inputs = [self._placeholder(n, v) if isinstance(v, Tensor) else v for n, v in zip(names, leaves, strict=True)]

        def entry(root: nn.Module, *flat: Any) -> Any:
            call_args, call_kwargs = pytree.tree_unflatten(list(flat), spec)
            outputs = pytree.tree_map(self._returnable, root_fn(root, *call_args, **call_kwargs))
            self._update_buffers()
            return outputs

        return entry, [self.root, *inputs]

    def _returnable(self, leaf: Any) -> Any:
        """None for an object that no graph can return, as the key-value cache that a language model adds to its output."""
        if issubclass(type(leaf), fx.Proxy) or is_dataclass(leaf):
            return leaf
        try:
            self.create_arg(leaf)
        except NotImplementedError:
            return None
        return leaf

    def _update_buffers(self) -> None:
        """What the forward has assigned to buffers, written into them at the end of the graph."""
        for path, module in self.root.named_modules():
            for name, value in module._buffers.items():
                buffer = self._buffers.get((module, name))
                if buffer is not None and issubclass(type(value), fx.Proxy):
                    module._buffers[name] = buffer
                    own = self.create_proxy("get_attr", f"{path}.{name}".lstrip("."), (), {})
                    self.create_proxy("call_method", "copy_", (own, value), {})

    def _input_names(self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]) -> list[str]:
        try:
            parameters = list(inspect.signature(self.root.forward).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        named += [f"arg{i}" for i in range(len(named), len(args))]
        parts = [*zip(named, args, strict=False), *kwargs.items()]
        names = []
        for name, part in parts:
            count = len(pytree.tree_leaves(part))
            names += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
        assert len(names) == len(leaves)
        return names

    def _placeholder(self, name: str, value: Tensor) -> fx.Proxy:
        proxy = super().create_proxy("placeholder", name, (), {})
        proxy.node.meta["val"] = self._mode.from_tensor(value, static_shapes=True)
        return proxy

    # -- values

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind != "output":
            try:
                proxy.node.meta["val"] = self._evaluate(kind, target, args, kwargs)
            except Exception:
                self.graph.erase_node(proxy.node)  # a forward may catch this and do something else
                raise
        return proxy

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = values_of((tuple(args), dict(kwargs)))
        self._evaluating = True
        try:
            with torch.no_grad():
                if kind == "call_module":
                    return self._leaf_value(self.root.get_submodule(target), args, kwargs)
                with self._mode:
                    if kind == "get_attr":
                        return self._fake(operator.attrgetter(target)(self.root))
                    if kind == "call_function":
                        return target(*args, **kwargs)
                    assert kind == "call_method", kind
                    return getattr(args[0], target)(*args[1:], **kwargs)
        finally:
            self._evaluating = False

    def _leaf_value(self, leaf: nn.Module, args: Any, kwargs: Any) -> Any:
        # Its state becomes fake first: an in-place update of a buffer (BatchNorm's counter) must not reach the real one.
        state = {name: self._fake(t) for name, t in [*leaf.named_parameters(), *leaf.named_buffers()]}
        visit = self._visits[leaf]
        self._visits[leaf] += 1
        try:
            with self._mode:
                return torch.func.functional_call(leaf, state, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            if not isinstance(leaf, self._leaves):
                raise
        return self._fake(self._really_returned(leaf)[visit])

    def _really_returned(self, leaf: nn.Module) -> list[Any]:
        """What each call of a leaf returns in a real run: the shapes of a module that looks at data are known no other
        way.
        """
        returned: list[Any] = []
        hook = leaf.register_forward_hook(lambda module, inputs, output: returned.append(output))
        buffers = [(b, b.clone()) for b in self.root.buffers()]
        args, kwargs = self._call
        try:
            self.root(*args, **kwargs)
        finally:
            hook.remove()
            for buffer, value in buffers:
                buffer.copy_(value)
        return returned

    def _fake(self, tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: self._mode.from_tensor(t.detach(), static_shapes=True), tree)

    def blame_for(self, error: Exception) -> str:
        """The innermost module that this error came out of. An earlier one may have been caught by a forward."""
        blamed, where = self._blame
        return where if blamed is error else ""

    # -- hooks of fx.Tracer

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        if m not in (self.submodule_paths or {}) and not [*m.parameters(), *m.buffers()]:
            return m.forward(*args, **kwargs)  # an activation function held aside has no path, and needs none
        self._inside.append(f"{self.path_of_module(m)!r} ({type(m).__name__})")
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self._blame = (error, self.blame_for(error) or self._inside[-1])
            raise
        finally:
            self._inside.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # A buffer that the forward has assigned is a proxy already.
        if self._evaluating or issubclass(type(attr_val), fx.Proxy):
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self._leaves) or _reads_mode(m):
            return True
        # torch's own modules are leaves, but its Transformers are built of layers that have pairs.
        return type(m).__module__ != transformer.__name__ and super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):  # before isinstance takes it for its value
            return a.node
        return tuple(self.create_arg(e) for e in a) if isinstance(a, torch.Size) else super().create_arg(a)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put back what a forward assigned: attributes, buffers, and caches held in plain dicts, lists and sets, nested or
    not.
    """
    seen: set[int] = set()
    saved = [(c, c.copy(), _content(c)) for module in model.modules() for c in _containers(vars(module), seen)]
    try:
        yield
    finally:
        for container, copied, content in saved:
            if _content(container) != content:
                container.clear()
                container.extend(copied) if isinstance(container, list) else container.update(copied)


def _containers(value: Any, seen: set[int]) -> Iterator[Any]:
    """Every dict, list and set in a nest of them and of tuples."""
    if not isinstance(value, (dict, list, set, tuple)) or id(value) in seen:
        return
    seen.add(id(value))
    if not isinstance(value, tuple):
        yield value
    for item in value.values() if isinstance(value, dict) else value:
        yield from _containers(item, seen)


def _content(container: Any) -> list[Any]:
    """What a container holds, comparable where its items are not."""
    return [(k, id(v)) for k, v in container.items()] if isinstance(container, dict) else [id(v) for v in container]
