"""The plan that a rewritten model carries: one for all pairs in it, in however many stages they came."""

import math
from dataclasses import replace

import torch
from torch import nn

from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.names import own_name
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.registry import form_of
from fxrank.plan import LayerDecision, Plan

_PLAN = "_fxrank_plan"


_NESTED = "_fxrank_use_nested_tensor"


def remember_plan(model: nn.Module, plan: Plan) -> None:
    """Keep the plan with the model: it survives deepcopy and pickle and is not in the state dict. Pairs that were there before
    it keep the decisions of the earlier plan.
    """
    model = uncompiled(model)
    model.__dict__[_PLAN] = _with_earlier(plan, model)


def has_plan(model: nn.Module) -> bool:
    """Whether `plan_of` has an answer."""
    return isinstance(uncompiled(model).__dict__.get(_PLAN), Plan)


def _with_earlier(plan: Plan, model: nn.Module) -> Plan:
    """The plan with a decision for every pair that it did not make: the one that made it, or one read off the pair."""
    pairs = {own_name(p): m for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, FactorPair)}
    ranks = plan.R
    made = {id(pairs[name].u.weight) for name in ranks if name in pairs}
    if all(id(pair.u.weight) in made for pair in pairs.values()):
        return plan
    earlier = plan_of(model).layers if has_plan(model) else ()
    kept = {d.name: d for d in earlier if d.factorized and d.name in pairs and d.name not in ranks}
    known = made | {id(pairs[name].u.weight) for name in kept}
    for name, pair in pairs.items():
        if id(pair.u.weight) not in known:  # put in by hand
            known.add(id(pair.u.weight))
            kept[name] = _read_off(name, pair)
    layers = [
        kept.pop(d.name, d) if not d.factorized else d
        for d in plan.layers
        if d.factorized or d.name not in pairs or d.name in kept
    ]
    names = {layer.name for layer in layers}
    followers: dict[str, list[LayerDecision]] = {}
    before = ""
    for decision in earlier:  # what the new plan does not have at all stands where it stood
        if decision.name in names:
            before = decision.name
        elif decision.name in kept:
            followers.setdefault(before, []).append(kept.pop(decision.name))
    ordered = [d for layer in layers for d in (layer, *followers.get(layer.name, ()))]
    return replace(plan, layers=(*followers.get("", ()), *ordered, *kept.values()))


def _read_off(name: str, pair: FactorPair) -> LayerDecision:
    return LayerDecision(
        name=name,
        kind=pair.kind,
        weight_shape=pair.dense_shape,
        full_rank=min(type(pair).unroll(pair, torch.empty(pair.dense_shape, device="meta")).shape[1:]),
        rank=pair.rank,
        reason=f"a factor pair of rank {pair.rank} before",
        form=form_of(pair),
        extra_bn=pair.extra_norm is not None,
        parameters=math.prod(pair.dense_shape),
        pair_parameters=pair.u.weight.numel() + pair.v.weight.numel(),
    )


def forget_plan(model: nn.Module) -> None:
    """Take away what `apply_plan` leaves on a model, for one that is dense again."""
    uncompiled(model).__dict__.pop(_PLAN, None)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.__dict__.pop(_NESTED, module.use_nested_tensor)


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model that fxrank has rewritten or loaded. Raises `ValueError` for any other model, `TypeError` for what is
    none.
    """
    plan = uncompiled(model).__dict__.get(_PLAN)
    if not isinstance(plan, Plan):
        raise ValueError(
            f"only a model that fxrank has rewritten has a plan; this {type(model).__name__} has none. Rewrite it with fxrank.factorize or fxrank.auto_lowrank."
        )
    return plan
