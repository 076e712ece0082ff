"""Models whose parameters lie in shards over several processes: FSDP2 (`torch.distributed.fsdp.fully_shard`).

Nothing here needs the whole model anywhere. Decisions are made on its skeleton, a copy on the meta device; of the numbers one
weight at a time is gathered, when a decision asks for it and when it is split. At the switch the sharded weight's place in its
unit is taken by its factors, in shards as well: units, hooks, streams, mixed precision stay as they are.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxrank.passes.model.calls import Example
from fxrank.passes.model.names import module_at
from fxrank.passes.model.weights import is_derived, stands_for
from fxrank.passes.pairs.locate import dense_at, holders, owners_in, weight_alone
from fxrank.passes.rewriting.calibrate import calibrate_on
from fxrank.passes.spectra.exact import check_finite
from fxrank.passes.tracing.trace import TracedModule
from fxrank.plan import Plan
from fxrank.switch.apply_plan import Factors, Replacement, apply_plan, take_hooks
from fxrank.switch.plan_of import remember_plan
from fxrank.torch_private import pytree
from fxrank.torch_private.dtensor import in_shards, local, whole
from fxrank.torch_private.fsdp2 import (
    drop_unit_hooks,
    groups,
    is_unit,
    of_own_classes,
    replace_in_unit,
    reshard,
    unit_states,
)
from fxrank.torch_private.modules import own_parameters


class Shards:
    """The shards of one model. All methods are for all processes at once, in the same order.

    `skeleton` is the model on the meta device, whole and without FSDP: for tracing, and for every decision. Its parameters
    stand for the model's: reading a layer's matrix gathers it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises `TypeError`, which names the way out, for shards that are not `fully_shard`'s alone."""
        self.model = model
        self._announce: Callable[[str], None] | None = None
        units = list(groups(model))
        managed = {id(p.parameter): p for group in units for p in group.managed()}
        reshard(model)
        for name, parameter in model.named_parameters():
            place = managed.get(id(parameter))
            if in_shards(parameter) and (place is None or place.was_dtensor):
                raise TypeError(
                    f"shards must be those of fully_shard alone to be replaced; {name!r} is a DTensor of another origin (tensor parallelism?). "
                    "Factorize first (fxrank.factorize, or a plan) and distribute the result."
                )
        for group in units:
            if group.processes != dist.get_world_size():
                raise TypeError(
                    f"all processes must share one model; its mesh has {group.processes} of {dist.get_world_size()}. "
                    "Factorize first (fxrank.factorize, or a plan) and shard the result."
                )
            if group.is_offloaded:
                raise TypeError(
                    "shards must be where they are computed with; these are offloaded to the CPU. Leave out CPUOffloadPolicy until the switch is made, "
                    "or factorize first."
                )
        self.skeleton = _skeleton(model, self.gather)

    def example(self, given: Example) -> Example:
        """A batch as the skeleton takes it."""
        moved: Example = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given)
        return moved

    def refusal(self, name: str) -> str | None:
        """Why a layer cannot be replaced inside its unit; None if it can."""
        if is_derived(dense_at(self.skeleton, name)):
            return "its weight is derived from parameters that are sharded"
        weight = self.model.get_parameter(_weight_name(self.model, name))
        held = holders(owners_in(self.model), weight, alone=weight_alone(self.skeleton, name))
        places = [(owner, attribute) for owner, attribute, _ in held]
        if any(is_unit(owner) for owner, attribute in places if not attribute):
            return "it is a unit of fully_shard by itself; shard the block around it instead"
        owner, attribute = places[0]  # asked by its place: a unit may be unsharded now
        managed = (p for group in groups(self.model) for p in group.managed())
        if not any(p.module is owner and p.attribute == (attribute or "weight") for p in managed):
            return "no unit of fully_shard holds its weight; shard a block around it, without ignored_params"
        return None

    def gather(self, name: str) -> Tensor:
        """All of a weight, by name, on every process."""
        if self._announce is not None:
            self._announce(name)
        reshard(self.model)
        return whole(self.model.get_parameter(name).detach())

    @contextmanager
    def announcing(self, announce: Callable[[str], None]) -> Iterator[None]:
        """Meanwhile one process asks alone, and calls the others to each weight by its name."""
        self._announce = announce
        try:
            yield
        finally:
            self._announce = None

    def apply(
        self,
        plan: Plan,
        gm: TracedModule,
        example: Example,
        *,
        split: bool,
        factors: Factors,
        share: Callable[[Iterable[Tensor]], None] | None,
    ) -> list[Replacement]:
        """As `apply_plan`: the plan's pairs in the model, in shards, and in the skeleton and its graph `gm`."""
        reshard(self.model)
        self._check_finite(list(plan.R))
        apply_plan(self.skeleton, plan, gm=gm, split=False)
        replacements, places = [], []
        for decision in plan.layers:
            if not decision.factorized:
                continue
            old = self.model.get_parameter(_weight_name(self.model, decision.name))
            plain = nn.Parameter(whole(old.detach()), old.requires_grad)
            for module in self.model.modules():
                own = own_parameters(module)
                own.update({attribute: plain for attribute, parameter in own.items() if parameter is old})
            (made,) = apply_plan(
                self.model, replace(plan, layers=(decision,)), split=split, factors=factors, share=share
            )
            factors_of = (made.pair.u.weight, made.pair.v.weight)
            places.append(replace_in_unit(self.model, old, factors_of, made.pair.modules()))
            for factor in factors_of:
                take_hooks(factor, old)
            replacements.append(Replacement(decision.name, (old,), made.pair))
        for place in places:
            place.prepare_again()
        calibrate_on(example, self.model, [r.pair.extra_norm for r in replacements], share)
        reshard(self.model)
        for made, place in zip(replacements, places, strict=True):
            if made.pair.extra_norm is not None:  # a BatchNorm in shards could not be written into
                place.add(self.model, made.pair.extra_norm.parameters())
        for place in places:
            place.prepare_again()
        remember_plan(self.model, plan)
        return replacements

    def _check_finite(self, names: list[str]) -> None:
        weights = [self.model.get_parameter(_weight_name(self.model, name)) for name in names]
        bad = torch.tensor([float(not torch.isfinite(local(w)).all()) for w in weights], device=weights[0].device)
        dist.all_reduce(bad)
        for name, weight, count in zip(names, weights, bad.tolist(), strict=True):
            if count:
                check_finite(whole(weight.detach()), name)


def _weight_name(model: nn.Module, name: str) -> str:
    owner, _, attribute = name.rpartition(".")
    return name if own_parameters(module_at(model, owner)).get(attribute) is not None else f"{name}.weight"


def _skeleton(model: nn.Module, gather: Callable[[str], Tensor]) -> nn.Module:
    """A copy on the meta device without FSDP, whose parameters stand for the model's."""
    memo: dict[int, Any] = {id(state): state for state in unit_states(model)}
    for name, parameter in model.named_parameters():
        stand_in = nn.Parameter(
            torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"),
            parameter.requires_grad,
        )
        memo[id(parameter)] = stands_for(stand_in, partial(gather, name))
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    with of_own_classes(model):
        skeleton = copy.deepcopy(model, memo)
    drop_unit_hooks(skeleton)
    return skeleton
