"""The rewrite, to be read: every layer before and after, and the nodes of the graph that changed.

Only the rewritten model is asked for. `auto_lowrank` and a session rewrite the model that they are given, so that the dense one is no
longer there; and nothing of it is needed: its layers are in the plan, its totals follow from the pairs, and its graph is that of
`merge(model)`, in which the plan is then applied once more.
"""

import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from tabulate import tabulate
from torch import Tensor, fx, nn

from fxrank.oneshot import merge
from fxrank.passes.errors import PlanMismatchError
from fxrank.passes.model.calls import Example
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.names import own_name
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.tracing.trace import TracedModule, trace
from fxrank.plan import LayerDecision, Plan
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.plan_of import plan_of


@dataclass(frozen=True)
class Weights:
    """What a layer multiplies with: the `shapes` of its weight, or of both factors, how many numbers these are, and the
    multiply-adds of one call at the example's sizes, None where the plan does not know them.
    """

    shapes: tuple[tuple[int, ...], ...]
    parameters: int
    macs: int | None


@dataclass(frozen=True)
class LayerDiff:
    """One layer, `before` and `after`; one left dense has no `after`, `form` and `rank`. `full_rank` counts one group. `beside` has what
    a pair has more than its factors: a `"norm"` between them, a `"bias"` that the layer has not.
    """

    name: str
    kind: str
    full_rank: int
    before: Weights
    after: Weights | None = None
    form: str = ""
    rank: int | None = None
    beside: tuple[str, ...] = ()

    @property
    def now(self) -> Weights:
        """Of the model as it is."""
        return self.after or self.before

    def rows(self) -> list[tuple[str, ...]]:
        """What the table says of it: one row for a layer left dense, else one before and one after."""

        def row(sign: str, form: str, rank: str, weights: Weights) -> tuple[str, ...]:
            shapes = " ".join(map(_sizes, weights.shapes))
            return sign, self.name, self.kind, form, rank, shapes, f"{weights.parameters:,}", _count(weights.macs)

        if self.after is None:
            return [row("", "", "", self.before)]
        rank = f"{self.rank} of {self.full_rank}"
        return [row("-", "", "", self.before), row("+", ", ".join((self.form, *self.beside)), rank, self.after)]


@dataclass(frozen=True)
class Diff:
    """What `diff` returns; its text is a table of all layers, `-` before and `+` after, and the nodes of the graph that changed.

    `parameters` are of the whole model, `macs` of its weight layers (None where one layer's are not known), each before and after. A
    weight that was derived from others (weight norm) counts as the plain one that `merge` makes of it.
    `nodes` are lines of a unified diff without context, None where no example was given; `notes` say what is not in them.
    """

    model: str
    layers: tuple[LayerDiff, ...]
    parameters: tuple[int, int]
    macs: tuple[int | None, int | None]
    nodes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        pairs = sum(layer.after is not None for layer in self.layers)
        headers = ("", "layer", "kind", "form", "rank", "weights", "parameters", "MACs")
        rows = [row for layer in self.layers for row in layer.rows()]
        for sign, parameters, macs in zip("-+", self.parameters, self.macs, strict=True):
            rows.append((sign, "whole model", "", "", "", "", f"{parameters:,}", _count(macs)))
        align = (*["left"] * 6, "right", "right")
        table = tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=align)
        lines = [f"{self.model}: {pairs} of {len(self.layers)} layers are pairs", *table.splitlines()]
        if self.nodes is not None:
            lines += ["", "--- graph before", "+++ graph after", *self.nodes]
        return "\n".join([line.rstrip() for line in lines] + list(self.notes))

    def _repr_html_(self) -> str:
        """For notebooks: the same text, in the usual colours of a diff."""
        colors = {"-": "#b31d28", "+": "#22863a"}
        lines = []
        for line in map(html.escape, str(self).splitlines()):
            color = colors.get(line[:1])
            lines.append(line if color is None else f'<span style="color: {color}">{line}</span>')
        return "<pre>" + "\n".join(lines) + "</pre>"


def diff(model: nn.Module, example_inputs: Example = None) -> Diff:
    """What fxrank has made of a model, to be printed: every layer before and after, with the totals.

    `model` is a factorized one; the dense one is not needed, as its plan knows it (`plan_of`). With `example_inputs`, one batch as
    `factorize` takes it, the nodes of the graph that changed are shown too, in the mode that the model is in: the graph is
    traced anew in a dense copy of the model, which is there meanwhile. What was not traced is named in the notes.

    Raises `ValueError` for a model without a plan, `PlanMismatchError` for one whose pairs are no longer those of its plan; with
    an example `TraceError` and `TypeError` as `trace`, and `TypeError` for a model that is in shards or quantized.
    """
    plan, model = plan_of(model), uncompiled(model)
    pairs = {own_name(p): m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, FactorPair)}
    layers = tuple(_layer(decision, pairs.get(decision.name)) for decision in plan.layers)
    now = sum(p.numel() for p in model.parameters())
    dense = sum(layer.before.parameters for layer in layers if layer.after is not None)
    parameters = now - _of_pairs(pairs, plan) + dense, now
    macs = _total(layer.before.macs for layer in layers), _total(layer.now.macs for layer in layers)
    nodes, notes = (None, ()) if example_inputs is None else _changed(model, plan, example_inputs)
    return Diff(type(model).__name__, layers, parameters, macs, nodes, notes)


