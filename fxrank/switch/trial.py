"""The proof that a model with pairs in it computes what it did before: tried on a twin, before anything is decided.

Code may ask what its parts are (`isinstance(layer, nn.Linear)`, a penalty over `self.parameters()`, `state_dict()["weight"]`, an average
of one layer's weights into another's) or hold a weight aside, and nothing of that is in a graph. So full-rank pairs are put into a twin
that shares the model's numbers, and it is run beside another twin that is left as it was. Where they differ, in their outputs, in what
their parts see and return, or in weights that they write into, the layers at fault are found by halves, and stay dense.

The pairs are exact without a decomposition, `V = P` and `U = Pᵀ W` with a signed permutation `P` (or the other way round, where the weight
has more rows than columns); each layer's is another, as factors of two layers have nothing in common. The weight that they replace is
NaN in the twin, so that nothing can go on with it unseen. Cost: the pairs' memory, and a few forward passes of two rows; nothing where the
code of the model asks no such question (`asks`).
"""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.decisions import take
from fxrank.passes.discovery.layer import Layer, matrices_of
from fxrank.passes.model.asks import may_ask
from fxrank.passes.model.calls import Example, at_other_batch_size, call_arguments
from fxrank.passes.model.compiled import eagerly
from fxrank.passes.model.restored import tensors_of
from fxrank.passes.model.weights import is_derived
from fxrank.passes.pairs.base import Unrolled
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.pairs.registry import AUTO
from fxrank.passes.tracing.compare import largest_difference, seeded_outputs
from fxrank.passes.tracing.inside import Inside, SeenInside
from fxrank.passes.tracing.proof import observers_off, tensors_of_both, without_data
from fxrank.passes.tracing.trace import TracedModule
from fxrank.plan import Plan
from fxrank.switch.apply_plan import Factors, apply_plan

NOISE = 100
"""Outputs may differ by so many times what one more rounding of each weight makes of them."""


def misfits(
    layers: Sequence[Layer], model: nn.Module, example: Example, gm: TracedModule, notes: list[str], form: str
) -> dict[str, str]:
    """Why to leave dense, by name, those of the layers without a reason with whose pairs the model computes something else, in its
    present mode or the other, or fails. `form` is what is asked for, as in `Policy`. The model, whose graph is `gm`, is left as it is. A
    note is added if it cannot be tried.
    """
    candidates = [layer for layer in layers if layer.reason is None]
    if not candidates or without_data(model) or not may_ask(model):
        return {}
    one_graph = gm.whole and gm.graphs.get(True) is gm.graphs.get(False)
    modes = (model.training,) if one_graph else (model.training, not model.training)
    try:
        trial = _Trial(model, example, modes, form)
    except Exception as error:
        notes.append(f"not tried with pairs in it: a copy of the model fails with {type(error).__name__}: {error}")
        return {}
    trial.judge(candidates)
    return trial.reasons


def with_reasons(layers: Sequence[Layer], reasons: Mapping[str, str]) -> list[Layer]:
    """The layers, those that are named with their reasons to stay dense."""
    return [a.kept_for(reasons[a.name]) if a.name in reasons else a for a in layers]


