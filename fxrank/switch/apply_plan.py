"""A plan applied to a model, in place, and read back from it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxrank.passes.model.calls import Example
from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.rewriting.calibrate import calibrate_on
from fxrank.passes.rewriting.factorize import Factorize
from fxrank.passes.rewriting.install import install_all, pairs_in
from fxrank.passes.spectra.exact import check_finite
from fxrank.passes.tracing.trace import WHOLE, TracedModule
from fxrank.plan import Plan
from fxrank.switch.plan_of import _NESTED, remember_plan
from fxrank.switch.sites import Site, sites
from fxrank.torch_private.modules import WEIGHT_HOOKS, own_children, own_parameters


@dataclass(frozen=True)
class Replacement:
    """One weight that became a factor pair: the parameters that are gone, and the pair that came.

    There is one dense parameter, except where the weight was `derived` from others (weight norm, standardization).
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    pair: FactorPair
    derived: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The dense parameter, the first of several."""
        return self.parameters[0]

    @property
    def hooked(self) -> bool:
        """Whether the user has hooks on what is gone. Those of one dense weight are on both factors now."""
        return any(getattr(parameter, name, None) for parameter in self.parameters for name in WEIGHT_HOOKS)

    @property
    def hook_note(self) -> str:
        """What has become of these hooks."""
        gone = "are gone with the parameters that it was derived from"
        return (
            f"{self.name}: the hooks on its weight {gone if self.derived else 'get the gradients of its factors now'}"
        )


Factors = dict[str, tuple[Tensor, ...]]
"""`(U, V)` by layer name, where they have already been computed, and after them what the bias gains, `(groups, rows)`, if it does."""


def apply_plan(
    model: nn.Module,
    plan: Plan,
    *,
    gm: TracedModule | None = None,
    example: Example = None,
    split: bool = True,
    factors: Factors | None = None,
    share: Callable[[Iterable[Tensor]], None] | None = None,
) -> list[Replacement]:
    """Put the plan's factor pairs into `model`, in place, and into its graph `gm` if given. Returns what was
    replaced.

    Everything is checked before anything is changed: `PlanMismatchError` names the first layer that is missing, of
    another kind or shape; `NonFiniteWeightError` and `RankError` name the layer. `split=False` leaves the factors
    unfilled, for loading a checkpoint. Pairs with an extra BatchNorm are calibrated on `example`, if there is one.
    `share` gives all processes the first one's numbers.
    """
    found = sites(model, plan)
    if split or share is not None:
        for site in found:
            check_finite(weight_of(site.dense).detach(), site.name)
    made: list[FactorPair] = []
    layers: dict[int, nn.Module] = {}
    weights: list[tuple[nn.Module, str, FactorPair]] = []
    norms = []  # of tied layers each has its own
    biases: list[Tensor] = []
    for site in found:
        pairs = _pairs(site, split, {} if factors is None else factors)
        norms += [pair.extra_norm for pair in pairs]
        biases += [] if plan.calibration_batches is None else [p.bias for p in pairs if p.bias is not None]
        made.append(pairs[0])
        for place, pair in zip(site.places, pairs, strict=True):
            if place.attribute:
                weights.append((place.owner, place.attribute, pair))
            else:
                layers[id(place.owner)] = pair
    paths = install_all(model, layers, weights)
    replacements = [Replacement(s.name, s.parameters, _at(s, p), s.derived) for s, p in zip(found, made, strict=True)]
    if gm is not None:
        show(gm, model, paths)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and pairs_in(module):
            # It asks its first layer only whether the fused path is open, and would hand nested tensors to the others.
            module.__dict__.setdefault(_NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False
    if share is not None:
        share([*(t for r in replacements for t in r.pair.held), *biases])
    calibrate_on(example, model, norms, share)
    remember_plan(model, plan)
    return replacements


def _pairs(site: Site, split: bool, factors: Factors) -> list[FactorPair]:
    """The pairs for all places of one weight."""
    pairs: list[FactorPair] = []
    gained: Tensor | None = None
    for place in site.places:
        pair = site.pair_at(place)
        if pairs:  # another place that holds the same weight: the same factors, its own bias and geometry
            pair.share(pairs[0])
        elif site.name in factors:
            u, v, *more = factors.pop(site.name)
            pair.fill(u, v)
            gained = more[0] if more else None
        elif split:
            pair.fill_from(weight_of(site.dense))
        if not pairs and not site.derived:
            for factor in (pair.u.weight, pair.v.weight):
                take_hooks(factor, site.parameters[0])
        pairs.append(pair)
    if gained is not None:
        biases = {id(pair.bias): pair.bias for pair in pairs if pair.bias is not None}
        with torch.no_grad():
            for bias in biases.values():
                bias += gained.reshape(bias.shape).to(bias.device)
    return pairs


def _at(site: Site, pair: FactorPair) -> FactorPair:
    """The pair that stands at the first place: in a layer's, the layer itself, which has become it."""
    first = site.places[0].owner
    return first if isinstance(first, FactorPair) else pair


def take_hooks(factor: nn.Parameter, weight: nn.Parameter) -> None:
    """The very dicts: handles that the user holds remove a hook from both."""
    for name in WEIGHT_HOOKS:
        if getattr(weight, name, None):
            setattr(factor, name, getattr(weight, name))


def show(gm: TracedModule, model: nn.Module, paths: Iterable[str]) -> None:
    """Bring a model's graphs, and those of its regions, up to date with pairs installed at these paths."""
    if WHOLE not in own_children(gm):
        own_children(gm).update(own_children(model))
        for name in own_parameters(gm).keys() & own_children(model).keys():
            del own_parameters(gm)[name]
    pairs = {path: pair for path in paths if isinstance(pair := model.get_submodule(path), FactorPair)}
    Factorize(pairs=pairs)(gm)
    below: dict[str, list[str]] = {}
    for path in pairs if gm.regions else ():
        parts = path.split(".")
        for region in (".".join(parts[:n]) for n in range(1, len(parts))):
            if region in gm.regions:
                below.setdefault(region, []).append(path.removeprefix(f"{region}."))
    for region, inside in below.items():
        show(gm.regions[region], model.get_submodule(region), inside)
    for path, pair in pairs.items():
        if path in gm.regions:  # a layer that was called from code that could not be traced: a graph of its own
            Factorize(pairs={WHOLE: pair})(gm.regions[path])
