"""Models whose parameters lie in shards over several processes: FSDP2 (`torch.distributed.fsdp.fully_shard`).

Nothing here needs the whole model anywhere. Decisions are made on its skeleton, a copy on the meta device; of the numbers one
weight at a time is gathered, when a decision asks for it and when it is split. At the switch the sharded weight's place in its
unit is taken by its factors, in shards as well: units, hooks, streams, mixed precision stay as they are. Torch has no public
call for that, so this file, alone, uses what its FSDP2 keeps inside; its tests run on the oldest and the newest torch.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxrank.passes.model.calls import Example
from fxrank.passes.model.names import module_at
from fxrank.passes.model.weights import is_derived, stands_for
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.locate import dense_at, holders
from fxrank.passes.rewriting.calibrate import calibrate_on
from fxrank.passes.spectra.exact import check_finite
from fxrank.passes.tracing.trace import TracedModule
from fxrank.plan import Plan
from fxrank.switch.apply_plan import Factors, Replacement, apply_plan, take_hooks
from fxrank.switch.plan_of import remember_plan


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in shards; every process that holds one must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may lie in shards."""
    held: Tensor = getattr(tensor, "_local_tensor", tensor)
    return held


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor that all processes have, if `like` lies in shards; else the tensor."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter lies in shards."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


class Shards:
    """The shards of one model. All methods are for all processes at once, in the same order.

    `skeleton` is the model on the meta device, whole and without FSDP: for tracing, and for every decision. Its parameters
    stand for the model's: reading a layer's matrix gathers it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises `TypeError`, which names the way out, for shards that are not `fully_shard`'s alone."""
        self.model = model
        self._announce: Callable[[str], None] | None = None
        groups = list(_groups(model))
        managed = {id(p.sharded_param): p for group in groups for p in group.fsdp_params}
        self._reshard()
        for name, parameter in model.named_parameters():
            place = managed.get(id(parameter))
            if hasattr(parameter, "full_tensor") and (place is None or place.is_dtensor):
                raise TypeError(
                    f"shards must be those of fully_shard alone to be replaced; {name!r} is a DTensor of another origin (tensor parallelism?). "
                    "Factorize first (fxrank.factorize, or a plan) and distribute the result."
                )
        for group in groups:
            if group.mesh_info.mesh.size() != dist.get_world_size():
                raise TypeError(
                    f"all processes must share one model; its mesh has {group.mesh_info.mesh.size()} of {dist.get_world_size()}. "
                    "Factorize first (fxrank.factorize, or a plan) and shard the result."
                )
            if type(group.offload_policy).__name__ == "CPUOffloadPolicy":
                raise TypeError(
                    "shards must be where they are computed with; these are offloaded to the CPU. Leave out CPUOffloadPolicy until the switch is made, "
                    "or factorize first."
                )
        self.skeleton = _skeleton(model, self.gather)

    def example(self, given: Example) -> Example:
        """A batch as the skeleton takes it."""
        moved: Example = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given)
        return moved

    def refusal(self, name: str, form: str) -> str | None:
        """Why a layer cannot be replaced inside its unit; None if it can."""
        if is_derived(dense_at(self.skeleton, name)):
            return "its weight is derived from parameters that are sharded"
        weight = self.model.get_parameter(_weight_name(self.model, name))
        places = [(owner, attribute) for owner, attribute, _ in holders(self.model, weight)]
        if any(_is_unit(owner) for owner, attribute in places if not attribute):
            return "it is a unit of fully_shard by itself; shard the block around it instead"
        owner, attribute = places[0]  # asked by its place: a unit may be unsharded now
        managed = (p._module_info for group in _groups(self.model) for p in group.fsdp_params)
        if not any(info.module is owner and info.param_name == (attribute or "weight") for info in managed):
            return "no unit of fully_shard holds its weight; shard a block around it, without ignored_params"
        return None

    def gather(self, name: str) -> Tensor:
        """All of a weight, by name, on every process."""
        if self._announce is not None:
            self._announce(name)
        self._reshard()
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
        """As `surgery.apply_plan`: the plan's pairs in the model, in shards, and in the skeleton and its graph `gm`."""
        self._reshard()
        self._check_finite(list(plan.R))
        apply_plan(self.skeleton, plan, gm=gm, split=False)
        replacements, places = [], []
        for decision in plan.layers:
            if not decision.factorized:
                continue
            old = self.model.get_parameter(_weight_name(self.model, decision.name))
            plain = nn.Parameter(whole(old.detach()), old.requires_grad)
            for module in self.model.modules():
                for attribute in [n for n, p in module._parameters.items() if p is old]:
                    module._parameters[attribute] = plain
            (made,) = apply_plan(
                self.model, replace(plan, layers=(decision,)), split=split, factors=factors, share=share
            )
            places.append(self._shard(made.pair, old))
            replacements.append(Replacement(decision.name, (old,), made.pair))
        _take_up(places)
        calibrate_on(example, self.model, [r.pair.extra_norm for r in replacements], share)
        self._reshard()
        for made, place in zip(replacements, places, strict=True):
            if made.pair.extra_norm is not None:  # a BatchNorm in shards could not be written into
                place.group.fsdp_params += self._managed(made.pair.extra_norm.parameters(), place)
        _take_up(places)
        remember_plan(self.model, plan)
        return replacements

    def _shard(self, pair: FactorPair, old: nn.Parameter) -> "_Place":
        """Let the unit that held `old` hold the factors of the pair. Returns the place."""
        place, held = next(
            (_Place(state, group, p.mp_policy), p)
            for state in _states(self.model)
            for group in _groups_of(state)
            for p in group.fsdp_params
            if p.sharded_param is old
        )
        group = place.group
        for handles in (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        ):
            for handle in handles.values():
                handle.remove()
            handles.clear()
        held._post_load_hook_handle.remove()
        at = group.fsdp_params.index(held)
        group.fsdp_params[at : at + 1] = self._managed((pair.u.weight, pair.v.weight), place)
        for other in group.fsdp_params:  # the bias lives in the pair now
            other._module_info = _holders(self.model, other.sharded_param)
        for module in pair.modules():
            module._is_fsdp_managed_module = module._fsdp_use_orig_params = True  # type: ignore[assignment]
        for factor in (pair.u.weight, pair.v.weight):
            take_hooks(factor, old)
        return place

    def _managed(self, parameters: Iterable[nn.Parameter], place: "_Place") -> list[Any]:
        """Whole parameters as a unit manages them: in shards from now on."""
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

        group = place.group
        return [
            FSDPParam(
                parameter,
                _holders(self.model, parameter),
                group.mesh_info,
                group.post_forward_mesh_info,
                group.device,
                None,
                place.mp_policy,
                group.offload_policy,
            )
            for parameter in parameters
        ]

    def _check_finite(self, names: list[str]) -> None:
        weights = [self.model.get_parameter(_weight_name(self.model, name)) for name in names]
        bad = torch.tensor([float(not torch.isfinite(local(w)).all()) for w in weights], device=weights[0].device)
        dist.all_reduce(bad)
        for name, weight, count in zip(names, weights, bad.tolist(), strict=True):
            if count:
                check_finite(whole(weight.detach()), name)

    def _reshard(self) -> None:
        for module in self.model.modules():
            if _is_unit(module):
                module.reshard()  # type: ignore[operator]


