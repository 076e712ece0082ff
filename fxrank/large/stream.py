"""Factorizing a model that lies in several files and need not fit into memory: one weight at a time.

The model itself is on the meta device. Its layers are found there; then each weight that may become a pair is read twice: for its
singular values, which are kept, and, when the ranks have been chosen for all, for its factors, which are written. At no time is more held
than one layer, what its decomposition takes, and the file that is being filled. With data it is one block (see `calibrated`).
"""

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.fitting import Fitting, variants
from fxrank.large.blocks import Feed
from fxrank.large.calibrated import Calibrated, for_each_part, tails
from fxrank.large.weights import Weights, without_numbers
from fxrank.oneshot import RATIO, given_ranks
from fxrank.passes.calibration.evidence import Evidence
from fxrank.passes.discovery.copies import without_followed
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.selection import Selector, candidates, require_some
from fxrank.passes.model.calls import Example
from fxrank.passes.model.names import own_state
from fxrank.passes.model.weights import is_derived
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.pairs.registry import AUTO
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.spectra.exact import Spectrum, check_finite, singular_values, truncation_error
from fxrank.passes.tracing.trace import trace
from fxrank.plan import Budget, LayerDecision, Plan
from fxrank.saving.shards import Shards, ShardWriter, check_empty
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.zero_weights import why_dead
from fxrank.training.batches import calls_of, to_device
from fxrank.wrappers import outside_autocast

log = logging.getLogger("fxrank")


