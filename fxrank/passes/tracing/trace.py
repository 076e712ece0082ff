"""Model and one example call → `TracedModule`: graphs in which every node knows its value's shape and dtype and its
owner.

The tracer's proxies carry a value: a fake tensor (shape, dtype, device; no data), or a plain Python number, tuple
or dict. Questions that Python must have answered on the spot (`bool`, `len`, iteration, `int`, `isinstance`) are
answered from the value; everything else stays a node, so `x.shape[0]` remains symbolic, also as a size of
`torch.zeros(x.shape[0], 4)`, and the graph runs at other batch sizes. That is what lets it go through shape tests,
keyword and nested inputs, and decorated forwards where `torch.fx.symbolic_trace` stops. Shapes come for free:
`node.meta["val"]`. What a forward makes of no input at all, `torch.randn(4)`, is a constant of the graph.

A module that reads `self.training` and owns no matrix (Dropout, DropPath, a fused BatchNorm and activation) stays
one node, so that the graph follows `train()` and `eval()`. Where the two modes still differ (`F.dropout(x, p,
self.training)`, an auxiliary head), there are two graphs, and `train()` selects.

A module that cannot be traced, because it asks for a tensor's data, becomes one node; what it calls is traced on its
own, from a real run's inputs, and stands in `regions`.
"""

import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from fxrank.passes.errors import TraceError
from fxrank.passes.model.calls import Example, call_arguments
from fxrank.passes.model.compiled import eagerly, uncompiled
from fxrank.passes.model.restored import modes_put_back, randoms_put_back, restored
from fxrank.passes.model.weights import made_in_inference
from fxrank.passes.tracing.compare import alone, seeded_outputs
from fxrank.passes.tracing.fake_values import Values
from fxrank.passes.tracing.one_thread import turn
from fxrank.passes.tracing.proof import differs, observers_off, without_data
from fxrank.passes.tracing.tracer import ValueTracer, is_layer
from fxrank.torch_private import pytree
from fxrank.torch_private.kernels import is_of_functorch
from fxrank.torch_private.modules import own_buffers, own_children, own_parameters

WHOLE = "whole_model"
"""Name of the one node of a model that could not be traced."""


class TracedModule(fx.GraphModule):
    """The graphs of one model, on the model's own modules and parameters.

    `leaves` maps the path of each module that could not be traced to the reason; the model itself is `""`, its graph
    then is one node. `regions` maps the paths of modules inside those to their own traces. `notes` says what else a
    reader should know: a mode that could not be traced, a check that could not be made. `read_aside` has the names of parameters
    that the code did not ask their module for, but found in a list, a global, or `parameters()`.
    """

    graphs: dict[bool, fx.Graph]
    leaves: dict[str, str]
    regions: dict[str, "TracedModule"]
    notes: list[str]
    read_aside: set[str]

    def __init__(self, model: nn.Module, graphs: dict[bool, fx.Graph], constants: Mapping[str, Tensor] = {}) -> None:
        """`graphs` by `training`; one of them alone, or both the same, serves both modes. `constants` are tensors that
        the forward makes of no input, by the names that the graphs call them.
        """
        empty = fx.Graph()
        super().__init__(dict(constants), empty, type(model).__name__)
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        for own in (own_children, own_parameters, own_buffers):
            own(self).update(own(model))  # type: ignore[arg-type]
        self.training = model.training
        self.graphs = graphs
        self.leaves, self.regions, self.notes, self.read_aside = {}, {}, [], set()
        self._select()
        empty.owning_module = None  # see `let_go`

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the graph of the present mode. Gradients that it has switched off are on again also when it fails."""
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return super().__call__(*inputs, **named)

    def train(self, mode: bool = True) -> "TracedModule":
        """Set the mode of all modules, and take the graph of that mode."""
        super().train(mode)
        self._select()
        return self

    def _select(self) -> None:
        graph = self.graphs.get(self.training)
        if graph is not None and graph is not self.graph:
            self.graph = graph

    def each_graph(self) -> Iterator[fx.Graph]:
        """Each different graph; while it is out it is the module's own."""
        before = self.graph
        for graph in {id(g): g for g in self.graphs.values()}.values():
            if graph is not self.graph:
                self.graph = graph
            yield graph
        if self.graph is not before:
            self.graph = before

    def let_go(self) -> None:
        """Let the model be freed with this, for who needs the graphs no more: a graph and its module hold each other, and with
        them the weights, until Python's collector happens to run.
        """
        for graph in (self.graph, *self.graphs.values()):
            graph.owning_module = None
        for region in self.regions.values():
            region.let_go()

    @property
    def whole(self) -> bool:
        """Whether the model is in one graph a mode, with no module left out."""
        return not self.leaves