@dataclass(frozen=True)
class _Place:
    """A unit's state, its group of parameters that one was in, and that one's precision."""

    state: Any
    group: Any
    mp_policy: Any


def _take_up(places: Iterable[_Place]) -> None:
    """Let units that have been through a forward, and prepare just once by themselves, prepare again."""
    for place in places:
        if place.state._is_root is not None:
            place.group._reset_sharded_params = False
            place.group.lazy_init()


def _weight_name(model: nn.Module, name: str) -> str:
    owner, _, attribute = name.rpartition(".")
    return name if module_at(model, owner)._parameters.get(attribute) is not None else f"{name}.weight"


def _is_unit(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _states(model: nn.Module) -> Iterator[Any]:
    seen = set()
    for module in model.modules():
        if _is_unit(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            if id(state) not in seen:
                seen.add(id(state))
                yield state


def _groups_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # before torch 2.12 a state has one group, or none
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(groups)


def _groups(model: nn.Module) -> Iterator[Any]:
    for state in _states(model):
        yield from _groups_of(state)


def _holders(model: nn.Module, parameter: nn.Parameter) -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_param import ParamModuleInfo

    (module, name), *others = [(m, n) for m in model.modules() for n, p in m._parameters.items() if p is parameter]
    return ParamModuleInfo(module, name, [m for m, _ in others], [n for _, n in others])


def _skeleton(model: nn.Module, gather: Callable[[str], Tensor]) -> nn.Module:
    """A copy on the meta device without FSDP, whose parameters stand for the model's."""
    from torch.distributed.fsdp import FSDPModule

    memo: dict[int, Any] = {id(state): state for state in _states(model)}
    for name, parameter in model.named_parameters():
        stand_in = nn.Parameter(
            torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta"),
            parameter.requires_grad,
        )
        memo[id(parameter)] = stands_for(stand_in, partial(gather, name))
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    units = [(module, type(module)) for module in model.modules() if _is_unit(module)]
    for module, kind in units:  # the user's own class: a copy of FSDP's is forbidden
        module.__class__ = next(cls for cls in kind.__mro__ if not issubclass(cls, FSDPModule))  # type: ignore[assignment]
    try:
        skeleton = copy.deepcopy(model, memo)
    finally:
        for module, kind in units:
            module.__class__ = kind
    for module in skeleton.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [
                k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
            ]:
                del hooks[key]
    return skeleton
