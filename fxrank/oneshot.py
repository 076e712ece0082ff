"""Copies of a model, rewritten: factorized at ranks that are given, and merged back into dense layers."""

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from fxrank.distributed.team import Team
from fxrank.fitting import Fitting, by_itself, variants
from fxrank.passes.calibration.batchnorm import measure_batchnorms
from fxrank.passes.calibration.evidence import Evidence, before_batchnorm, gather
from fxrank.passes.calibration.processes import alone, together
from fxrank.passes.discovery.copies import without_followed
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.discovery.selection import Selector, candidates, require_some
from fxrank.passes.errors import NothingFactorizedWarning, RankError
from fxrank.passes.model.calls import Call, Example, own_call
from fxrank.passes.model.compiled import uncompiled
from fxrank.passes.model.held import change_held
from fxrank.passes.model.names import own_name
from fxrank.passes.model.quantized import check_not_quantized
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.registry import AUTO, check_form
from fxrank.passes.rewriting.install import pairs_in, put_back, uncompile_parts
from fxrank.passes.tracing.trace import trace
from fxrank.plan import LayerDecision, Plan
from fxrank.policies.budget import asked_budget
from fxrank.policies.outputs import Outputs, check_keep
from fxrank.policies.ranks import ratio_rank
from fxrank.policies.times import Trials
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.plan_of import forget_plan, has_plan
from fxrank.switch.trial import misfits, with_reasons
from fxrank.switch.zero_weights import why_dead, without_zero_weights
from fxrank.torch_private import pytree
from fxrank.training.batches import calls_of
from fxrank.wrappers import outside_autocast

TRIED, TRIED_BYTES = 16, 2**28
"""Calibration batches on which pairs are tried, where a share of the model's outputs is to be kept: so many, which are held meanwhile, and no
more after so much.
"""
Rank = int | float | Mapping[str, int | float] | Plan
RATIO = 0.25
"""The rank of every layer, as a share of its full rank, where nothing else is asked for."""


