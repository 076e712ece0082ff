"""Graph → the layers that hold weight matrices, each with what can be done to it, or the reason why nothing can.

One `Layer` per unique weight: a module called several times, registered under several names, or two modules that
share one parameter are one layer with several call sites.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxrank.passes.errors import NothingToFactorizeError
from fxrank.passes.factors import FactorPair, pair_class, weight_of

Selector = str | re.Pattern[str] | type[nn.Module] | nn.Module

_RAW = "parameter"
"""The kind of a weight that is read where its module is not called."""


@dataclass(frozen=True)
class Layer:
    """One weight of the model, seen from the graph.

    The weight unrolls to `groups` matrices of `(rows, cols)`. `positions` is how often each of its numbers is used
    in one call of the model at the example's sizes, so that the dense layer takes `groups · rows · cols ·
    positions` multiply-adds (MACs).
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    groups: int = 1
    rows: int = 0
    cols: int = 0
    positions: int = 0
    paths: tuple[str, ...] = ()
    """Every module path under which the weight can be reached; `name` is the first."""
    nodes: tuple[str, ...] = ()
    """Graph nodes that use it, in execution order."""
    input_shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    geometry: tuple[Any, ...] = ()
    reason: str | None = None
    """Why this layer cannot be factorized at all; None if it can."""
    supported: bool = True
    """Whether the layer's kind has a factor pair, whatever `reason` says about this one."""
    boundary: str | None = None
    """`"first"` if no other weight comes before it in the graph, `"last"` if none comes after."""

    @property
    def full_rank(self) -> int:
        return min(self.rows, self.cols)

    @property
    def parameters(self) -> int:
        """Numbers in the dense weight (the bias stays as it is)."""
        return self.groups * self.rows * self.cols

    @property
    def macs(self) -> int:
        return self.parameters * self.positions

    def pair_parameters(self, rank: int) -> int:
        return self.groups * rank * (self.rows + self.cols)

    def pair_macs(self, rank: int) -> int:
        return self.pair_parameters(rank) * self.positions

    @property
    def break_even_rank(self) -> float:
        """`rows·cols / (rows + cols)`: a pair of this rank is as large, and takes as many MACs, as the layer (spec
        of the rule: Pufferfish Table 1).
        """
        return self.rows * self.cols / (self.rows + self.cols) if self.rows else 0.0


def discover(gm: fx.GraphModule, model: nn.Module, *, form: str = "channel") -> list[Layer]:
    """Every weight with two or more dimensions, in graph order, then those that the traced call does not reach.

    `gm` comes from `trace(model, …)`. A weight that cannot be factorized is in the list too, with its `reason`;
    normalization weights and relative-position tables owned by a supported layer's module are not matrices of a
    layer and are left out if they have one dimension.
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    found: dict[int, Layer] = {}
    for node in gm.graph.nodes:
        for weight, layer in _used_at(gm, model, node, names, form):
            known = found.get(id(weight))
            found[id(weight)] = layer if known is None else _merge(known, layer)
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            owned = found.get(id(weight))
            if (
                owned is not None
                and owned.reason is None
                and not (name == "weight" and _kind(module, form) == owned.kind)
            ):
                # Not reached by this call, so not met in the graph: replacing the weight would cut the tie.
                other = f"{path}.{name}".removesuffix(".weight").lstrip(".")
                reason = f"its weight is shared with {other!r} ({type(module).__name__})"
                found[id(weight)] = replace(owned, reason=reason, supported=False)
    boundary = _boundaries(gm, {n for layer in found.values() for n in layer.nodes})
    layers = [
        replace(layer, boundary=next((boundary[n] for n in layer.nodes if n in boundary), None))
        for layer in found.values()
    ]
    in_pairs = {id(p) for m in model.modules() if isinstance(m, FactorPair) for p in m.parameters()}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim >= 2 and id(weight) not in found and id(weight) not in in_pairs:
                own = path if name == "weight" else f"{path}.{name}".lstrip(".")
                found[id(weight)] = _unsupported(
                    own, type(module).__name__, weight, "the traced call does not reach it"
                )
                layers.append(found[id(weight)])
    return layers


def candidates(
    layers: Sequence[Layer],
    model: nn.Module,
    *,
    include: Iterable[Selector] | Selector = (),
    exclude: Iterable[Selector] | Selector = (),
) -> list[Layer]:
    """The same layers, with a `reason` on those that are left alone by rule: the first, the last, and what
    `exclude` names.

    The first and the last layer (by position in the graph: nothing with a weight before, or after) stay dense
    because they are small, see raw inputs or produce the logits, and lose accuracy soonest (Pufferfish §3;
    Cuttlefish §3.2). `include` takes them in; `exclude` wins over it. A selector is a name or glob (`"layer4.*"`),
    a regular expression (`re.compile(…)` or `"re:…"`), a module class, or a module. Raises `ValueError` for a
    selector that matches no layer.
    """
    included = _selected(layers, model, include, "include")
    excluded = _selected(layers, model, exclude, "exclude")
    result = []
    for layer in layers:
        reason = layer.reason
        if reason is None and layer.name in excluded:
            reason = "excluded by the user"
        elif reason is None and layer.boundary and layer.name not in included:
            reason = f"{layer.boundary} layer of the graph, left dense by default"
        result.append(replace(layer, reason=reason))
    return result


def require_some(layers: Sequence[Layer]) -> None:
    """Raise `NothingToFactorizeError`, with each layer's reason, if all have one."""
    if all(layer.reason for layer in layers):
        listing = (
            "".join(f"\n  {layer.name} ({layer.kind}): {layer.reason}" for layer in layers)
            or "\n  (no weight matrix at all)"
        )
        raise NothingToFactorizeError(
            f"at least one layer must be factorizable; 0 of {len(layers)} are:{listing}\nName layers to take in with include=… ('*' takes everything)."
        )


def stack_of(layer: Layer, model: nn.Module, *, form: str = "channel") -> Tensor:
    """The layer's live weight as `(groups, rows, cols)`, without a copy where the memory allows; for spectra only."""
    module = model.get_submodule(layer.name)
    cls = pair_class(module, form)
    assert cls is not None, layer.name
    return cls.spectral_view(module, weight_of(module).detach())


def matrices_of(layer: Layer, model: nn.Module, *, form: str = "channel") -> Tensor:
    """The layer's live weight as `(groups, rows, cols)` in the order of rows and columns that a pair's factors have."""
    module = model.get_submodule(layer.name)
    cls = pair_class(module, form)
    assert cls is not None, layer.name
    return cls.unroll(module, weight_of(module).detach())


def _used_at(
    gm: fx.GraphModule, model: nn.Module, node: fx.Node, names: dict[int, list[str]], form: str
) -> list[tuple[Tensor, Layer]]:
    if node.op == "get_attr":
        target = str(node.target)
        owner, _, attribute = target.rpartition(".")
        weight = getattr(gm.get_submodule(owner), attribute)
        readers = [user for user in node.users if not _only_looks(user)]
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or not readers:
            return []
        name = owner if attribute == "weight" and owner else target
        users = ", ".join(sorted(user.name for user in readers))
        reason = f"its weight is read as a raw parameter, by {users}; fxrank factorizes weights that their own module applies"
        return [(weight, replace(_unsupported(name, _RAW, weight, reason), nodes=tuple(u.name for u in readers)))]
    if node.op != "call_module":
        return []
    owner = str(node.target).rpartition(".")[0]
    if owner and isinstance(pair := model.get_submodule(owner), FactorPair):
        if str(node.target) != f"{owner}.u":
            return []
        reason = f"already a factor pair, of rank {pair.rank}"
        return [
            (
                pair.u.weight,
                replace(
                    _unsupported(owner, pair.kind, pair.u.weight, reason),
                    weight_shape=pair.dense_shape,
                    nodes=(node.name,),
                ),
            )
        ]
    module = gm.get_submodule(str(node.target))
    cls = pair_class(module, form)
    paths = tuple(names.get(id(module), [str(node.target)]))
    if cls is None or "weight" not in dict(module.named_parameters(recurse=False)):
        derived = cls is not None
        reason = (
            "its weight is derived from other parameters (weight norm or another hook)"
            if derived
            else f"{type(module).__name__} has no factor pair"
        )
        found: list[tuple[Tensor, Layer]] = []
        for path, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                name = f"{node.target}.{path}".removesuffix(".weight")
                found.append(
                    (
                        parameter,
                        replace(_unsupported(name, type(module).__name__, parameter, reason), nodes=(node.name,)),
                    )
                )
        return found
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    reason_or_none = None
    if not weight.is_floating_point():
        reason_or_none = f"its weight is {str(weight.dtype).removeprefix('torch.')}; only real floating-point weights have a low-rank split here"
    groups, rows, cols = cls.unroll(module, weight).shape
    output = node.meta["val"]
    layer = Layer(
        name=str(node.target),
        kind=cls.kind,
        weight_shape=tuple(weight.shape),
        groups=groups,
        rows=rows,
        cols=cols,
        positions=output.numel() // weight.shape[0],
        paths=paths,
        nodes=(node.name,),
        input_shape=tuple(_input_of(node).shape),
        dtype=weight.dtype,
        geometry=tuple(str(getattr(module, g)) for g in cls.geometry),
        reason=reason_or_none,
        supported=reason_or_none is None,
    )
    return [(weight, layer)]


def _kind(module: nn.Module, form: str) -> str | None:
    cls = pair_class(module, form)
    return cls.kind if cls is not None else None


def _only_looks(node: fx.Node) -> bool:
    """Whether a reader of a weight takes its dtype, device or shape only, which a pair tells as well: no tensor comes of
    it, and it is no assignment.
    """
    value = node.meta.get("val")
    return value is not None and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _input_of(node: fx.Node) -> Tensor:
    source = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(source, fx.Node)
    value = source.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _unsupported(name: str, kind: str, weight: Tensor, reason: str) -> Layer:
    return Layer(
        name=name,
        kind=kind,
        weight_shape=tuple(weight.shape),
        rows=weight.shape[0],
        cols=weight[0].numel() if len(weight) else 0,
        paths=(name,),
        dtype=weight.dtype,
        reason=reason,
        supported=False,
    )


def _merge(known: Layer, again: Layer) -> Layer:
    """One weight met at another site."""
    paths = known.paths + tuple(p for p in again.paths if p not in known.paths)
    nodes = known.nodes + tuple(n for n in again.nodes if n not in known.nodes)
    reason = known.reason or again.reason
    unlike = (known.kind, known.groups) != (again.kind, again.groups)
    if unlike and _RAW not in (known.kind, again.kind):
        reason = f"its weight is shared with {again.name!r} ({again.kind})"
    return replace(
        known,
        paths=paths,
        nodes=nodes,
        positions=known.positions + again.positions,
        reason=reason,
        supported=known.supported and again.supported and not unlike,
    )


def _boundaries(gm: fx.GraphModule, weighted: set[str]) -> dict[str, str]:
    """Weight nodes with no weight before them, and with none after, on any path."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for node in gm.graph.nodes:
        graph.add_node(node.name)
        graph.add_edges_from((source.name, node.name) for source in node.all_input_nodes)

    def beyond(direction: "nx.DiGraph[str]") -> set[str]:
        probe = direction.copy()
        start = "the layers themselves"  # no node of a graph has spaces in its name
        probe.add_edges_from((start, after) for name in weighted for after in direction.successors(name))
        return set(nx.descendants(probe, start)) if start in probe else set()

    after_some, before_some = beyond(graph), beyond(graph.reverse(copy=False))
    return {n: "first" for n in weighted - after_some} | {n: "last" for n in weighted - before_some if n in after_some}


def _selected(
    layers: Sequence[Layer], model: nn.Module, selectors: Iterable[Selector] | Selector, argument: str
) -> set[str]:
    if isinstance(selectors, (str, re.Pattern, type, nn.Module)):
        selectors = [selectors]
    chosen: set[str] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    for selector in selectors:
        if isinstance(selector, str) and not selector.startswith("re:"):
            pattern = selector
            hits = {a.name for a in layers if any(p == pattern or fnmatch.fnmatchcase(p, pattern) for p in a.paths)}
        elif isinstance(selector, (str, re.Pattern)):
            expression = re.compile(selector.removeprefix("re:")) if isinstance(selector, str) else selector
            hits = {a.name for a in layers if any(expression.search(p) for p in a.paths)}
        elif isinstance(selector, type):
            hits = {a.name for a in layers if isinstance(modules.get(a.name), selector)}
        elif isinstance(selector, nn.Module):
            inside = {id(m) for m in selector.modules()}
            hits = {a.name for a in layers if id(modules.get(a.name)) in inside}
        else:
            raise TypeError(
                f"{argument} takes names, globs, regular expressions, module classes or modules; got {type(selector).__name__}."
            )
        if not hits:
            near = get_close_matches(str(selector), [p for a in layers for p in a.paths], n=3)
            hint = f" Nearest names: {', '.join(near)}." if near else ""
            raise ValueError(
                f"each selector in {argument} must match at least one layer; {selector!r} matches none of {len(layers)}.{hint}"
            )
        chosen |= hits
    return chosen