@outside_autocast
def compress_shards(
    model: nn.Module,
    example: Example,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    rank: int | float | None = None,
    *,
    budget: Budget | None = None,
    include: Iterable[Selector] | Selector = (),
    exclude: Iterable[Selector] | Selector = (),
    form: str = "channel",
    calibration: Iterable[Any] | None = None,
    calibration_batches: int | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """Write the factorized model into the folder `output`, files of at most `limit` bytes (as large as the largest of `source`) with an index
    and the plan, which `fxrank.load` reads; returns the plan.

    `model`, without numbers (`saving.unfilled`, or on the meta device), is the dense one, whose numbers are in the folder `source`: `*.safetensors`
    with `model.safetensors.index.json`, by the names of its state dict. It has pairs afterwards. Everything else is as of `factorize`, but for
    statistics of BatchNorm, which stay. Factors get the weight's dtype in the file. Weights are decomposed, and blocks run, on `device`.

    `calibration` needs a model of blocks that are called one after another (see `blocks.find_blocks`), each of which must fit into memory in
    float32, with the moments of its layers and with what the blocks are given: for each batch twice the hidden states, masks and positions. Layers
    in no block are read when they are used, one at a time, but for the weights among them that become pairs. Factors are those of
    `factorize`, and so are ranks, but that under a budget they are chosen by what each block loses of what it gives, not the model; the data are gone through twice, for the ranks and for the factors, and a loader is asked for them each time.

    Raises, with nothing written, `CheckpointError` for files that are damaged or not this model's, or an output folder that holds weights,
    `NonFiniteWeightError`, `BudgetError`, `RankError` and `NothingToFactorizeError` as `factorize` does; `CalibrationError` for a model without
    such blocks, or data as `factorize` does.
    """
    check_empty(Path(output))
    shards = Shards(Path(source))
    place = torch.device(device)
    dense = without_numbers(model).eval()
    weights = Weights(dense, shards, place)
    example = to_device(example, torch.device("meta"))
    gm = trace(dense, example)
    found = [layer.if_in_form(form) for layer in without_followed(discover(gm, dense), dense)]
    gm.let_go()
    layers = candidates(found, dense, include=include, exclude=exclude)
    require_some(layers)
    feed, weighed, notes = None, dict[str, float](), list[str]()
    if calibration is not None:
        runs = without_numbers(model, to_run=True).eval()
        calls = calls_of(runs, calibration, calibration_batches, place)
        feed = Feed(runs, Weights(runs, shards, place), calls)
    fitting = _Streamed(dense, Evidence())
    chooses = budget is not None or form == AUTO
    layers = [
        _looked_at(layer, weights, fitting, variants(layer, form, budget), keep=chooses and feed is None)
        for layer in layers
    ]
    require_some(layers)
    if feed is not None:
        forms = {layer.name: variants(layer, form, budget) for layer in layers if layer.reason is None}
        every = [variant for of_layer in forms.values() for variant in of_layer]
        fitting.evidence, weighed, notes = tails(feed, every, None if budget is None else budget.target)
        for layer in layers:
            blind = [v for v in forms.get(layer.name, ()) if v.key not in fitting.evidence.known]
            _looked_at(layer, weights, fitting, blind, keep=chooses)
    if budget is not None:
        plan = fitting.plan_within(budget, layers, form, weights=weighed)
    else:
        plan = fitting.plan_at(layers, given_ranks(layers, RATIO if rank is None else rank), form)
    plan = replace(plan, note="; ".join([*([plan.note] if plan.note else []), *notes]))
    with ShardWriter(output, shards.largest if limit is None else limit) as writer:
        writing = _Writing(dense, plan, weights, writer)
        if feed is None:
            writing.write(weights.keys, {})
        else:
            planned = {d.name: d.form for d in plan.layers if d.factorized}
            chosen = [layer.if_in_form(planned[layer.name]) for layer in layers if layer.name in planned]
            decided: list[LayerDecision] = []

            def write(part: Calibrated) -> None:
                decisions, factors = part.decided(plan)
                decided.extend(decisions)
                writing.write([n for n in weights.keys if feed.blocks.part_of(n) == part.path], factors)

            for_each_part(feed, chosen, write)
            plan = plan.with_layers(decided)
        writer.finish(plan)
    apply_plan(model, plan, split=False)
    return plan


class _Writing:
    """Of a model that gets the plan's pairs, without numbers, for their names."""

    def __init__(self, model: nn.Module, plan: Plan, weights: Weights, writer: ShardWriter) -> None:
        self._weights, self._writer = weights, writer
        replacements = apply_plan(model, plan, split=False)
        self._replaced = {id(r.weight): r for r in replacements}
        self._places = {id(value): name for name, value in reversed(own_state(model).items())}
        names = {id(r.pair.u.weight): r.name for r in replacements}
        pairs = pairs_in(model).values()
        self._of_bias = {id(pair.bias): names[id(pair.u.weight)] for pair in pairs if pair.bias is not None}

    def write(self, names: Iterable[str], factors: Mapping[str, tuple[Tensor, ...]]) -> None:
        """What becomes of these tensors in the files; pairs of layers that are not in `factors` know the weight alone."""
        for name in names:
            key, tensor = self._weights.keys[name], self._weights.read(name)
            replacement = self._replaced.get(key)
            if replacement is None:
                gained = factors.get(self._of_bias.get(key, ""), ())[2:]
                for bias in gained:
                    tensor = tensor + bias.reshape(tensor.shape).to(tensor)
                self._writer.add(self._places[key], tensor.cpu())
                continue
            pair, found = replacement.pair, factors.get(replacement.name)
            for held, numbers in zip(pair.held, _numbers(pair, tensor, name, found), strict=True):
                self._writer.add(self._places[id(held)], numbers)
            if pair.bias is not None and id(pair.bias) not in self._weights.keys.values():
                assert found is not None
                bias = found[2].reshape(pair.bias.shape).to(tensor.dtype)
                self._writer.add(self._places[id(pair.bias)], bias.cpu())
            log.info("factorized %s", name)


def _numbers(pair: FactorPair, weight: Tensor, name: str, factors: tuple[Tensor, ...] | None) -> list[Tensor]:
    """What a pair on the meta device holds (see `FactorPair.held`), of these factors, or else of this weight's."""
    if factors is None:
        stack = type(pair).unroll(pair, weight)
        check_finite(stack, name)
        factors = Spectrum(stack).factors(pair.rank)
    real = copy.deepcopy(pair).to_empty(device="cpu")
    real.fill(factors[0].cpu(), factors[1].cpu())
    return [t.detach().to(weight.dtype if t.is_floating_point() else t.dtype) for t in real.held]


def _looked_at(layer: Layer, weights: Weights, fitting: "_Streamed", forms: Sequence[Layer], *, keep: bool) -> Layer:
    """The layer, with a reason if its weight cannot become a pair; its singular values in these forms are kept, if they are to be."""
    if layer.reason is not None or not forms:
        return layer
    dense = dense_at(fitting.model, layer.name)
    if is_derived(dense):
        return replace(layer, reason="its weight is made of others, which are not read together")
    weight = weights.of(dense)
    for variant in forms:
        assert variant.unrolled.pair is not None, layer.name
        stack = variant.unrolled.pair.unroll(dense, weight)
        check_finite(stack, layer.name)
        if (reason := why_dead(stack)) is not None:
            return replace(layer, reason=reason)
        if keep and variant.key not in fitting.sigmas:
            fitting.sigmas[variant.key] = singular_values(stack)
    log.info("looked at %s", layer.name)
    return layer


@dataclass
class _Streamed(Fitting):
    """Of weights of which nothing but the singular values is kept, and of data of which nothing but tails are; they become factors later."""

    sigmas: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def _sigma(self, layer: Layer) -> Tensor:
        return super()._sigma(layer) if layer.key in self.evidence.known else self.sigmas[layer.key]

    def _loss(self, layer: Layer, rank: int) -> float:
        known = layer.key in self.evidence.known
        return super()._loss(layer, rank) if known else truncation_error(self.sigmas[layer.key], rank)

    def _decided(self, layer: Layer, rank: int, reason: str, *, gains_bias: bool | None = None) -> LayerDecision:
        decision = super()._decided(layer, rank, reason, gains_bias=gains_bias)
        if layer.key in self.sigmas:
            decision = replace(decision, truncation_error=round(self._loss(layer, rank), 6))
        return decision
