"""Equality and error bounds, for tests and for users who want to see a rewrite proved on their own model."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.passes.model.calls import Example, call_arguments, describe
from fxrank.passes.model.restored import randoms_put_back, seed, unwritten
from fxrank.torch_private import pytree


def largest_difference(a: Any, b: Any) -> float:
    """Largest `|a - b|` over the tensors of two nests of the same structure, relative to the largest finite `|a|` of
    each tensor.

    NaN and infinity differ infinitely from anything but themselves. Complex numbers count by their absolute value. Tensors of
    whole numbers or truth values must be equal (difference 0 or infinity); of tensors on the meta device the shapes are. Raises `ValueError` if the structures or shapes differ.
    """
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    if spec_a != spec_b:
        raise ValueError(f"both outputs must have one structure; got {spec_a} and {spec_b}.")
    worst = 0.0
    for x, y in zip(leaves_a, leaves_b, strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            raise ValueError(f"both outputs must have one structure; got {describe(x)} and {describe(y)}.")
        if not isinstance(x, Tensor):
            continue
        if x.shape != y.shape:
            raise ValueError(f"both outputs must have one shape; got {describe(x)} and {describe(y)}.")
        if x.is_meta or y.is_meta:
            continue  # no numbers to compare
        if not (x.is_floating_point() or x.is_complex()):
            worst = max(worst, 0.0 if torch.equal(x, y) else float("inf"))
        elif x.numel():
            exact = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
            x, y = x.detach().to(exact), y.detach().to(exact)
            same = (x == y) | (x.isnan() & y.isnan())
            # A NaN would pass unseen: max(0.0, nan) is 0.0.
            difference = float(
                (x - y).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).masked_fill(same, 0).max()
            )
            scale = float(x.abs().nan_to_num(nan=0, posinf=0).max())
            worst = max(worst, difference / scale if scale > 0 else difference)
    return worst


def output_difference(model: nn.Module, other: nn.Module, example: Example) -> float:
    """`largest_difference` of both models' outputs for one call, without gradients, each in its present mode.

    Random numbers (dropout) are drawn alike for both; buffers are put back afterwards.
    """
    args, kwargs = call_arguments(model, example)
    return largest_difference(seeded_outputs(model, args, kwargs), seeded_outputs(other, args, kwargs))


def seeded_outputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the model returns, without gradients, from a fixed seed; random state, parameters and buffers are put back, and the
    inputs are copies.

    A forward that takes derivatives itself, as one that gives forces by an energy, and fails without gradients is run with them.
    """
    try:
        with torch.no_grad():
            return _run(model, args, kwargs)
    except RuntimeError:
        with torch.enable_grad():
            outputs = _run(model, args, kwargs)
        return pytree.tree_map_only(Tensor, Tensor.detach, outputs)


def differentiable_outputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the model returns as in training, with all that autograd has recorded but the activations: it can be looked
    through, and no backward can be run. Else as `seeded_outputs`.
    """

    def lost(_: Any) -> Any:
        raise RuntimeError("a forward that takes derivatives itself needs its activations")

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lost):
        return _run(model, args, kwargs)


def _run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch.random.fork_rng(), randoms_put_back(model), unwritten(model), warnings.catch_warnings():
        # what reentrant checkpointing has to say of every run without gradients
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
        seed(0)
        own_args, own_kwargs = copy.deepcopy(pytree.tree_map_only(Tensor, alone, (list(args), dict(kwargs))))
        return model(*own_args, **own_kwargs)


def alone(tensor: Tensor) -> Tensor:
    """A tensor without what it was computed from, which could not be copied with it."""
    return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()
