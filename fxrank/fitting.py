"""One-shot factorization's own questions: which forms a layer may take, what a rank would lose, and the decision with its factors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

from torch import Tensor, nn

from fxrank.decisions import keep as keep_dense
from fxrank.decisions import take
from fxrank.passes.calibration.evidence import Evidence
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.pairs.registry import AUTO
from fxrank.passes.spectra.exact import Spectrum
from fxrank.plan import Budget, LayerDecision, Plan
from fxrank.policies.budget import Option, counted, ladders_of, norm_parameters, ranks_within, why_unspent
from fxrank.policies.forms import spectrum_of
from fxrank.policies.outputs import Alone, Outputs
from fxrank.policies.path import FIRST, Path, Way, farthest
from fxrank.policies.times import Trials, ranks_within_time
from fxrank.switch.apply_plan import Factors

T = TypeVar("T")


class Agree(Protocol):
    """What the first of several processes makes, in all of them."""

    def __call__(self, decide: Callable[[], T], /) -> T: ...


def by_itself(decide: Callable[[], T]) -> T:
    """The `Agree` of one process."""
    return decide()


HALF = 0.5
"""Of a layer's parameters: at such a pair what it does to the model is measured, where no target says how small it is to be."""
ALONE = "; factors of the weight alone: "
"""What comes in a reason before why they do not know the data."""


def variants(layer: Layer, form: str, budget: Budget | None = None) -> list[Layer]:
    """The layer in each form that it may take where a user asks for this one, under this budget."""
    if form == AUTO:
        saves_parameters = budget is not None and budget.of == "params"
        others = [other for other in layer.others if other.pair and (saves_parameters or other.pair.saves_time)]
        return [layer, *(layer.in_form(other.form) for other in others)]
    return [layer.if_in_form(form)]


