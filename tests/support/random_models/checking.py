"""What must hold of fxrank on any model, checked on the one of a seed."""

import copy
import random
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass

import numpy as np
import torch
from torch import Tensor

import fxrank
from fxrank.oneshot import copied
from fxrank.passes.model.calls import call_arguments
from fxrank.passes.model.weights import is_derived
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.rewriting.install import pairs_in
from fxrank.torch_private import pytree
from random_models.drawn import Draw
from random_models.model import build

TOLERANCE = 1e-9
"""Relative to the largest number of a tensor, or to 1. All is in float64, and what differs is the order of sums of at most some hundred
terms, through some ten layers.
"""
NAMES = {True: "training", False: "evaluation"}


class WrongError(AssertionError):
    """A model of which something does not hold. `what` says what, in words that are the same for all of the kind."""

    def __init__(self, what, detail=""):
        super().__init__(f"{what}: {detail}" if detail else what)
        self.what = what


def check(seed):
    """Raise `WrongError` if anything does not hold of the model of this seed, else return what was seen, as plain data."""
    draw, model = Draw(f"check {seed}"), build(seed)
    seen = {"parts": list(model.names), "leaves": 0, "refused": None, "factorized": [], "dense": []}
    examples = [model.example(3, seed), model.example(draw.choice([2, 4, 5]), seed + 1)]
    with unchanged(model, "trace"):
        graph = fxrank.trace(model, examples[0])
    seen["leaves"] = len(graph.leaves)
    check_graph(graph, model, examples)
    model = build(seed)  # the graph's runs have moved its buffers
    try:
        with unchanged(model, "factorize"):
            full = factorize(model, examples[0], rank=1.0)
    except fxrank.NothingToFactorizeError as error:
        return seen | {"refused": type(error).__name__}
    plan = fxrank.plan_of(full)
    seen |= {"factorized": [d.kind for d in plan.layers if d.factorized]}
    seen |= {"dense": [d.reason for d in plan.layers if not d.factorized]}
    check_plan(model, plan)
    check_full_rank(model, full, examples)
    options = {"form": draw.choice(["channel", "gauge", "spatial", "qkv"]), "extra_bn": draw.flip(0.2)}
    low = factorize(model, examples[0], rank=draw.choice([0.2, 0.5, 0.8]), **options)
    check_bound(model, low)
    check_merge(model, low, examples)
    check_files(build(seed), low, examples)
    return seen


def factorize(model, example, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks at or above break-even")
        return fxrank.factorize(model, example, include="*", **options)


# -- the original


@contextmanager
def unchanged(model, what):
    """Meanwhile nothing of the model changes, and no random number is drawn."""
    before = inside(model)
    yield
    after = inside(model)
    for name in before | after:
        if name not in before or name not in after or before[name] != after[name]:
            raise WrongError(f"{what} changed the original", name)


def inside(model):
    """All that a model is, and the random states, comparable."""
    of_numpy = np.random.get_state()
    found = {
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": (of_numpy[1].tolist(), of_numpy[2:]),
        "Python's random state": random.getstate(),
    }
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path} (class)"] = type(module)
        found |= {f"{path}.{name}": content(value) for name, value in vars(module).items()}
    return found


