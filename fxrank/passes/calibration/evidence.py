"""What calibration knows of the layers of a model."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from fxrank.passes.calibration.collect import DRAWN, Drawn, Watch, collect, rounds
from fxrank.passes.calibration.joint import JointProjection
from fxrank.passes.calibration.parts import Parts, of_parts
from fxrank.passes.calibration.processes import OfAll, alone
from fxrank.passes.calibration.projection import Projection
from fxrank.passes.calibration.spatial import SpatialProjection, TurnedProjection, turned
from fxrank.passes.discovery.layer import Layer, matrices_of
from fxrank.passes.model.calls import Call
from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.locate import Owners, dense_at, holders, owners_in
from fxrank.passes.pairs.parameter import RawWeight
from fxrank.passes.spectra.exact import check_finite
from fxrank.torch_private.modules import BatchNorm, own_parameters

Key = tuple[str, str]
"""Name and form of a layer; see `Layer.key`."""
Known = Projection | SpatialProjection | JointProjection
NEEDED = 1.05
"""A pair gains a bias where its least squared error would be so many times as large without."""


@dataclass(frozen=True)
class Fit:
    """The factors of one layer at one rank: `U`, `V` and what its bias gains, which is one that it gains itself if `gains_bias`; and
    the error of its outputs, relative.
    """

    factors: tuple[Tensor, ...]
    gains_bias: bool
    output_error: float


@dataclass(frozen=True)
class Evidence:
    """What is known, by name and form of a layer: of those that were seen the `known` projections, of the others why they are `blind`;
    and by name which are `biased` already, or need no bias because a BatchNorm takes out every mean.
    """

    known: dict[Key, Known] = field(default_factory=dict)
    blind: dict[Key, str] = field(default_factory=dict)
    biased: frozenset[str] = frozenset()
    centred_later: frozenset[str] = frozenset()
    batches: int = 0
    notes: dict[Key, str] = field(default_factory=dict)
    """What a reason says of layers that are known."""
    _plain: dict[Key, Known] = field(default_factory=dict, init=False, repr=False)
    """Of the known that need no bias: not about the mean. Kept, as each has a decomposition of its own."""

    def may_gain_bias(self, layer: Layer) -> bool:
        """Whether a pair of the layer may gain a bias that the layer has not."""
        known = self.known.get(layer.key)
        has_one = layer.name in self.biased or layer.name in self.centred_later
        return known is not None and known.centred and not has_one

    def fit(
        self, name: str, form: str, rank: int, gains_bias: bool | None = None, *, search: bool = True
    ) -> Fit | None:
        """The best pair of a layer, or, without a `search`, that from which it is looked for; None where only its weight is known.
        `gains_bias`: as a plan has it, else where it is needed.
        """
        best = self.known.get((name, form))
        if best is None:
            return None
        if best.centred and name not in self.biased and not gains_bias:
            if name in self.centred_later:
                return Fit(best.factors(rank, search)[:2], False, best.output_error(rank, search))
            plain = self._plain.setdefault((name, form), replace(best, centred=False))
            if gains_bias is False or plain.lost(rank, search) <= NEEDED * best.lost(rank, search):
                return Fit(plain.factors(rank, search), False, plain.output_error(rank, search))
        gains = best.centred and name not in self.biased
        return Fit(best.factors(rank, search), gains, best.output_error(rank, search))


def gather(
    model: nn.Module,
    layers: Sequence[Layer],
    calls: Callable[[], Iterable[Call]],
    centred_later: frozenset[str],
    of_all: OfAll = alone,
    *,
    by_batch: bool = False,
    drawn: Drawn = DRAWN,
) -> Evidence:
    """Run the model over the calls, in evaluation mode (`by_batch` and `drawn` as of `collect`), for the layers without a `reason`, which
    may come in several forms. Errors as of `collect`, and `NonFiniteWeightError`.
    """
    watched: dict[Key, Watch] = {}
    blind: dict[Key, str] = {}
    by_key = {layer.key: layer for layer in layers if layer.reason is None}
    owners = owners_in(model)
    for key, layer in by_key.items():
        watch = _watch(model, owners, layer)
        if isinstance(watch, Watch):
            watched[key] = watch
        else:
            blind[key] = watch
    known: dict[Key, Known] = {}
    notes: dict[Key, str] = {}
    moments_of, batches = collect(model, watched, calls, of_all, by_batch=by_batch, drawn=drawn)
    mixed = [key for key, moments in moments_of.items() if isinstance(moments, Parts) and moments.is_mixed]
    if mixed:  # once more, all products with them in one way
        again = {key: replace(watched[key], layers=(), narrow=False) for key in mixed}
        moments_of |= collect(model, again, calls, of_all, by_batch=by_batch, drawn=drawn)[0]
    for key, moments in moments_of.items():
        layer, watch = by_key[key], watched[key]
        stack = matrices_of(layer, model)
        check_finite(stack, layer.name)
        if isinstance(moments, Parts):
            found = of_parts(moments, stack, stacked=layer.form == "stack")
            if isinstance(found, str):
                blind[key] = found
                continue
            known[key], unseen = found
            if unseen:
                notes[key] = f"{unseen} of its {len(stack)} matrices saw no data: they know their weights alone"
        elif watch.side == "patches":
            width, turns = watch.pair.width(dense_at(model, layer.name)), watch.pair.is_turned
            kind = TurnedProjection if turns else SpatialProjection
            known[key] = kind(turned(stack, width) if turns else stack, moments, width, watch.pair.takes_bias)
        else:
            known[key] = Projection(stack, moments, watch.side, watch.pair.takes_bias)
    blind |= {key: "no batch reached it" for key in watched if key not in moments_of}
    biased = {key[0] for key, w in watched.items() if all(getattr(m, "bias", None) is not None for m in w.layers)}
    return Evidence(known, blind, frozenset(biased), centred_later, batches, notes)


def needed_bytes(model: nn.Module, layers: Sequence[Layer]) -> dict[Key, int]:
    """What the moments of each layer take, in its form; 0 where it would be blind."""
    owners = owners_in(model)
    watches = {layer.key: _watch(model, owners, layer) for layer in layers}
    return {key: watch.bytes if isinstance(watch, Watch) else 0 for key, watch in watches.items()}


def in_rounds(model: nn.Module, layers: Sequence[Layer], at_most: int) -> Iterator[list[Layer]]:
    """The layers, in rounds whose moments fit into so many bytes; a larger one has one of its own. Those that are blind are in the
    first.
    """
    owners = owners_in(model)
    watches = {i: _watch(model, owners, layer) for i, layer in enumerate(layers)}
    seen = list(rounds({i: w for i, w in watches.items() if isinstance(w, Watch)}, at_most)) or [[]]
    seen[0] += [i for i, w in watches.items() if not isinstance(w, Watch)]
    for numbers in seen:
        yield [layers[i] for i in numbers]


def _watch(model: nn.Module, owners: Owners, layer: Layer) -> Watch | str:
    """How to watch a layer, or why it cannot be."""
    dense, pair = dense_at(model, layer.name), layer.unrolled.pair
    assert pair is not None, layer.name
    groups, rows, cols = layer.unrolled.matrices
    read = Watch(layer.name, pair, (), "inputs", (groups, min(rows, cols) if groups == 1 else cols))
    if pair.is_parameter:
        return replace(read, weight=weight_of(dense))
    side = pair.side(dense)
    if side is None:
        return f"{layer.form} pairs of {layer.kind} have none that know data"
    weight = own_parameters(dense).get("weight")
    places = [dense] if weight is None else [place for _, _, place in holders(owners, weight)]
    matrix = isinstance(dense, (nn.Linear, nn.Embedding))
    if any(type(place) is not type(dense) for place in places):
        if matrix and all(isinstance(place, (nn.Linear, nn.Embedding, RawWeight)) for place in places):
            return replace(read, weight=weight)
        return "its weight is shared with a layer of another kind, and no formula has the least error of both"
    size = rows if side == "outputs" else cols * pair.width(dense) if side == "patches" else cols
    return Watch(layer.name, pair, tuple(places), side, (groups, size), weight if matrix else None)


def before_batchnorm(graph: fx.Graph, model: nn.Module, layers: Sequence[Layer]) -> frozenset[str]:
    """Names of the layers whose every output goes into a BatchNorm that measures its mean, and nowhere else."""
    nodes = {node.name: node for node in graph.nodes}
    modules = dict(model.named_modules())
    found = set()
    for layer in layers:
        users = [user for name in layer.nodes if name in nodes for user in nodes[name].users]
        if users and all(u.op == "call_module" and isinstance(modules.get(str(u.target)), BatchNorm) for u in users):
            found.add(layer.name)
    return frozenset(found)
