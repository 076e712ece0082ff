"""The same optimizer after the switch: parameters swapped in place, its state projected, Frobenius decay and
learning-rate ramp in its own step.

With `W = V U` the gradients are `∂U = Vᵀ G`, `∂V = G Uᵀ` (`G` the gradient of `W`), linear in `G`. So a momentum
buffer `M`, a weighted sum of past gradients, becomes `Vᵀ M` and `M Uᵀ` exactly. A running mean of squares `S`
becomes `(V∘V)ᵀ S` and `S (U∘U)ᵀ`: exact if the entries of `G` were uncorrelated, an approximation otherwise. Where
the mean is kept beside it (centered RMSprop), that holds for the variance, so that the square stays above it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxrank.passes.factors import FactorPair
from fxrank.surgery import Replacement

LINEAR_STATE = {"momentum_buffer", "exp_avg", "grad_avg", "prev"}
"""State that is a linear function of past gradients."""
SQUARED_STATE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
"""State that is a linear function of past squared gradients."""
_DECOUPLED = {"AdamW", "Adafactor", "Muon", "Lion"}


def check_holds(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise `ValueError` unless the optimizer holds at least one trainable parameter of the model; `TypeError` for
    an optimizer with closures.
    """
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


def swap_parameters(optimizer: Optimizer, replacements: Sequence[Replacement]) -> list[str]:
    """Replace each dense weight by its factors at the same place of the same group, and project its state.

    Number, order and options of `param_groups` stay. Returns notes about weights whose state could not be projected
    and starts fresh. An extra BatchNorm's parameters join the first group without weight decay, or the weight's
    own.
    """
    by_weight = {id(r.weight): r for r in replacements}
    gone = {id(p) for r in replacements for p in r.parameters[1:]}
    for parameter in (p for r in replacements for p in r.parameters):
        # A list of the user's that holds it still, for clipping say, would count its gradient in every step.
        parameter.grad = None
    notes: list[str] = []
    plain = next((g for g in optimizer.param_groups if not g.get("weight_decay")), None)
    for group in list(optimizer.param_groups):
        swapped: list[nn.Parameter] = []
        for parameter in group["params"]:
            replacement = by_weight.get(id(parameter))
            if id(parameter) in gone:
                optimizer.state.pop(parameter, None)
                continue
            if replacement is None:
                swapped.append(parameter)
                continue
            pair = replacement.pair
            u, v = pair.u.weight, pair.v.weight
            assert isinstance(u, nn.Parameter) and isinstance(v, nn.Parameter)
            swapped += [u, v]
            notes += _project_state(optimizer, replacement, u, v)
            if pair.extra_norm is not None:
                target = swapped if plain is None or plain is group else plain["params"]
                target += list(pair.extra_norm.parameters())
        group["params"][:] = swapped
    return notes


def _project_state(optimizer: Optimizer, replacement: Replacement, u: nn.Parameter, v: nn.Parameter) -> list[str]:
    state = optimizer.state.pop(replacement.weight, None)
    if not state:
        return []
    if replacement.derived:
        return [f"{replacement.name}: its weight was derived from other parameters; its factors start fresh"]
    pair, shape = replacement.pair, replacement.weight.shape
    u_matrix, v_matrix = pair.unfold_u(u.detach()), pair.unfold_v(v.detach())
    new_u: dict[str, Any] = {}
    new_v: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != shape):
            new_u[key] = value.clone() if isinstance(value, Tensor) else value
            new_v[key] = value.clone() if isinstance(value, Tensor) else value
        elif value.shape == shape and key in LINEAR_STATE | SQUARED_STATE:
            square = key in SQUARED_STATE
            left, right = (v_matrix.square(), u_matrix.square()) if square else (v_matrix, u_matrix)
            if (
                key == "square_avg" and "grad_avg" in state
            ):  # centered RMSprop: the variance; the mean's square comes below
                moment = (value - state["grad_avg"].square()).clamp_(min=0)
            else:
                moment = value
            moment = pair.unroll(pair, moment).to(left.dtype)
            new_u[key] = _like(pair.fold_u(left.transpose(1, 2) @ moment), u, value)
            new_v[key] = _like(pair.fold_v(moment @ right.transpose(1, 2)), v, value)
        else:
            return [
                f"{replacement.name}: optimizer state {key!r} of {type(optimizer).__name__} has no known projection; its factors start fresh"
            ]
    for new in (new_u, new_v):
        if "square_avg" in new and "grad_avg" in new:
            new["square_avg"] += new["grad_avg"].square()
    optimizer.state[u], optimizer.state[v] = new_u, new_v
    return []