class _Trial:
    """What a model computes, and the layers with whose pairs it was seen to do so (`good`), or not (`reasons`)."""

    def __init__(self, model: nn.Module, example: Example, modes: Sequence[bool], form: str) -> None:
        """Raises whatever the model raises, copied or run in the first of the modes."""
        call = call_arguments(model, example)
        twin = _twin(model)
        with observers_off(twin, *call):
            self._model = _twin(twin)
        self._modes, self._form = modes, form
        self._written: list[str] | None = None
        self.good: list[Layer] = []
        self.reasons: dict[str, str] = {}
        try:
            self._call = at_other_batch_size(*call)
            self._expected = self._runs(self._model)
        except Exception:
            self._call = call
            self._expected = self._runs(self._model)
        self._written = sorted({name for run in self._expected.values() for name in run.weights})
        if self._written:
            self._expected = self._runs(self._model)

    def judge(self, layers: Sequence[Layer]) -> None:
        """All at once, and by halves if anything is wrong with them."""
        together = [*self.good, *layers]
        problem = self._problem([_with_basis(layer, False) for layer in together])
        if problem is None:  # what a basis adds to a pair, a buffer, shows in itself alone
            based = [_with_basis(layer, True) if self._form == AUTO else layer for layer in together]
            problem = self._problem(based) if any(_basis_of(layer.unrolled) for layer in based) else None
        if problem is None:
            self.good += layers
        elif len(layers) == 1:
            self.reasons[layers[0].name] = f"with a pair in its place the model {problem}"
        else:
            self.judge(layers[: len(layers) // 2])
            self.judge(layers[len(layers) // 2 :])

    def _problem(self, layers: Sequence[Layer]) -> str | None:
        below = tuple(f"{layer.name}." for layer in layers)  # where a pair has other parts than its layer
        try:
            found = self._runs(self._with_pairs(layers))
            if strange := sorted(self._expected.keys() - found.keys()):
                return f"fails in {_name(strange[0])} mode"
            for mode, expected in self._expected.items():
                inside = {n: outs for n, outs in expected.of_modules.items() if not n.startswith(below)}
                for what, both in (
                    ("its outputs", (expected.outputs, found[mode].outputs)),
                    ("weights that it writes into", (expected.weights, found[mode].weights)),
                    ("what its parts see and return", (inside, found[mode].of_modules)),
                ):
                    difference = self._difference(*both)
                    if difference == float("inf"):
                        return f"goes on with the weight that the pair replaces, in {_name(mode)} mode"
                    if difference > 0:
                        return (
                            f"computes something else: {what} differ by {difference:.1e} relative in {_name(mode)} mode"
                        )
        except Exception as error:
            return f"fails with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return None

    def _difference(self, expected: Any, found: Any) -> float:
        """The largest of one tensor that is well above what rounding makes of it; 0.0 if there is none."""
        worst = 0.0
        for a, b in tensors_of_both(expected, found):
            difference = largest_difference(a, b)
            if difference > max(worst, NOISE * self._precision) and difference > NOISE * self._noise.get(id(a), 0.0):
                worst = difference
        return worst

    @property
    def _precision(self) -> float:
        """Of the least precise weights, relative: no difference that is not well above it says anything."""
        return max((torch.finfo(p.dtype).eps for p in self._model.parameters() if p.is_floating_point()), default=0.0)

    @cached_property
    def _noise(self) -> dict[int, float]:
        """How far one more rounding of the weights, or nothing but another run, moves each tensor, by its `id`."""
        noisy = self._runs(_twin(self._model, {id(p): _rounded(p) for p in self._model.parameters()}))
        runs = ((self._expected[mode], noisy[mode]) for mode in noisy)
        return {id(a): largest_difference(a, b) for run in runs for a, b in tensors_of_both(*run)}

    def _with_pairs(self, layers: Sequence[Layer]) -> nn.Module:
        dense = [dense_at(self._model, layer.name) for layer in layers]
        gone = [layer.get_parameter("weight") for layer in dense if not is_derived(layer)]
        twin = _twin(self._model, {id(weight): _nothing_like(weight) for weight in gone})
        plan = Plan(policy="trial", layers=tuple(take(layer, layer.full_rank, "tried") for layer in layers))
        factors: Factors = {
            layer.name: _exact(matrices_of(layer, self._model), seed) for seed, layer in enumerate(layers)
        }
        apply_plan(twin, plan, factors=factors, split=False)
        return twin

    def _runs(self, twin: nn.Module) -> dict[bool, Inside]:
        """By mode. A model that runs in its present mode only has only that."""
        found: dict[bool, Inside] = {}
        with eagerly(twin):
            for mode in self._modes:
                if mode != twin.training:
                    twin.train(mode)
                try:
                    found[mode] = seeded_outputs(SeenInside(twin, self._written), *self._call)
                except Exception:
                    if not found:
                        raise
        return found


def _twin(model: nn.Module, instead: dict[int, Any] = {}) -> nn.Module:  # noqa: B006 (never written to)
    """A copy that shares all numbers, but has other tensors in the places of those with these `id`s."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors_of(model)} | instead)


def _nothing_like(weight: nn.Parameter) -> nn.Parameter:
    """NaN of the same shape, without memory."""
    return nn.Parameter(weight.new_full((), float("nan")).expand(weight.shape), weight.requires_grad)


def _rounded(weight: nn.Parameter) -> nn.Parameter:
    if not weight.is_floating_point():
        return weight
    way = torch.empty(weight.shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(0)).sign()
    moved = weight.detach() * (1 + torch.finfo(weight.dtype).eps * way.to(weight))
    return nn.Parameter(moved, weight.requires_grad)


def _with_basis(layer: Layer, wanted: bool) -> Layer:
    """The layer in a form that fixes something of `V`, or in one that fixes nothing; as it is if it has no such form. A pair whose `V` is
    fixed may have the layer itself for its first factor at full rank, and what takes that for the layer would not be seen.
    """
    if layer.unrolled.pair is None or _basis_of(layer.unrolled) == wanted:
        return layer
    others = (other.form for other in layer.others if other.pair is not None and _basis_of(other) == wanted)
    return layer.in_form(next(others, layer.form))


def _basis_of(unrolled: Unrolled) -> bool:
    return unrolled.pair is not None and bool(unrolled.pair.basis)


def _exact(stack: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """`U` and `V` of full rank whose product is the stack `(groups, rows, cols)`, to the last bit."""
    groups, rows, cols = stack.shape
    size = min(rows, cols)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    sign = torch.empty(size, 1).uniform_(-1, 1, generator=generator).sign()
    turn = (sign * torch.eye(size)[order]).to(stack)
    order, sign = order.to(stack.device), sign.to(stack)
    if rows <= cols:
        return stack[:, order] * sign, turn.mT.expand(groups, -1, -1)
    return turn.expand(groups, -1, -1), stack[:, :, order] * sign.mT


def _name(mode: bool) -> str:
    return "training" if mode else "evaluation"
