"""What a run leaves behind beside its totals, as plain data: what its page draws."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.profiling.roofline import roofline
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.spectra import linalg
from fxrank.plan import Plan
from fxrank.session.session import LowRankSession
from fxrank.torch_private.dtensor import in_shards

SAMPLES = 120
"""Of each rank curve are kept, at most, evenly spaced, the last one among them."""
NODES = 2000
"""Of a graph are kept, at most, from its start."""


def details_of(session: LowRankSession, plan: Plan, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a run that is over:

    - `history`: its rows by epoch, without the ranks;
    - `curves`: `steps`, and `ranks`, the stable ranks then by layer, with `full_ranks`; `steps_per_epoch`;
    - `stacks`: what was timed before the switch (see `StackProfile.to_dict`), and the device's `roofline`, None where nothing was timed;
    - `spectra`: what was cut (see `cut_spectra`), with `after`, the singular values that each pair's product has now, descending;
    - `graph`: `nodes` of the rewritten fx graph in order, each with its `name`, `op`, `target`, `shape`, the `inputs` as numbers of nodes, and the
      `layer` whose pair it belongs to, None for the others; `more` is how many nodes are not in it.
    """
    monitor = session.scene.monitor
    stacks = {id(profile): profile for profile in session.scene.profiles.values()}
    return {
        "history": [{k: v for k, v in row.items() if k != "stable_ranks"} for row in history],
        "steps_per_epoch": session.clock.steps_per_epoch,
        "curves": None if monitor is None else _thinned(monitor.steps, monitor.curves, monitor.full_ranks),
        "stacks": [profile.to_dict() for profile in stacks.values()],
        "roofline": _roofline(session) if stacks else None,
        "spectra": _with_pairs(session),
        "graph": graph_data(session.graph_module.graph, plan.R),
    }


def _thinned(
    steps: Sequence[int], curves: Mapping[str, Sequence[float]], full_ranks: Mapping[str, int]
) -> dict[str, Any]:
    last = len(steps) - 1
    places = sorted({round(i * last / (SAMPLES - 1)) for i in range(SAMPLES)}) if last >= SAMPLES else range(last + 1)
    ranks = {name: [_short(curve[place]) for place in places] for name, curve in curves.items()}
    return {"steps": [steps[place] for place in places], "ranks": ranks, "full_ranks": dict(full_ranks)}


def _roofline(session: LowRankSession) -> dict[str, float]:
    device = next(session.model.parameters()).device
    profiler = session.scene.profiler
    dtype = (profiler and profiler.amp) or next(p.dtype for p in session.model.parameters() if p.is_floating_point())
    return roofline(device, dtype)._asdict()


def _with_pairs(session: LowRankSession) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    pairs = pairs_in(session.model)
    for name, cut in session.spectra.items():
        pair = pairs.get(name)
        after = None if pair is None else product_singular_values(pair)
        found[name] = cut | {"after": None if after is None else [_short(float(x)) for x in after]}
    return found


@torch.no_grad()
def product_singular_values(pair: FactorPair) -> Tensor | None:
    """The singular values `(r,)` of the product of a pair's factors, descending, the mean over its groups; from `R` factors of two QR
    decompositions, so that no matrix of the layer's size is made. None where a BatchNorm stands between the factors, which have no product then,
    and where they lie in shards, on the meta device, or hold no numbers.
    """
    first, second = pair.unfold_u(pair.u.weight.detach()), pair.unfold_v(pair.v.weight.detach())
    if pair.extra_norm is not None or any(in_shards(x) or x.is_meta or not x.isfinite().all() for x in (first, second)):
        return None
    small = linalg.qr(second.cpu().double()).R @ linalg.qr(first.mT.cpu().double()).R.mT
    values: Tensor = linalg.svdvals(small).mean(0)
    return values


def graph_data(graph: fx.Graph, factorized: Mapping[str, int]) -> dict[str, Any]:
    """The `graph` of `details_of`; nodes that give nothing to others but the output are in it as well."""
    nodes = list(graph.nodes)
    numbers = {node: i for i, node in enumerate(nodes[:NODES])}
    found = []
    for node in numbers:
        value = node.meta.get("val")
        found.append(
            {
                "name": node.name,
                "op": node.op,
                "target": node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?"),
                "shape": list(value.shape) if isinstance(value, Tensor) else None,
                "inputs": [numbers[one] for one in node.all_input_nodes if one in numbers],
                "layer": _layer_of(node, factorized),
            }
        )
    return {"nodes": found, "more": len(nodes) - len(numbers)}


def _layer_of(node: fx.Node, factorized: Mapping[str, int]) -> str | None:
    if node.op not in ("call_module", "get_attr"):
        return None
    path = str(node.target)
    while path and path not in factorized:
        path = path.rpartition(".")[0]
    return path or None


def _short(value: float) -> float:
    """With five digits, which no eye tells apart."""
    return float(f"{value:.5g}") if math.isfinite(value) else value
