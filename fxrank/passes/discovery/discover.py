"""Graph → the layers that hold weight matrices, each with what can be done to it, or the reason why nothing can.

One `Layer` per unique weight: a module called several times, registered under several names, or two modules that
share one parameter are one layer with several call sites.
"""

from collections.abc import Iterator
from dataclasses import replace

import networkx as nx
from torch import Tensor, fx, nn

from fxrank.passes.discovery.adapters import ADAPTER, in_adapter
from fxrank.passes.discovery.alike import Alike
from fxrank.passes.discovery.found import QUANTIZED, Use, done, layer_from, merged, unsupported
from fxrank.passes.discovery.holdings import held_elsewhere
from fxrank.passes.discovery.inside import Found, checked, first_shape, inside, joined
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.uses import uses
from fxrank.passes.model.beyond import written_by
from fxrank.passes.model.names import own_name
from fxrank.passes.model.quantized import packs_its_weight
from fxrank.passes.model.weights import is_derived
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.locate import weight_alone
from fxrank.passes.pairs.parameter import RawWeight, form_when_read
from fxrank.passes.pairs.registry import PAIRS, beyond, dense_type, forms_of, pair_class, shows_forward
from fxrank.passes.tracing.trace import WHOLE, TracedModule

UNREACHED = "the traced call does not reach it"


