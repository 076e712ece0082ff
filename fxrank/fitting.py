"""One-shot factorization's own questions: which forms a layer may take, what a rank would lose, and the decision with its factors."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fxrank.decisions import keep, take
from fxrank.passes.calibration.evidence import Evidence
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.pairs.registry import AUTO
from fxrank.passes.spectra.exact import Spectrum
from fxrank.plan import Budget, LayerDecision, Plan
from fxrank.policies.budget import ranks_within
from fxrank.policies.forms import spectrum_of
from fxrank.switch.apply_plan import Factors


def variants(layer: Layer, form: str) -> list[Layer]:
    """The layer in each form that it may take where a user asks for this one."""
    if form == AUTO:
        return [layer, *(layer.in_form(other) for other in layer.other_forms)]
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
    _spectra: dict[tuple[str, str], Spectrum] = field(default_factory=dict)

    def plan_at(self, layers: Sequence[Layer], ranks: dict[str, tuple[int, str]], form: str) -> Plan:
        """The plan with these ranks, of the layers' present forms, and the reasons for them. Where several forms are open it is the one
        that loses least with no more parameters.
        """
        decisions = []
        for layer in layers:
            if layer.reason is not None:
                decisions.append(keep(layer, layer.reason))
                continue
            rank, reason = ranks[layer.name]
            choices = [(variant, _same_size(layer, rank, variant)) for variant in variants(layer, form)]
            if len(choices) > 1:
                choices = sorted((c for c in choices if c[1]), key=lambda c: self._loss(*c))
            best, its_rank = choices[0]
            other = "" if best.form == layer.form else f"; {best.form}, rank {its_rank}, loses less at its size"
            decisions.append(self._decided(best, its_rank, reason + other))
        return self._plan(decisions)

    def plan_within(self, budget: Budget, layers: Sequence[Layer], form: str) -> Plan:
        """The plan that keeps to the budget. Errors as of `ranks_within`."""
        forms = {
            layer.name: [(variant, self._sigma(variant)) for variant in variants(layer, form)]
            for layer in layers
            if layer.reason is None
        }
        chosen, reached = ranks_within(budget, layers, self.model, forms)
        asked = f"under target_{budget.of}={budget.target:g}"
        decisions = []
        for layer in layers:
            option = chosen.get(layer.name)
            if layer.reason is not None or option is None or option.rank is None:
                decisions.append(keep(layer, layer.reason or f"worth its cost {asked}"))
            else:
                reason = f"rank {option.rank} of {option.layer.full_rank} {asked}"
                decisions.append(self._decided(option.layer, option.rank, reason))
        if budget.of == "params":
            gained = sum(d.weight_shape[0] for d in decisions if d.gains_bias)
            reached = replace(
                reached, reached=reached.reached + gained / sum(p.numel() for p in self.model.parameters())
            )
        return self._plan(decisions, reached)

    def fitted(self, plan: Plan, layers: Sequence[Layer]) -> Plan:
        """A plan that is given, with factors from the data."""
        by_name = {layer.name: layer for layer in layers}
        decisions = [
            self._with_data(d, by_name[d.name], d.gains_bias) if d.factorized and d.name in by_name else d
            for d in plan.layers
        ]
        return replace(plan, layers=tuple(decisions), calibration_batches=self.evidence.batches or None)

    def _plan(self, decisions: list[LayerDecision], budget: Budget | None = None) -> Plan:
        batches = self.evidence.batches or None
        return Plan("factorize", tuple(decisions), budget=budget, calibration_batches=batches)

    def _sigma(self, layer: Layer) -> Tensor:
        known = self.evidence.known.get((layer.name, layer.form))
        return self._spectrum(layer).sigma if known is None else known.sigma

    def _loss(self, layer: Layer, rank: int) -> float:
        """Relative."""
        known = self.evidence.known.get((layer.name, layer.form))
        if known is None:
            return self._spectrum(layer).truncation_error(rank)
        return known.output_error(rank)

    def _spectrum(self, layer: Layer) -> Spectrum:
        key = layer.name, layer.form
        if key not in self._spectra:
            self._spectra[key] = spectrum_of(layer, self.model)
        return self._spectra[key]

    def _decided(self, layer: Layer, rank: int, reason: str) -> LayerDecision:
        decision = take(layer, rank, reason, extra_bn=self.extra_bn)
        found = self._spectra.get((layer.name, layer.form))
        if found is not None and (layer.name, layer.form) not in self.evidence.known:
            self.factors[layer.name] = found.factors(rank)
            decision = replace(decision, truncation_error=round(found.truncation_error(rank), 6))
        return self._with_data(decision, layer)

    def _with_data(self, decision: LayerDecision, layer: Layer, gains_bias: bool | None = None) -> LayerDecision:
        if not self.evidence.batches:
            return decision
        fit = self.evidence.fit(layer.name, layer.form, decision.rank or 0, gains_bias)
        if fit is None:
            why = self.evidence.blind.get((layer.name, layer.form), "calibration did not look at it")
            said = f"; factors of the weight alone: {why}"  # once, however often a plan is repeated
            return replace(decision, reason=decision.reason.removesuffix(said) + said)
        self.factors[layer.name] = fit.factors
        if (note := self.evidence.notes.get((layer.name, layer.form))) is not None:
            decision = replace(decision, reason=decision.reason.removesuffix(f"; {note}") + f"; {note}")
        return replace(decision, gains_bias=fit.gains_bias, output_error=round(fit.output_error, 6))


def _same_size(layer: Layer, rank: int, variant: Layer) -> int:
    """The rank in another form with no more parameters; in the layer's own it is the one given."""
    if variant.form == layer.form:
        return rank
    return min(variant.full_rank, layer.pair_parameters(rank) // variant.pair_parameters(1))
