"""What the charts of a page share: their colours, axes and marks.

A chart is a Vega-Lite specification with its data in it. Colours are names of the page's own, `"@dense"`, `"@pair"`, `"@quiet"`, which it replaces by
those of its light or dark theme.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
Data = Mapping[str, Any]
"""The plain data of a report."""

ROW = 15
"""Pixels of a layer's row."""


def is_number(value: object) -> bool:
    """Whether it can be drawn: not None, not NaN, not infinite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def stack_label(stack: Data) -> str:
    """A stack's first layer, and how many more there are."""
    names: Sequence[str] = stack["names"]
    return names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "")


def stack_names(report: Data) -> dict[str, str]:
    """The label of the stack of each layer that was timed; else layers of one kind and shape are one."""
    timed = {name: stack_label(stack) for stack in report["details"]["stacks"] for name in stack["names"]}
    alike: dict[tuple[Any, ...], list[str]] = {}
    for layer in report["plan"]["layers"]:
        if layer["name"] not in timed:
            alike.setdefault((layer["kind"], *layer["weight_shape"]), []).append(layer["name"])
    return timed | {name: stack_label({"names": names}) for names in alike.values() for name in names}


def wide(spec: Spec) -> Spec:
    """A chart as wide as its place."""
    return {"width": "container", **spec}


def epochs_axis() -> Spec:
    """Epochs from the left to the right."""
    return {"field": "epoch", "type": "quantitative", "title": "epoch", "axis": {"tickMinStep": 1}}


def layers_axis(field: str) -> Spec:
    """Layers, or stacks, in their order from the top."""
    return {"field": field, "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 220, "grid": False}}


def two_colours(field: str, names: Sequence[str], colors: Sequence[str]) -> Spec:
    """Two series by names, in colours of the page."""
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(names), "range": list(colors)},
        "legend": {"title": None, "orient": "top"},
    }


def switch_marks(report: Data, last: float) -> list[Spec]:
    """A line at E, with its name, on an axis that ends at the epoch `last`; none where nothing was factorized."""
    epoch: float | None = report.get("E")
    if epoch is None:
        return []
    values = [{"epoch": epoch, "text": f"switch, E = {epoch:.3g}"}]
    x = {"field": "epoch", "type": "quantitative"}
    side = {"align": "left", "dx": 4} if epoch < last / 2 else {"align": "right", "dx": -4}
    return [
        {
            "data": {"values": values},
            "mark": {"type": "rule", "color": "@pair", "strokeDash": [5, 3], "strokeWidth": 1.5},
            "encoding": {"x": x, "tooltip": [{"field": "text"}]},
        },
        {
            "data": {"values": values},
            "mark": {"type": "text", "color": "@pair", "fontSize": 11, "baseline": "bottom", "dy": -2, **side},
            "encoding": {"x": x, "y": {"value": 0}, "text": {"field": "text"}},
        },
    ]