def _layer(decision: LayerDecision, pair: FactorPair | None) -> LayerDiff:
    """What a decision has made of its layer."""
    if (None if pair is None else pair.rank) != decision.rank:
        now, then = ("none" if rank is None else f"one of rank {rank}" for rank in (pair and pair.rank, decision.rank))
        raise PlanMismatchError(
            f"a model must have the pairs that its plan names; {decision.name!r} has {now}, the plan {then}. "
            "Factorize the model anew, or load what fxrank.save wrote of it."
        )
    known = pair is None or decision.pair_macs is not None  # not of a pair that was put in by hand
    before = Weights((decision.weight_shape,), decision.parameters, decision.macs if known else None)
    layer = LayerDiff(decision.name, decision.kind, decision.full_rank, before)
    if pair is None:
        return layer
    u, v = pair.u.weight, pair.v.weight
    beside = {"norm": pair.extra_norm is not None, "bias": decision.gains_bias}
    return replace(
        layer,
        after=Weights((tuple(u.shape), tuple(v.shape)), u.numel() + v.numel(), decision.pair_macs),
        form=decision.form,
        rank=pair.rank,
        beside=tuple(what for what, there in beside.items() if there),
    )


def _total(numbers: Iterable[int | None]) -> int | None:
    """Of all, None where one is not known."""
    listed = list(numbers)
    return None if None in listed else sum(number or 0 for number in listed)


def _of_pairs(pairs: Mapping[str, FactorPair], plan: Plan) -> int:
    """How many numbers the pairs have that no dense layer has: shared ones once."""
    gained = {id(pairs[layer.name].u.weight) for layer in plan.layers if layer.gains_bias}
    held: dict[int, nn.Parameter] = {}
    for pair in pairs.values():
        norm = [] if pair.extra_norm is None else pair.extra_norm.parameters()
        bias = [pair.bias] if id(pair.u.weight) in gained and pair.bias is not None else []
        held |= {id(p): p for p in (pair.u.weight, pair.v.weight, *norm, *bias)}
    return sum(p.numel() for p in held.values())


# -- the graph


def _changed(model: nn.Module, plan: Plan, example: Example) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nodes that differ when the plan is applied to the graph of the dense model, as lines, and notes."""
    dense = merge(model)
    gm = trace(dense, example)
    graphs = dict(_graphs(gm))
    before = {path: [(node, _line(node), _read(node)) for node in graph.nodes] for path, graph in graphs.items()}
    apply_plan(dense, plan, gm=gm, split=False)
    lines: list[str] = []
    for path, graph in graphs.items():
        changed = _hunks(before[path], list(graph.nodes))
        lines += [f"in {path}, which is traced by itself:"] if changed and path else []
        lines += changed
    gm.let_go()
    notes = [f"not in one graph: {path or type(model).__name__}: {reason}" for path, reason in gm.leaves.items()]
    called = {f"{path}.{node.target}".lstrip(".") for path, graph in graphs.items() for node in graph.nodes}
    if read := [name for name in plan.R if not any(target.startswith(f"{name}.") for target in called)]:
        notes.append(
            f"the graph has no node for the factors of what code reads, and multiplies with, by itself: {', '.join(read)}"
        )
    return tuple(lines), (*notes, *gm.notes)


def _graphs(gm: TracedModule, path: str = "") -> Iterator[tuple[str, fx.Graph]]:
    """The graph of the present mode, and those of what was traced by itself, with its path."""
    yield path, gm.graph
    for name, region in gm.regions.items():
        yield from _graphs(region, f"{path}.{name}".lstrip("."))


def _hunks(before: list[tuple[fx.Node, str, list[fx.Node]]], after: list[fx.Node]) -> list[str]:
    """A unified diff without context. A node that only reads a pair where it read the layer is as it was."""
    read_before, now_there = {node: read for node, _, read in before}, set(after)
    layers = {
        now: was
        for node in after
        for was, now in zip(read_before.get(node, []), _read(node), strict=False)
        if was not in now_there
    }
    old, new = [line for _, line, _ in before], [_line(node, layers) for node in after]
    lines: list[str] = []
    for what, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if what != "equal":
            lines += [f"@@ -{a + 1},{b - a} +{c + 1},{d - c} @@", *(f"-{line}" for line in old[a:b])]
            lines += [f"+{_line(node)}" for node in after[c:d]]
    return lines


def _read(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments of one, in order, as often as they stand there."""
    read: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), read.append)
    return read


class _Name(str):
    """What stands among the arguments of a line as it is, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _line(node: fx.Node, instead: Mapping[fx.Node, fx.Node] = {}) -> str:
    """One node as a line of code, with the shape of what it gives; nodes that stand `instead` of others have their names."""

    def shown(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: _Name(instead.get(n, n).name))

    args, kwargs = shown(node.args), shown(node.kwargs)
    if node.op == "output":
        return f"return {args[0]!r}"
    target = getattr(node.target, "__name__", str(node.target))
    if node.op == "call_method":
        target, args = f"{args[0]!r}.{target}", args[1:]
    call = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
    name, value = instead.get(node, node).name, node.meta.get("val")
    code = name if node.op == "placeholder" else f"{name} = {target}" + ("" if node.op == "get_attr" else f"({call})")
    return f"{code}  # {_sizes(value.shape)}" if isinstance(value, Tensor) else code


def _sizes(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"
