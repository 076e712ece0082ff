"""A page of HTML that holds its data, its charts and what draws them, and asks no network for anything."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from fxrank.page.parts import Spec


@dataclass(frozen=True)
class Section:
    """Charts under a heading: `wide`, one below the other, or in pairs beside each other. `choices` are what its charts may be asked for, by the
    list with the name `choice`.
    """

    key: str
    title: str
    text: str
    charts: Sequence[Spec | None]
    wide: bool = False
    choice: str = ""
    choices: Sequence[str] = ()


@dataclass(frozen=True)
class Cell:
    """A cell of a table or a tile: its text, and by what number it is sorted, None if by the text."""

    text: str
    number: float | None = None

    @classmethod
    def of(cls, value: float | None, how: str) -> "Cell":
        """A number as `how` formats it; a dash for None."""
        return cls("-" if value is None else how.format(value), value)


@dataclass(frozen=True)
class Tile:
    """A number to see at once: what it is, the number, and what it was."""

    of: str
    now: str
    was: str = ""


@dataclass(frozen=True)
class Contents:
    """All of a page. `notes` are warnings or not; a row of the table is lit or not; `graphs` have names, and `more` is how many nodes these lack."""

    title: str
    headline: str
    notes: Sequence[tuple[bool, str]]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    head: Sequence[str]
    rows: Sequence[tuple[bool, Sequence[Cell]]]
    footer: str
    graphs: Sequence[tuple[str, Spec]] = ()
    more: int = 0


def render(contents: Contents) -> str:
    """The page. Raises `ImportError` that says what to install where the libraries for pages are missing."""
    specs: list[tuple[str, str]] = []

    def placed(spec: Spec, name: str = "") -> dict[str, str]:
        specs.append((f"chart-{len(specs)}", _json(spec)))
        return {"id": specs[-1][0], "name": name}

    drawn = [(section, [placed(spec) for spec in section.charts if spec is not None]) for section in contents.sections]
    files = resources.files("fxrank.page")
    found: str = _template().render(
        page=contents,
        sections=[(section, charts) for section, charts in drawn if charts],
        graphs=[placed(spec, name) for name, spec in contents.graphs],
        specs=specs,
        style=files.joinpath("page.css").read_text("utf-8"),
        library=_library(),
        script=files.joinpath("page.js").read_text("utf-8"),
    )
    return found


def in_notebook(html: str) -> str:
    """The page in a frame of its own, for a notebook: its styles and scripts touch nothing else."""
    return f'<iframe srcdoc="{escape(html)}" style="width: 100%; height: 720px; border: 0" title="fxrank"></iframe>'


def _json(spec: Spec) -> str:
    """With null for what JSON has no number for, and without what would end the element that it stands in."""
    return json.dumps(_finite(spec), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(_MISSING.format("jinja2")) from error
    text = resources.files("fxrank.page").joinpath("page.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from vl-convert."""
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError(_MISSING.format("vl-convert-python")) from error
    found: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return found.replace("</script", "<\\/script")


_MISSING = "a page needs {0}, which is not installed: pip install {0}"