def content(value):
    """Of a tensor its numbers, of a container what is in it, of anything else which one it is."""
    if isinstance(value, Tensor):
        return (
            id(value),
            value.requires_grad,
            value.shape,
            value.dtype,
            value.is_leaf and value.grad is None,
            value.tolist(),
        )
    if isinstance(value, dict):
        return [(key if isinstance(key, str) else repr(key), content(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [content(item) for item in value]
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


# -- one call of a model


@dataclass
class Call:
    """What a call returned (its tensors), the gradients of a random sum of it, and the buffers afterwards."""

    out: list[Tensor]
    of_inputs: list[Tensor | None]
    of_parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def called(module, model, example, training):
    """The call of a model, or of its graph, from a fixed seed."""
    args, kwargs = call_arguments(model, example)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in leaves]
    module.train(training)
    model.zero_grad()
    torch.manual_seed(0)
    if module is model:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        returned = model(*args, **kwargs)
    else:
        returned = module(*leaves)
    returned = vars(returned) if is_dataclass(returned) else returned
    out = [x for x in pytree.tree_leaves(returned) if isinstance(x, Tensor)]
    generator = torch.Generator().manual_seed(1)
    trained = [x for x in out if x.requires_grad]
    torch.autograd.backward(trained, [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in trained])
    return Call(
        [x.detach() for x in out],
        [x.grad for x in leaves],
        {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)},
        {name: b.clone() for name, b in model.named_buffers()},
    )


def compare(found, expected, what, training, detail=""):
    """Two calls, what they have by the same names."""
    where = f"{detail} in {NAMES[training]} mode".strip()
    if len(found.out) != len(expected.out):
        raise WrongError(f"{what} outputs differ", f"{where}: {len(found.out)} of {len(expected.out)}")
    for a, b in zip(found.out, expected.out, strict=True):
        agree(a, b, f"{what} outputs differ", where)
    for a, b in zip(found.of_inputs, expected.of_inputs, strict=True):
        agree(a, b, f"{what} gradients differ", f"of the inputs, {where}")
    for name, grad in expected.of_parameters.items():
        for there in (name, bias_of_pair(name)):
            if there in found.of_parameters:
                agree(found.of_parameters[there], grad, f"{what} gradients differ", f"of {name}, {where}")
    for name in found.buffers.keys() & expected.buffers.keys():
        agree(found.buffers[name], expected.buffers[name], f"{what} buffers differ", f"{name}, {where}")


def bias_of_pair(name):
    """Where a layer's bias is in its pair."""
    return f"{name.removesuffix('bias')}v.bias" if name.endswith(".bias") else name


def agree(found, expected, what, detail):
    """Equal up to rounding. A gradient that is not there is zero."""
    if found is None and expected is None:
        return
    found = torch.zeros_like(expected) if found is None else found
    expected = torch.zeros_like(found) if expected is None else expected
    if found.shape != expected.shape:
        raise WrongError(what, f"{detail}: shapes {tuple(found.shape)}, {tuple(expected.shape)}")
    if found.numel():
        difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
        if not difference <= TOLERANCE * max(1.0, scale):
            raise WrongError(what, f"{detail}, by {difference:.1e} of {scale:.1e}")


# -- what must hold


def check_graph(graph, model, examples):
    """The graph, which is of this very model, computes what the model does, with the gradients and the buffers that it leaves."""
    only = [mode for mode in NAMES if any(f"is of {NAMES[mode]} mode only" in note for note in graph.notes)]
    one_size = any(note.startswith("the graph holds for the example's batch size only") for note in graph.notes)
    state = copy.deepcopy(model.state_dict())
    for training in only or NAMES:
        for example in examples[: 1 if one_size else 2]:
            model.load_state_dict(state)
            expected = called(model, model, example, training)
            model.load_state_dict(state)
            compare(called(graph, model, example, training), expected, "the graph's", training)


def check_plan(model, plan):
    """Every weight of two or more dimensions is in the plan, with a rank or with a reason."""
    known = set()
    for decision in plan.layers:
        if not decision.factorized and not decision.reason:
            raise WrongError("a layer is left dense without a reason", decision.name)
        known |= {id(p) for p in dense_at(model, decision.name).parameters()}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in known:
            raise WrongError("a weight is not in the plan", name)


def check_full_rank(model, full, examples):
    """Pairs of full rank change no output, no buffer, and no gradient but their own, which are those of the dense weight."""
    for training in NAMES:
        for example in examples:
            dense, small = copied(model), copy.deepcopy(full)
            expected = called(dense, dense, example, training)
            compare(called(small, small, example, training), expected, "at full rank the", training)
            for path, pair in pairs_in(small).items():
                check_gradients(pair, dense_at(dense, path), f"of {path} in {NAMES[training]} mode")


def check_gradients(pair, layer, where):
    """`dU = Vᵀ dW` and `dV = dW Uᵀ`: the pair computes wherever the layer did."""
    if is_derived(layer):
        trained = any(p.grad is not None for p in layer.parameters() if p is not getattr(layer, "bias", None))
        if trained and (pair.u.weight.grad is None or pair.v.weight.grad is None):
            raise WrongError("a factor has no gradient", where)
        return
    u, v = pair.unfold_u(pair.u.weight).detach(), pair.unfold_v(pair.v.weight).detach()
    dense = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
    gradient = type(pair).unroll(pair, dense)
    agree(pair.u.weight.grad, pair.fold_u(v.mT @ gradient), "a factor's gradient differs", where)
    agree(pair.v.weight.grad, pair.fold_v(gradient @ u.mT), "a factor's gradient differs", where)


def check_bound(model, low):
    """Each pair is the best of its rank (Eckart-Young-Mirsky)."""
    for path, pair in pairs_in(low).items():
        error = pair_error(dense_at(model, path), pair)
        if error.spectral > error.bound + TOLERANCE or error.relative > error.relative_bound + TOLERANCE:
            raise WrongError("a pair is not the best of its rank", f"{path}: {error}")


def check_merge(model, low, examples):
    """The merged model computes what the factorized one does, of the original's classes, and has the original's names."""
    dense = fxrank.merge(low)
    for path, module in dense.named_modules():
        if isinstance(module, FactorPair):
            raise WrongError("a pair is left after merging", path)
        original = type(model.get_submodule(path))
        if type(module) is not original and not issubclass(original, type(module)):  # parametrized classes are made
            raise WrongError("merging changed a class", f"{path}: {original.__name__} to {type(module).__name__}")
    derived = any(is_derived(m) for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor))
    folded = any(pair.extra_norm is not None for pair in pairs_in(low).values())  # which makes a bias
    if not derived and not folded and dense.state_dict().keys() != model.state_dict().keys():
        raise WrongError("merging changed the names of the state dict")
    for example in examples:
        small, merged = copy.deepcopy(low), copied(dense)
        a, b = called(small, small, example, False), called(merged, merged, example, False)
        for x, y in zip(a.out, b.out, strict=True):
            agree(y, x, "the merged outputs differ", "in evaluation mode")


def check_files(fresh, low, examples):
    """What is saved and loaded computes the same numbers, bit for bit, in both modes, and trains the same."""
    with tempfile.TemporaryDirectory() as folder:
        fxrank.save(low, folder)
        loaded = fxrank.load(fresh, folder)
    if fxrank.plan_of(loaded) != fxrank.plan_of(low):
        raise WrongError("the loaded plan differs")
    for training in NAMES:
        one, other = copy.deepcopy(low), copied(loaded)
        expected = called(one, one, examples[1], training)
        compare(called(other, other, examples[1], training), expected, "the loaded", training)