def trace(
    model: nn.Module, example: Example, *, leaf_modules: tuple[type[nn.Module], ...] = (), verify: bool = True
) -> TracedModule:
    """The graphs of `model` for the example call, in both modes, sharing its modules and parameters.

    The result's placeholders are the tensors of the example call under their parameter names. `node.meta["val"]` is
    a fake tensor (or tuple, number, …) with the shape and dtype at the example's sizes;
    `node.meta["nn_module_stack"]` names the owner. `leaf_modules` are classes to keep as one node. Nothing of the
    model is changed and no random number is drawn.

    Threads that trace take turns, and others may run other models meanwhile; what they draw from torch's process-wide
    generator (dropout) may then come again, because it is put back.

    With `verify`, the graph of the present mode is run beside the model on another batch size (2 or 3 rows, which is
    cheap), and given up, as if the model could not be traced, if the outputs differ by more than 1e-4 relative.

    Raises `TraceError`, naming the innermost module at fault, where the model refuses the example, or a parameter that a lazy
    module has yet to make, and `TypeError` where the example does not fit its signature.
    """
    model = uncompiled(model)
    # A forward makes them for good, but what it notes beside them (in_features, …) would be put back.
    lazy = next(
        (name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if is_lazy(tensor)), None
    )
    if lazy is not None:
        raise TraceError(
            f"a model must have all of its parameters before it is traced; {lazy!r} has no shape yet. Call the lazy model once, on a batch, before."
        )
    args, kwargs = call_arguments(model, example)
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    drawn = torch.random.fork_rng(devices=list(devices))
    mode = torch.inference_mode(made_in_inference(model) is not None)  # where it was made it can run, and nowhere else
    with (
        mode,
        turn(),
        restored(model),
        eagerly(model),
        drawn,
        randoms_put_back(model),
        warnings.catch_warnings(),
    ):
        # what torch has to say, where warnings are errors, of a weight that is computed: it looks for its gradient
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf")
        with observers_off(model, args, kwargs):
            return _trace(model, args, kwargs, leaf_modules, verify)


class _UntraceableError(TraceError):
    """The model runs, but cannot be a graph."""


def _trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], types: tuple[type[nn.Module], ...], verify: bool
) -> TracedModule:
    if is_layer(model):
        return _opaque(model, args, kwargs)
    leaves: dict[nn.Module, str] = {}
    notes: list[str] = []
    aside: set[str] = set()
    graphs: dict[bool, fx.Graph] = {}
    mode = model.training
    values = Values()
    try:
        graphs[mode], constants, asked_mode, asked_gradients = _graph(model, args, kwargs, types, leaves, values, aside)
    except _UntraceableError as error:
        leaves = {model: str(error)}
        traced = _opaque(model, args, kwargs)
    else:
        if not asked_mode:
            graphs[not mode] = graphs[mode]
        else:
            try:
                with modes_put_back(model):
                    model.train(not mode)
                    other, more, *_ = _graph(
                        model, args, kwargs, types, dict(leaves), values, aside, leaves_may_grow=False
                    )
            except TraceError as error:
                notes.append(f"the graph is of {'training' if mode else 'evaluation'} mode only: {error}")
            else:
                graphs[not mode] = other
                constants |= _renamed(other, more)
                if _listing(graphs[mode], constants) == _listing(other, constants):
                    graphs[not mode] = graphs[mode]
        traced = TracedModule(model, graphs, constants)
        if verify:
            problem = differs(traced, model, args, kwargs, notes, asked_gradients)
            if problem is not None:
                leaves = {model: problem}
                traced.let_go()
                traced = _opaque(model, args, kwargs)
    traced.notes, traced.read_aside = notes, aside
    # A layer is one node anyhow; here it stands because its values had to be seen in a real run.
    leaves = {module: reason for module, reason in leaves.items() if not is_layer(module)}
    names = {module: path for path, module in model.named_modules()}
    traced.leaves = {names[module]: reason for module, reason in leaves.items()}
    if leaves:
        for path, (part, part_args, part_kwargs) in _calls_inside(model, args, kwargs, leaves, notes).items():
            traced.regions[path] = _trace(part, part_args, part_kwargs, types, verify=False)
    return traced


