"""Averages of a model's weights, taken through the switch beside it: `torch.optim.swa_utils.AveragedModel`, timm's
`ModelEmaV3`, a teacher, a target network.

From the switch on, an average is one of factors, and factors are known up to a change of basis only, `V U = (V A)(A⁻¹ U)`:
the mean of two pairs is near the mean of their products only if both are written in the same basis. So the averaged
weight is not split by itself. It is fitted from the model's factors, by the smallest change of them that follows the
averaged weight. Its own best factors would be a little nearer at the switch and drift off after it, even rotated
towards the model's (Procrustes).

Measured on digits, two 128-wide layers at a quarter of the rank, decay 0.99, switch after 300 steps; distances relative to
the averaged weight at the switch, and 10 and 50 steps later to the average of the model's products:

    its own best factors             0.590    0.234    0.631
    the same, rotated                0.590    0.019    0.051
    fitted from the model's factors  0.592    0.002    0.011
    the model's factors themselves   0.612    0.000    0.004    (the average is lost)

An average may be a module, or a list of tensors beside `model.parameters()`, in an object (diffusers' `EMAModel`, `torch_ema`) or by
itself: the list is dressed as a module for the time of the switch.

An average that fxrank is not told of stays dense. Nothing is known of it at the switch; its next update meets factors where
it has weights, and fails with torch's error about their shapes.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxrank.passes.model.names import module_at, own_name
from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.spectra.exact import check_finite
from fxrank.plan import Plan
from fxrank.switch.apply_plan import Factors, apply_plan
from fxrank.switch.sites import sites
from fxrank.torch_private.dtensor import is_sharded
from fxrank.torch_private.modules import COMPILED, own_children


class ListedAverage:
    """An average that is a list of tensors, one for each of the model's parameters or of those that train."""

    def __init__(self, holder: Any, attribute: str, trained: bool) -> None:
        """The list is `holder.attribute`, or `holder` itself where that is empty."""
        self._holder, self._attribute, self._trained = holder, attribute, trained

    def as_module(self, model: nn.Module) -> nn.Module:
        """A copy of the model, as it is before the switch, with the very tensors of the list."""
        tensors = getattr(self._holder, self._attribute) if self._attribute else self._holder
        memo: dict[int, Tensor] = {id(t): t for t in (*model.buffers(), *model.parameters())}
        for parameter, tensor in zip(self._followed(model), tensors, strict=True):
            memo[id(parameter)] = nn.Parameter(tensor, parameter.requires_grad)
        return copy.deepcopy(model, memo)

    def take(self, module: nn.Module, model: nn.Module) -> None:
        """List what the switch has made of that copy, beside the parameters that the model has now."""
        followed = set(map(id, self._followed(model)))
        theirs = zip(module.parameters(), model.parameters(), strict=True)
        tensors = [mine.detach() for mine, parameter in theirs if id(parameter) in followed]
        if self._attribute:
            setattr(self._holder, self._attribute, tensors)
        else:
            self._holder[:] = tensors

    def _followed(self, model: nn.Module) -> list[nn.Parameter]:
        return [p for p in model.parameters() if p.requires_grad or not self._trained]


Average = nn.Module | ListedAverage


def averaged_in(follower: object, model: nn.Module) -> Average:
    """The module inside `follower`, or itself, whose parameters have the names and shapes of the model's; or the list of tensors, in
    one of its attributes or itself, whose shapes are those of `model.parameters()`, all or those that require gradients.

    Wrappers are looked into by the names torch and timm give them (`module`, `_orig_mod`). Raises `TypeError` for what holds
    neither and `ValueError` if none fits.
    """
    if not isinstance(follower, nn.Module):
        return _listed_in(follower, model)
    if is_sharded(model):
        raise TypeError(
            "an average is followed through the switch beside a whole model; this one is in shards. Make its average anew after the switch (listener=)."
        )
    expected = _shapes(model)
    for module in _unwrapping(follower):
        if module is model:
            raise ValueError(
                "a follower must be a copy of the model; got the model itself. Leave it out, or pass its average."
            )
        if _shapes(module) == expected:
            return module
    found = _shapes(list(_unwrapping(follower))[-1])
    strange = next(
        iter([*(n for n in expected if found.get(n) != expected[n]), *(n for n in found if n not in expected)])
    )
    raise ValueError(
        f"a follower must have the model's parameters, by name and shape; {strange!r} is {found.get(strange, 'missing')} in "
        f"{type(follower).__name__} and {expected.get(strange, 'missing')} in {type(model).__name__}. Pass a copy of this very model, before the switch."
    )


