"""The tracer: an `fx.Tracer` whose proxies carry a value (see `trace`).

It knows torch's inside; tried on torch 2.8.0 and 2.14.1.
"""

import builtins
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, is_grad_enabled, nn
from torch.nn.modules import transformer

from fxrank.passes.model.restored import tensors_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.pairs.registry import dense_type, shows_forward
from fxrank.passes.tracing.code import write_any_name
from fxrank.passes.tracing.compare import seeded_outputs
from fxrank.passes.tracing.fake_values import Values
from fxrank.passes.tracing.gradients import NEEDED, OFF, function_around, needs_gradient, switch_as_the_forward
from fxrank.passes.tracing.patches import graph_by_fx, python_asks_the_values
from fxrank.passes.tracing.proxies import Mode, ValueProxy, values_of
from fxrank.torch_private import pytree
from fxrank.torch_private.modules import has_backward_hooks, own_buffers
from fxrank.torch_private.writes import Watched


def is_layer(module: nn.Module) -> bool:
    """Whether this is a layer itself, not something made of layers: what a trace never looks into."""
    layer = dense_type(module) is not None and not shows_forward(module)
    return layer or isinstance(module, (nn.RNNBase, nn.MultiheadAttention))


def _reads_mode(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names and all(p.ndim < 2 for p in module.parameters())


class ValueTracer(fx.Tracer):
    """Traces one call. `leaf_types` are classes, `leaves` modules, to keep as one node; `values` may be shared by the
    traces of one model.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaf_types: tuple[type[nn.Module], ...],
        leaves: Container[nn.Module],
        values: Values,
    ) -> None:
        super().__init__()
        self._call = (args, kwargs)
        self._leaf_types, self._leaves = leaf_types, leaves
        self._values = values
        self.asked_mode = False
        self.as_before: Callable[[], AbstractContextManager[None]] = nullcontext
        """Puts the model back, meanwhile, to what it was before the trace."""
        self.read_aside: set[str] = set()
        """Parameters and buffers, by name, that the code did not ask their module for: of a list, a global, or `parameters()`."""
        self.asked_gradients = False
        """Whether the forward asked if gradients are made: then it may compute something else without."""
        self.isinstance: tuple[Any, Any] | None = None
        """Python's own `isinstance`, and the one that is put in its place while tracing; see `python_asks_the_values`."""
        self._tensor_names: dict[int, str] = {}
        self._evaluating = False
        self._off = False
        self._inside: list[nn.Module] = []
        self._visits: Counter[nn.Module] = Counter()
        self._buffers: dict[tuple[nn.Module, str], Tensor | None] = {}
        self._returned: dict[nn.Module, list[Any]] = {}
        self._blame: tuple[Exception | None, nn.Module | None] = (None, None)

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """The graph of the call. Sets `asked_mode` if the forward of a module that is gone through asked for
        `self.training`: then the graph holds for this mode only.
        """
        assert isinstance(root, nn.Module)
        self.root = root
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._tensor_names.setdefault(id(tensor), name)
        marked = list(self._gone_through(root, ""))
        before = [module.training for module in marked]
        for module in marked:
            vars(module)["training"] = Mode(module.training, self._note_mode)
        try:
            # No graph would write what the forward's own code writes into parameters: whose code that is becomes a leaf.
            self._watched = Watched(tensors_of(root), fixed=True, read=self._note_read)
            with self._watched, torch.enable_grad(), python_asks_the_values(self) as patches:
                graph = graph_by_fx(self, root, concrete_args, patches)
            switch_as_the_forward(graph, root)
            write_any_name(graph)
            return graph
        finally:
            for module, training in zip(marked, before, strict=True):
                vars(module)["training"] = training

    def _gone_through(self, module: nn.Module, path: str) -> Iterator[nn.Module]:
        called = path and not isinstance(module, (nn.ModuleList, nn.ModuleDict))  # those are never called
        if isinstance(module, torch.jit.ScriptModule) or (called and self.is_leaf_module(module, path)):
            return
        yield module
        for name, child in module.named_children():
            yield from self._gone_through(child, f"{path}.{name}".lstrip("."))

    def _note_read(self, tensor: Tensor) -> None:
        """Of something that the code computes without a proxy, a penalty over `self.parameters()` say."""
        if not self._evaluating and (name := self._tensor_names.get(id(tensor))) is not None:
            self.read_aside.add(name)

    def _note_mode(self) -> None:
        self.asked_mode = True

    # -- the entry point: one placeholder per tensor of the example call, whatever the signature says

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        args, kwargs = self._call
        leaves, spec = pytree.tree_flatten((args, kwargs))
        names = self._input_names(args, kwargs, leaves)
        self._buffers = {(m, name): b for m in self.root.modules() for name, b in own_buffers(m).items()}
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
            buffers: dict[str, Any] = own_buffers(module)  # or proxies
            for name, value in buffers.items():
                buffer = self._buffers.get((module, name))
                if buffer is not None and issubclass(type(value), fx.Proxy):
                    buffers[name] = buffer
                    if value.node.meta["val"].shape != buffer.shape:
                        continue  # a cache of another size: computed anew in each call of the graph
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
        proxy.node.meta["val"] = self._values.fake(value)
        proxy.node.meta[NEEDED] = value.requires_grad
        return proxy

    # -- values

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind != "output":
            try:
                proxy.node.meta["val"] = self._evaluate(kind, target, args, kwargs)
                self._note_gradients(proxy.node)
            except Exception:
                self.graph.erase_node(proxy.node)  # a forward may catch this and do something else
                raise
        return proxy

    def _note_gradients(self, node: fx.Node) -> None:
        off = not is_grad_enabled()
        if off and not self._off:
            function = function_around()
            if function is not None:
                raise TypeError(f"it calls the autograd.Function {function}, whose backward is its own")
        self._off = off
        if off:
            node.meta[OFF] = True
        before, self._evaluating = self._evaluating, True  # it reads the model
        try:
            node.meta[NEEDED] = needs_gradient(node, self.root)
        finally:
            self._evaluating = before

    def _evaluate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = values_of((tuple(args), dict(kwargs)))
        before, self._evaluating = self._evaluating, True
        if self.isinstance and not before:
            # No proxies from here on, and torch asks it very often. Either one gives other threads the same answers.
            builtins.isinstance = self.isinstance[0]
        try:
            with torch.no_grad():
                if kind == "call_module":
                    return self._leaf_value(self.root.get_submodule(target), args, kwargs)
                if kind == "get_attr":
                    return self._values.fake(operator.attrgetter(target)(self.root))
                if kind == "call_function":
                    return self._values.of_function(target, args, kwargs)
                assert kind == "call_method", kind
                return self._values.of_method(target, args, kwargs)
        finally:
            self._evaluating = before
            if self.isinstance and not before:
                builtins.isinstance = self.isinstance[1]

    def _leaf_value(self, leaf: nn.Module, args: Any, kwargs: Any) -> Any:
        visit = self._visits[leaf]
        self._visits[leaf] += 1
        try:
            return self._values.of_module(leaf, args, kwargs)
        except Exception as error:  # it asks for data, or takes derivatives
            if not self._kept_whole(leaf) or isinstance(error, RecursionError):  # its parts hold each other
                raise
            if leaf not in self._returned:
                self._returned[leaf] = self._really_returned(leaf)
            if visit >= len(self._returned[leaf]):
                raise
        return self._values.fake(self._returned[leaf][visit])

    def _kept_whole(self, module: nn.Module) -> bool:
        return isinstance(module, self._leaf_types) or module in self._leaves

    def _really_returned(self, leaf: nn.Module) -> list[Any]:
        """What each call of a leaf returns in a real run: the shapes of a module that looks at data are known no other
        way.
        """
        returned: list[Any] = []
        args, kwargs = self._call
        # The forward may have assigned buffers and attributes by now, values that are none, and put on hooks.
        with self._watched.allowing(), self.as_before():
            hook = leaf.register_forward_hook(lambda module, inputs, output: returned.append(output))
            try:
                seeded_outputs(self.root, args, kwargs)
            finally:
                hook.remove()
        return returned

    def culprit(self, error: Exception) -> nn.Module | None:
        """The innermost module that this error came out of, None for the traced module itself. An earlier one may have
        been caught by a forward.
        """
        blamed, module = self._blame
        return module if blamed is error else None

    def let_go(self) -> None:
        """Forget all that the trace has seen: functions of fx that hold the tracer hold each other too, and are there until
        Python's collector happens to run.
        """
        vars(self).clear()

    # -- hooks of fx.Tracer

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        if m not in (self.submodule_paths or {}) and not [*m.parameters(), *m.buffers()]:
            return m.forward(*args, **kwargs)  # an activation function held aside has no path, and needs none
        self._inside.append(m)
        try:
            if has_backward_hooks(m) and not self.is_leaf_module(m, self.path_of_module(m)):
                raise TypeError("it has hooks on its gradients, which no graph calls")
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self._blame = (error, self.culprit(error) or self._inside[-1])
            raise
        finally:
            self._inside.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        # A buffer that the forward has assigned is a proxy already. (fx's own way walks all parameters at each reading.)
        name = None if self._evaluating else self._tensor_names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._kept_whole(m):
            return True
        if dense_type(m) is not None or _reads_mode(m):
            return not shows_forward(m)
        above = module_qualified_name.rpartition(".")[0]
        if isinstance(m, FactorPair) or isinstance(self.root.get_submodule(above), FactorPair):
            return not isinstance(m, FactorPair)  # a pair shows as its children
        # torch's own modules are leaves, but its Transformers are built of layers that have pairs.
        return type(m).__module__ != transformer.__name__ and super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):  # before isinstance takes it for its value
            return a.node
        if type(a) is Mode:
            return bool(a)
        if isinstance(a, Tensor) and (name := self._tensor_names.get(id(a))) is not None:
            self.read_aside.add(name)
            return self.create_proxy("get_attr", name, (), {}).node  # fx's own would have no value
        if isinstance(a, Tensor) and a.grad_fn is not None and not self._evaluating:
            raise TypeError(
                "it computes with parameters that it reads elsewhere than in the attributes of their modules"
            )
        if issubclass(type(a), LowRankWeight):
            a = a.weight  # the product of its factors' proxies
            return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)
        return tuple(self.create_arg(e) for e in a) if isinstance(a, torch.Size) else super().create_arg(a)
