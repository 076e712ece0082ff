"""Graph → the layers that hold weight matrices, each with what can be done to it, or the reason why nothing can.

One `Layer` per unique weight: a module called several times, registered under several names, or two modules that
share one parameter are one layer with several call sites.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.uses import uses
from fxrank.passes.model.names import own_name
from fxrank.passes.model.weights import computed_part, is_derived, weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.parameter import RawWeight
from fxrank.passes.pairs.registry import dense_type, pair_class
from fxrank.passes.tracing.trace import WHOLE, TracedModule

Found = Iterable[tuple[Tensor, Layer]]
_COMPUTED = "its layer's weight or bias is computed, as after pruning; make it a parameter first, after pruning with prune.remove"


def discover(gm: TracedModule, model: nn.Module) -> list[Layer]:
    """Every weight with two or more dimensions, in graph order, then those that the traced calls do not reach.

    `gm` comes from `trace(model, …)`. A weight that cannot be factorized is in the list too, with its `reason`;
    biases and normalization weights, of one dimension, are not. Names are those of the user's own class (`names`).
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    found = {key: layer for key, (layer, _) in _Search(model, names).run(gm).items()}
    _check_owners(model, found)
    layers = list(found.values())
    # Of a pair, and of a layer that derives its weight, one parameter stands for all.
    together = [
        m for m in model.modules() if isinstance(m, FactorPair) or (dense_type(m) is not None and is_derived(m))
    ]
    in_pairs = {id(p) for m in together for p in m.parameters()}
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("torch.ao.nn", "torch.nn.quantized")) and hasattr(
            module, "_packed_params"
        ):
            reason = "its weight is quantized; factorize before quantizing"
            layers.append(Layer(path, type(module).__name__, (), paths=(path,), reason=reason, supported=False))
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2 and id(weight) not in found and id(weight) not in in_pairs:
                own = path if name == "weight" else f"{path}.{name}".lstrip(".")
                reason = "the traced call does not reach it"
                found[id(weight)] = _unsupported(own, type(module).__name__, weight, reason)
                layers.append(found[id(weight)])
    return [_by_own_names(layer) for layer in layers]


def _check_owners(model: nn.Module, found: dict[int, Layer]) -> None:
    """A weight with another owner that has no such pair stays dense: replacing it here would cut the tie there."""
    derived = {id(p) for m in model.modules() if dense_type(m) is not None and is_derived(m) for p in m.parameters()}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(weight) in derived:
                continue
            layer = found.get(id(weight))
            if layer is None or layer.reason is not None:
                continue
            whole = name == "weight" and dense_type(module) is not None
            dense = module if whole else RawWeight(module, name, layer.form)
            cls = pair_class(dense, layer.form)
            own = _join(path, name).removesuffix(".weight").lstrip(".")
            known = {p.removesuffix(".weight") for p in layer.paths}
            fits = cls is not None and tuple(cls.unroll(dense, weight).shape) == (layer.groups, layer.rows, layer.cols)
            if not fits or (own not in known and not whole):
                reason = f"its weight is shared with {own_name(own)!r} ({type(module).__name__})"
                found[id(weight)] = replace(layer, reason=reason, supported=False)


