"""Models that are built without memory for their parameters, to be filled from files."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from fxrank.torch_private.modules import own_buffers, own_parameters, read_weights_again


def built_unfilled(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes, `unfilled`; with its numbers if that fails, as it does for one that computes with its parameters while it is
    built, or would lose a buffer that is in no file.
    """
    try:
        with unfilled():
            model = build()
    except RuntimeError:  # an operation without a meta kernel is a NotImplementedError, one of these too
        return build()
    stored = {id(value) for value in model.state_dict(keep_vars=True).values()}
    return build() if any(b.is_meta and id(b) not in stored for b in model.buffers()) else model


def give_memory(model: nn.Module) -> None:
    """Put empty tensors in the place of a model's tensors on the meta device; those that are shared stay so."""
    made: dict[int, Any] = {}

    def real(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device=torch.get_default_device())
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
            vars(made[id(tensor)]).update(vars(tensor))
        return made[id(tensor)]

    for module in model.modules():
        for held in (own_parameters(module), own_buffers(module)):
            if unfilled_ones := {name: t for name, t in held.items() if t is not None and t.is_meta}:
                held.update({name: real(t) for name, t in unfilled_ones.items()})  # a script's own are never
        if isinstance(module, nn.RNNBase):
            read_weights_again(module)


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules that this thread builds have their parameters on the meta device, and their buffers as they compute them. (With
    `torch.device("meta")` the buffers would be lost too, and those that are no part of a state dict are in no file.)
    """
    thread = threading.get_ident()

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        empty = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        vars(empty).update(vars(parameter))
        return empty

    hook = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type] # it may return a parameter
    try:
        with _EmptyOnMeta():
            yield
    finally:
        hook.remove()


class _EmptyOnMeta(TorchFunctionMode):
    """What is made without numbers gets no memory either: torch's layers begin with it, and a heap that had a place for each would be full of
    holes. A buffer that is filled only later stays empty.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)
