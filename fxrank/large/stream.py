"""Factorizing a model that lies in several files and need not fit into memory: one weight at a time.

The model itself is on the meta device. Its layers are found there; then each weight that may become a pair is read twice: for its
singular values, which are kept, and, when the ranks have been chosen for all, for its factors, which are written. At no time is more held
than one layer, what its decomposition takes, and the file that is being filled.
"""

import copy
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fxrank.fitting import Fitting, variants
from fxrank.oneshot import RATIO, given_ranks
from fxrank.passes.calibration.evidence import Evidence
from fxrank.passes.discovery.copies import without_followed
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.discovery.selection import Selector, candidates, require_some
from fxrank.passes.errors import CheckpointError
from fxrank.passes.model.calls import Example
from fxrank.passes.model.names import own_state
from fxrank.passes.model.weights import is_derived, weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.spectra.exact import Spectrum, check_finite, singular_values, truncation_error
from fxrank.passes.tracing.trace import trace
from fxrank.plan import Budget, LayerDecision, Plan
from fxrank.saving.shards import Shards, ShardWriter, check_empty
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.zero_weights import why_dead

log = logging.getLogger("fxrank")

COMPUTED = "rotary_emb.inv_freq"
"""Older files of language models hold these angles in every layer; the models compute them now."""


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
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> Plan:
    """Write the factorized model into the folder `output`, files of at most `limit` bytes (as large as the largest of `source`) with an index
    and the plan, which `fxrank.load` reads; returns the plan.

    `model`, on the meta device, is the dense one, whose numbers are in the folder `source`: `*.safetensors` with
    `model.safetensors.index.json`, by the names of its state dict. It has pairs afterwards, without numbers. Everything else is as of
    `factorize`, but that no data are looked at: factors are those of the weights. They get the weight's dtype in the file. Weights are decomposed on `device`.

    Raises, with nothing written, `CheckpointError` for files that are damaged or not this model's, or an output folder that holds weights,
    `NonFiniteWeightError`, `BudgetError`, `RankError` and `NothingToFactorizeError` as `factorize` does.
    """
    check_empty(Path(output))
    shards = Shards(Path(source))
    weights = _Weights(model, shards, torch.device(device))
    gm = trace(model.eval(), example)
    found = [layer.if_in_form(form) for layer in without_followed(discover(gm, model), model)]
    gm.let_go()
    layers = candidates(found, model, include=include, exclude=exclude)
    require_some(layers)
    fitting = _Streamed(model, Evidence())
    layers = [_looked_at(layer, weights, fitting, form, budget) for layer in layers]
    require_some(layers)
    if budget is not None:
        plan = fitting.plan_within(budget, layers, form)
    else:
        plan = fitting.plan_at(layers, given_ranks(layers, RATIO if rank is None else rank), form)
    replaced = {id(r.weight): r.pair for r in apply_plan(model, plan, split=False)}
    places = {id(value): name for name, value in reversed(own_state(model).items())}
    with ShardWriter(output, shards.largest if limit is None else limit) as writer:
        for name, key in weights.keys.items():
            tensor = weights.read(name)
            if (pair := replaced.get(key)) is None:
                writer.add(places[key], tensor.cpu())
                continue
            for held, numbers in zip(pair.held, _numbers(pair, tensor, name), strict=True):
                writer.add(places[id(held)], numbers)
            log.info("factorized %s", name)
        writer.finish(plan)
    return plan


def _numbers(pair: FactorPair, weight: Tensor, name: str) -> list[Tensor]:
    """What a pair on the meta device holds (see `FactorPair.held`), for this weight."""
    stack = type(pair).unroll(pair, weight)
    check_finite(stack, name)
    real = copy.deepcopy(pair).to_empty(device="cpu")
    u, v = Spectrum(stack).factors(pair.rank)
    real.fill(u.cpu(), v.cpu())
    return [t.detach().to(weight.dtype if t.is_floating_point() else t.dtype) for t in real.held]


class _Weights:
    """The numbers of a model on the meta device."""

    def __init__(self, model: nn.Module, source: Shards, device: torch.device) -> None:
        """Raises `CheckpointError` unless the files hold each tensor of the model once, under one of its names, and nothing else."""
        self._source, self._device = source, device
        state = own_state(model)
        self.keys: dict[str, int] = {}
        """By the name in the files the `id` of the model's tensor, in the order of the files."""
        fix = "Read the whole model with the library that wrote it, and give it to fxrank.factorize"
        known: set[int] = set()
        for name, shape in source.shapes.items():
            if name not in state and name.endswith(COMPUTED):
                continue
            if name not in state:
                raise CheckpointError(
                    f"every stored tensor must be one of the model's; {type(model).__name__} has no {name!r}. {fix}."
                )
            if shape != tuple(state[name].shape):
                raise CheckpointError(
                    f"stored shapes must fit the model; {name!r} is {shape} in the files and {tuple(state[name].shape)} in its configuration. {fix}."
                )
            if id(state[name]) not in known:  # else tied, and stored under both names
                self.keys[name] = id(state[name])
                known.add(id(state[name]))
        if missing := [name for name, value in state.items() if id(value) not in known]:
            raise CheckpointError(
                f"every tensor of the model must be stored; {missing[0]!r} is not in {source.folder}. {fix}."
            )
        self._names = {key: name for name, key in self.keys.items()}

    def of(self, dense: nn.Module) -> Tensor:
        """The weight of a layer."""
        return self.read(self._names[id(weight_of(dense))])

    def read(self, name: str) -> Tensor:
        """A tensor, on the device."""
        return self._source.read(name).to(self._device)


def _looked_at(layer: Layer, weights: _Weights, fitting: "_Streamed", form: str, budget: Budget | None) -> Layer:
    """The layer, with a reason if its weight cannot become a pair, once what must be known of its numbers is."""
    if layer.reason is not None:
        return layer
    dense = dense_at(fitting.model, layer.name)
    if is_derived(dense):
        return replace(layer, reason="its weight is made of others, which are not read together")
    weight = weights.of(dense)
    open_forms = variants(layer, form, budget)
    for variant in open_forms:
        assert variant.unrolled.pair is not None, layer.name
        stack = variant.unrolled.pair.unroll(dense, weight)
        check_finite(stack, layer.name)
        if (reason := why_dead(stack)) is not None:
            return replace(layer, reason=reason)
        if variant.key not in fitting.sigmas and (budget is not None or len(open_forms) > 1):
            fitting.sigmas[variant.key] = singular_values(stack)
    log.info("looked at %s", layer.name)
    return layer


@dataclass
class _Streamed(Fitting):
    """Of weights of which nothing but the singular values is kept, and which become factors later."""

    sigmas: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def _sigma(self, layer: Layer) -> Tensor:
        return self.sigmas[layer.key]

    def _loss(self, layer: Layer, rank: int) -> float:
        return truncation_error(self._sigma(layer), rank)

    def _decided(self, layer: Layer, rank: int, reason: str) -> LayerDecision:
        decision = super()._decided(layer, rank, reason)
        if layer.key in self.sigmas:
            decision = replace(decision, truncation_error=round(self._loss(layer, rank), 6))
        return decision
