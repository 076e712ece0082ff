"""Factors that know the data, at the switch: from the calls of the model in the last steps before it.

These calls are made once more, without gradients and in evaluation mode, but for each BatchNorm that is trained, whose own statistics lag behind weights
that still move fast, and what each layer sees in them makes its factors (see `passes.calibration`). They are those since the last checkpoint at most:
a run that goes on from it makes these steps again itself, and so the same factors to the last bit. What is kept for it are references to the arguments
of calls, of no more than `KEPT_BYTES` beyond the last step's. Cost: a forward of each for every `ROUND_BYTES` of moments, and a decomposition of each weight.

A layer that has seen fewer vectors than one of them has numbers keeps the factors of its weight: a classifier's hidden layers at a small batch.
Measured on three layers 256 wide, relative errors of the outputs on images not seen, at ranks of a quarter and a tenth: 0.079 and 0.134
with factors of the weights, 0.072 and 0.241 with those of 32 vectors, 0.057 and 0.118 of 128, 0.042 and 0.097 of 512.

Factors that take a search, of kernels down and across and of weights of several uses, are those that it starts from: it takes as long as all else,
and they are trained on. A pair gains no bias here, which no optimizer would know. A bias that there is takes what the mean of the outputs has lost, and its optimizer
state goes on. The statistics of BatchNorms that are trained are measured again on the calls where there are at least `ENOUGH` of them, as many
as an exponential average remembers: they lag behind in training, and would be those of other layers.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxrank.fitting import Fitting
from fxrank.passes.calibration.batchnorm import measure_batchnorms
from fxrank.passes.calibration.collect import Drawn
from fxrank.passes.calibration.evidence import Evidence, before_batchnorm, gather, in_rounds
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import CalibrationError
from fxrank.passes.model.calls import Call, call_arguments, own_call
from fxrank.passes.tracing.proof import observers_off
from fxrank.plan import Plan
from fxrank.session.attach import Attachment
from fxrank.torch_private import pytree
from fxrank.torch_private.modules import times_written
from fxrank.wrappers import autocast_as_now

CALLS = 16
"""That are made once more, at most, the last ones: a step may add up the gradients of many."""
STEPS = 16, 40
"""So many of the last steps, and no more than one of so many of the training: a forward of each is less than a hundredth of it then."""
ENOUGH = 10
"""Calls, over all processes."""
FEWEST, VECTORS = 4, 2
"""Calls that factors are made of, if there are so many, and all where a layer would see fewer vectors than so many for each of its numbers."""
DRAWN = 2048, 8.0
"""Vectors that are drawn of all calls together at most, or so many for each number of a vector, if these are more."""
KEPT_BYTES = 2**26
"""Of arguments, and at least the last step's."""
ROUND_BYTES = 2**28
"""Memory for moments at a time; one layer's may be larger."""