def _graph(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    types: tuple[type[nn.Module], ...],
    leaves: dict[nn.Module, str],
    values: Values,
    aside: set[str],
    leaves_may_grow: bool = True,
) -> tuple[fx.Graph, dict[str, Tensor], bool, bool]:
    """One graph in the present mode, its constants, and whether it may differ in the other mode, or without gradients. A module
    that cannot be traced joins `leaves`, with the reason, and the trace begins anew; what is read past its module joins `aside`.
    """
    first: str | None = (
        None  # no error itself: by its traceback it would hold this frame, and all that the trace has seen
    )
    while True:
        tracer = ValueTracer(args, kwargs, types, leaves, values)
        try:
            with restored(model) as tracer.as_before:
                graph = tracer.trace(model)
                reads = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
                # Tensors that the forward made are attributes of the model until it is put back.
                constants = {n: getattr(model, n) for n in reads if n.startswith("_tensor_constant")}
                for node in graph.nodes:
                    if node.target in constants:
                        node.meta["val"] = constants[node.target]
                    elif node.op == "get_attr" and "val" not in node.meta:  # read out of a container, past the tracer
                        node.meta["val"] = _without_numbers(values, attrgetter(str(node.target))(model))
                return graph, constants, tracer.asked_mode, tracer.asked_gradients
        except Exception as error:
            culprit = tracer.culprit(error)
            names = {module: path for path, module in model.named_modules()}
            where = f"{names.get(culprit)!r} ({type(culprit).__name__})" if culprit is not None else "its own forward"
            wrong = (
                f"every operation of a traced model must be a graph node; {type(model).__name__} failed in "
                f"{where} with {type(error).__name__}: {str(error).partition(chr(10))[0]}. "
                "Check that the example fits the model, or pass that module's class in leaf_modules to keep it as one node."
            )
            if first is None:
                first = wrong
                if not _runs(model, args, kwargs):  # then it is the example's fault, not the tracer's
                    raise TraceError(first) from error
            if culprit is None or culprit in leaves or culprit is model or not leaves_may_grow:
                raise _UntraceableError(first) from error
            leaves[culprit] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        finally:
            aside |= tracer.read_aside
            tracer.let_go()


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model takes the call. On the meta device nobody knows: data are missing there."""
    if without_data(model):
        return True
    try:
        seeded_outputs(model, args, kwargs)
    except Exception:
        return False
    return True


def _listing(graph: fx.Graph, constants: Mapping[str, Tensor]) -> list[tuple[str, str, str]]:
    """What tells two graphs apart."""

    def named(node: fx.Node) -> str:
        value = constants.get(str(node.target))
        return str(node.target) if value is None or value.is_meta else str(value.tolist())

    return [(n.op, named(n), f"{n.args} {n.kwargs}") for n in graph.nodes]


def _renamed(graph: fx.Graph, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The constants of the other mode's graph, under names of their own."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in constants:
            node.target = f"_other{node.target}"
    return {f"_other{name}": value for name, value in constants.items()}


def _opaque(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedModule:
    """The graph of a model that could not be traced, or is a layer: the call of the model itself."""
    values = Values()
    holder = nn.Module()
    holder.training = model.training
    holder.add_module(WHOLE, model)
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, PackedSequence))
    graph = fx.Graph()
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, (int, float, str, type(None), torch.dtype, torch.device)):
            leaves[i] = graph.placeholder(f"input_{i}")
            leaves[i].meta["val"] = _without_numbers(values, leaf)
    call_args, call_kwargs = pytree.tree_unflatten(leaves, spec)
    call = graph.call_module(WHOLE, call_args, call_kwargs)
    if is_layer(model):
        call.meta["val"] = _without_numbers(values, seeded_outputs(model, args, kwargs))
    graph.output(call)
    return TracedModule(holder, {True: graph, False: graph})


def _without_numbers(values: Values, tree: Any) -> Any:
    """What a graph keeps of the values of a real run: it lives as long as a training, and activations are large."""
    if isinstance(tree, PackedSequence):
        return PackedSequence(*values.fake(tuple(tree)))
    ordinary = [
        t.layout is torch.strided and not t.is_nested for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)
    ]
    return values.fake(tree) if all(ordinary) else tree


def _calls_inside(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: dict[nn.Module, str],
    notes: list[str],
) -> dict[str, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The outermost modules that the untraceable ones call, in the order of the calls, each with the inputs of its first
    completed call in a real run.
    """
    begun: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    seen: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    transformed: set[nn.Module] = set()  # called in a `vmap`, `grad` or `jvp`, on tensors that are none outside

    def begin(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        begun[module] = pytree.tree_map_only(Tensor, alone, (inputs, named))

    def end(module: nn.Module, *_: Any) -> None:
        call = begun[module]  # one that raised, and was caught by the forward, does not come here
        if any(map(is_of_functorch, pytree.tree_leaves(call))):
            transformed.add(module)
        else:
            seen.setdefault(module, call)

    below = (m for leaf in leaves for child in leaf.children() for m in child.modules())
    inside = dict.fromkeys(m for m in below if not isinstance(m, torch.jit.ScriptModule))  # those take no hooks
    handles = [m.register_forward_pre_hook(begin, with_kwargs=True) for m in inside]
    handles += [m.register_forward_hook(end) for m in inside]
    try:
        seeded_outputs(model, args, kwargs)
    except Exception as error:
        notes.append(f"the modules inside {', '.join(type(m).__name__ for m in leaves)} were not seen: {error}")
        return {}
    finally:
        for handle in handles:
            handle.remove()
    names = {module: path for path, module in model.named_modules()}
    if unseen := sorted(names[m] for m in transformed if m not in seen and [*m.parameters()]):
        notes.append(f"not looked into, because torch.func (vmap, grad, jvp) calls them: {', '.join(unseen)}")
    covered: set[nn.Module] = set()
    for leaf in leaves:
        todo = list(leaf.children())
        while todo:
            module = todo.pop()
            if module in leaves:
                continue
            if module not in seen:
                todo += module.children()
            elif [*module.parameters()]:
                covered.add(module)
    return {names[m]: (m, *call) for m, call in seen.items() if m in covered}
