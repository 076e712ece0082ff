"""What was timed: stacks, dense and as pairs, and where the run itself spent its time. Nothing to draw is None."""

from collections.abc import Sequence

from fxrank.page.parts import ROW, Data, Spec, layers_axis, stack_label, two_colours, wide

BESIDE_IT = "Beside it the same against the device's best rates: what lies far below the line is held up by small pieces, not by arithmetic."


def busy(stacks: Sequence[Data]) -> str:
    """By what stacks were timed where the clock could not be believed, as a sentence; empty where it could."""
    hows = sorted({stack.get("how", "clock") for stack in stacks} - {"clock"})
    return f" The machine was busy: times are by {' and '.join(hows)}." if hows else ""


def stack_bars(stacks: Sequence[Data]) -> Spec | None:
    """Milliseconds of a layer of each stack, forward and backward, dense and as a pair (Cuttlefish Fig. 4)."""
    if not stacks:
        return None
    order = [stack_label(stack) for stack in stacks]
    values, labels = [], []
    for stack, label in zip(stacks, order, strict=True):
        pair = f"pair of rank {stack['probe_rank']}"
        values += [
            {"stack": label, "as": "dense", "which": "dense layer", "ms": stack["dense_ms"]},
            {"stack": label, "as": "pair", "which": pair, "ms": stack["pair_ms"]},
        ]
        spread = f" ± {stack['spread']:.2f}" if stack["spread"] else ""
        longest = max(stack["dense_ms"], stack["pair_ms"])
        labels.append({"stack": label, "ms": longest, "text": f"{stack['speedup']:.2f}x{spread}"})
    y: Spec = {**layers_axis("stack"), "sort": order}
    return wide(
        {
            "height": 2.4 * ROW * len(stacks),
            "layer": [
                {
                    "data": {"values": values},
                    "mark": {"type": "bar"},
                    "encoding": {
                        "y": y,
                        "yOffset": {"field": "as", "sort": ["dense", "pair"]},
                        "x": {
                            "field": "ms",
                            "type": "quantitative",
                            "title": "ms, forward and backward",
                            "scale": {"nice": False, "domainMax": 1.4 * max(label["ms"] for label in labels)},
                        },
                        "color": two_colours("as", ("dense", "pair"), ("@dense", "@pair")),
                        "tooltip": [{"field": "stack"}, {"field": "which"}, {"field": "ms", "format": ".3f"}],
                    },
                },
                {
                    "data": {"values": labels},
                    "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10},
                    "encoding": {"y": y, "x": {"field": "ms", "type": "quantitative"}, "text": {"field": "text"}},
                },
            ],
        }
    )


def roofline(stacks: Sequence[Data], roof: Data | None) -> Spec | None:
    """Every stack, dense and as a pair, under what the device can do at best (Cuttlefish Fig. 6)."""
    if not stacks or not roof:
        return None
    ridge = roof["flops"] / roof["bandwidth"]
    values, ties = [], []
    for stack in stacks:
        ends = []
        for kind, prefix in (("dense", ""), ("pair", "pair_")):
            intensity = stack[f"{prefix}flops"] / stack[f"{prefix}bytes_moved"]
            rate = 3 * stack[f"{prefix}flops"] / stack[f"{kind}_ms"] / 1e6
            ends += [intensity, rate]
            values.append({"stack": stack_label(stack), "as": kind, "intensity": intensity, "rate": rate})
        ties.append(dict(zip(("x", "y", "x2", "y2"), ends, strict=True)))
    low = min(min(v["intensity"] for v in values), ridge) / 2
    high = max(max(v["intensity"] for v in values), ridge) * 2
    edge = [{"x": x, "y": min(roof["flops"], x * roof["bandwidth"]) / 1e9} for x in (low, ridge, high)]
    log: Spec = {"type": "log"}
    x = {"type": "quantitative", "scale": {**log, "nice": False}, "title": "FLOP per byte", "axis": {"grid": False}}
    y = {"type": "quantitative", "scale": log, "title": "GFLOP/s, forward and backward", "axis": {"grid": False}}
    return wide(
        {
            "height": 320,
            "layer": [
                {
                    "data": {"values": edge},
                    "mark": {"type": "line", "color": "@text", "strokeWidth": 1.5},
                    "encoding": {"x": {**x, "field": "x"}, "y": {**y, "field": "y"}},
                },
                {
                    "data": {"values": ties},
                    "mark": {"type": "rule", "color": "@quiet", "opacity": 0.6},
                    "encoding": {
                        "x": {**x, "field": "x"},
                        "y": {**y, "field": "y"},
                        "x2": {"field": "x2"},
                        "y2": {"field": "y2"},
                    },
                },
                {
                    "data": {"values": values},
                    "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.9},
                    "encoding": {
                        "x": {**x, "field": "intensity"},
                        "y": {**y, "field": "rate"},
                        "shape": {"field": "as", "scale": {"domain": ["dense", "pair"]}},
                        "color": two_colours("as", ("dense", "pair"), ("@dense", "@pair")),
                        "tooltip": [
                            {"field": "stack"},
                            {"field": "as"},
                            {"field": "intensity", "format": ".1f"},
                            {"field": "rate", "format": ".1f", "title": "GFLOP/s"},
                        ],
                    },
                },
            ],
        }
    )


def own_cost(report: Data) -> Spec | None:
    """Where the run's wall-clock went."""
    seconds = dict(report["seconds"])
    total = seconds.pop("total", 0.0)
    if not total:
        return None
    parts = {"training": max(0.0, total - sum(seconds.values())), **seconds}
    names = {"monitor": "fxrank: watching ranks", "profile": "fxrank: timing", "switch": "fxrank: the switch"}
    values = [
        {"part": names.get(name, name), "seconds": value, "share": value / total, "order": i}
        for i, (name, value) in enumerate(parts.items())
    ]
    colors = {"training": "@dense", "evaluation": "@quiet"}
    domain = [value["part"] for value in values]
    shades = iter(("@pair", "@pair2", "@pair3"))
    return wide(
        {
            "data": {"values": values},
            "height": 46,
            "mark": {"type": "bar"},
            "encoding": {
                "x": {"field": "seconds", "type": "quantitative", "title": "seconds", "stack": "zero"},
                "order": {"field": "order"},
                "color": {
                    "field": "part",
                    "type": "nominal",
                    "sort": None,
                    "scale": {
                        "domain": domain,
                        "range": [colors.get(part) or next(shades, "@quiet") for part in domain],
                    },
                    "legend": {"title": None, "orient": "bottom", "columns": 3, "labelLimit": 200},
                },
                "tooltip": [
                    {"field": "part"},
                    {"field": "seconds", "format": ".2f"},
                    {"field": "share", "format": ".1%"},
                ],
            },
        }
    )
