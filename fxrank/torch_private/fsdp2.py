"""What FSDP2 (`torch.distributed.fsdp.fully_shard`) keeps inside: units, their groups of parameters, and what each manages.

Torch has no public call that lets a unit hold other parameters than it was made with, nor one that copies a model without its
units. Before torch 2.12 a unit has one group, or none. Tried on torch 2.8.0 and 2.14.1.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxrank.torch_private.modules import own_parameters, post_hooks, pre_hooks


def is_unit(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let every unit hold its shards only, as after a step."""
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def unit_states(model: nn.Module) -> Iterator[Any]:
    """The state of each unit, once: units that were made together share it. No copy of a model may copy them."""
    seen = set()
    for module in model.modules():
        if is_unit(module):
            state = module._get_fsdp_state()  # type: ignore[operator]
            if id(state) not in seen:
                seen.add(id(state))
                yield state


@dataclass(frozen=True)
class Managed:
    """What a unit knows of one parameter of its own."""

    parameter: nn.Parameter
    """In shards."""
    was_dtensor: bool
    """Whether it lay in shards already when the unit was made, as with tensor parallelism."""
    module: nn.Module
    attribute: str


@dataclass(frozen=True)
class Group:
    """A unit's parameters that are gathered together."""

    state: Any
    group: Any

    @property
    def processes(self) -> int:
        """Over how many processes its shards are spread, and copied."""
        return int(self.group.mesh_info.mesh.size())

    @property
    def is_offloaded(self) -> bool:
        """Whether its shards are on the CPU, and computed with elsewhere."""
        return type(self.group.offload_policy).__name__ == "CPUOffloadPolicy"

    def managed(self) -> list[Managed]:
        """Its parameters."""
        return [
            Managed(p.sharded_param, p.is_dtensor, p._module_info.module, p._module_info.param_name)
            for p in self.group.fsdp_params
        ]


def groups(model: nn.Module) -> Iterator[Group]:
    """The groups of all units."""
    for state in unit_states(model):
        found = getattr(state, "_fsdp_param_groups", None)
        if found is None:
            found = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
        yield from (Group(state, group) for group in found)


@dataclass(frozen=True)
class Place:
    """The place in a unit that a parameter had, for others to take."""

    group: Group
    mp_policy: Any

    def add(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """Let the unit manage these whole parameters of the model too: they are in shards from now on."""
        self.group.group.fsdp_params += self._managed(model, parameters)

    def prepare_again(self) -> None:
        """Let a unit that has been through a forward prepare again: by itself it does so once."""
        if self.group.state._is_root is not None:
            self.group.group._reset_sharded_params = False
            self.group.group.lazy_init()

    def _managed(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> list[Any]:
        from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

        group = self.group.group
        return [
            FSDPParam(
                parameter,
                _holders(model, parameter),
                group.mesh_info,
                group.post_forward_mesh_info,
                group.device,
                None,
                self.mp_policy,
                group.offload_policy,
            )
            for parameter in parameters
        ]


def replace_in_unit(
    model: nn.Module, old: nn.Parameter, new: Iterable[nn.Parameter], inside: Iterable[nn.Module]
) -> Place:
    """Let the unit that manages `old`, which is in the model no more, manage the whole parameters `new`, in shards, in its
    place; `inside` are the modules that came with them.
    """
    place, held = next(
        (Place(group, p.mp_policy), p)
        for group in groups(model)
        for p in group.group.fsdp_params
        if p.sharded_param is old
    )
    group = place.group.group
    for handles in (
        group._module_to_pre_save_state_dict_hook_handle,
        group._module_to_pre_load_state_dict_hook_handle,
    ):
        for handle in handles.values():
            handle.remove()
        handles.clear()
    held._post_load_hook_handle.remove()
    at = group.fsdp_params.index(held)
    group.fsdp_params[at : at + 1] = place._managed(model, new)
    for other in group.fsdp_params:  # one may be held by another module now
        other._module_info = _holders(model, other.sharded_param)
    for module in inside:
        module._is_fsdp_managed_module = module._fsdp_use_orig_params = True  # type: ignore[assignment]
    return place


def _holders(model: nn.Module, parameter: Tensor) -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_param import ParamModuleInfo

    (module, name), *others = [(m, n) for m in model.modules() for n, p in own_parameters(m).items() if p is parameter]
    return ParamModuleInfo(module, name, [m for m, _ in others], [n for _, n in others])


@contextmanager
def of_own_classes(model: nn.Module) -> Iterator[None]:
    """Meanwhile units are of the user's own classes: copying one of FSDP's is forbidden."""
    from torch.distributed.fsdp import FSDPModule

    units = [(module, type(module)) for module in model.modules() if is_unit(module)]
    for module, kind in units:
        module.__class__ = next(cls for cls in kind.__mro__ if not issubclass(cls, FSDPModule))  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in units:
            module.__class__ = kind


def drop_unit_hooks(model: nn.Module) -> None:
    """Take off the hooks by which units gather and scatter."""
    for module in model.modules():
        for hooks in (pre_hooks(module), post_hooks(module)):
            for key in [
                k for k, hook in hooks.items() if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
            ]:
                del hooks[key]
