"""The sites that a plan touches in a model: one list for applying it, checking it, saving and loading."""

from dataclasses import dataclass

from torch import nn

from fxrank.passes.discovery.found import untied
from fxrank.passes.errors import PlanMismatchError, RankError
from fxrank.passes.model.weights import check_not_computed, is_derived, weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.locate import Owners, dense_at, holders, owners_in, weight_alone
from fxrank.passes.pairs.registry import forms, kinds, pair_class
from fxrank.plan import LayerDecision, Plan


@dataclass(frozen=True)
class Place:
    """One place in the module tree that holds a weight: the module `owner`, its parameter's name `attribute`, empty where the
    owner is the layer itself, and the layer, or the parameter dressed as one.
    """

    owner: nn.Module
    attribute: str
    dense: nn.Module


@dataclass(frozen=True)
class Site:
    """One weight that a plan factorizes: every place that holds it, and the parameters that go with it.

    There is one of these, except where the weight is `derived` from several (weight norm, standardization).
    """

    decision: LayerDecision
    dense: nn.Module
    parameters: tuple[nn.Parameter, ...]
    places: tuple[Place, ...]
    derived: bool

    @property
    def name(self) -> str:
        return self.decision.name

    def pair_at(self, place: Place) -> FactorPair:
        """A pair without numbers for one of the places."""
        cls = pair_class(place.dense, self.decision.form)
        assert cls is not None and self.decision.rank is not None, self.name
        pair = cls(place.dense, self.decision.rank, self.decision.extra_bn)
        if self.decision.gains_bias and pair.bias is None:
            pair.gain_bias()
        return pair


def sites(model: nn.Module, plan: Plan) -> list[Site]:
    """Where the plan factorizes the model, in the plan's order. Nothing is changed.

    Raises `PlanMismatchError` or `RankError` for the first decision that does not fit.
    """
    found: list[Site] = []
    first: dict[object, str] = {}
    owners = owners_in(model)
    for number, decision in enumerate(plan.layers):
        site = _site(model, owners, decision) if decision.factorized else None
        for thing in (
            decision.name,
            number if site is None else id(site.dense if site.derived else site.parameters[0]),
        ):
            if thing in first:
                raise PlanMismatchError(
                    f"a plan must have each weight once; {first[thing]!r} and {decision.name!r} are one in this {type(model).__name__}. Use the plan of this very architecture."
                )
            first[thing] = decision.name
        if site is not None:
            found.append(site)
    return found


def _site(model: nn.Module, owners: Owners, decision: LayerDecision) -> Site:
    dense = _dense_layer(model, decision)
    if is_derived(dense):
        parameters = tuple(p for p in dense.parameters() if p is not getattr(dense, "bias", None))
        return Site(decision, dense, parameters, (Place(dense, "", dense),), True)
    weight = dense.get_parameter("weight")
    alone = weight_alone(model, decision.name)
    places = tuple(Place(*held) for held in holders(owners, weight, alone=alone))
    return Site(decision, dense, (weight,), places, False)


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
    known = untied(decision.kind) in kinds()
    if cls is None or cls.kind != untied(decision.kind) or shape != tuple(decision.weight_shape):
        raise PlanMismatchError(
            f"layers must match the plan; {decision.name!r} is {type(layer).__name__} with weight {shape}, "
            f"the plan has {decision.kind} with {tuple(decision.weight_shape)}. Use the plan of this very architecture."
            + ("" if known else f" If {decision.kind} is a kind of your own, call fxrank.register_pair first.")
        )
    if 0 in shape:
        raise PlanMismatchError(
            f"the layers that a plan factorizes must have numbers; {decision.name!r} has a weight {shape}. Leave it dense in the plan."
        )
    assert decision.rank is not None
    full_rank = cls.full_rank_of(layer)
    if not 1 <= decision.rank <= full_rank:
        raise RankError(
            f"the rank of {decision.name!r} must be in 1 … {full_rank}, its full rank; got {decision.rank}."
        )
    return layer
