"""Parameters that no longer train after the switch, and those that are off for a moment while it is made."""

import fnmatch
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from fxrank.passes.model.names import own_name


def frozen_names(model: nn.Module, globs: Iterable[str]) -> list[str]:
    """The names of the parameters that the globs match, a factor by the name of the weight it stands for as well.
    Raises `ValueError` for a glob that matches none.
    """
    names = [name for name, _ in model.named_parameters()]
    known = {name: (name, own_name(name), *_names_before(own_name(name))) for name in names}
    frozen: set[str] = set()
    for glob in globs:
        hits = {name for name in names if fnmatch.filter(known[name], glob)}
        if not hits:
            raise ValueError(
                f"each glob in freeze must match a parameter; {glob!r} matches none of {len(names)}. Names look like {own_name(names[0])!r}."
            )
        frozen |= hits
    return [name for name in names if name in frozen]


def freeze(model: nn.Module, globs: tuple[str, ...]) -> list[str]:
    """Stop training the parameters that the globs match. Returns a note, or nothing."""
    frozen = set(frozen_names(model, globs))
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
    return [f"frozen after the switch: {len(frozen)} parameters ({', '.join(globs)})"] if frozen else []


@contextmanager
def as_in_training(trained: Iterable[nn.Parameter]) -> Iterator[None]:
    """Meanwhile all of these require gradients, so that what takes their place trains as they did.

    Loops with several optimizers turn the parameters of the others off while one steps (Lightning's `toggle_optimizer`), and turn
    on again those that they remember, which factors are not among.
    """
    off = [parameter for parameter in trained if not parameter.requires_grad]
    for parameter in off:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in off:
            parameter.requires_grad_(False)


def _names_before(name: str) -> tuple[str, ...]:
    """What a factor's weight was called as a layer's and as a raw parameter."""
    factor = re.fullmatch(r"(.*)\.[uv]\.(weight|bias)", name)
    return () if factor is None else (f"{factor[1]}.{factor[2]}", factor[1])