@dataclass
class Fitting:
    """Of one model, with what calibration knows of it. Asking fills `factors`: of the layers that were decided, what had to be
    computed for it.
    """

    model: nn.Module
    evidence: Evidence
    extra_bn: bool = False
    factors: Factors = field(default_factory=dict)
    search: bool = True
    """Whether the best factors are looked for where that takes long (see `SpatialProjection`)."""
    _spectra: dict[tuple[str, str], Spectrum] = field(default_factory=dict)

    def plan_at(self, layers: Sequence[Layer], ranks: dict[str, tuple[int, str]], form: str) -> Plan:
        """The plan with these ranks, of the layers' present forms, and the reasons for them. Where several forms are open it is the one
        that loses least with no more parameters.
        """
        decisions = []
        for layer in layers:
            if layer.reason is not None:
                decisions.append(keep_dense(layer, layer.reason))
                continue
            rank, reason = ranks[layer.name]
            choices = [(variant, _same_size(layer, rank, variant)) for variant in variants(layer, form)]
            if len(choices) > 1:
                choices = sorted((c for c in choices if c[1]), key=lambda c: self._loss(*c))
            best, its_rank = choices[0]
            other = "" if best.form == layer.form else f"; {best.form}, rank {its_rank}, loses less at its size"
            decisions.append(self._decided(best, its_rank, reason + other))
        return self._plan(decisions)

    def plan_within(
        self,
        budget: Budget,
        layers: Sequence[Layer],
        form: str,
        trials: Trials | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> Plan:
        """The plan that keeps to the budget; `trials` measure one of time. Errors as of `ranks_within` and `ranks_within_time`."""
        forms = {
            layer.name: [(variant, self._sigma(variant)) for variant in variants(layer, form, budget)]
            for layer in layers
            if layer.reason is None
        }
        if trials is None:
            chosen, reached = ranks_within(budget, layers, self.model, forms, extra=self._extra, weights=weights)
            decisions = self._decisions(budget, layers, chosen)
            if budget.of == "params":
                reached = replace(reached, reached=reached.reached - self._not_gained(decisions, chosen))
            note = why_unspent(reached)
        else:
            chosen, reached, note = ranks_within_time(
                budget,
                forms,
                trials.costs([variant for of_layer in forms.values() for variant, _ in of_layer]),
                trials.dense_ms(),
                lambda ways: trials.share(self._plan(self._decisions(budget, layers, ways)), self.factors),
                trials.device,
                weights,
            )
            self.factors.clear()
            decisions = self._decisions(budget, layers, chosen)
        return self._plan(decisions, reached, note)

    def weights(
        self, budget: Budget, layers: Sequence[Layer], form: str, outputs: Outputs, agree: Agree = by_itself
    ) -> dict[str, float]:
        """How much the model loses for what each layer loses, for `plan_within`: measured with pairs of the target's share of every layer's
        parameters, and once more with those that are chosen then; of both, those with whose ranks the model loses less. (Under a target of
        time, the first.) On a ResNet-56 with 0.3 of its parameters the first are no better than none, on MiniLM with 0.6 they are best.

        In all processes of several. Raises `ValueError` where the outputs cannot be compared.
        """
        open_layers = [layer for layer in layers if layer.reason is None]
        known = [outputs.weights(self.alone(at_share(open_layers, budget.target)))]
        if budget.is_time or not known[0]:
            return known[0]
        in_form = {(v.name, v.form): v for layer in open_layers for v in variants(layer, form, budget)}
        draft: Fitting = replace(self, factors={}, search=False)

        def chosen() -> dict[Layer, int]:
            plan = draft.plan_within(budget, layers, form, weights=known[-1])
            return {in_form[d.name, d.form]: d.rank for d in plan.layers if d.rank is not None}

        ranks = [agree(chosen)]
        known.append(known[0] | outputs.weights(self.alone(ranks[0]), known[0]))
        ranks.append(agree(chosen))
        outputs.see_dense()
        lost = [outputs.lost(*self._pairs(some)) for some in ranks]
        return known[lost.index(min(lost))]

    def alone(self, ranks: Mapping[Layer, int]) -> Iterator[Alone]:
        """Each of the layers with a pair of its rank, made when it is asked for. A bias is gained wherever the data are centred: BatchNorms are
        not measured again for each.
        """
        for layer, rank in ranks.items():
            yield Alone(layer.name, *self._pairs({layer: rank}, gains_bias=True), self._loss(layer, rank) ** 2)

    def _pairs(self, ranks: Mapping[Layer, int], gains_bias: bool | None = None) -> tuple[Plan, Factors]:
        """For a trial."""
        draft: Fitting = replace(self, factors={}, search=False)
        decisions = [draft._decided(layer, rank, "", gains_bias=gains_bias) for layer, rank in ranks.items()]
        return draft._plan(decisions), draft.factors

    def plan_keeping(
        self,
        keep: float,
        layers: Sequence[Layer],
        form: str,
        outputs: Outputs,
        agree: Agree = by_itself,
    ) -> Plan:
        """The plan of about the fewest parameters with which the model keeps this share of its outputs, along two paths: with layers' losses
        weighed, which is better where a model is to lose little, and as they are. (ResNet-56: 0.48 of all parameters for 0.51 at keep=0.99, and
        0.25 for 0.23 at 0.95.) All processes of several ask for it, and `agree` gives them the first one's paths. Raises `ValueError` where the outputs cannot be compared.
        """
        open_layers = [layer for layer in layers if layer.reason is None]
        forms = {a.name: [(v, self._sigma(v)) for v in variants(a, form)] for a in open_layers}
        in_form = {(v.name, v.form): v for of_layer in forms.values() for v, _ in of_layer}

        def path(weights: Mapping[str, float]) -> Path:
            return Path.of(ladders_of(forms, counted("params", self._extra), weights))

        def saved(ways: Mapping[str, Way]) -> int:
            layers = ((in_form[name, its_form], rank) for name, (its_form, rank) in ways.items())
            return sum(layer.parameters - layer.pair_parameters(rank) for layer, rank in layers)

        def lost_with(ways: Mapping[str, Way]) -> float:
            return outputs.lost(*self._pairs({in_form[name, its_form]: r for name, (its_form, r) in ways.items()}))

        try:
            outputs.see_dense()
            weights = outputs.weights(self.alone(at_share(open_layers, HALF)))
            found = [
                farthest(agree(partial(path, given)), lost_with, 1 - keep, 1.0 if given else FIRST)
                for given in ([weights, {}] if weights else [{}])
            ]
            ways, lost = max(found, key=lambda one: saved(one[0]))
        except ValueError as error:
            raise ValueError(
                f"keep={keep:g} compares a model's outputs with those of copies with pairs, which cannot be done here: {error} Give a rank, or a "
                "target_…, instead."
            ) from error
        why, decisions = f"the model keeps {keep:g} of its outputs", []
        for layer in layers:
            if layer.name not in ways:
                decisions.append(keep_dense(layer, layer.reason or f"worth its parameters where {why}"))
                continue
            its_form, rank = ways[layer.name]
            variant = in_form[layer.name, its_form]
            decisions.append(self._decided(variant, rank, f"rank {rank} of {variant.full_rank}: {why}"))
        note = f"with the ranks chosen the model kept {1 - lost:.4f} of its outputs in {outputs.number} of the batches"
        return self._plan(decisions, note=note)

    def _decisions(self, budget: Budget, layers: Sequence[Layer], chosen: Mapping[str, Option]) -> list[LayerDecision]:
        asked = f"under target_{budget.of}={budget.target:g}"
        decisions = []
        for layer in layers:
            option = chosen.get(layer.name)
            if layer.reason is not None or option is None or option.rank is None:
                decisions.append(keep_dense(layer, layer.reason or f"worth its cost {asked}"))
            else:
                reason = f"rank {option.rank} of {option.layer.full_rank} {asked}"
                decisions.append(self._decided(option.layer, option.rank, reason))
        return decisions

    def _extra(self, layer: Layer, rank: int) -> int:
        """Parameters of a normalization, and of a bias that the pair may gain, beside its factors."""
        gained = layer.weight_shape[0] if self.evidence.may_gain_bias(layer) else 0
        return norm_parameters(self.extra_bn)(layer, rank) + gained

    def _not_gained(self, decisions: Sequence[LayerDecision], chosen: Mapping[str, Option]) -> float:
        """The share of the parameters that biases were to have that no pair needed."""
        kept = (d for d in decisions if d.factorized and not d.gains_bias)
        spared = sum(d.weight_shape[0] for d in kept if self.evidence.may_gain_bias(chosen[d.name].layer))
        return spared / sum(p.numel() for p in self.model.parameters())

    def fitted(self, plan: Plan, layers: Sequence[Layer]) -> Plan:
        """A plan that is given, with factors from the data."""
        by_name = {layer.name: layer for layer in layers}
        decisions = [
            self._with_data(d, by_name[d.name], d.gains_bias) if d.factorized and d.name in by_name else d
            for d in plan.layers
        ]
        return replace(plan, layers=tuple(decisions), calibration_batches=self.evidence.batches or None)

    def _plan(self, decisions: list[LayerDecision], budget: Budget | None = None, note: str = "") -> Plan:
        batches = self.evidence.batches or None
        return Plan("factorize", tuple(decisions), note=note, budget=budget, calibration_batches=batches)

    def _sigma(self, layer: Layer) -> Tensor:
        known = self.evidence.known.get(layer.key)
        return self._spectrum(layer).sigma if known is None else known.sigma

    def _loss(self, layer: Layer, rank: int) -> float:
        """Relative."""
        known = self.evidence.known.get(layer.key)
        if known is None:
            return self._spectrum(layer).truncation_error(rank)
        return known.output_error(rank)

    def _spectrum(self, layer: Layer) -> Spectrum:
        key = layer.key
        if key not in self._spectra:
            self._spectra[key] = spectrum_of(layer, self.model)
        return self._spectra[key]

    def _decided(self, layer: Layer, rank: int, reason: str, *, gains_bias: bool | None = None) -> LayerDecision:
        decision = take(layer, rank, reason, extra_bn=self.extra_bn)
        found = self._spectra.get(layer.key)
        if found is not None and layer.key not in self.evidence.known:
            self.factors[layer.name] = found.factors(rank)
            decision = replace(decision, truncation_error=round(found.truncation_error(rank), 6))
        return self._with_data(decision, layer, gains_bias)

    def _with_data(self, decision: LayerDecision, layer: Layer, gains_bias: bool | None = None) -> LayerDecision:
        if not self.evidence.batches:
            return decision
        fit = self.evidence.fit(*layer.key, decision.rank or 0, gains_bias, search=self.search)
        decision = replace(decision, reason=decision.reason.partition(ALONE)[0])  # of a plan that is repeated
        if fit is None:
            why = self.evidence.blind.get(layer.key, "calibration did not look at it")
            return replace(decision, reason=f"{decision.reason}{ALONE}{why}")
        self.factors[layer.name] = fit.factors
        if (note := self.evidence.notes.get(layer.key)) is not None:
            decision = replace(decision, reason=decision.reason.removesuffix(f"; {note}") + f"; {note}")
        return replace(decision, gains_bias=fit.gains_bias, output_error=round(fit.output_error, 6))


def at_share(layers: Iterable[Layer], share: float) -> dict[Layer, int]:
    """The ranks at which the layers' pairs have so large a share of their parameters, but 1 at least."""
    return {layer: max(1, layer.rank_within(int(share * layer.parameters))) for layer in layers}


def _same_size(layer: Layer, rank: int, variant: Layer) -> int:
    """The rank in another form with no more parameters; in the layer's own it is the one given."""
    if variant.form == layer.form:
        return rank
    return variant.rank_within(layer.pair_parameters(rank))
