"""A plan applied to a model, in place, and read back from it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fxrank.passes.errors import PlanMismatchError, RankError
from fxrank.passes.model.calls import Example
from fxrank.passes.model.weights import check_not_computed, is_derived, weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.locate import dense_at, holders
from fxrank.passes.pairs.registry import forms, pair_class
from fxrank.passes.rewriting.calibrate import calibrate_on
from fxrank.passes.rewriting.factorize import Factorize
from fxrank.passes.rewriting.install import install, install_weight, pairs_in
from fxrank.passes.spectra.exact import check_finite
from fxrank.passes.tracing.trace import WHOLE, TracedModule
from fxrank.plan import LayerDecision, Plan
from fxrank.switch.plan_of import _NESTED, remember_plan

_WEIGHT_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


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
        return any(getattr(parameter, name, None) for parameter in self.parameters for name in _WEIGHT_HOOKS)

    @property
    def hook_note(self) -> str:
        """What has become of these hooks."""
        gone = "are gone with the parameters that it was derived from"
        return (
            f"{self.name}: the hooks on its weight {gone if self.derived else 'get the gradients of its factors now'}"
        )


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""`(U, V)` by layer name, where a policy has already computed them."""


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
    dense = check_plan(model, plan)
    if split or share is not None:
        for name, layer in dense.items():
            check_finite(weight_of(layer).detach(), name)
    decisions = {d.name: d for d in plan.layers}
    replacements: list[Replacement] = []
    for name, layer in dense.items():
        decision = decisions[name]
        assert decision.rank is not None
        derived = is_derived(layer)
        if derived:
            sites: list[tuple[nn.Module, str, nn.Module]] = [(layer, "", layer)]
            old = tuple(p for p in layer.parameters() if p is not getattr(layer, "bias", None))
        else:
            weight = layer.weight
            assert isinstance(weight, nn.Parameter)
            sites, old = list(holders(model, weight)), (weight,)
        pairs: list[FactorPair] = []
        paths: list[str] = []
        for owner, attribute, dense_layer in sites:
            cls = pair_class(dense_layer, decision.form)
            assert cls is not None, name
            pair = cls(dense_layer, decision.rank, decision.extra_bn)
            if pairs:  # another place that holds the same weight: the same factors, its own bias and geometry
                pair.u.weight, pair.v.weight = pairs[0].u.weight, pairs[0].v.weight
            elif factors is not None and name in factors:
                pair.fill(*factors.pop(name))
            elif split:
                pair.split(weight_of(layer))
            pairs.append(pair)
            for factor in () if derived or len(pairs) > 1 else (pair.u.weight, pair.v.weight):
                take_hooks(factor, old[0])
            paths += install_weight(model, owner, attribute, pair) if attribute else install(model, {id(owner): pair})
        replacements.append(Replacement(name, old, pairs[0], derived))
        if gm is not None:
            show(gm, model, paths)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and pairs_in(module):
            # It asks its first layer only whether the fused path is open, and would hand nested tensors to the others.
            module.__dict__.setdefault(_NESTED, module.use_nested_tensor)
            module.use_nested_tensor = False
    if share is not None:
        share(p for r in replacements for p in (r.pair.u.weight, r.pair.v.weight))
    calibrate_on(example, model, [r.pair.extra_norm for r in replacements], share)
    remember_plan(model, plan)
    return replacements


def take_hooks(factor: nn.Parameter, weight: nn.Parameter) -> None:
    """The very dicts: handles that the user holds remove a hook from both."""
    for name in _WEIGHT_HOOKS:
        if getattr(weight, name, None):
            setattr(factor, name, getattr(weight, name))


def show(gm: TracedModule, model: nn.Module, paths: Iterable[str]) -> None:
    """Bring a model's graphs, and those of its regions, up to date with pairs installed at these paths."""
    if WHOLE not in gm._modules:
        gm._modules.update(model._modules)
        for name in gm._parameters.keys() & model._modules.keys():
            del gm._parameters[name]
    pairs = {path: pair for path in paths if isinstance(pair := model.get_submodule(path), FactorPair)}
    Factorize(pairs=pairs)(gm)
    for region, inner in gm.regions.items():
        below = [p.removeprefix(f"{region}.") for p in pairs if p.startswith(f"{region}.")]
        if below:
            show(inner, model.get_submodule(region), below)


def check_plan(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The dense layers that the plan factorizes, by name. Raises `PlanMismatchError` or `RankError` for the first misfit."""
    dense: dict[str, nn.Module] = {}
    first: dict[object, str] = {}
    for place, decision in enumerate(plan.layers):
        layer = _dense_layer(model, decision) if decision.factorized else None
        for thing in (decision.name, place if layer is None else id(layer if is_derived(layer) else layer.weight)):
            if thing in first:
                raise PlanMismatchError(
                    f"a plan must have each weight once; {first[thing]!r} and {decision.name!r} are one in this {type(model).__name__}. Use the plan of this very architecture."
                )
            first[thing] = decision.name
        if layer is not None:
            dense[decision.name] = layer
    return dense


def _dense_layer(model: nn.Module, decision: LayerDecision) -> nn.Module:
    try:
        layer = dense_at(model, decision.name)
    except AttributeError:
        raise PlanMismatchError(
            f"every layer of a plan must exist in the model; {type(model).__name__} has no {decision.name!r}. Use the plan of this very architecture."
        ) from None
    if isinstance(layer, FactorPair):
        raise PlanMismatchError(
            f"a plan applies to a dense model; {decision.name!r} is already a factor pair. Pass a freshly built model."
        )
    if decision.form not in forms():
        raise PlanMismatchError(
            f"a plan's forms must be among {', '.join(forms())}; {decision.name!r} has {decision.form!r}. Install the fxrank that wrote the plan."
        )
    check_not_computed(layer, decision.name)
    cls = pair_class(layer, decision.form)
    shape = () if cls is None else tuple(weight_of(layer).shape)
    if cls is None or cls.kind != decision.kind.removeprefix("tied ") or shape != tuple(decision.weight_shape):
        raise PlanMismatchError(
            f"layers must match the plan; {decision.name!r} is {type(layer).__name__} with weight {shape}, "
            f"the plan has {decision.kind} with {tuple(decision.weight_shape)}. Use the plan of this very architecture."
        )
    assert decision.rank is not None
    full_rank = cls.full_rank_of(layer)
    if not 1 <= decision.rank <= full_rank:
        raise RankError(
            f"the rank of {decision.name!r} must be in 1 … {full_rank}, its full rank; got {decision.rank}."
        )
    return layer
