"""The same optimizer after the switch: factors in the places of their weights, in place, with the state that `moments` makes."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.pairs.registry import pair_class
from fxrank.switch.apply_plan import Replacement
from fxrank.switch.decays import put_on_parameters
from fxrank.switch.moments import NoProjectionError, gradients, projected
from fxrank.torch_private.steps import takes_hooks
from fxrank.wrappers import unwrapped


def optimizers_of(given: Optimizer | Iterable[Optimizer], model: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers that a user gives, one or several, without what frameworks wrap around them.

    Raises `TypeError` for anything else, for LBFGS, for engines with flat or scattered parameters, for gradients of single
    samples and for memory kept on the parameters, `ValueError` if there is none, if one comes twice, or if one holds no parameter of the model.
    """
    listed: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    _check_per_sample(listed, model)
    for optimizer in listed:
        _check_engine(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch optimizer, or a list of some in the order in which they step; got {type(optimizer).__name__}."
            )
        if not takes_hooks(unwrapped(optimizer)):
            raise TypeError(
                f"an optimizer must take hooks around its step, which the session counts by; {type(optimizer).__name__} has not called Optimizer.__init__. "
                "Pass the optimizer that it wraps, if its step calls that one's, or have it call super().__init__."
            )
    optimizers = tuple(map(unwrapped, listed))
    if len(set(map(id, optimizers))) < max(1, len(optimizers)):
        found = "none" if not optimizers else "the same one twice"
        raise ValueError(
            f"a session needs one optimizer, or several different ones; got {found}. Pass those that step the model."
        )
    for optimizer in optimizers:
        _check_holds(optimizer, model)
    return optimizers


def _check_per_sample(optimizers: Iterable[Any], model: nn.Module) -> None:
    """Raise `TypeError` for gradients of single samples, which hooks on the layers make (Opacus' `GradSampleModule`): pairs have none."""
    hooked = next((n for n, m in model.named_modules() if hasattr(m, "autograd_grad_sample_hooks")), None)
    if hooked is None:
        hooked = next((n for n, p in model.named_parameters() if hasattr(p, "grad_sample")), None)
    found = [type(o).__name__ for o in optimizers if type(o).__module__.startswith("opacus.")]
    if hooked is not None or found:
        what = f"an optimizer is a {found[0]}" if found else f"{hooked or 'the model'!r} has hooks for them"
        raise TypeError(
            f"gradients of single samples are made by hooks on the layers as they were, which factors would not have; {what}. Factorize first "
            "(fxrank.factorize, or a plan), and wrap the result."
        )


