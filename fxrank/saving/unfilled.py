"""Models that are built without memory for their parameters, to be filled from files."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules that this thread builds have their parameters on the meta device, one after the other as they are made, and their buffers as
    they compute them. (With `torch.device("meta")` the buffers would be lost too, and those that are no part of a state dict are in no file.)
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
        yield
    finally:
        hook.remove()
