"""Modules under `torch.compile`, and what runs or is left out of it.

`torch.compile` has no public call that tells its wrapper, changes what is in it, or runs it as Python without the compiler.
Tried on torch 2.8.0 and 2.14.1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxrank.torch_private.modules import COMPILED, own_children


def is_compiled(module: nn.Module) -> bool:
    """Whether this is the wrapper that `torch.compile(module)` gives. Its class is known by name: importing it is slow."""
    return type(module).__name__ == "OptimizedModule" and COMPILED in own_children(module)


def inside_compiled(wrapper: nn.Module) -> nn.Module:
    """What is in the wrapper now."""
    inside = own_children(wrapper)[COMPILED]
    assert inside is not None
    return inside


def compile_anew(wrapper: nn.Module) -> None:
    """Let the wrapper call the module that it holds now: it has kept the call of the one before."""
    wrapper._initialize()  # type: ignore[operator]


@contextmanager
def run_as_python(model: nn.Module) -> Iterator[None]:
    """Run the modules of `model` as Python, whatever was compiled among them, by `module.compile()` too."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        own = vars(module)
        if own.get("_compiled_call_impl") is not None:
            before.append((own, "_compiled_call_impl", own["_compiled_call_impl"]))
            own["_compiled_call_impl"] = None
        if is_compiled(module):
            before.append((own, "forward", own["forward"]))
            own["forward"] = _calling(inside_compiled(module))
    try:
        yield
    finally:
        for own, name, value in before:
            own[name] = value


def _calling(module: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return forward


def compiles_recurrent() -> bool:
    """Whether the compiler takes recurrent layers; else it leaves them to Python, which a pair must do for itself."""
    return bool(torch._dynamo.config.allow_rnn)


def leave_to_python(reason: str) -> None:
    """Break the graph that is being compiled here; outside of the compiler nothing happens."""
    torch._dynamo.graph_break(reason)