def _check_engine(optimizer: Any) -> None:
    """Raise `TypeError` for an optimizer whose parameters are spread over processes, or lie flat, whatever is around it."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise TypeError(
            "ZeroRedundancyOptimizer fixes which process owns which parameter when it is built, so they cannot be swapped; use the "
            "optimizer it wraps: after the switch its state is smaller by itself."
        )
    for part in (optimizer, getattr(optimizer, "optimizer", None)):  # Accelerate puts its own around it
        if type(part).__module__.startswith("deepspeed"):
            raise TypeError(
                f"DeepSpeed keeps flat copies of the parameters, so they cannot be swapped; got its {type(part).__name__}. Use a torch optimizer with "
                "DistributedDataParallel or fully_shard, or start DeepSpeed on a model from fxrank.factorize."
            )


def _check_holds(optimizer: Optimizer, model: nn.Module) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates the model several times inside one step, so its parameters cannot be swapped; use a first-order optimizer."
        )
    if kept := put_on_parameters(optimizer):
        raise TypeError(
            f"an optimizer must keep its memory in its state, from which factors get theirs; {type(optimizer).__name__} keeps {', '.join(map(repr, kept))} on "
            "the parameters themselves. Use another optimizer, or factorize first (fxrank.factorize) and build it on the result."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            f"the optimizer must hold the model's parameters; {type(optimizer).__name__} holds {len(held)}, none of them of {type(model).__name__}. "
            "Build it from model.parameters() of this very object, after any model.to(...) that replaces parameters."
        )


def refused_by(
    optimizers: Iterable[Optimizer], layers: Iterable[Layer], model: nn.Module, planned: Container[str] = ()
) -> list[Layer]:
    """The layers, with a reason for those whose factors the optimizer that holds their weight does not take. Raises
    `TypeError` if one of these is `planned`.
    """
    holder = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    answer = []
    for layer in layers:
        reason = None if layer.reason else _refusal(dense_at(model, layer.name), layer, holder)
        if reason is not None and layer.name in planned:
            raise TypeError(
                f"an optimizer must take the factors that a plan asks for; of {layer.name!r}, {reason}. Give this weight to another one."
            )
        answer.append(layer if reason is None else replace(layer, reason=reason))
    return answer


def _refusal(dense: nn.Module, layer: Layer, holder: Mapping[int, Optimizer]) -> str | None:
    optimizer, pair = holder.get(id(getattr(dense, "weight", None))), pair_class(dense, layer.form)
    if (
        isinstance(optimizer, getattr(torch.optim, "Muon", ()))
        and pair is not None
        and pair(dense, 1).u.weight.ndim > 2
    ):
        return "its factors are stacks of matrices, which Muon does not take"
    if isinstance(optimizer, torch.optim.SparseAdam):
        return "one of its factors has a dense gradient, which SparseAdam does not take"
    return None


def swap_parameters(optimizer: Optimizer, replacements: Sequence[Replacement]) -> list[str]:
    """Replace each dense weight by its factors at the same place of the same group, and project its state and gradient.

    Number, order and options of `param_groups` stay; `param_names`, where groups have them, follow. Returns notes about
    weights whose state could not be projected and starts fresh. An extra BatchNorm's parameters join the first group without
    weight decay at the weight's learning rate, or the weight's own.
    """
    by_weight = {id(r.weight): r for r in replacements}
    by_part = {id(p): r for r in replacements for p in r.pair.parameters()}
    gone = {id(p) for r in replacements for p in r.parameters[1:]}
    for made in replacements:
        project_gradient(made)
    notes: list[str] = []
    joining: list[tuple[dict[str, Any], nn.Parameter, str]] = []
    for group in optimizer.param_groups:
        swapped: list[tuple[nn.Parameter, str]] = []
        names = group.get("param_names") or [""] * len(group["params"])
        for parameter, name in zip(list(group["params"]), list(names), strict=True):
            replacement = by_weight.get(id(parameter))
            if id(parameter) in gone:
                optimizer.state.pop(parameter, None)
                continue
            if replacement is None:
                around = by_part.get(id(parameter))  # a bias, which the pair has taken over
                swapped.append((parameter, name if around is None else _names_in(around, name)[id(parameter)]))
                continue
            pair = replacement.pair
            u, v = pair.u.weight, pair.v.weight
            assert isinstance(u, nn.Parameter) and isinstance(v, nn.Parameter)
            new_names = _names_in(replacement, name)
            swapped += [(u, new_names[id(u)]), (v, new_names[id(v)])]
            notes += _project_state(optimizer, replacement, group.get("min_dim_size_to_factor") or 0)
            if pair.extra_norm is not None:
                plain, norm = (
                    _without_decay(optimizer, group),
                    [(p, new_names[id(p)]) for p in pair.extra_norm.parameters()],
                )
                if plain is group:
                    swapped += norm
                else:
                    joining += [(plain, *named) for named in norm]
        _fill(group, swapped)
    for group, parameter, name in joining:
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
    if isinstance(optimizer, torch.optim.Adagrad):
        _complete(optimizer)
    return notes


def project_gradient(replacement: Replacement) -> None:
    """Hand the gradient of a weight that is gone on to its factors: a loop may look at gradients after the step, or add to them.

    Where nobody knows it, of a weight derived from others or of an extra BatchNorm, it is zero.
    """
    weight, pair = replacement.weight, replacement.pair
    if any(p.grad is not None for p in replacement.parameters):
        known = not replacement.derived and weight.grad is not None
        factors = (pair.u.weight, pair.v.weight)
        found = gradients(weight.grad, pair) if known and weight.grad is not None else map(torch.zeros_like, factors)
        for factor, gradient in zip(factors, found, strict=True):
            if factor.requires_grad:
                factor.grad = gradient.detach()
        for parameter in pair.extra_norm.parameters() if pair.extra_norm is not None else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    for parameter in replacement.parameters:
        # A list of the user's that holds it still, for clipping say, would count its gradient in every step.
        parameter.grad = None


def _without_decay(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    others = (g for g in optimizer.param_groups if not g.get("weight_decay") and g.get("lr") == group.get("lr"))
    return next(others, group) if group.get("weight_decay") else group


def _complete(optimizer: torch.optim.Adagrad) -> None:
    """Adagrad makes its state when it is built, and older torch then takes it for granted."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.get_default_dtype()),
                    "sum": torch.full_like(parameter, group.get("initial_accumulator_value", 0.0), requires_grad=False),
                }


def _fill(group: dict[str, Any], named: Sequence[tuple[nn.Parameter, str]]) -> None:
    group["params"][:] = [parameter for parameter, _ in named]
    if "param_names" in group:
        group["param_names"][:] = [name for _, name in named]


def _names_in(replacement: Replacement, name: str) -> dict[int, str]:
    """The names of a pair's parameters, from that of the weight as the user gave it, under a wrapper's prefix maybe."""
    if isinstance(replacement.pair, LowRankWeight):
        path = name  # the pair is where the parameter was
    else:
        before, layer, _ = f".{name}".rpartition(f".{replacement.name}.")
        path = f"{before}.{replacement.name}"[1:] if layer else name.rpartition(".")[0]
    return {id(p): f"{path}.{inner}".lstrip(".") for inner, p in replacement.pair.named_parameters()}


def _project_state(optimizer: Optimizer, replacement: Replacement, smallest: int) -> list[str]:
    state = optimizer.state.pop(replacement.weight, None)
    if not state:
        return []
    if replacement.derived:
        return [f"{replacement.name}: its weight was derived from other parameters; its factors start fresh"]
    pair = replacement.pair
    try:
        new_u, new_v = projected(state, replacement.weight.shape, pair, smallest)
    except NoProjectionError as key:
        return [
            f"{replacement.name}: optimizer state {str(key)!r} of {type(optimizer).__name__} has no known projection; its factors start fresh"
        ]
    optimizer.state[pair.u.weight], optimizer.state[pair.v.weight] = new_u, new_v
    return []
