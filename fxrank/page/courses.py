"""How a run went: loss, accuracy and ranks over its epochs. Each function returns None, or an empty list, where there is nothing to draw."""

from typing import Any

from fxrank.page.parts import (
    ROW,
    Data,
    Spec,
    epochs_axis,
    is_number,
    layers_axis,
    stack_names,
    switch_marks,
    two_colours,
    wide,
)

NAMED = 40
"""Stacks that have a legend, at most."""
POINTS, CELLS, LEAST = 12_000, 9_000, 20
"""Points of all curves, and cells of the heat map, that a page holds, and those of a layer at least."""


def training(report: Data) -> list[Spec]:
    """Loss, and accuracy where there is one, of each epoch, with the switch."""
    rows = report["details"]["history"]
    found = []
    for title, names in (("loss", ("loss", "val_loss")), ("accuracy", ("accuracy", "val_accuracy"))):
        values = [
            {"epoch": row["epoch"] + 1, "of": "validation" if name.startswith("val") else "training", title: row[name]}
            for row in rows
            for name in names
            if is_number(row.get(name))
        ]
        if not values:
            continue
        lines: Spec = {
            "data": {"values": values},
            "mark": {"type": "line", "point": {"size": 18}},
            "encoding": {
                "x": epochs_axis(),
                "y": {
                    "field": title,
                    "type": "quantitative",
                    "scale": {"zero": False},
                    "axis": {"format": ".0%"} if title == "accuracy" else {},
                },
                "color": two_colours("of", ("training", "validation"), ("@quiet", "@dense")),
                "tooltip": [{"field": "epoch"}, {"field": "of"}, {"field": title, "format": ".4f"}],
            },
        }
        found.append(wide({"height": 220, "layer": [lines, *switch_marks(report, len(rows))]}))
    return found


def rank_curves(report: Data) -> Spec | None:
    """Stable rank of every layer over the epochs, as a share of its full rank, coloured by stack; those that stayed dense are dashed."""
    stack = stack_names(report)
    pairs = {layer["name"] for layer in report["plan"]["layers"] if layer["rank"] is not None}
    series = [
        one | {"stack": stack.get(one["layer"], one["layer"]), "now": "pair" if one["layer"] in pairs else "dense"}
        for one in _series(report, POINTS)
    ]
    if not series:
        return None
    stacks = {one["stack"] for one in series}
    legend = (
        {"symbolLimit": NAMED, "columns": 3, "title": None, "orient": "bottom", "labelLimit": 150}
        if len(stacks) <= NAMED
        else None
    )
    lines: Spec = {
        "data": {"values": series},
        "transform": [{"flatten": ["epoch", "share"]}, {"calculate": "datum.share * datum.full", "as": "rank"}],
        "params": [{"name": "chosen", "select": {"type": "point", "fields": ["stack"]}, "bind": "legend"}],
        "mark": {"type": "line", "strokeWidth": 1.5, "interpolate": "monotone"},
        "encoding": {
            "x": epochs_axis(),
            "y": {
                "field": "share",
                "type": "quantitative",
                "title": "stable rank / full rank",
                "axis": {"format": ".0%"},
            },
            "detail": {"field": "layer"},
            "color": {"field": "stack", "type": "nominal", "sort": None, "legend": legend},
            "strokeDash": {
                "field": "now",
                "type": "nominal",
                "scale": {"domain": ["pair", "dense"], "range": [[1, 0], [2, 3]]},
                "legend": {"title": "after the run", "orient": "top"},
            },
            "opacity": {"condition": {"param": "chosen", "value": 0.95}, "value": 0.08},
            "tooltip": [
                {"field": "layer"},
                {"field": "epoch", "format": ".2f"},
                {"field": "rank", "format": ".1f", "title": "stable rank"},
                {"field": "share", "format": ".1%", "title": "of full"},
            ],
        },
    }
    return wide({"height": 340, "layer": [lines, *switch_marks(report, max(one["epoch"][-1] for one in series))]})


def rank_heat(report: Data) -> Spec | None:
    """The same numbers, layer by layer from the input down, as colours (Cuttlefish Fig. 3)."""
    series = _series(report, CELLS)
    if not series:
        return None
    for one in series:
        epochs = one["epoch"]
        one["to"] = [*epochs[1:], epochs[-1] + (epochs[-1] - epochs[0]) / max(1, len(epochs) - 1)]
    return wide(
        {
            "data": {"values": series},
            "transform": [{"flatten": ["epoch", "to", "share"]}],
            "height": ROW * len(series),
            "mark": {"type": "rect"},
            "encoding": {
                "x": {
                    "field": "epoch",
                    "type": "quantitative",
                    "title": "epoch",
                    "axis": {"grid": False},
                    "scale": {"nice": False},
                },
                "x2": {"field": "to"},
                "y": layers_axis("layer"),
                "color": {
                    "field": "share",
                    "type": "quantitative",
                    "scale": {"scheme": "viridis", "domain": [0, 1]},
                    "legend": {"title": "of full rank", "format": ".0%", "orient": "top", "gradientLength": 160},
                },
                "tooltip": [
                    {"field": "layer"},
                    {"field": "epoch", "title": "epoch"},
                    {"field": "share", "format": ".1%"},
                ],
            },
        }
    )


def _series(report: Data, points: int) -> list[dict[str, Any]]:
    """A row for each layer with a rank curve: `epoch` and `share` of the full rank as lists, of so many numbers for all layers together."""
    curves = report["details"]["curves"]
    if not curves:
        return []
    steps, per = curves["steps"], report["details"]["steps_per_epoch"]
    most = min(len(steps), max(LEAST, points // max(1, len(curves["ranks"]))))
    places = sorted({round(i * (len(steps) - 1) / max(1, most - 1)) for i in range(most)})
    found = []
    for name, ranks in curves["ranks"].items():
        full, known = curves["full_ranks"][name], [place for place in places if is_number(ranks[place])]
        if known:
            epochs, shares = zip(*((round(steps[i] / per, 3), round(ranks[i] / full, 4)) for i in known), strict=True)
            found.append({"layer": name, "full": full, "epoch": list(epochs), "share": list(shares)})
    return found
