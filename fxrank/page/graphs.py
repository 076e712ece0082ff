"""The traced graph before and after the rewrite: networkx places the nodes, Vega-Lite draws them."""

from collections.abc import Sequence
from typing import Any

import networkx as nx

from fxrank.page.parts import Data, Spec

STEP = 22
"""Pixels from one row of nodes to the next."""
Nodes = Sequence[Data]
"""In execution order, as `fxrank.training.details.graph_data` has them: `inputs` are places in the sequence."""


def graphs(report: Data) -> list[tuple[str, Spec]]:
    """The graph before and after, by name; empty without a graph. Before, each pair was one node."""
    nodes = report["details"]["graph"]["nodes"]
    if not nodes:
        return []
    return [("before", _drawn(before(nodes))), ("after", _drawn(nodes))]


def before(nodes: Nodes) -> list[dict[str, Any]]:
    """The nodes with each pair's two drawn together to the layer that it stands for: a node that reads nothing but another one of its layer
    goes into that.
    """
    place: dict[int, int] = {}
    found: list[dict[str, Any]] = []
    for number, node in enumerate(nodes):
        inputs: list[int] = list(dict.fromkeys(place[i] for i in node["inputs"]))
        if node["layer"] is not None and len(inputs) == 1 and found[inputs[0]]["layer"] == node["layer"]:
            place[number] = inputs[0]
            found[inputs[0]]["shape"] = node["shape"]
            continue
        place[number] = len(found)
        name = node["target"] if node["layer"] is None else node["layer"]
        found.append({**node, "target": name, "inputs": inputs})
    return found


def _drawn(nodes: Nodes) -> Spec:
    graph: nx.DiGraph[int] = nx.DiGraph()
    for number, node in enumerate(nodes):
        graph.add_node(number)
        graph.add_edges_from((source, number) for source in node["inputs"])
    generations = list(nx.topological_generations(graph))
    rows = len(generations)
    for row, numbers in enumerate(generations):
        for number in numbers:
            graph.nodes[number]["row"] = row
    across = nx.multipartite_layout(graph, subset_key="row", align="horizontal")
    widest = max(abs(float(x)) for x, _ in across.values()) or 1.0
    points = [
        {
            "x": round(float(across[number][0]) / widest, 4),
            "y": graph.nodes[number]["row"],
            "name": node["target"] if node["op"] in ("call_module", "get_attr") else node["name"],
            "op": node["op"],
            "shape": "x".join(map(str, node["shape"])) if node["shape"] is not None else "",
            "layer": node["layer"],
        }
        for number, node in enumerate(nodes)
    ]
    lines = [
        {"x": points[a]["x"], "y": points[a]["y"], "x2": points[b]["x"], "y2": points[b]["y"]} for a, b in graph.edges
    ]
    x: Spec = {"type": "quantitative", "axis": None, "scale": {"domain": [-1.15, 2.0]}}
    y: Spec = {
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [-0.7, rows - 0.3], "reverse": True, "nice": False},
    }
    at = {"x": {**x, "field": "x"}, "y": {**y, "field": "y"}}
    lit = {"condition": {"test": "datum.layer !== null", "value": "@pair"}, "value": "@quiet"}
    return {
        "width": 420,
        "height": STEP * rows,
        "datasets": {"nodes": points, "edges": lines},
        "layer": [
            {
                "data": {"name": "edges"},
                "mark": {"type": "rule", "color": "@quiet", "opacity": 0.5},
                "encoding": {**at, "x2": {"field": "x2"}, "y2": {"field": "y2"}},
            },
            {
                "data": {"name": "nodes"},
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {
                    **at,
                    "color": lit,
                    "tooltip": [{"field": "name"}, {"field": "op"}, {"field": "shape"}, {"field": "layer"}],
                },
            },
            {
                "data": {"name": "nodes"},
                "mark": {"type": "text", "align": "left", "dx": 8, "fontSize": 11, "limit": 200},
                "encoding": {
                    **at,
                    "text": {"field": "name"},
                    "color": {"condition": {"test": "datum.layer !== null", "value": "@pair"}, "value": "@text"},
                },
            },
        ],
    }