@outside_autocast
def factorize(
    model: nn.Module,
    example_inputs: Example,
    rank: Rank | None = None,
    *,
    include: Iterable[Selector] | Selector = (),
    exclude: Iterable[Selector] | Selector = (),
    form: str = "channel",
    extra_bn: bool = False,
    target_params: float | None = None,
    target_macs: float | None = None,
    target_step_time: float | None = None,
    target_latency: float | None = None,
    keep: float | None = None,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int | None = None,
    recalibrate: bool = True,
) -> nn.Module:
    """A factorized copy of `model`, same class; the original is untouched. No part of the copy is compiled.

    `rank`: a float in (0, 1] is a ratio of each layer's full rank (rounded down, at least 1; `1.0` makes exact
    full-rank pairs), an int is a rank for all layers, a dict gives one or the other by layer name and names its own
    layers (one whose pair would be multiplied out in every call stays dense, with a warning), a `Plan` is applied as it stands. Ranks are used as given; one warning lists those above break-even. The
    first and last layer stay dense unless included or named (`include="*"` takes everything). `fxrank.plan_of`
    returns the decisions with their reasons. Layers that have pairs of this `form` get them, the others those of their own: `"qkv"`
    splits fused projections in three, `"spatial"` two-dimensional kernels into one down and one across, `"gauge"` has rows of the
    second factor that are the identity, so that its pairs are always smaller than their layers, though not faster; see `register_pair`.
    `"auto"` takes for each layer, of all forms that it may have, the one that loses least with no more parameters, or, under a target,
    at its cost; `"gauge"` only under `target_params`.
    Without a rank it is a quarter of each layer's full rank, or what a target leaves, or `keep`.

    `target_params` and `target_macs` are budgets instead of ranks: the share, in (0, 1], of all the model's parameters, or of the
    multiply-adds of its weight layers, that the copy may have. The ranks are then chosen so that the least is lost (see
    `policies.budget`), and layers that are worth their cost stay dense. With `calibration` what a layer loses is weighed by what the whole model
    loses with its pair alone, on the first batches, in a copy for each (see `policies.outputs`); the note says where that cannot be compared. `target_step_time` and `target_latency` are the share of the
    milliseconds of the model's forward and backward in training mode, or of its forward alone in evaluation mode, with these inputs on the
    device where they are: the layers are timed, and then whole copies (see `policies.times`). `plan_of(copy).budget` says what was reached.

    `keep` is the share, in (0, 1), of what the model gives on the `calibration` that the copy must keep, of the mean square of its outputs
    about their mean: the ranks are those of about the fewest parameters with which it does, found by trying some in copies on up to `TRIED`
    of the batches (see `policies.path`). With `recalibrate` BatchNorms are measured again in these copies, and in the dense one that they are
    compared with. The plan's note says what was kept.

    `calibration` is a loader, or a list of batches as a training loader yields them, of which `calibration_batches` are taken:
    the factors are then those whose outputs differ least on these data (see `passes.calibration.projection`), a pair may gain a
    bias, and with `recalibrate` the statistics of every BatchNorm are measured again on the copy. A plan's `output_error` says what is
    lost, and the reason which layers' factors are made of the weight alone. Where torch.distributed is initialized every process calls
    this, each with its own part of the data: what they see is added up.

    Raises `RankError` for a rank of 0 or above full rank, `TypeError` for another type, `NothingToFactorizeError`,
    `TraceError`, `NonFiniteWeightError`, `PlanMismatchError`; where nothing is left because of what the layers do, the copy is dense, with
    a `NothingFactorizedWarning`, and so where no pairs that were tried `keep` enough. A weight of zeros stays dense, whoever names it in a plan: factors of
    zeros would never train. `BudgetError` for a target out of reach, `CalibrationError` for data that yield nothing, or activations
    that are not finite, `ValueError` for a rank beside a target, two targets, or a `keep` out of bounds, without data, or of a model
    whose outputs cannot be compared.
    """
    if form != AUTO:
        check_form(form)
    targets = {"params": target_params, "macs": target_macs, "step_time": target_step_time, "latency": target_latency}
    budget = asked_budget(rank, keep, **targets)
    if keep is not None:
        check_keep(keep)
        if calibration is None:
            raise ValueError(
                f"keep={keep} is a share of what the model gives on data; got no calibration=. Give a loader, or a list of batches."
            )
    model = uncompiled(model)
    small = copied(model)
    calls = None if calibration is None else calls_of(small, calibration, calibration_batches)
    team = None if calls is None else Team.of(small)
    of_all, agree = (alone, by_itself) if team is None else (team.of_all, team.agree)
    if isinstance(rank, Plan) and calls is None:
        apply_plan(small, without_zero_weights(small, rank), example=example_inputs)
        return small
    gm = trace(small, example_inputs)
    layers = discover(gm, small)
    notes: list[str] = []
    if isinstance(rank, Plan):
        rank = without_zero_weights(small, rank)
        layers = _as_planned(layers, rank)
    else:
        layers = [_if_it_can_train(layer.if_in_form(form), small) for layer in without_followed(layers, small)]
        if isinstance(rank, Mapping):
            layers, named = _only_named(layers, rank)
        else:
            layers, named = candidates(layers, small, include=include, exclude=exclude), set()
        layers = with_reasons(layers, misfits(layers, small, example_inputs, gm, notes, form))
        for layer in layers:
            if layer.name in named:
                _check_named(layer.name, layer)
        if not isinstance(rank, Mapping) and not pairs_in(small):
            require_some(layers)
    absorbed = before_batchnorm(gm.graph, small, layers) if recalibrate else frozenset()
    gm.let_go()
    evidence = Evidence()
    if calls is not None:
        open_forms = [
            v
            for a in layers
            if a.reason is None
            for v in (variants(a, form, budget) if budget or form == AUTO else [a])
        ]
        evidence = gather(small, open_forms, calls, absorbed, of_all)
    fitting = Fitting(small, evidence, extra_bn)

    outputs, weights = None, None
    if calls is not None and (budget is not None or keep is not None):
        tried: list[Call] = []  # the same each time: a loader that shuffles, or draws, has others in each pass
        with torch.random.fork_rng():  # a loader draws when it is asked
            together(lambda: tried.extend(_some_of(calls)), of_all)

        def some() -> Generator[Call]:
            yield from map(own_call, tried)

        settle = partial(measure_batchnorms, calls=some, of_all=of_all) if recalibrate else None
        outputs = Outputs(small, partial(copied, small), some, of_all, example_inputs, settle=settle)
    if outputs is not None and budget is not None:
        try:
            weights = fitting.weights(budget, layers, form, outputs, agree)
        except Exception as error:  # of outputs that cannot be compared, or for want of memory
            why = str(error).partition("\n")[0]
            notes.append(f"ranks by what the layers themselves lose, as what the model loses cannot be measured: {why}")

    def decide() -> Plan:
        if isinstance(rank, Plan):
            return fitting.fitted(rank, layers)
        if keep is not None:
            assert outputs is not None
            return fitting.plan_keeping(keep, layers, form, outputs, agree)
        if budget is None:
            return fitting.plan_at(layers, given_ranks(layers, RATIO if rank is None else rank), form)
        trials = None
        if budget.is_time:
            trials = Trials(partial(copied, small), example_inputs, backward=budget.of == "step_time")
        return fitting.plan_within(budget, layers, form, trials, weights)

    if team is None or team.size == 1:
        plan = decide()
    else:  # the first one's: a clock may tell each something else
        decided = decide() if keep is not None else None  # that one takes all of them
        plan = team.agree(lambda: decided or decide())
        fitting.factors.clear()
        plan = fitting.fitted(plan, _as_planned(layers, plan))
    if budget is None and not isinstance(rank, Plan):
        _warn_above_break_even(layers, plan.layers)
    if keep is not None and not plan.R and any(layer.reason is None for layer in layers):
        text = f"nothing was factorized: no pairs that were tried keep {keep:g} of the model's outputs. Lower keep, or let form='auto' choose."
        warnings.warn(text, NothingFactorizedWarning, stacklevel=3)
    plan = replace(plan, note="; ".join([*([plan.note] if plan.note else []), *notes]))
    if plan.R or not (pairs_in(small) and has_plan(small)):  # else the plan that made the pairs stands
        apply_plan(small, plan, example=example_inputs, factors=fitting.factors)
    if calls is not None and recalibrate:
        measure_batchnorms(small, calls, of_all)
    return small


