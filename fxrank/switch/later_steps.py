"""What is added to each step of an optimizer after the switch: Frobenius decay, and a factor of the learning rate."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxrank.passes.pairs.base import FactorPair
from fxrank.switch.apply_plan import Replacement
from fxrank.switch.decays import Way, way_of_decay
from fxrank.switch.step_hooks import restore_after_failure, restore_lr, scale_lr, unscale_lr
from fxrank.torch_private.dtensor import placed_like, whole
from fxrank.torch_private.modules import times_written
from fxrank.wrappers import outside_autocast


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
        self._old: dict[int, tuple[Callable[[], Tensor | None], int]] = {}
        self._lr_factor: Callable[[], float] = lambda: 1.0

    def expect_new_gradients(self) -> None:
        """Those that the factors have are of the switch's own step: in the next one they are not enough."""
        self._old = {id(p): (ref(p.grad), times_written(p.grad)) for p in self._first if p.grad is not None}

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
        if self._first and not any(self._has_new_gradient(p) for p in self._first):
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
        self._first, self._gone, self._old = [], [], {}

    def _has_new_gradient(self, factor: nn.Parameter) -> bool:
        of_switch, written = self._old.get(id(factor), (lambda: None, 0))
        if factor.grad is None or factor.grad is not of_switch():
            return factor.grad is not None
        # zero_grad(set_to_none=False) writes zeros
        return times_written(factor.grad) > written and bool(whole(factor.grad).any())

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
            if any(w.grad is None for w in (first, second) if w.numel()):  # a form may leave nothing of `V` to train
                continue
            for w in (first, second):
                if w.grad is not None and w.grad.is_sparse:  # of a table whose every entry decays
                    w.grad = w.grad.to_dense()
            u, v = pair.unfold_u(whole(first)), pair.unfold_v(whole(second))
            ut, vt = u.transpose(1, 2), v.transpose(1, 2)
            pulls = (
                (first, placed_like(pair.fold_u((vt @ v) @ u), first)),
                (second, placed_like(pair.fold_v(v @ (u @ ut)), second)),
            )
            if way == "weights":
                # The step multiplies by 1 - lr·own; this makes the sum of both w - lr·strength·pull.
                lr = float(group["lr"])
                shrink = 1.0 - lr * own
                for w, pull in pulls:
                    change = w.mul(lr * own).sub_(pull, alpha=lr * strength).div_(shrink)
                    w.add_(change if found_inf is None else change.mul_(found_inf.to(w.device) == 0))
                continue
            sign = -1.0 if group.get("maximize") else 1.0
            for w, pull in pulls:
                if w.grad is None:
                    continue
                if grad_scale is None:
                    w.grad.add_(pull, alpha=sign * strength)
                    if own:
                        w.grad.add_(w, alpha=-sign * own)
                else:
                    w.grad.add_(pull.mul_(strength).sub_(w, alpha=own) * grad_scale.to(w.device), alpha=sign)
