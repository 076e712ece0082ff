"""R by what the whole model gives: pairs that are tried in a copy, on what the model was called with in the last steps before the switch.

What the layers lose by themselves does not add up to what the model loses, and how it does differs from model to model. So the
path of `policies.path` is followed as far as the outputs of the copy keep the share of their mean square that the policy asks for.
Where they cannot be compared, the layers' own losses may add up to what is left of that share, which is far less.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fxrank.decisions import take
from fxrank.fitting import variants
from fxrank.passes.calibration.collect import evaluating
from fxrank.passes.calibration.evidence import Evidence
from fxrank.passes.calibration.processes import together
from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.rewriting.install import uncompile_parts
from fxrank.plan import Plan
from fxrank.policies.budget import counted, ladders_of, norm_parameters
from fxrank.policies.forms import spectrum_of
from fxrank.policies.path import Path, Way, farthest
from fxrank.session.attach import Attachment
from fxrank.session.live_data import LastCalls, again, look, seen_by
from fxrank.session.worth import apart
from fxrank.switch.apply_plan import Factors, apply_plan
from fxrank.switch.zero_weights import why_dead
from fxrank.torch_private import pytree

CALLS, SHARE = 4, 400
"""Of which outputs are compared, at most, and no more than one for so many steps of the training, but at least one."""
KEPT_BYTES = 2**28
"""Of the dense model's outputs, and at least one call's."""


def choose(keep: float, calls: LastCalls, attached: Attachment) -> tuple[Evidence | None, list[str]]:
    """Fill the scene's `chosen` with the pairs of fewest parameters with which the model keeps this share of its outputs. Returns what is
    known of the layers, for `fitted_to`, and notes. In all processes of a team, each on its own calls.
    """
    scene, policy, team = attached.scene, attached.policy, attached.team
    kept = policy.eligible(scene)
    open_layers = [
        layer
        for layer in scene.layers
        if layer.reason is None and layer.name not in kept and why_dead(stack_of(layer, scene.model)) is None
    ]
    forms = {layer.name: variants(layer, policy.form) for layer in open_layers}
    by_key = {layer.key: layer for of_layer in forms.values() for layer in of_layer}
    scene.chosen.clear()
    known, notes = look(list(by_key.values()), calls, attached)
    path = team.agree(lambda: _path(forms, attached))
    trial = _Trial(attached, calls, known, by_key)
    try:
        trial.see_dense()
        ways, lost = farthest(path, trial.lost, 1 - keep)
        note = f"with the ranks chosen the model kept {1 - lost:.4f} of its outputs in {trial.number} of its last calls"
    except Exception as error:  # of a model that cannot be copied, or whose outputs cannot be compared
        words = f"{type(error).__name__}: {error}".partition("\n")[0]
        ways = path.at(path.until(1 - keep))
        note = f"the losses of all layers add up to {1 - keep:.4g} at most, as the model could not be tried with its pairs: {words}"
    scene.chosen.update({name: (by_key[name, form], rank) for name, (form, rank) in ways.items()})
    return known, [*notes, note]


def _path(forms: Mapping[str, Sequence[Layer]], attached: Attachment) -> Path:
    """By what is known of the outputs of layers, in the forms of which it is, or else by their weights."""
    scene, found = attached.scene, {}
    for name, of_layer in forms.items():
        seen = [(layer, scene.outputs[layer.key]) for layer in of_layer if layer.key in scene.outputs]
        found[name] = seen or [(of_layer[0], spectrum_of(of_layer[0], scene.model).sigma)]
    return Path.of(ladders_of(found, counted("params", norm_parameters(attached.policy.extra_bn))))


class _Trial:
    """The dense model's outputs, and how far those of a copy with pairs are from them."""

    def __init__(
        self, attached: Attachment, calls: LastCalls, known: Evidence | None, layers: Mapping[tuple[str, str], Layer]
    ) -> None:
        self._attached, self._calls, self._known, self._layers = attached, calls, known, layers
        self._wanted: list[list[Tensor]] = []

    @property
    def number(self) -> int:
        """Of calls."""
        return len(self._wanted)

    def see_dense(self) -> None:
        """Keep what the dense model gives."""
        self._run(lambda: self._attached.team.model, lambda _, outputs: self._wanted.append(outputs))

    def lost(self, ways: Mapping[str, Way]) -> float:
        """The share of the mean square of the outputs, about their mean, that pairs lose; of several outputs the largest."""
        attached, team = self._attached, self._attached.team
        layers = [self._layers[name, form] for name, (form, _) in ways.items()]
        plan = Plan("", tuple(take(a, ways[a.name][1], "", extra_bn=attached.policy.extra_bn) for a in layers))
        factors: Factors = {}
        for some, evidence in [(layers, self._known)] if self._known else seen_by(layers, self._calls, attached):
            drafts = {layer.name: evidence.draft(*layer.key, ways[layer.name][1]) for layer in some}
            factors |= {name: draft for name, draft in drafts.items() if draft is not None}

        def copied() -> nn.Module:
            twin = uncompile_parts(apart(team.model))
            apply_plan(twin, plan, example=team.example(attached.example), factors=factors)
            return twin

        sums: list[tuple[int, float, float]] = []

        def compare(number: int, outputs: list[Tensor]) -> None:
            for place, (wanted, got) in enumerate(zip(self._wanted[number], outputs, strict=True)):
                if wanted.shape != got.shape:
                    raise ValueError(
                        f"outputs of shapes {tuple(wanted.shape)} and {tuple(got.shape)} cannot be compared."
                    )
                off, about = (got - wanted).double(), (wanted - _mean(wanted)).double()
                sums.append((place, float(off.square().sum()), float(about.square().sum())))

        self._run(copied, compare)
        totals: dict[int, tuple[float, float]] = {}
        for place, off, about in (one for theirs in team.of_all(sums) for one in theirs):
            before = totals.get(place, (0.0, 0.0))
            totals[place] = before[0] + off, before[1] + about
        return max(off / about if about > 0 else float(off > 0) for off, about in totals.values())

    def _run(self, made: Callable[[], nn.Module], take_in: Callable[[int, list[Tensor]], None]) -> None:
        most = max(1, min(CALLS, self._attached.clock.total_steps // SHARE))

        def run() -> None:
            model, held = made(), 0
            with ExitStack() as around, evaluating(model, by_batch=True), torch.no_grad():
                for number, (args, kwargs) in enumerate(again(self._calls, self._attached, around, most)):
                    outputs = _numbers(model(*args, **kwargs))
                    take_in(number, outputs)
                    held += sum(t.nbytes for t in outputs)
                    if held > KEPT_BYTES:
                        break

        together(run, self._attached.team.of_all)


def _numbers(outputs: object) -> list[Tensor]:
    """The tensors of a call's outputs that are no labels, without losses where there is more."""
    found = [t.detach().float() for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise ValueError(f"a model that is tried must give floating-point tensors; got {type(outputs).__name__}.")
    return [t for t in found if t.numel() > 1] or found


def _mean(outputs: Tensor) -> Tensor:
    """Of each feature, the last dimension, or the second of images, over all else; of one number 0."""
    if outputs.numel() == 1:
        return torch.zeros_like(outputs)
    feature = {1: None, 4: 1}.get(outputs.ndim, outputs.ndim - 1)
    return outputs.mean([d for d in range(outputs.ndim) if d != feature], keepdim=True)