def discover(gm: TracedModule, model: nn.Module) -> list[Layer]:
    """Every weight with two or more dimensions, in graph order, then those that the traced calls do not reach.

    `gm` comes from `trace(model, …)`. A weight that cannot be factorized is in the list too, with its `reason`;
    biases and normalization weights, of one dimension, are not. Names are those of the user's own class (`names`).
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    search = _Search(model, names)
    found = {key: layer for key, (layer, _) in search.run(gm).items()}
    _check_owners(model, found)
    for key, reason in held_elsewhere(model, found, search.read_aside).items():
        found[key] = found[key].kept_for(reason)
    for key, layer in found.items():
        if any(in_adapter(model, path) for path in layer.paths):  # which says more than what else speaks against it
            found[key] = replace(layer, reason=ADAPTER, supported=False)
    layers = list(found.values())
    # Of a pair, and of a layer that derives its weight, one parameter stands for all.
    together = [
        m for m in model.modules() if isinstance(m, FactorPair) or (dense_type(m) is not None and is_derived(m))
    ]
    in_pairs = {id(p) for m in together for p in m.parameters()}
    for path, module in model.named_modules():
        if packs_its_weight(module):
            layers.append(Layer(path, type(module).__name__, (), paths=(path,), reason=QUANTIZED, supported=False))
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2 and id(weight) not in found and id(weight) not in in_pairs:
                own = path if name == "weight" else f"{path}.{name}".lstrip(".")
                found[id(weight)] = unsupported(own, type(module).__name__, weight, UNREACHED)
                if shows_forward(module):
                    reason = f"{type(module).__name__} {beyond(module)}, and its forward cannot be gone through"
                    found[id(weight)] = found[id(weight)].kept_for(reason)
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
            of_layer = name == "weight" and dense_type(module) is not None
            alone = weight_alone(model, layer.name)
            whole = of_layer and not alone
            cls = pair_class(module if whole else RawWeight(module, name), layer.form)
            own = joined(path, name).removesuffix(".weight").lstrip(".")
            known = {p.removesuffix(".weight") for p in layer.paths}
            dense = module if whole else RawWeight(module, name)
            fits = cls is not None and tuple(cls.unroll(dense, weight).shape) == layer.unrolled.matrices
            if not fits or (own not in known and not of_layer) or (whole and shows_forward(module)):
                reason = f"its weight is shared with {own_name(own)!r} ({type(module).__name__})"
                found[id(weight)] = replace(layer, reason=reason, supported=False)


class _Search:
    """One walk over all graphs of a traced model. Results: by parameter, the layer and whether it still may be first or
    last.
    """

    def __init__(self, model: nn.Module, names: dict[int, list[str]]) -> None:
        self.model, self.names = model, names
        self.alike = Alike()
        self.found: dict[int, tuple[Layer, bool]] = {}
        self.read_aside: set[str] = set()

    def run(
        self, gm: TracedModule, prefix: str = "", first: bool = True, last: bool = True
    ) -> dict[int, tuple[Layer, bool]]:
        """Take in one part. `first`, `last`: whether no weight comes before, or after, this part."""
        self.read_aside |= {joined(prefix, name) for name in gm.read_aside}
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
                here[id(weight)] = layer if known is None else merged(known, layer)
        edges = _boundaries(graph, {n for layer in here.values() for n in layer.nodes} | {h for h in holes if holes[h]})
        for key, layer in here.items():
            ends = next((edges[n] for n in layer.nodes if n in edges), (False, False))
            boundary = "first" if first and ends[0] else "last" if last and ends[1] else None
            if key not in self.found:
                self.found[key] = (replace(layer, boundary=boundary), True)
            elif prefix and not set(layer.nodes) & set(self.found[key][0].nodes):
                self.found[key] = (merged(self.found[key][0], layer), True)
            elif layer.reason is not None and self.found[key][0].reason is None:  # in the other mode
                self.found[key] = (
                    replace(self.found[key][0], reason=layer.reason, supported=False, guarded=layer.guarded),
                    True,
                )
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
                    yield owner.u.weight, done(path.rpartition(".")[0], owner, node.name)
            elif pairs := forms_of(module):
                use = Use(node.name, first_shape(node), tuple(node.meta["val"].shape))
                paths = tuple(self.names.get(id(module), [path]))
                weight, layer = layer_from(module, path, use, form=next(iter(pairs)), paths=paths)
                yield weight, self.alike.checked(checked(layer, module), module)
            else:
                yield from inside(module, path, node, self.names)

    def _read(self, node: fx.Node, path: str) -> Found:
        """A weight that is read as a tensor."""
        owner_path, _, attribute = path.rpartition(".")
        owner = self.model.get_submodule(owner_path)
        if isinstance(owner, FactorPair) or any(isinstance(m, FactorPair) for m in _above(self.model, owner_path)):
            return
        weight = getattr(owner, attribute, None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
            return
        found = uses(node)
        products, others = found.products, found.others
        if not products and not others:
            return
        whole = attribute == "weight" and bool(forms_of(owner)) and not shows_forward(owner)
        name = owner_path if whole else path
        own_names = self.names.get(id(owner), [owner_path]) if attribute == "weight" else []
        layer_like = isinstance(owner, tuple(PAIRS))
        nodes = tuple(p.node for p in products) or tuple(others)
        if not products and not whole:
            why = f"no layer multiplies with it; it is read by {', '.join(others)}"
            table = replace(unsupported(name, "table", weight, why), nodes=nodes, paths=(name, *own_names))
            yield weight, replace(table, guarded=layer_like)
            return
        reason = f"its numbers are read by {', '.join(others)}, which needs the whole matrix" if others else None
        positions = sum(p.macs for p in products) / max(1, weight.numel())
        layer = owner if whole else RawWeight(owner, attribute)
        kernel = next((p.input_shape for p in products if p.convolution), None)
        form = next(iter(forms_of(layer))) if whole else form_when_read(weight, kernel is not None)
        shape = forms_of(layer)[form].shape_when_read(layer, positions) if kernel is None else kernel
        use = Use(nodes[0], shape, positions=positions, made=found.made)
        paths = tuple(own_names) if whole else (name, *own_names)
        parameter, one = layer_from(layer, name, use, form=form, paths=paths, reason=reason)
        one = replace(one, nodes=nodes, guarded=one.guarded or (layer_like and reason is not None))
        if one.unrolled.whole:
            mixed = any(p.mixes for p in products)
            why = "its matrices are mixed before they multiply" if mixed else "it is used as a whole"
            unsaving = f"{why}, by {', '.join(nodes)}: the product of its factors would be made in every call"
            one = replace(one, unsaving=unsaving)
        if whole:
            yield parameter, checked(one, owner)
            return
        if one.reason is None and (writer := written_by(owner, attribute)) is not None:
            one = one.kept_for(f"{writer} may write into it, which the product of two factors does not allow")
        if shows_forward(owner):
            one = replace(one, is_table=any(cls.is_table for cls in forms_of(owner).values()))
        yield parameter, self.alike.checked(one, owner, attribute) if layer_like else one


def _by_own_names(layer: Layer) -> Layer:
    return replace(layer, name=own_name(layer.name), paths=tuple(dict.fromkeys(own_name(p) for p in layer.paths)))


def _above(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on the way down to a path."""
    module = model
    for name in path.split(".") if path else ():
        module = module.get_submodule(name)
        yield module


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
