"""The same optimizer after the switch: parameters swapped in place, Frobenius decay and learning-rate ramp in its own
step. (Its state: `moments`.)
"""

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.optim import Optimizer

from fxrank.decays import Way, way_of_decay
from fxrank.distributed import check_optimizer
from fxrank.moments import NoProjectionError, projected
from fxrank.passes.factors import FactorPair
from fxrank.passes.kinds import dense_at, pair_class
from fxrank.passes.layers import Layer
from fxrank.passes.raw import LowRankWeight
from fxrank.sharded import placed_like, whole
from fxrank.steps import restore_after_failure, restore_lr, scale_lr, unscale_lr
from fxrank.surgery import Replacement
from fxrank.wrappers import outside_autocast, unwrapped


def optimizers_of(given: Optimizer | Iterable[Optimizer], model: nn.Module) -> tuple[Optimizer, ...]:
    """The optimizers that a user gives, one or several, without what frameworks wrap around them.

    Raises `TypeError` for anything else, for LBFGS and for engines with flat or scattered parameters, `ValueError` if there is
    none, if one comes twice, or if one holds no parameter of the model.
    """
    listed: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for optimizer in listed:
        check_optimizer(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch optimizer, or a list of some in the order in which they step; got {type(optimizer).__name__}."
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


def _check_holds(optimizer: Optimizer, model: nn.Module) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates the model several times inside one step, so its parameters cannot be swapped; use a first-order optimizer."
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
        reason = None if layer.reason else _refusal(dense_at(model, layer.name, layer.form), layer, holder)
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
    """Replace each dense weight by its factors at the same place of the same group, and project its state.

    Number, order and options of `param_groups` stay; `param_names`, where groups have them, follow. Returns notes about
    weights whose state could not be projected and starts fresh. An extra BatchNorm's parameters join the first group without
    weight decay at the weight's learning rate, or the weight's own.
    """
    by_weight = {id(r.weight): r for r in replacements}
    by_part = {id(p): r for r in replacements for p in r.pair.parameters()}
    gone = {id(p) for r in replacements for p in r.parameters[1:]}
    for parameter in (p for r in replacements for p in r.parameters):
        # A list of the user's that holds it still, for clipping say, would count its gradient in every step.
        parameter.grad = None
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


class FactorRegime:
    """What happens inside every `optimizer.step()` after the switch: Frobenius decay, and the learning-rate factor.

    Frobenius decay adds the gradient of `λ/2 ‖VU‖_F²`, that is `λ (VᵀV) U` and `λ V (U Uᵀ)`, through the `r × r`
    Gram matrices (Cuttlefish §3.5, Khodak et al. 2021), and cancels the group's own decay of the factors, in
    whichever way the optimizer decays: added to the gradient (SGD, Adam), or applied to the weights (AdamW).
    `strength`: a number, or `"auto"` for the group's own weight decay. Where the optimizer decays in neither way, its decay
    stays as it is, and `notes` says so.
    """

    def __init__(self, optimizer: Optimizer, replacements: Sequence[Replacement], strength: float | str | None) -> None:
        self._optimizer = optimizer
        self._strength = None if strength == "auto" or strength is None else float(strength)
        decayed = [] if strength is None or strength is False else [r.pair for r in replacements]
        self._pairs = {id(pair.u.weight): pair for pair in decayed}
        self._ways: dict[FactorPair, Way | None] = {}
        self._known: dict[str, Way | None] = {}
        self.notes: list[str] = []
        names = {r.pair: r.name for r in replacements}
        left = [
            names[pair]
            for pair, group in self._held()
            if self._way(pair, group) is None and (self._strength or group.get("weight_decay"))
        ]
        if left:
            self.notes.append(
                f"{', '.join(left)}: {type(optimizer).__name__} decays weights in a way of its own; its decay stays, without Frobenius decay"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._first = [
            p for r in replacements for p in (r.pair.u.weight, r.pair.v.weight) if id(p) in held and p.requires_grad
        ]
        self._gone = [(r.name, ref(p)) for r in replacements if id(r.pair.u.weight) in held for p in r.parameters]
        self._lr_factor: Callable[[], float] = lambda: 1.0

    def _held(self) -> list[tuple[FactorPair, dict[str, Any]]]:
        """The pairs that the optimizer holds now, with their groups: the user may add and remove some."""
        groups = self._optimizer.param_groups
        return [(self._pairs[id(p)], group) for group in groups for p in group["params"] if id(p) in self._pairs]

    def _way(self, pair: FactorPair, group: dict[str, Any]) -> Way | None:
        if pair not in self._ways:
            # Found out once for groups that differ by their rates only, one for each layer say.
            same = {
                k: v for k, v in group.items() if k not in ("params", "param_names", "weight_decay") and "lr" not in k
            }
            key = repr(("weight_decay" in group, sorted(same.items())))
            if key not in self._known:
                self._known[key] = way_of_decay(self._optimizer, group, pair.u.weight.device)
            self._ways[pair] = self._known[key]
        return self._ways[pair]

    def scale_lr(self, factor: Callable[[], float]) -> None:
        """Multiply the scheduled learning rate by `factor()` within each step; outside of it schedulers see only
        their own values.
        """
        self._lr_factor = factor

    def before_step(self, closure: Callable[[], Any] | None = None) -> Callable[[], Any] | None:
        """Set the learning rate and add the decay. A step with a `closure` makes its gradients inside: the closure
        returned then does both after it, so that one that raises leaves nothing behind.
        """
        restore_after_failure(self._optimizer, self)
        if closure is None:
            self._begin()
            return None

        def begun() -> Any:
            loss = closure()
            self._begin()
            return loss

        return begun

    def after_step(self) -> None:
        unscale_lr(self._optimizer, self)

    def _begin(self) -> None:
        try:
            scale_lr(self._optimizer, self, self._lr_factor)
            self.decay()
        except BaseException:
            restore_lr(self._optimizer)
            raise

    def _check_first_step(self) -> None:
        """Warn, in the first step after the switch, of gradients that are missing or that no optimizer meets."""
        if self._first and all(p.grad is None for p in self._first):
            warnings.warn(
                "the factors must have gradients in the step after the switch; none of them has any. Does the loop run something that was made "
                "from the model before, a CUDA graph or a copy? Make it anew after the switch.",
                UserWarning,
                stacklevel=3,
            )
        used = [name for name, gone in self._gone if (weight := gone()) is not None and weight.grad is not None]
        if used:
            warnings.warn(
                f"a weight must not be used after the switch has replaced it; {', '.join(dict.fromkeys(used))} got gradients in the step after it, "
                "and no optimizer holds them. Does another model share them, or the loop keep them in a list or dict? Attach to a module that holds "
                "both models, and ask the model for its parameters in each step.",
                UserWarning,
                stacklevel=3,
            )
        self._first, self._gone = [], []

    @torch.no_grad()
    @outside_autocast
    def decay(self) -> None:
        """Add the Frobenius decay of this step."""
        self._check_first_step()
        # Both are set by GradScaler when a fused step unscales, and leaves out overflown gradients, by itself.
        grad_scale, found_inf = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        for pair, group in self._held():
            way, own = self._way(pair, group), float(group.get("weight_decay", 0.0))
            strength = own if self._strength is None else self._strength
            if way is None or (strength == 0 and own == 0):
                continue
            first, second = pair.u.weight, pair.v.weight
            assert isinstance(first, nn.Parameter) and isinstance(second, nn.Parameter)
            if first.grad is None or second.grad is None:
                continue
            for w in (first, second):
                if w.grad is not None and w.grad.is_sparse:  # of a table whose every entry decays
                    w.grad = w.grad.to_dense()
            u, v = pair.unfold_u(whole(first)), pair.unfold_v(whole(second))
            ut, vt = u.transpose(1, 2), v.transpose(1, 2)
            pull_u, pull_v = (
                placed_like(pair.fold_u((vt @ v) @ u), first),
                placed_like(pair.fold_v(v @ (u @ ut)), second),
            )
            if way == "weights":
                # The step multiplies by 1 - lr·own; this makes the sum of both w - lr·strength·pull.
                lr = float(group["lr"])
                shrink = 1.0 - lr * own
                for w, pull in ((first, pull_u), (second, pull_v)):
                    change = w.mul(lr * own).sub_(pull, alpha=lr * strength).div_(shrink)
                    w.add_(change if found_inf is None else change.mul_(found_inf.to(w.device) == 0))
                continue
            sign = -1.0 if group.get("maximize") else 1.0
            for w, pull in ((first, pull_u), (second, pull_v)):
                assert w.grad is not None
                if grad_scale is None:
                    w.grad.add_(pull, alpha=sign * strength)
                    if own:
                        w.grad.add_(w, alpha=-sign * own)
                else:
                    w.grad.add_(pull.mul_(strength).sub_(w, alpha=own) * grad_scale.to(w.device), alpha=sign)
