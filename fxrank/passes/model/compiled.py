"""Models under `torch.compile`: the module inside, and how to run it as Python.

`torch.compile(model)` is a wrapper that shares everything with the model, `model.compile()` a mark on it. A trace needs the
code itself, and a run on another batch size, or with hooks, would only make the compiler work for nothing.
"""

from contextlib import AbstractContextManager

from torch import nn

from fxrank.torch_private.compile import compile_anew, inside_compiled, is_compiled, run_as_python


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(model)`, `DistributedDataParallel` and `DataParallel`; any other is itself. Raises
    `TypeError` for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a model must be a torch.nn.Module; got {type(model).__name__}. Pass an instance of one.")
    while True:
        if is_compiled(model):
            model = inside_compiled(model)
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def compiled_parts(model: nn.Module) -> dict[int, nn.Module]:
    """What is inside each `torch.compile(part)` of a model, by the wrapper's `id`."""
    parts = {}
    for module in model.modules():
        inner = module
        while is_compiled(inner):
            inner = inside_compiled(inner)
        if inner is not module:
            parts[id(module)] = inner
    return parts


def eagerly(model: nn.Module) -> AbstractContextManager[None]:
    """Run the modules of `model` as Python, whatever was compiled among them."""
    return run_as_python(model)


def follow_change(wrapper: nn.Module) -> None:
    """Let a wrapper call the module that it holds now."""
    if is_compiled(wrapper):
        compile_anew(wrapper)
