"""Which layers are left alone by rule, and which ones a user names."""

import fnmatch
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches

from torch import Tensor, nn

from fxrank.passes.discovery.layer import Layer
from fxrank.passes.errors import NothingFactorizedWarning, NothingToFactorizeError
from fxrank.passes.model.names import own_name

Selector = str | re.Pattern[str] | type[nn.Module] | nn.Module
"""A name or glob (`"layer4.*"`), a regular expression (`re.compile(…)` or `"re:…"`), a module class, or a module."""


def candidates(
    layers: Sequence[Layer],
    model: nn.Module,
    *,
    include: Iterable[Selector] | Selector = (),
    exclude: Iterable[Selector] | Selector = (),
) -> list[Layer]:
    """The same layers, with a `reason` on those that are left alone by rule: the first, the last, embeddings and
    decoders tied to them, those that no rank makes smaller (depthwise convolutions), those whose pair would be multiplied out
    in every call, and what `exclude` names.

    The first and the last layer (by position in the graph: nothing with a weight before, or after) stay dense
    because they are small, see raw inputs or produce the logits, and lose accuracy soonest (Pufferfish §3;
    Cuttlefish §3.2). `include` takes them in; `exclude` wins over it. A selector is a name or glob (`"layer4.*"`),
    a regular expression (`re.compile(…)` or `"re:…"`), a module class, or a module. Raises `ValueError` for a
    selector that matches no layer.
    """
    included = _selected(layers, model, include, "include")
    excluded = _selected(layers, model, exclude, "exclude")
    result = []
    for layer in layers:
        reason = layer.reason
        if reason is None and layer.name in excluded:
            reason = "excluded by the user"
        elif reason is None and layer.name not in included:
            if layer.boundary:
                reason = f"{layer.boundary} layer of the graph, left dense by default"
            elif layer.is_table:
                reason = f"{layer.kind}, left dense by default"
            elif layer.unsaving:
                reason = layer.unsaving
            elif layer.break_even_rank <= 1:
                reason = f"a pair of rank 1 would not save anything: break-even is {layer.break_even_rank:.1f}"
        result.append(replace(layer, reason=reason))
    return result


def listed(selectors: Iterable[Selector] | Selector) -> tuple[Selector, ...]:
    """What a user gives for `include` or `exclude`, one or several, as several. Raises `TypeError` for what is neither."""
    if isinstance(selectors, (str, re.Pattern, type, nn.Module)):
        return (selectors,)
    if not isinstance(selectors, Iterable) or isinstance(selectors, Tensor):
        raise TypeError(
            f"include and exclude take a selector or several; got {type(selectors).__name__}. Pass () for none."
        )
    return tuple(selectors)


def require_some(layers: Sequence[Layer]) -> None:
    """Raise `NothingToFactorizeError`, with each layer's reason, if all have one. It is a warning where some are `guarded`: the
    model is what it should be then, as it stands.
    """
    if any(layer.reason is None for layer in layers):
        return
    listing = (
        "".join(f"\n  {layer.name} ({layer.kind}): {layer.reason}" for layer in layers)
        or "\n  (no weight matrix at all)"
    )
    hint = "Name layers to take in with include=… ('*' takes everything)."
    if any(layer.guarded for layer in layers):
        text = f"nothing will be factorized, the model stays dense; 0 of {len(layers)} layers can be:{listing}\n{hint}"
        warnings.warn(text, NothingFactorizedWarning, stacklevel=2)
        return
    raise NothingToFactorizeError(f"at least one layer must be factorizable; 0 of {len(layers)} are:{listing}\n{hint}")


def _selected(
    layers: Sequence[Layer], model: nn.Module, selectors: Iterable[Selector] | Selector, argument: str
) -> set[str]:
    chosen: set[str] = set()
    # What is inside a wrapper comes after it, under the same name.
    modules = {own_name(path): module for path, module in model.named_modules(remove_duplicate=False)}
    for selector in listed(selectors):
        if isinstance(selector, str) and not selector.startswith("re:"):
            pattern = own_name(selector)
            hits = {a.name for a in layers if any(p == pattern or fnmatch.fnmatchcase(p, pattern) for p in a.paths)}
        elif isinstance(selector, (str, re.Pattern)):
            expression = _expression(selector, argument) if isinstance(selector, str) else selector
            if not isinstance(expression.pattern, str):
                raise TypeError(
                    f"{argument} is matched with names; {selector!r} is an expression of bytes. Drop its b."
                )
            hits = {a.name for a in layers if any(expression.search(p) for p in a.paths)}
        elif isinstance(selector, type):
            hits = {a.name for a in layers if isinstance(_owner(modules, a.name), selector)}
        elif isinstance(selector, nn.Module):
            inside = {id(m) for m in selector.modules()}
            hits = {a.name for a in layers if id(_owner(modules, a.name)) in inside}
        else:
            raise TypeError(
                f"{argument} takes names, globs, regular expressions, module classes or modules; got {type(selector).__name__}."
            )
        if not hits:
            near = get_close_matches(str(selector), [p for a in layers for p in a.paths], n=3)
            hint = f" Nearest names: {', '.join(near)}." if near else ""
            raise ValueError(
                f"each selector in {argument} must match at least one layer; {selector!r} matches none of {len(layers)}.{hint}"
            )
        chosen |= hits
    return chosen


def _expression(selector: str, argument: str) -> re.Pattern[str]:
    try:
        return re.compile(selector.removeprefix("re:"))
    except re.error as error:
        raise ValueError(
            f"what follows 're:' in {argument} must be a regular expression; {selector!r} is not: {error}. Escape what is meant as it stands, or use a glob."
        ) from error


def _owner(modules: dict[str, nn.Module], name: str) -> nn.Module | None:
    """The layer's module; of a raw parameter the one that has it."""
    return modules.get(name, modules.get(name.rpartition(".")[0]))
