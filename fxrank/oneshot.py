"""Copies of a model, rewritten: factorized at ranks that are given, and merged back into dense layers."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from fxrank.decisions import keep, take
from fxrank.passes.discovery.copies import without_followed
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.discovery.selection import Selector, candidates, require_some
from fxrank.passes.errors import RankError
from fxrank.passes.model.calls import Example
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.held import change_held
from fxrank.passes.model.names import own_name
from fxrank.passes.model.quantized import check_not_quantized
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.registry import check_form
from fxrank.passes.rewriting.install import pairs_in, put_back, uncompile_parts
from fxrank.passes.tracing.trace import trace
from fxrank.plan import LayerDecision, Plan
from fxrank.policies.ranks import ratio_rank
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.plan_of import forget_plan, has_plan
from fxrank.switch.trial import misfits, with_reasons
from fxrank.switch.zero_weights import why_dead, without_zero_weights
from fxrank.wrappers import outside_autocast

Rank = int | float | Mapping[str, int | float] | Plan


@outside_autocast
def factorize(
    model: nn.Module,
    example_inputs: Example,
    rank: Rank = 0.25,
    *,
    include: Iterable[Selector] | Selector = (),
    exclude: Iterable[Selector] | Selector = (),
    form: str = "channel",
    extra_bn: bool = False,
) -> nn.Module:
    """A factorized copy of `model`, same class; the original is untouched. No part of the copy is compiled.

    `rank`: a float in (0, 1] is a ratio of each layer's full rank (rounded down, at least 1; `1.0` makes exact
    full-rank pairs), an int is a rank for all layers, a dict gives one or the other by layer name and names its own
    layers (one whose pair would be multiplied out in every call stays dense, with a warning), a `Plan` is applied as it stands. Ranks are used as given; one warning lists those above break-even. The
    first and last layer stay dense unless included or named (`include="*"` takes everything). `fxrank.plan_of`
    returns the decisions with their reasons. Layers that have pairs of this `form` get them, the others those of their own: `"qkv"`
    splits fused projections in three, `"spatial"` two-dimensional kernels into one down and one across; see `register_pair`.

    Raises `RankError` for a rank of 0 or above full rank, `TypeError` for another type, `NothingToFactorizeError`,
    `TraceError`, `NonFiniteWeightError`, `PlanMismatchError`; where nothing is left because of what the layers do, the copy is dense, with
    a `NothingFactorizedWarning`. A weight of zeros stays dense, whoever names it in a plan: factors of
    zeros would never train.
    """
    check_form(form)
    model = uncompiled(model)
    small = copied(model)
    if isinstance(rank, Plan):
        apply_plan(small, without_zero_weights(small, rank), example=example_inputs)
        return small
    gm = trace(small, example_inputs)
    layers = [layer.if_in_form(form) for layer in without_followed(discover(gm, small), small)]
    gm.let_go()
    layers = [_if_it_can_train(layer, small) for layer in layers]
    if isinstance(rank, Mapping):
        chosen = _named_ranks(layers, rank)
        layers = [
            layer
            if layer.name in chosen or layer.reason
            else replace(layer, reason=layer.unsaving or "not named in rank=")
            for layer in layers
        ]
        layers = with_reasons(layers, misfits(layers, small, example_inputs, gm, []))
        for layer in layers:
            if layer.name in chosen:
                _check_named(layer.name, layer)
    else:
        layers = candidates(layers, small, include=include, exclude=exclude)
        layers = with_reasons(layers, misfits(layers, small, example_inputs, gm, []))
        if not pairs_in(small):
            require_some(layers)
        chosen = {layer.name: rank for layer in layers if layer.reason is None}
    decisions = [
        _given(layer, chosen[layer.name], extra_bn) if layer.name in chosen else keep(layer, layer.reason or "")
        for layer in layers
    ]
    _warn_above_break_even(layers, decisions)
    plan = Plan(policy="factorize", layers=tuple(decisions))
    if plan.R or not (pairs_in(small) and has_plan(small)):  # else the plan that made the pairs stands
        apply_plan(small, plan, example=example_inputs)
    return small


def whole_given_rank(name: str, full_rank: int, rank: object) -> int:
    """A rank as a user writes it (float: ratio, int: rank), checked, as a whole number."""
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(
            f"a rank is an int (rank) or a float (ratio of the full rank); got {type(rank).__name__} for {name!r}."
        )
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise RankError(
                f"a rank ratio must be above 0 and at most 1.0; got {rank} for {name!r}. An int gives a rank instead."
            )
        return ratio_rank(full_rank, rank)
    if not 1 <= rank <= full_rank:
        raise RankError(
            f"the rank of {name!r} must be in 1 … {full_rank}, its full rank; got {rank}. Lower it, give a ratio (float), or give a dict of ranks by layer name."
        )
    return rank


def _given(layer: Layer, rank: int | float, extra_bn: bool) -> LayerDecision:
    whole = whole_given_rank(layer.name, layer.full_rank, rank)
    reason = f"rank {whole} as given" if isinstance(rank, int) else f"rank {whole}, {rank:g} of full rank as given"
    return take(layer, whole, reason if layer.unsaving is None else f"{reason}; {layer.unsaving}", extra_bn=extra_bn)


def _if_it_can_train(layer: Layer, model: nn.Module) -> Layer:
    """The layer, with a reason if its factors would not train."""
    if layer.reason is not None:
        return layer
    return replace(layer, reason=why_dead(stack_of(layer, model)))


def _named_ranks(layers: Sequence[Layer], ranks: Mapping[str, int | float]) -> dict[str, int | float]:
    by_path = {path: layer for layer in layers for path in layer.paths}
    chosen = {}
    for given, rank in ranks.items():
        if (name := own_name(str(given))) not in by_path or not isinstance(given, str):
            known = ", ".join(layer.name for layer in layers if layer.reason is None)
            raise ValueError(
                f"each name in rank= must be a layer of the model; {given!r} is none. Layers that can be factorized: {known}."
            )
        layer = by_path[name]
        _check_named(name, layer)
        if layer.unsaving:
            warnings.warn(
                f"a pair must save work where its weight is used; {layer.name!r} stays dense: {layer.unsaving}. Name it in include= to have "
                "its parameters saved all the same.",
                UserWarning,
                stacklevel=4,
            )
            continue
        chosen[layer.name] = rank
    return chosen


def _check_named(name: str, layer: Layer) -> None:
    if layer.reason is not None:
        raise ValueError(f"layer {name!r} cannot be factorized: {layer.reason}. Leave it out of rank=.")


def _warn_above_break_even(layers: Sequence[Layer], decisions: Sequence[LayerDecision]) -> None:
    above = []
    for layer, decision in zip(layers, decisions, strict=True):
        if (
            decision.pair_parameters is not None
            and decision.rank is not None
            and decision.rank >= layer.break_even_rank
        ):
            above.append(f"{layer.name} (rank {decision.rank}, break-even {layer.break_even_rank:.1f})")
    if above:
        listing = ", ".join(above[:5]) + (f" and {len(above) - 5} more" if len(above) > 5 else "")
        warnings.warn(
            f"ranks at or above break-even make a layer no smaller: {listing}. They are used as given.",
            UserWarning,
            stacklevel=4,
        )


@outside_autocast
def merge(model: nn.Module) -> nn.Module:
    """A dense copy: every factor pair becomes one dense layer of the original class with the product as its weight.
    The original is untouched; of what is compiled, the whole or parts, the copy is not.

    Outputs agree up to rounding in evaluation mode (an extra BatchNorm is folded in with its running statistics).
    The state dict fits the untouched original class, and layers that shared a weight share it again, if there is no extra
    BatchNorm in them. A weight that was derived from others (weight norm, standardization) is a plain one now. Raises `TypeError`
    for a model that is quantized.
    """
    check_not_quantized(model, "merging")
    dense = copied(uncompiled(model))
    merged: dict[int, nn.Parameter] = {}
    layers: list[tuple[FactorPair, nn.Module]] = []
    with torch.no_grad():
        for pair in pairs_in(dense).values():
            layer = pair.to_dense()
            # Pairs that share their factors share the product again, unless each has a BatchNorm of its own in it.
            if pair.extra_norm is None:
                layer.weight = merged.setdefault(id(pair.u.weight), cast(nn.Parameter, layer.weight))
            layers.append((pair, layer))
        put_back(dense, layers)
    forget_plan(dense)
    return dense


def copied(model: nn.Module) -> nn.Module:
    """A deep copy with no compiled parts, also of models with legacy weight or spectral norm, whose weights are no leaves.
    Raises `TypeError` for a model in shards.
    """
    if (name := next((n for n, p in model.named_parameters() if hasattr(p, "full_tensor")), None)) is not None:
        raise TypeError(
            f"a copy is made of a whole model; {name!r} of this one lies in shards. Factorize before it is sharded; a rewritten one is "
            "gathered by fxrank.save, and fxrank.load puts it into a freshly built model."
        )
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for parameter in model.parameters():
        if parameter.layout is not torch.strided:  # torch copies it as if it were
            memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise TypeError(
            f"a model must be one that copy.deepcopy copies; of this {type(model).__name__} it said: {error}. Take out what cannot be "
            "copied, or give its class a __deepcopy__."
        ) from error
    # Python takes functions and weak references as they are: what they hold of the model would stay the original's.
    change_held(twin, lambda value, where: memo.get(id(value), value))
    return uncompile_parts(twin)