class _Search:
    """One walk over all graphs of a traced model. Results: by parameter, the layer and whether it still may be first or
    last.
    """

    def __init__(self, model: nn.Module, names: dict[int, list[str]]) -> None:
        self.model, self.names = model, names
        self.found: dict[int, tuple[Layer, bool]] = {}

    def run(self, gm: TracedModule, prefix: str = "", first: bool = True, last: bool = True) -> Any:
        """Take in one part. `first`, `last`: whether no weight comes before, or after, this part."""
        graphs = [gm.graph, *(g for g in gm.graphs.values() if g is not gm.graph)]
        for graph in dict.fromkeys(graphs):
            self._one_graph(gm, graph, prefix, first, last)
        return self.found

    def _one_graph(self, gm: TracedModule, graph: fx.Graph, prefix: str, first: bool, last: bool) -> None:
        here: dict[int, Layer] = {}
        holes: dict[str, list[str]] = {}
        for node in graph.nodes:
            leaf = "" if node.target == WHOLE else str(node.target)
            if node.op == "call_module" and leaf in gm.leaves:
                holes[node.name] = [p for p in gm.regions if not leaf or p.startswith(f"{leaf}.")]
                continue
            for weight, layer in self._used_at(gm, node, prefix):
                known = here.get(id(weight))
                here[id(weight)] = layer if known is None else _merge(known, layer)
        edges = _boundaries(graph, {n for layer in here.values() for n in layer.nodes} | {h for h in holes if holes[h]})
        for key, layer in here.items():
            ends = next((edges[n] for n in layer.nodes if n in edges), (False, False))
            boundary = "first" if first and ends[0] else "last" if last and ends[1] else None
            if key not in self.found:
                self.found[key] = (replace(layer, boundary=boundary), True)
            elif prefix and not set(layer.nodes) & set(self.found[key][0].nodes):
                self.found[key] = (_merge(self.found[key][0], layer), True)
        for hole, regions in holes.items():
            at = edges.get(hole, (False, False))
            for i, path in enumerate(regions):
                inner = f"{prefix}.{path}".lstrip(".")
                self.run(gm.regions[path], inner, first and at[0] and i == 0, last and at[1] and i == len(regions) - 1)

    def _used_at(self, gm: TracedModule, node: fx.Node, prefix: str) -> Iterator[tuple[Tensor, Layer]]:
        path = prefix if node.target == WHOLE else f"{prefix}.{node.target}".lstrip(".")
        if node.op == "get_attr":
            yield from self._read(node, path)
        elif node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            owner = self.model.get_submodule(path.rpartition(".")[0])
            if isinstance(owner, FactorPair):
                if path.rpartition(".")[2] == owner.children_in_order[0]:
                    yield owner.u.weight, _done(path.rpartition(".")[0], owner, node.name)
            elif pair_class(module) is not None:
                out = node.meta["val"]
                yield from self._layer(module, path, node.name, _shape(node), _positions(module, out, _shape(node)))
            else:
                yield from self._inside(module, path, node)

    def _read(self, node: fx.Node, path: str) -> Found:
        """A weight that is read as a tensor."""
        owner_path, _, attribute = path.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        if isinstance(owner, FactorPair) or any(isinstance(m, FactorPair) for m in _above(self.model, owner_path)):
            return
        weight = getattr(owner, attribute, None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
            return
        products, others = uses(node)
        if not products and not others:
            return
        whole = attribute == "weight" and pair_class(owner) is not None
        name = owner_path if whole else path
        nodes = tuple(p.node for p in products) or tuple(others)
        if not products and not whole:
            why = f"no layer multiplies with it; it is read by {', '.join(others)}"
            yield weight, replace(_unsupported(name, "table", weight, why), nodes=nodes)
            return
        reason = f"its numbers are read by {', '.join(others)}, which needs the whole matrix" if others else None
        positions = sum(p.macs for p in products) / max(1, weight.numel())
        # A weight of three dimensions is a stack of matrices, unless a convolution takes it for a kernel.
        kernel = any(p.convolution for p in products)
        form = "stack" if weight.ndim == 3 and not kernel and not whole else "channel"
        layer = owner if whole else RawWeight(owner, attribute, form)
        shape: tuple[int, ...] = (max(1, round(positions)), weight.shape[-1])
        if kernel:
            shape = next(p.input_shape for p in products if p.convolution)
        elif form == "stack":
            shape = (weight.shape[0], *shape)
        elif isinstance(layer, nn.Embedding):
            shape = shape[:1]
        for parameter, one in self._layer(layer, name, nodes[0], shape, positions, reason, form):
            yield parameter, replace(one, nodes=nodes)

    def _layer(
        self,
        dense: nn.Module,
        name: str,
        node: str,
        input_shape: tuple[int, ...],
        positions: float,
        reason: str | None = None,
        form: str = "channel",
    ) -> Found:
        cls = pair_class(dense, form)
        assert cls is not None
        weight = weight_of(dense)
        if weight.is_complex() or not weight.is_floating_point():
            kind = str(weight.dtype).removeprefix("torch.")
            reason = f"its weight is {kind}; only real floating-point weights have a low-rank split here"
        elif weight.layout != nn.Parameter().layout:
            reason = (
                f"its weight is {str(weight.layout).removeprefix('torch.')}; only dense memory has a low-rank split"
            )
        key = weight
        if is_derived(dense):
            key = next(p for p in dense.parameters() if p.ndim >= 2)
        groups, rows, cols = cls.unroll(dense, weight).shape
        fused = groups == 1 and form == "channel" and rows == 3 * cols and pair_class(dense, "qkv") is not None
        module = not isinstance(dense, RawWeight)
        yield (
            key,
            Layer(
                name=name,
                kind=cls.kind,
                weight_shape=tuple(weight.shape),
                groups=groups,
                rows=rows,
                cols=cols,
                positions=positions,
                paths=tuple(self.names.get(id(dense), [name])) if module else (name,),
                nodes=(node,),
                input_shape=input_shape,
                dtype=weight.dtype,
                geometry=tuple(str(getattr(dense, g)) for g in cls.geometry),
                form=form,
                other_forms=("qkv",) if fused else (),
                reason=reason,
                supported=reason is None,
            ),
        )

    def _inside(self, module: nn.Module, path: str, node: fx.Node) -> Found:
        """The weights of a module that is one node: attention and recurrent layers read theirs by themselves."""
        shape = _shape(node)
        if isinstance(module, nn.MultiheadAttention):
            given: dict[str, Any] = dict(zip(("query", "key", "value"), node.args, strict=False)) | dict(node.kwargs)
            inputs = [given[name].meta["val"] for name in ("query", "key", "value")]
            tokens = [x.numel() // x.shape[-1] for x in inputs]
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("proj_weight"):
                    own = sum(tokens) / 3 if name[0] == "i" else tokens["qkv".index(name[0])]
                    yield from self._layer(RawWeight(module, name), _join(path, name), node.name, shape, own)
                elif parameter.ndim >= 2:
                    learned = name in ("bias_k", "bias_v")
                    reason = "it is a learned key or value, not the matrix of a layer" if learned else _COMPUTED
                    yield parameter, _unsupported(_join(path, name), "parameter", parameter, reason, node.name)
            if isinstance(module.out_proj, nn.Linear):
                if pair_class(module.out_proj) is None:
                    yield from self._inside(module.out_proj, _join(path, "out_proj"), node)
                else:
                    yield from self._layer(module.out_proj, _join(path, "out_proj"), node.name, shape, tokens[0])
            return
        if isinstance(module, nn.RNNBase):
            steps = 1
            for size in shape[:-1]:
                steps *= size
            for name, parameter in module.named_parameters(recurse=False):
                if name not in module._flat_weights_names and parameter.ndim >= 2:
                    yield parameter, _unsupported(_join(path, name), "parameter", parameter, _COMPUTED, node.name)
                elif parameter.ndim >= 2:
                    dense = RawWeight(module, name)
                    width = (steps, parameter.shape[1])
                    yield from self._layer(dense, _join(path, name), node.name, width, steps)
            return
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2 and not isinstance(module.get_submodule(name.rpartition(".")[0]), FactorPair):
                own = _join(path, name).removesuffix(".weight")
                if dense_type(module) is not None and computed_part(module) is not None:
                    reason = _COMPUTED
                elif parametrize.is_parametrized(module):
                    reason = "it is an original of a parametrization that has no factor pair"
                else:
                    options = " with max_norm or scale_grad_by_freq" if isinstance(module, nn.Embedding) else ""
                    reason = f"{type(module).__name__} has no factor pair{options}"
                yield parameter, _unsupported(own, type(module).__name__, parameter, reason, node.name)
        for name, child in module.named_modules():
            if isinstance(child, FactorPair):
                yield child.u.weight, _done(_join(path, name), child, node.name)


def _by_own_names(layer: Layer) -> Layer:
    return replace(layer, name=own_name(layer.name), paths=tuple(dict.fromkeys(own_name(p) for p in layer.paths)))


def _above(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on the way down to a path."""
    module = model
    for name in path.split(".") if path else ():
        module = module.get_submodule(name)
        yield module


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def _done(name: str, pair: FactorPair, node: str) -> Layer:
    layer = _unsupported(name, pair.kind, pair.u.weight, f"already a factor pair, of rank {pair.rank}", node)
    return replace(layer, weight_shape=pair.dense_shape)


def _unsupported(name: str, kind: str, weight: Tensor, reason: str, node: str = "") -> Layer:
    return Layer(
        name=name,
        kind=kind,
        weight_shape=tuple(weight.shape),
        rows=weight.shape[0],
        cols=weight[0].numel() if len(weight) else 0,
        paths=(name,),
        nodes=(node,) if node else (),
        dtype=weight.dtype,
        reason=reason,
        supported=False,
    )


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of the first input."""
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(source, fx.Node)
    if "val" not in source.meta:  # fx makes the node of a named tuple by itself; its data come first
        source = source.args[0]
        assert isinstance(source, fx.Node)
    value = source.meta["val"]
    if isinstance(value, PackedSequence):
        value = value.data
    assert isinstance(value, Tensor)
    return tuple(value.shape)


def _positions(module: nn.Module, out: Tensor, input_shape: tuple[int, ...]) -> float:
    """How often each number of the weight is used: once for each place of the output, of a transposed convolution of
    the input, of an embedding for each index.
    """
    if isinstance(module, nn.Embedding):
        return out.numel() / module.embedding_dim
    weight = weight_of(module)
    if getattr(module, "transposed", False):
        total = 1
        for size in input_shape:
            total *= size
        return total / weight.shape[0]
    return out.numel() / weight.shape[0]


def _merge(known: Layer, again: Layer) -> Layer:
    """One weight met at another site."""
    shape = (known.groups, known.rows, known.cols)
    reason = known.reason or again.reason
    unlike = shape != (again.groups, again.rows, again.cols) or not (known.supported and again.supported)
    if unlike and reason is None:
        reason = f"its weight is shared with {own_name(again.name)!r} ({again.kind})"
    # A decoder tied to an embedding: the embedding's kind, so that it is left dense unless asked for.
    kind, positions = known.kind, known.positions + again.positions
    if "embedding" in (known.kind, again.kind) and known.kind != again.kind:
        kind, positions = "tied embedding", (again if known.kind == "embedding" else known).positions
    return replace(
        known,
        name=again.name if again.kind == "embedding" else known.name,
        kind=kind,
        paths=known.paths + tuple(p for p in again.paths if p not in known.paths),
        nodes=known.nodes + tuple(n for n in again.nodes if n not in known.nodes),
        positions=positions,
        reason=reason,
        supported=known.supported and again.supported and not unlike,
    )


def _boundaries(graph: fx.Graph, weighted: set[str]) -> dict[str, tuple[bool, bool]]:
    """For each weighted node with no weight before it, or none after, on any path: `(first, last)`."""
    edges: nx.DiGraph[str] = nx.DiGraph()
    for node in graph.nodes:
        edges.add_node(node.name)
        edges.add_edges_from((source.name, node.name) for source in node.all_input_nodes)

    def beyond(direction: "nx.DiGraph[str]") -> set[str]:
        probe = direction.copy()
        start = "the layers themselves"  # no node of a graph has spaces in its name
        probe.add_edges_from((start, after) for name in weighted for after in direction.successors(name))
        return set(nx.descendants(probe, start)) if start in probe else set()

    after_some, before_some = beyond(edges), beyond(edges.reverse(copy=False))
    ends = {n: (n not in after_some, n not in before_some) for n in weighted if n in edges}
    return {n: at for n, at in ends.items() if any(at)}
