"""Models under `torch.compile`: the module inside, and how to run it as Python.

`torch.compile(model)` is a wrapper that shares everything with the model, `model.compile()` a mark on it. A trace needs the
code itself, and a run on another batch size, or with hooks, would only make the compiler work for nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(model)`, `DistributedDataParallel` and `DataParallel`; any other is itself."""
    while True:
        if _is_wrapper(model):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def compiled_parts(model: nn.Module) -> dict[int, nn.Module]:
    """What is inside each `torch.compile(part)` of a model, by the wrapper's `id`."""
    parts = {}
    for module in model.modules():
        inner = module
        while _is_wrapper(inner):
            inner = inner._modules["_orig_mod"]  # type: ignore[assignment]
        if inner is not module:
            parts[id(module)] = inner
    return parts


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Run the modules of `model` as Python, whatever was compiled among them."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        own = vars(module)
        if own.get("_compiled_call_impl") is not None:
            before.append((own, "_compiled_call_impl", own["_compiled_call_impl"]))
            own["_compiled_call_impl"] = None
        if _is_wrapper(module):
            before.append((own, "forward", own["forward"]))
            own["forward"] = _calling(module._modules["_orig_mod"])
    try:
        yield
    finally:
        for own, name, value in before:
            own[name] = value


def _calling(module: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    return forward


def follow_change(wrapper: nn.Module) -> None:
    """Let a wrapper call the module that it holds now."""
    if _is_wrapper(wrapper):
        wrapper._initialize()  # type: ignore[operator]


def _is_wrapper(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules
