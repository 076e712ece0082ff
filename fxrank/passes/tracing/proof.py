"""The proof that a graph computes what its model does: both are run side by side."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, nn

from fxrank.passes.errors import TraceError
from fxrank.passes.model.calls import at_other_batch_size
from fxrank.passes.model.weights import derives_weight
from fxrank.passes.tracing.compare import differentiable_outputs, largest_difference, seeded_outputs
from fxrank.passes.tracing.gradients import unlike, way_back
from fxrank.passes.tracing.patches import checkpoints_just_called
from fxrank.torch_private import pytree
from fxrank.torch_private.modules import post_hooks, pre_hooks

TOLERANCE = 1e-4
"""Relative difference up to which a graph is taken to compute what its model does; both do the same operations."""


@contextmanager
def observers_off(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Meanwhile the user's forward hooks are off, if they only look on: in a trace they would see values without data.

    Whether they do is found out by a real run with them and one without. Hooks that change what the model returns belong to its
    computation, and are traced.
    """
    hooks = [dict_ for module in model.modules() for dict_ in (pre_hooks(module), post_hooks(module)) if dict_]
    before = [dict(dict_) for dict_ in hooks]
    look_on = bool(hooks) and not without_data(model)
    if look_on:
        try:
            call_args, call_kwargs = at_other_batch_size(args, kwargs)
            expected = seeded_outputs(model, call_args, call_kwargs)
            _take_off(hooks)
            look_on = largest_difference(expected, seeded_outputs(model, call_args, call_kwargs)) == 0
        except Exception:  # nobody knows
            look_on = False
    try:
        if not look_on:
            _put_on(hooks, before)
        yield
    finally:
        _put_on(hooks, before)


Hooks = dict[int, Callable[..., Any]]


def _take_off(hooks: Sequence[Hooks]) -> None:
    """All but those by which older torch derives weights."""
    for dict_ in hooks:
        for key in [k for k, hook in dict_.items() if not derives_weight(hook)]:
            del dict_[key]


def _put_on(hooks: Sequence[Hooks], before: Sequence[Hooks]) -> None:
    for dict_, content in zip(hooks, before, strict=True):
        if list(dict_) != list(content):
            dict_.clear()  # the very dict, to which the user's handles lead
            dict_.update(content)


def differs(
    traced: nn.Module,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    notes: list[str],
    also_without_gradients: bool = False,
) -> str | None:
    """What is wrong with the graph of the present mode, None if it computes what the model does and gradients come by the same
    parameters. Both are run as in training, and `also_without_gradients`.
    """
    problem, traced = None, _Plainly(traced)
    for last, (call_args, call_kwargs) in enumerate((at_other_batch_size(args, kwargs), (args, kwargs))):
        inputs = [leaf for leaf in pytree.tree_leaves((call_args, call_kwargs)) if isinstance(leaf, Tensor)]
        try:
            expected, recorded = _as_in_training(model, call_args, call_kwargs)
        except Exception as error:
            problem = f"raised {_said(error)}"
            if last and not without_data(model):
                raise TraceError(f"the model must run on the example; {type(model).__name__} {problem}.") from error
            continue
        try:
            found = differentiable_outputs(traced, inputs, {}) if recorded else seeded_outputs(traced, inputs, {})
            both = [*tensors_of_both(expected, found)]
            difference = largest_difference([a for a, _ in both], [b for _, b in both])
            if also_without_gradients and recorded:
                quiet = (seeded_outputs(model, call_args, call_kwargs), seeded_outputs(traced, inputs, {}))
                quiet_both = [*tensors_of_both(*quiet)]
                quiet_difference = largest_difference([a for a, _ in quiet_both], [b for _, b in quiet_both])
                difference = max(difference, quiet_difference)
        except Exception as error:
            problem = f"the graph fails with {_said(error)}"
            continue
        if difference > TOLERANCE:
            problem = f"the graph's outputs differ from the model's by {difference:.1e} relative"
            continue
        if recorded:
            names = {id(p): name for name, p in model.named_parameters()}
            wrong = unlike(way_back((a for a, _ in both), names), way_back((b for _, b in both), names))
            if wrong is not None:
                return wrong
        if problem is not None:
            notes.append(f"the graph holds for the example's batch size only; at another: {problem}")
        return None
    if without_data(model):
        notes.append(f"not verified: the model is on the meta device ({problem})")
        return None
    return problem


class _Plainly(nn.Module):
    """A graph that fails here is no news: fx's own call would print it."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *inputs: Any) -> Any:
        return nn.Module.__call__(self.traced, *inputs)


def _as_in_training(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """The model's outputs, and whether what autograd has recorded of them can be looked through."""
    try:
        with checkpoints_just_called():
            return differentiable_outputs(model, args, kwargs), True
    except RuntimeError:  # it takes derivatives itself, or was built in `inference_mode`
        return seeded_outputs(model, args, kwargs), False


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def tensors_of_both(expected: Any, found: Any) -> Iterator[tuple[Any, Any]]:
    """Tensors at the same places of two outputs. What no graph can return, a key-value cache say, is None in `found`."""
    if isinstance(expected, Tensor) and found is not None:
        yield expected, found
    elif isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in expected:
            yield from tensors_of_both(expected[key], found.get(key))
    elif isinstance(expected, (tuple, list)) and isinstance(found, (tuple, list)):
        for a, b in zip(expected, found, strict=True):
            yield from tensors_of_both(a, b)
    elif is_dataclass(expected) and is_dataclass(found):
        yield from tensors_of_both(vars(expected), vars(found))


def without_data(model: nn.Module) -> bool:
    """Whether nobody knows what the model computes: some of it is on the meta device."""
    return any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))
