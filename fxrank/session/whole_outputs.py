"""R by what the whole model gives: pairs that are tried in a copy, on what the model was called with in the last steps before the switch.

What the layers lose by themselves does not add up to what the model loses, and how it does differs from model to model. So the
path of `policies.path` is followed as far as the outputs of the copy keep the share of their mean square that the policy asks for.
Where they cannot be compared, the layers' own losses may add up to what is left of that share, which is far less.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from fxrank.decisions import take
from fxrank.fitting import HALF, at_share, variants
from fxrank.passes.calibration.evidence import Evidence, needed_bytes
from fxrank.passes.calibration.processes import together
from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.model.calls import Call
from fxrank.passes.rewriting.install import uncompile_parts
from fxrank.passes.spectra.exact import truncation_error
from fxrank.plan import Plan
from fxrank.policies.budget import Forms, counted, ladders_of, norm_parameters
from fxrank.policies.forms import spectrum_of
from fxrank.policies.outputs import Alone, Outputs
from fxrank.policies.path import FIRST, Path, Way, farthest
from fxrank.session.attach import Attachment
from fxrank.session.live_data import LastCalls, again, in_a_line, look, seen_by, unobserved
from fxrank.session.worth import apart
from fxrank.switch.apply_plan import Factors
from fxrank.switch.zero_weights import why_dead

TRIED, STEPS_EACH = 4, 400
"""Calls of which outputs are compared, at most, and no more than one for so many steps of the training, but at least one."""
FORM_BYTES = 2**25
"""Of moments, for another form of a layer than its own: patches of a kernel 3x3 with up to 227 channels. Time and memory for them grow with
the third and the second power, and beyond that the pairs down and across would take longer than all else.
"""


def choose(keep: float, calls: LastCalls, attached: Attachment) -> tuple[Evidence | None, list[str]]:
    """Fill the scene's `chosen` with the pairs of fewest parameters, but for the policy's `floor`, with which the model keeps this share of its
    outputs. Returns what is known of the layers, for `fitted_to`, and notes. In all processes of a team, each on its own calls.
    """
    scene, policy, team = attached.scene, attached.policy, attached.team
    kept = policy.eligible(scene)
    open_layers = [
        layer
        for layer in scene.layers
        if layer.reason is None and layer.name not in kept and why_dead(stack_of(layer, scene.model)) is None
    ]
    forms = _open_forms(open_layers, attached)
    in_form = {(a.name, a.form): a for of_layer in forms.values() for a in of_layer}
    scene.chosen.clear()
    if not open_layers:
        return None, []
    with unobserved(calls, attached):
        known, notes = look(list(in_form.values()), calls, attached)
        found = _known_forms(forms, attached)
        outputs = _outputs(calls, attached)

        def alone() -> Iterator[Alone]:
            for (layer, sigma), *_ in found.values():
                ranks = at_share([layer], HALF)
                left_out = truncation_error(sigma, ranks[layer]) ** 2
                yield Alone(layer.name, *_tried(ranks, calls, attached, known), left_out)

        def lost_with(ways: Mapping[str, Way]) -> float:
            layers = {in_form[name, form]: rank for name, (form, rank) in ways.items()}
            return outputs.lost(*_tried(layers, calls, attached, known))

        try:
            outputs.see_dense()
            weights = outputs.weights(alone()) if known is not None else {}  # else the calls would be made for each
            path = team.agree(lambda: _path(found, weights, attached))
            ways, lost = farthest(path, lost_with, 1 - keep, 1.0 if weights else FIRST)
            scene.asked = f"the model keeps {keep:g} of its outputs"
            if policy.floor and ways and ways == path.at(len(path.steps)):
                scene.asked = f"pairs keep {policy.floor:g} of their layers' size"
            on = f"{outputs.number} of its last calls" if len(calls) else "the example"
            note = f"with the ranks chosen the model kept {1 - lost:.4f} of its outputs in {on}"
        except Exception as error:  # of a model that cannot be copied, or whose outputs cannot be compared
            path = team.agree(lambda: _path(found, {}, attached))
            ways = path.at(path.until(1 - keep))
            scene.asked = f"the losses of all layers add up to {1 - keep:.4g} at most"
            note = f"{scene.asked}, as the model could not be tried with its pairs: {in_a_line(error)}"
    scene.chosen.update({name: (in_form[name, form], rank) for name, (form, rank) in ways.items()})
    return known, [*notes, note]


def _open_forms(layers: Sequence[Layer], attached: Attachment) -> dict[str, list[Layer]]:
    """The layers, by name, and in other forms that they may take, if what is added up for them is no more than `FORM_BYTES`."""
    forms = {layer.name: variants(layer, attached.policy.form) for layer in layers}
    needed = needed_bytes(attached.team.model, [other for _, *others in forms.values() for other in others])
    return {
        name: [own, *(other for other in others if needed[other.key] <= FORM_BYTES)]
        for name, (own, *others) in forms.items()
    }


def _known_forms(forms: Mapping[str, Sequence[Layer]], attached: Attachment) -> dict[str, Forms]:
    """Layers by what is known of their outputs, in the forms of which it is, or else by their weights."""
    scene = attached.scene
    found: dict[str, Forms] = {}
    for name, of_layer in forms.items():
        seen = [(layer, scene.outputs[layer.key]) for layer in of_layer if layer.key in scene.outputs]
        found[name] = seen or [(of_layer[0], spectrum_of(of_layer[0], scene.model).sigma)]
    return found


def _path(found: Mapping[str, Forms], weights: Mapping[str, float], attached: Attachment) -> Path:
    policy = attached.policy
    ladders = ladders_of(found, counted("params", norm_parameters(policy.extra_bn)), weights)
    return Path.of(ladders, policy.floor)


def _outputs(calls: LastCalls, attached: Attachment) -> Outputs:
    """What the model gives on its last calls."""
    team = attached.team
    most = max(1, min(TRIED, attached.clock.total_steps // STEPS_EACH))

    def made_again() -> Generator[Call]:
        with ExitStack() as around:
            yield from again(calls, attached, around, most)

    return Outputs(
        team.model,
        lambda: uncompile_parts(apart(team.model)),
        made_again,
        team.of_all,
        team.example(attached.example),
        by_batch=True,
    )


def _tried(
    ranks: Mapping[Layer, int], calls: LastCalls, attached: Attachment, known: Evidence | None
) -> tuple[Plan, Factors]:
    """A plan with these pairs, and factors that know what `known` does, or else what the layers see in the calls, one round's at a time."""
    policy, team = attached.policy, attached.team
    layers = list(ranks)
    factors: Factors = {}

    def fit(some: Sequence[Layer], evidence: Evidence) -> None:
        fits = {a.name: evidence.fit(*a.key, ranks[a], gains_bias=False, search=False) for a in some}
        factors.update({name: found.factors for name, found in fits.items() if found is not None})

    for some, evidence in seen_by(layers, calls, attached) if known is None else [(layers, known)]:
        together(partial(fit, some, evidence), team.of_all)
    return Plan("", tuple(take(a, rank, "", extra_bn=policy.extra_bn) for a, rank in ranks.items())), factors
