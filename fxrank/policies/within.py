"""R of a policy with a target: ranks by the spectra of the layers at the switch, so that the model keeps to it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fxrank.decisions import keep, take
from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.errors import BudgetError
from fxrank.passes.spectra.exact import Spectrum
from fxrank.plan import Budget, LayerDecision
from fxrank.policies.budget import check_reach, norm_parameters, ranks_within, why_unspent
from fxrank.policies.forms import open_forms, spectrum_of
from fxrank.policies.scene import Scene
from fxrank.switch.zero_weights import why_dead


@dataclass(frozen=True)
class Within:
    """A budget, and the options of the policy that it concerns."""

    budget: Budget
    form: str
    extra_bn: bool

    def check(self, scene: Scene) -> None:
        """Raise `BudgetError` if no ranks of the layers without a `reason` keep to it."""
        self._check([layer for layer in scene.layers if layer.reason is None], scene)

    def decide(self, scene: Scene, kept: Mapping[str, str]) -> tuple[list[LayerDecision], Budget, str]:
        """A decision for each layer, the budget with what they reach, and what the plan should say. Layers that are `kept` for a reason
        stay dense, if the others can keep to the budget without them. Fills `scene.factors`.
        """
        reasons = {layer.name: reason for layer in scene.layers if (reason := layer.reason or _dead(layer, scene))}
        open_layers = [layer for layer in scene.layers if layer.name not in reasons]
        needed: Mapping[str, str] = {}
        try:
            self._check([layer for layer in open_layers if layer.name not in kept], scene)
            reasons = {**kept, **reasons}
            open_layers = [layer for layer in open_layers if layer.name not in kept]
        except BudgetError:
            needed = kept
        variants = {layer.name: open_forms(layer, self.form) for layer in open_layers}
        spectra = {(v.name, v.form): spectrum_of(v, scene.model) for of_layer in variants.values() for v in of_layer}
        forms = {name: [(v, spectra[name, v.form].sigma) for v in of_layer] for name, of_layer in variants.items()}
        extra = norm_parameters(self.extra_bn)
        chosen, reached = ranks_within(self.budget, scene.layers, scene.model, forms, extra=extra)
        asked = f"under target_{self.budget.of}={self.budget.target:g}"
        decisions = []
        for layer in scene.layers:
            option = chosen.get(layer.name)
            if option is None or option.rank is None:
                decision = keep(layer, reasons.get(layer.name, f"worth its cost {asked}"))
                profile = scene.profiles.get(layer.name)
                decisions.append(replace(decision, speedup=None if profile is None else round(profile.speedup, 4)))
                continue
            why = f"rank {option.rank} of {option.layer.full_rank} {asked}"
            if layer.name in needed:
                why += f"; taken in, as the target cannot be met without it: {needed[layer.name]}"
            decisions.append(self._taken(option.layer, option.rank, why, spectra[layer.name, option.layer.form], scene))
        return decisions, reached, why_unspent(reached)

    def _taken(self, layer: Layer, rank: int, why: str, spectrum: Spectrum, scene: Scene) -> LayerDecision:
        scene.factors[layer.name] = spectrum.factors(rank)
        speedup = None
        if scene.profiler is not None:
            dense_ms, pair_ms = scene.profiler.times_ms(layer, [rank])
            speedup = round(dense_ms / pair_ms, 4)
        return replace(
            take(layer, rank, why, extra_bn=self.extra_bn),
            stable_rank=round(spectrum.stable_rank, 4),
            truncation_error=round(spectrum.truncation_error(rank), 6),
            speedup=speedup,
        )

    def _check(self, layers: list[Layer], scene: Scene) -> None:
        forms = {layer.name: open_forms(layer, self.form) for layer in layers}
        check_reach(self.budget, scene.layers, scene.model, forms, norm_parameters(self.extra_bn))


def _dead(layer: Layer, scene: Scene) -> str | None:
    return why_dead(stack_of(layer, scene.model)) if layer.reason is None else None