class LastCalls:
    """The calls of a model, in training mode and with gradients, in the last `steps`: a forward pre-hook.

    A call whose tensors are written into before it is made once more is left out. Inside a compiled model only the last call is known.
    """

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps
        self._handle: RemovableHandle | None = None
        self._kept: deque[_Kept] = deque(maxlen=CALLS)
        self._compiled: Call | None = None
        self._step = 0
        self._forgot_at = -steps  # nothing

    @classmethod
    def of_run(cls, total_steps: int) -> "LastCalls":
        """Of as many steps as cost a training of this length little."""
        most, share = STEPS
        return cls(max(1, min(most, total_steps // share)))

    def __len__(self) -> int:
        """How many can be made once more."""
        return sum(kept.is_as_it_was() for kept in self._kept) or int(self._compiled is not None)

    @property
    def lacks_some(self) -> bool:
        """Whether it was made to forget so lately that it knows fewer steps than it keeps."""
        return self._step - self._forgot_at + 1 < self.steps  # the present one among these

    def watch(self, model: nn.Module) -> None:
        """From now on, until `stop`."""
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)

    @contextmanager
    def aside(self, model: nn.Module) -> Iterator[None]:
        """Meanwhile nothing is watched."""
        if self._handle is None:
            yield
            return
        self._handle.remove()
        try:
            yield
        finally:
            self.watch(model)

    def stop(self) -> None:
        """Forget all calls, and see no more."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._compiled = None
        self._kept.clear()

    def step_made(self) -> None:
        """The next call begins another step."""
        self._step += 1

    def forget(self) -> None:
        """A run that goes on from here knows no call of before."""
        self._kept.clear()
        self._compiled = None
        self._forgot_at = self._step

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():  # what is added to a list, or read here, would be compiled anew in each call
            self._compiled = args, kwargs
        elif self._handle is not None:
            self._kept.append(_Kept(self._step, args, kwargs))
            while self._kept[0].step <= self._step - self.steps or (
                self._kept[0].step < self._step and sum(kept.bytes for kept in self._kept) > KEPT_BYTES
            ):
                self._kept.popleft()

    def __reduce__(self) -> tuple[type["LastCalls"], tuple[()]]:
        """In a copy of the model, or a file of it, it watches nothing."""
        return LastCalls, ()

    def again(self, around: ExitStack, most: int = CALLS) -> Iterator[Call]:
        """The calls, the last ones if there are more, each under the autocast that it was made under, which `around` ends if nobody asks
        for the next.
        """
        if not self._kept and self._compiled is not None:
            yield own_call(self._compiled)
        for kept in list(self._kept)[-most:]:
            if kept.is_as_it_was():
                around.enter_context(kept.autocast())
                yield own_call(kept.call)
                around.close()


class _Kept:
    """One call, without the history of its tensors."""

    def __init__(self, step: int, *call: Any) -> None:
        self.step = step
        leaves = pytree.tree_leaves(call)
        plain = all(leaf is None or isinstance(leaf, (Tensor, int, float, str)) for leaf in leaves)
        # What an object holds nobody knows: as much as is kept of the last step alone.
        self.bytes = sum(t.nbytes for t in leaves if isinstance(t, Tensor)) if plain else KEPT_BYTES + 1
        self.call: Call = pytree.tree_map_only(Tensor, torch.detach, call)
        self.autocast: Callable[[], AbstractContextManager[None]] = autocast_as_now()
        self._versions = self._now()

    def is_as_it_was(self) -> bool:
        return self._versions == self._now()

    def _now(self) -> list[int]:
        return [
            times_written(t) for t in pytree.tree_leaves(self.call) if isinstance(t, Tensor) and not t.is_inference()
        ]


def _where_enough(evidence: Evidence) -> Evidence:
    """Blind where too few vectors were seen."""
    few = {}
    for key, known in evidence.known.items():
        count, size = known.vectors
        if count < size:
            few[key] = f"it saw {count} vectors of {size} numbers in these steps, and as many as numbers are needed"
    enough = {key: one for key, one in evidence.known.items() if key not in few}
    return replace(evidence, known=enough, blind=evidence.blind | few)


def look(layers: Sequence[Layer], calls: LastCalls, attached: Attachment) -> tuple[Evidence | None, list[str]]:
    """Put the spectra of what the layers, each in all its forms, give on the calls into the scene's `outputs`. Returns what is known of
    them, for `fitted_to`, if that was little enough to be kept, and notes.
    """
    scene = attached.scene
    found: list[Evidence] = []
    scene.outputs.clear()
    try:
        for _, evidence in seen_by(layers, calls, attached):
            sigmas = attached.team.together(partial(_sigmas, evidence))
            scene.outputs.update(sigmas)
            found = [*found[:1], evidence]
    except Exception as error:  # of what is called: not in this mode, say, or not without gradients
        scene.outputs.clear()
        return None, [f"ranks were chosen by the weights alone: {in_a_line(error)}"]
    return found[0] if len(found) == 1 else None, []


def _sigmas(evidence: Evidence) -> dict[tuple[str, str], Tensor]:
    return {key: known.sigma for key, known in evidence.known.items()}


def fitted_to(plan: Plan, calls: LastCalls, attached: Attachment, known: Evidence | None = None) -> tuple[Plan, str]:
    """The plan with what its pairs lose on the calls, or on the example where there were none, their factors in the scene's; and a note.
    In all processes of a team: each runs its own calls, what they see is added up, and the first one's factors are taken. `known` is what
    `look` found.
    """
    team, scene = attached.team, attached.scene
    planned = {d.name: d.form for d in plan.layers if d.factorized}
    there = [layer.if_in_form(planned[layer.name]) for layer in scene.layers if layer.name in planned]
    layers = [replace(layer, reason=None) for layer in there]  # of a plan that is given, which may name any
    given = plan
    seen: Iterable[tuple[Sequence[Layer], Evidence]]
    if known is not None and all(layer.key in known.known or layer.key in known.blind for layer in layers):
        seen = [(layers, known)]
    else:
        seen = seen_by(layers, calls, attached)
    try:
        with unobserved(calls, attached):
            for some, evidence in seen:
                fitting = Fitting(team.model, evidence, factors=scene.factors, search=False)  # they are trained on
                plan = team.agree(partial(fitting.fitted, plan, some))
    except Exception as error:  # as in `look`
        scene.factors.clear()
        return given, f"factors were made of the weights alone: {in_a_line(error)}"
    number, calls_made = sum(d.output_error is not None for d in plan.layers), plan.calibration_batches
    made = f"{calls_made} call{'s' * (calls_made != 1)}"
    return (
        plan,
        f"factors of {number} of {len(plan.R)} layers know what these saw in {made} of the model, of the last steps before the switch",
    )


def in_a_line(error: Exception) -> str:
    """An error of fxrank's own in its words, another with its kind, without what is below the first line."""
    said = str(error) if isinstance(error, CalibrationError) else f"{type(error).__name__}: {error}"
    return said.partition("\n")[0]


@contextmanager
def unobserved(calls: LastCalls, attached: Attachment) -> Iterator[None]:
    """Meanwhile hooks that only look on, the user's and that of `calls`, see none of the calls that are made once more."""
    model = attached.team.model
    with calls.aside(model), observers_off(model, *call_arguments(model, attached.example)):
        yield


def again(calls: LastCalls, attached: Attachment, around: ExitStack, most: int = CALLS) -> Iterator[Call]:
    """The calls as of `LastCalls.again`, or the example where there are none."""
    made = False
    for call in calls.again(around, most):
        made = True
        yield call
    if not made:
        yield own_call(call_arguments(attached.team.model, attached.example))


def seen_by(
    layers: Sequence[Layer], calls: LastCalls, attached: Attachment
) -> Iterator[tuple[Sequence[Layer], Evidence]]:
    """The layers, in rounds, with what is known of them by the calls."""
    team = attached.team
    absorbed = before_batchnorm(attached.graph_module.graph, team.model, layers)
    most = max((_calls_for(layer) for layer in attached.scene.layers if layer.reason is None), default=FEWEST)
    number = max(1, sum(team.of_all(min(most, len(calls)))))
    drawn = Drawn(*(together / number for together in DRAWN))
    with ExitStack() as around:
        made = partial(again, calls, attached, around, most)
        for some in in_rounds(team.model, layers, ROUND_BYTES):
            found = gather(team.model, some, made, absorbed, team.of_all, by_batch=True, drawn=drawn)
            yield some, _where_enough(found)


def measure_again(plan: Plan, calls: LastCalls, attached: Attachment) -> list[str]:
    """The statistics of the model's BatchNorms with the plan's pairs in it, if there are calls enough. Returns what to say of it."""
    team = attached.team
    if plan.calibration_batches is None or sum(team.of_all(len(calls))) < ENOUGH:
        return []
    with ExitStack() as around:
        try:
            made = partial(again, calls, attached, around)
            with unobserved(calls, attached):
                number = measure_batchnorms(team.model, made, team.of_all, trained=True)
        except Exception as error:  # as in `look`
            return [f"statistics of BatchNorms were not measured again: {in_a_line(error)}"]
    return [f"statistics of {number} BatchNorms were measured again with the pairs"] if number else []


def _calls_for(layer: Layer) -> int:
    """Calls after which a layer has seen vectors enough, by its positions in the example."""
    return min(CALLS, max(FEWEST, math.ceil(VECTORS * max(layer.rows, layer.cols) / max(1, layer.positions))))