def _some_of(calls: Callable[[], Iterable[Call]]) -> Iterator[Call]:
    """The first `TRIED`, as many of them as `TRIED_BYTES` hold."""
    held = 0
    for call in islice(calls(), TRIED):
        yield call
        held += sum(t.nbytes for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor))
        if held > TRIED_BYTES:
            return


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


def given_ranks(layers: Sequence[Layer], rank: int | float | Mapping[str, int | float]) -> dict[str, tuple[int, str]]:
    """The whole rank of each layer without a `reason`, by name, and how it was given."""
    if isinstance(rank, Mapping):
        by_path = {path: layer.name for layer in layers for path in layer.paths}
        asked = {by_path[own_name(given)]: one for given, one in rank.items()}
    else:
        asked = {layer.name: rank for layer in layers if layer.reason is None}
    found = {}
    for layer in layers:
        if (one := asked.get(layer.name)) is not None and layer.reason is None:
            whole = whole_given_rank(layer.name, layer.full_rank, one)
            reason = f"rank {whole}" + ("" if isinstance(one, int) else f", {one:g} of full rank") + " as given"
            found[layer.name] = whole, reason if layer.unsaving is None else f"{reason}; {layer.unsaving}"
    return found


def _if_it_can_train(layer: Layer, model: nn.Module) -> Layer:
    """The layer, with a reason if its factors would not train."""
    if layer.reason is not None:
        return layer
    return replace(layer, reason=why_dead(stack_of(layer, model)))


def _only_named(layers: Sequence[Layer], ranks: Mapping[str, int | float]) -> tuple[list[Layer], set[str]]:
    """The layers, with a reason on those that `rank=` does not name, or whose pairs would save nothing, and the names of the rest."""
    by_path = {path: layer for layer in layers for path in layer.paths}
    named = set()
    for given in ranks:
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
        named.add(layer.name)
    kept = [a if a.name in named or a.reason else replace(a, reason=a.unsaving or "not named in rank=") for a in layers]
    return kept, named


def _as_planned(layers: Sequence[Layer], plan: Plan) -> list[Layer]:
    """The layers that the plan factorizes, in its forms, with a reason on the others."""
    planned = {decision.name: decision for decision in plan.layers if decision.factorized}
    return [
        layer.if_in_form(planned[layer.name].form)
        if layer.name in planned
        else replace(layer, reason="not in the plan")
        for layer in layers
    ]


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
    model = uncompiled(model)
    check_not_quantized(model, "merging")
    dense = copied(model)
    merged: dict[int, nn.Parameter] = {}
    layers: list[tuple[FactorPair, nn.Module]] = []
    with torch.no_grad():
        for pair in pairs_in(dense).values():
            layer = pair.dense_layer()
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
