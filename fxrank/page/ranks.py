"""What was chosen: ranks beside full ranks, and what they left out. Nothing to draw is None, or an empty list."""

from fxrank.page.parts import ROW, Data, Spec, layers_axis, wide

CHOICE = "cut-layer"
"""The list on the page from which the layer is chosen whose spectra are shown."""


def chosen_ranks(report: Data) -> Spec | None:
    """The rank of each layer beside its full rank (Cuttlefish Figs. 5, 7, 8)."""
    layers = [layer for layer in report["plan"]["layers"] if layer["full_rank"]]
    if not layers:
        return None
    values = [
        {
            "layer": layer["name"],
            "full rank": layer["full_rank"],
            "rank": layer["rank"],
            "label": "" if layer["rank"] is None else f"{layer['rank']} of {layer['full_rank']}",
        }
        for layer in layers
    ]
    y = layers_axis("layer")
    tooltip = [{"field": "layer"}, {"field": "rank"}, {"field": "full rank"}]
    return wide(
        {
            "data": {"values": values},
            "height": (ROW + 3) * len(layers),
            "encoding": {"y": y, "tooltip": tooltip},
            "layer": [
                {
                    "mark": {"type": "bar", "color": "@quiet", "opacity": 0.35, "height": 11},
                    "encoding": {
                        "x": {
                            "field": "full rank",
                            "type": "quantitative",
                            "title": "rank; pale: full rank",
                            "scale": {"nice": False, "domainMax": 1.3 * max(layer["full_rank"] for layer in layers)},
                        }
                    },
                },
                {
                    "mark": {"type": "bar", "color": "@pair", "height": 11},
                    "encoding": {"x": {"field": "rank", "type": "quantitative"}},
                },
                {
                    "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10},
                    "encoding": {"x": {"field": "full rank", "type": "quantitative"}, "text": {"field": "label"}},
                },
            ],
        }
    )


def spectra(report: Data) -> list[Spec]:
    """What a pair of each rank would leave out of a layer, with the cut, and the singular values of the pair's product after the run; the layer is
    chosen from the page's list `CHOICE`.
    """
    cuts = report["details"]["spectra"]
    if not cuts:
        return []
    names = list(cuts)
    floor = 1e-9
    left = [
        {"layer": name, "rank": rank, "share": max(share, floor)}
        for name, cut in cuts.items()
        for rank, share in zip(cut["ranks"], cut["left_out"], strict=True)
    ]
    marks = [{"layer": name, "rank": cut["rank"], "text": f"rank {cut['rank']}"} for name, cut in cuts.items()]
    param: Spec = {"name": "layer", "value": names[0], "bind": {"element": f"#{CHOICE}", "event": "input"}}
    only: list[Spec] = [{"filter": "datum.layer == layer"}]
    found: list[Spec] = [
        {
            "height": 240,
            "params": [param],
            "layer": [
                {
                    "data": {"values": left},
                    "transform": only,
                    "mark": {"type": "area", "line": {"color": "@dense"}, "color": "@dense", "fillOpacity": 0.12},
                    "encoding": {
                        "x": {"field": "rank", "type": "quantitative", "title": "rank of the pair"},
                        "y": {
                            "field": "share",
                            "type": "quantitative",
                            "title": "left out",
                            "axis": {"format": ".0%"},
                        },
                        "tooltip": [{"field": "rank"}, {"field": "share", "format": ".2%", "title": "left out"}],
                    },
                },
                {
                    "data": {"values": marks},
                    "transform": only,
                    "mark": {"type": "rule", "color": "@pair", "strokeWidth": 2},
                    "encoding": {"x": {"field": "rank", "type": "quantitative"}, "tooltip": [{"field": "text"}]},
                },
            ],
        }
    ]
    after = [
        {"layer": name, "number": i + 1, "value": max(value, floor)}
        for name, cut in cuts.items()
        for i, value in enumerate(cut["after"] or ())
    ]
    if after:
        found.append(
            {
                "height": 240,
                "params": [param],
                "data": {"values": after},
                "transform": only,
                "mark": {"type": "line", "color": "@pair", "point": {"size": 14, "color": "@pair"}},
                "encoding": {
                    "x": {
                        "field": "number",
                        "type": "quantitative",
                        "title": "singular value of the pair, after the run",
                    },
                    "y": {"field": "value", "type": "quantitative", "scale": {"type": "log"}, "title": "value"},
                    "tooltip": [{"field": "number"}, {"field": "value", "format": ".4f"}],
                },
            }
        )
    return [wide(spec) for spec in found]