def _listed_in(follower: object, model: nn.Module) -> ListedAverage:
    held: dict[str, object] = {"": follower} if isinstance(follower, list) else dict(getattr(follower, "__dict__", {}))
    lists = {name: x for name, x in held.items() if isinstance(x, list) and x and all(isinstance(t, Tensor) for t in x)}
    if not lists:
        raise TypeError(
            f"a follower must be a module with the model's parameters, or hold a list of tensors beside them; got {type(follower).__name__}. Pass the "
            "averaged module, or the list, that it has."
        )
    if is_sharded(model):
        raise TypeError(
            "a list of averages is followed through the switch beside a whole model; this one is in shards. Make it anew after the switch (listener=)."
        )
    everything = list(model.parameters())
    own = set(map(id, everything))
    if any(id(t) in own for tensors in lists.values() for t in tensors):
        raise ValueError(
            "a follower must be a copy of the model; got a list of its own parameters. Leave it out, or pass its average."
        )
    for trained in (False, True):
        wanted = [tuple(p.shape) for p in everything if p.requires_grad or not trained]
        for name, tensors in lists.items():
            if [tuple(t.shape) for t in tensors] == wanted:
                return ListedAverage(follower, name, trained)
    found = ", ".join(f"{name or 'the list'} of {len(tensors)}" for name, tensors in lists.items())
    raise ValueError(
        f"a list of averages must have a tensor of the same shape for each of the model's {len(everything)} parameters, or for each that trains; got "
        f"{found}. Make it from list(model.parameters()) of this very model, before the switch."
    )


def _unwrapping(module: nn.Module | None) -> Iterator[nn.Module]:
    while module is not None:
        yield module
        inside = own_children(module)
        module = inside.get(COMPILED) or inside.get("module")


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {own_name(name): tuple(p.shape) for name, p in module.named_parameters()}


def check_averages(averages: Iterable[nn.Module], plan: Plan) -> None:
    """Raise `NonFiniteWeightError` or `PlanMismatchError` if an average cannot be switched as the plan says."""
    for average in averages:
        for site in sites(average, plan):
            check_finite(weight_of(site.dense).detach(), f"{site.name} of an average")


Before = Mapping[str, tuple[Tensor, Tensor | None]]
"""By layer name the weight and the bias that a model had before the switch."""


def switch_average(
    average: nn.Module, model: nn.Module, plan: Plan, *, split: bool = True, before: Before | None = None
) -> None:
    """Make of `average`, in place, what the plan has made of `model`: its own weights, split at the model's ranks and in
    the basis of its factors. `split=False` leaves the factors unfilled.

    Factors that know the data leave out of a weight what other factors would have: with `before`, what the model's have lost, and what its bias
    has gained, is lost and gained here as well.

    An extra BatchNorm starts as the model's own. Devices and dtypes of the average stay.
    """
    found = sites(average, plan)
    factors: Factors = {}
    for site in found if split else ():
        pair = module_at(model, site.name)
        assert isinstance(pair, FactorPair)
        own = pair.unfold_u(pair.u.weight), pair.unfold_v(pair.v.weight)
        factors[site.name] = _following(pair, weight_of(site.dense).detach(), own, (before or {}).get(site.name))
    apply_plan(average, plan, split=False, factors=dict(factors))
    for name in [site.name for site in found]:
        mine, theirs = module_at(average, name), module_at(model, name)
        assert isinstance(mine, FactorPair) and isinstance(theirs, FactorPair)
        if name in factors:
            u, v, *_ = factors[name]
            mine.fill(u, v, like=theirs)
        if mine.extra_norm is not None and theirs.extra_norm is not None:
            mine.extra_norm.load_state_dict(theirs.extra_norm.state_dict())


@torch.no_grad()
def _following(
    pair: FactorPair, weight: Tensor, own: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor | None] | None
) -> tuple[Tensor, ...]:
    """The factors of an averaged weight, from the model's `own`, and what its bias gains, if it does."""
    stack = type(pair).unroll(pair, weight)
    if before is None:
        return fitted(stack, *own)
    u, v = (t.to(dtype=torch.float64) for t in own)
    lost = type(pair).unroll(pair, before[0]).to(v) - v @ u
    found = fitted(stack.to(torch.float64) - lost.to(stack.device), *own)
    if pair.bias is None or before[1] is None:
        return found
    return *found, (pair.bias - before[1]).to(weight)


@torch.no_grad()
def fitted(stack: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Factors near `u` `(groups, r, cols)` and `v` `(groups, rows, r)` with `V U ≈ stack`, `(groups, rows, cols)`; float64.

    With `D = stack - V U`, the smallest `(dU, dV)` with `V dU + dV U` = the part of `D` that changes of the factors can
    reach: `dU = V⁺D - ½ V⁺D U⁺ U`, `dV = D U⁺ - ½ V V⁺D U⁺`. The inverses are damped by the size of that part: singular
    values below it say nothing about a direction, and would make the step, which is of first order, far too large.
    """
    place: dict[str, Any] = {"device": stack.device, "dtype": torch.float64}
    u, v = u.to(**place), v.to(**place)
    d = stack.to(**place) - v @ u
    rows, cols = v @ torch.linalg.pinv(v), torch.linalg.pinv(u) @ u
    reach = torch.linalg.matrix_norm(rows @ d + d @ cols - rows @ d @ cols, ord=2, keepdim=True)
    damping = reach.clamp(min=torch.finfo(u.dtype).tiny) * torch.eye(u.shape[1], **place)
    left = torch.linalg.solve(v.mT @ v + damping, v.mT)
    right = torch.linalg.solve(u @ u.mT + damping, u).mT
    core = left @ d @ right / 2
    return u + left @ d - core @ u, v + d @ right - v @ core