def _like(value: Tensor, parameter: Tensor, old: Tensor) -> Tensor:
    """`value` with the strides of its parameter and the dtype of the old state."""
    return torch.empty_like(parameter, dtype=old.dtype).copy_(value)


@dataclass(frozen=True)
class _Site:
    pair: FactorPair
    group: int
    strength: float | None


class FactorRegime:
    """What happens inside every `optimizer.step()` after the switch: Frobenius decay, and the learning-rate factor.

    Frobenius decay adds the gradient of `λ/2 ‖VU‖_F²`, that is `λ (VᵀV) U` and `λ V (U Uᵀ)`, through the `r × r`
    Gram matrices (Cuttlefish §3.5, Khodak et al. 2021), and cancels the group's own decay of the factors, in
    whichever way the optimizer decays: added to the gradient (SGD, Adam), or applied to the weights (AdamW).
    `strength`: a number, or `"auto"` for the group's own weight decay.
    """

    def __init__(self, optimizer: Optimizer, replacements: Iterable[Replacement], strength: float | str | None) -> None:
        self._optimizer = optimizer
        self._sites: list[_Site] = []
        group_of = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        for r in replacements:
            group = group_of.get(id(r.pair.u.weight))
            if strength is not None and strength is not False and group is not None:
                self._sites.append(_Site(r.pair, group, None if strength == "auto" else float(strength)))
        self._lr_factor: Callable[[], float] = lambda: 1.0
        self._scheduled: list[Any] = []

    def scale_lr(self, factor: Callable[[], float]) -> None:
        """Multiply the scheduled learning rate by `factor()` within each step; outside of it schedulers see only
        their own values.
        """
        self._lr_factor = factor

    def before_step(self, closure: Callable[[], Any] | None = None) -> Callable[[], Any] | None:
        """Set the learning rate and add the decay. A step with a `closure` makes its gradients inside: the closure
        returned then adds the decay to them.
        """
        self.after_step()  # of a step that failed
        factor = self._lr_factor()
        if factor != 1.0:
            self._scheduled = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * factor
        if closure is None:
            self.decay()
            return None

        def decayed() -> Any:
            loss = closure()
            self.decay()
            return loss

        return decayed

    def after_step(self) -> None:
        for group, lr in zip(self._optimizer.param_groups, self._scheduled, strict=False):
            group["lr"] = lr
        self._scheduled = []

    @torch.no_grad()
    def decay(self) -> None:
        """Add the Frobenius decay of this step."""
        # Both are set by GradScaler when a fused step unscales, and leaves out overflown gradients, by itself.
        grad_scale, found_inf = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        for site in self._sites:
            group = self._optimizer.param_groups[site.group]
            own = float(group.get("weight_decay", 0.0))
            strength = own if site.strength is None else site.strength
            if strength == 0 and own == 0:
                continue
            pair = site.pair
            first, second = pair.u.weight, pair.v.weight
            assert isinstance(first, nn.Parameter) and isinstance(second, nn.Parameter)
            if first.grad is None or second.grad is None:
                continue
            u, v = pair.unfold_u(first), pair.unfold_v(second)
            ut, vt = u.transpose(1, 2), v.transpose(1, 2)
            pull_u, pull_v = pair.fold_u((vt @ v) @ u), pair.fold_v(v @ (u @ ut))
            if _is_decoupled(self._optimizer, group):
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


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    flag = group.get("decoupled_weight_decay")
    name = type(optimizer).__name__
    return bool(flag) if flag is not None else name in _DECOUPLED or name.endswith("W")
