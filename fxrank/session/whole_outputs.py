"""R by what the whole model gives: pairs that are tried in a copy, on what the model was called with in the last steps before the switch.

What the layers lose by themselves does not add up to what the model loses, and how it does differs from model to model. So the
path of `policies.path` is followed as far as the outputs of the copy keep the share of their mean square that the policy asks for.
Where they cannot be compared, the layers' own losses may add up to what is left of that share, which is far less.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fxrank.decisions import take
from fxrank.fitting import variants
from fxrank.passes.calibration.collect import evaluating
from fxrank.passes.calibration.evidence import Evidence, needed_bytes
from fxrank.passes.calibration.processes import together
from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.pairs.parameter import RawWeight
from fxrank.passes.rewriting.install import uncompile_parts
from fxrank.plan import Plan
from fxrank.policies.budget import counted, ladders_of, norm_parameters
from fxrank.policies.forms import spectrum_of
from fxrank.policies.path import Path, Way, farthest
from fxrank.session.attach import Attachment
from fxrank.session.live_data import LastCalls, again, in_a_line, look, seen_by, unobserved
from fxrank.session.worth import apart
from fxrank.switch.apply_plan import Factors, apply_plan
from fxrank.switch.zero_weights import why_dead
from fxrank.torch_private import pytree

TRIED, STEPS_EACH = 4, 400
"""Calls of which outputs are compared, at most, and no more than one for so many steps of the training, but at least one."""
KEPT_BYTES = 2**28
"""Of the dense model's outputs, and at least one call's."""
LARGE, MASKED = 1e3, 100.0
"""Numbers larger than the first, and so many times as large as is usual for those below it, stand for something that is masked, and are
not compared.
"""
FORM_BYTES = 2**25
"""Of moments, for another form of a layer than its own: patches of a kernel 3x3 with up to 227 channels. Time and memory for them grow with
the third and the second power, and beyond that the pairs down and across would take longer than all else.
"""
SAMPLE = 2**16
"""Numbers of an output that say what is usual there."""


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
    by_key = {layer.key: layer for of_layer in forms.values() for layer in of_layer}
    scene.chosen.clear()
    if not open_layers:
        return None, []
    with unobserved(calls, attached):
        known, notes = look(list(by_key.values()), calls, attached)
        path = team.agree(lambda: _path(forms, attached))
        trial = _Trial(attached, calls, known, by_key)
        try:
            trial.see_dense()
            ways, lost = farthest(path, trial.lost, 1 - keep)
            scene.asked = f"the model keeps {keep:g} of its outputs"
            if policy.floor and ways and ways == path.at(len(path.steps)):
                scene.asked = f"pairs have {policy.floor:g} of their layers' parameters at least"
            on = f"{trial.number} of its last calls" if len(calls) else "the example"
            note = f"with the ranks chosen the model kept {1 - lost:.4f} of its outputs in {on}"
        except Exception as error:  # of a model that cannot be copied, or whose outputs cannot be compared
            ways = path.at(path.until(1 - keep))
            scene.asked = f"the losses of all layers add up to {1 - keep:.4g} at most"
            note = f"{scene.asked}, as the model could not be tried with its pairs: {in_a_line(error)}"
    scene.chosen.update({name: (by_key[name, form], rank) for name, (form, rank) in ways.items()})
    return known, [*notes, note]


def _open_forms(layers: Sequence[Layer], attached: Attachment) -> dict[str, list[Layer]]:
    """The layers, by name, and in other forms that they may take, if what is added up for them is no more than `FORM_BYTES`."""
    forms = {layer.name: variants(layer, attached.policy.form) for layer in layers}
    needed = needed_bytes(attached.team.model, [other for _, *others in forms.values() for other in others])
    return {
        name: [own, *(other for other in others if needed[other.key] <= FORM_BYTES)]
        for name, (own, *others) in forms.items()
    }


def _path(forms: Mapping[str, Sequence[Layer]], attached: Attachment) -> Path:
    """By what is known of the outputs of layers, in the forms of which it is, or else by their weights."""
    scene, found = attached.scene, {}
    for name, of_layer in forms.items():
        seen = [(layer, scene.outputs[layer.key]) for layer in of_layer if layer.key in scene.outputs]
        found[name] = seen or [(of_layer[0], spectrum_of(of_layer[0], scene.model).sigma)]
    ladders = ladders_of(found, counted("params", norm_parameters(attached.policy.extra_bn)))
    return Path.of(ladders, attached.policy.floor)


class _Trial:
    """The dense model's outputs, and how far those of a copy with pairs are from them. What is done in one process of several alone, and
    may fail, is done in `_run`, which fails in all of them then.
    """

    def __init__(
        self, attached: Attachment, calls: LastCalls, known: Evidence | None, layers: Mapping[tuple[str, str], Layer]
    ) -> None:
        self._attached, self._calls, self._known, self._layers = attached, calls, known, layers
        self._wanted: list[list[_Output]] = []
        self._energies: list[float] = []
        """Of each place among the outputs, over all calls and processes: the sum of squares about the mean."""

    @property
    def number(self) -> int:
        """Of calls."""
        return len(self._wanted)

    def see_dense(self) -> None:
        """Keep what the dense model gives."""
        self._run(
            lambda: self._attached.team.model,
            lambda _, outputs: self._wanted.append([_Output.of(one) for one in outputs]),
        )
        places = self._attached.team.of_all([[one.moments() for one in of_call] for of_call in self._wanted])
        by_place = zip(*(of_call for theirs in places for of_call in theirs), strict=True)
        self._energies = [_about_the_mean(moments) for moments in by_place]

    def lost(self, ways: Mapping[str, Way]) -> float:
        """The share of the mean square of the outputs, about their mean, that pairs lose; of several outputs the largest. Raises
        `ValueError` where the copy does not compute with its pairs.
        """
        attached, team = self._attached, self._attached.team
        layers = [self._layers[name, form] for name, (form, _) in ways.items()]
        plan = Plan("", tuple(take(a, ways[a.name][1], "", extra_bn=attached.policy.extra_bn) for a in layers))
        factors: Factors = {}
        example = team.example(attached.example)

        def fit(some: Sequence[Layer], evidence: Evidence) -> None:
            fits = {a.name: evidence.fit(*a.key, ways[a.name][1], gains_bias=False, search=False) for a in some}
            factors.update({name: found.factors for name, found in fits.items() if found is not None})

        known = seen_by(layers, self._calls, attached) if self._known is None else [(layers, self._known)]
        for some, evidence in known:  # one round's at a time
            together(partial(fit, some, evidence), team.of_all)

        def copied() -> nn.Module:
            twin = uncompile_parts(apart(team.model))
            apply_plan(twin, plan, example=example, factors=factors)
            return twin

        squares = [0.0] * len(self._energies)

        def compare(number: int, outputs: list[Tensor]) -> None:
            for place, (wanted, got) in enumerate(zip(self._wanted[number], outputs, strict=True)):
                squares[place] += wanted.off(got)

        self._run(copied, compare, [dense_at(team.model, name) for name in ways])
        totals = [sum(of_place) for of_place in zip(*team.of_all(squares), strict=True)]
        if not any(totals) and ways:
            raise ValueError("a copy of it computes without its own pairs.")
        return float(max(off / energy for off, energy in zip(totals, self._energies, strict=True)))

    def _run(
        self,
        made: Callable[[], nn.Module],
        take_in: Callable[[int, list[Tensor]], None],
        never: Sequence[nn.Module] = (),
    ) -> None:
        """Call the model that is made, which must call none of the layers in `never`."""
        most = max(1, min(TRIED, self._attached.clock.total_steps // STEPS_EACH))

        def run() -> None:
            model, held = made(), 0
            with ExitStack() as around, evaluating(model, by_batch=True), torch.no_grad(), _uncalled(never):
                for number, (args, kwargs) in enumerate(again(self._calls, self._attached, around, most)):
                    outputs = _numbers(model(*args, **kwargs))
                    take_in(number, outputs)
                    held += sum(t.nbytes for t in outputs)
                    if held > KEPT_BYTES:
                        break

        together(run, self._attached.team.of_all)


class _Output(NamedTuple):
    """One tensor of a call's outputs, and which of its numbers are compared; None where all are."""

    values: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, values: Tensor) -> "_Output":
        sizes = values.flatten()[:: -(-values.numel() // SAMPLE)].abs()
        usual = sizes[(sizes > 0) & (sizes < LARGE)]
        bound = max(LARGE, MASKED * float(usual.median())) if len(usual) else math.inf
        kept = values.isfinite() & (values.abs() <= bound)
        return cls(values, None) if kept.all() else cls(values.where(kept, 0.0), kept)

    def moments(self) -> tuple[Tensor, Tensor, float]:
        """Of each feature, the last dimension, or the second of images: numbers, and their sum; and the sum of all squares."""
        feature = -1 if self.values.ndim < 4 else 1
        over = [d for d in range(self.values.ndim) if self.values.ndim > 1 and d != feature % self.values.ndim]
        over = over or list(range(self.values.ndim))
        kept = torch.ones_like(self.values) if self.kept is None else self.kept
        squares = torch.linalg.vector_norm(self.values, dtype=torch.float64).square()
        return (
            kept.sum(over, dtype=torch.float64).cpu(),
            self.values.sum(over, dtype=torch.float64).cpu(),
            float(squares),
        )

    def off(self, got: Tensor) -> float:
        """The sum of the squared differences."""
        if self.values.shape != got.shape:
            raise ValueError(f"outputs of shapes {tuple(self.values.shape)} and {tuple(got.shape)} cannot be compared.")
        off = got - self.values if self.kept is None else (got - self.values).where(self.kept, 0.0)
        return float(
            torch.linalg.vector_norm(off, dtype=torch.float64).square().nan_to_num(nan=math.inf, posinf=math.inf)
        )


def _about_the_mean(moments: Sequence[tuple[Tensor, Tensor, float]]) -> float:
    """Of one place among the outputs: the sum of squares about the features' means, of one number of each about 0. Raises `ValueError`
    where nothing varies.
    """
    numbers, sums = (sum(column[1:], start=column[0]) for column in list(zip(*moments, strict=True))[:2])
    squares = sum(m[2] for m in moments)
    energy = squares - float((sums.square() / numbers.clamp(min=1))[numbers > 1].sum())
    if energy <= 1e-12 * squares:
        raise ValueError("its outputs are the same whatever it is called with.")
    return energy


def _numbers(outputs: object) -> list[Tensor]:
    """The floating-point tensors of a call's outputs, but for losses, of which so small a share may be much."""
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    # Sums are made in double precision, which not every device has.
    places = [t.device if t.device.type in ("cpu", "cuda") else torch.device("cpu") for t in tensors]
    found = [t.detach().to(at).float() for t, at in zip(tensors, places, strict=True) if t.numel() > 1]
    if not found:
        raise ValueError(
            f"it must give floating-point tensors of more than one number; it gave {type(outputs).__name__}."
        )
    return found


@contextmanager
def _uncalled(layers: Iterable[nn.Module]) -> Iterator[None]:
    """A copy may hold functions that are not copied, a forward that was compiled, say, and run the model that it was made of."""

    def found(layer: nn.Module, args: object) -> None:
        raise ValueError("a copy of it calls the layers of the model itself.")

    hooks = [layer.register_forward_pre_hook(found) for layer in layers if not isinstance(layer, RawWeight)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
