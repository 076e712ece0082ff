"""What was cut: the spectra of the layers that a plan factorizes, as they were just before, for whoever looks at the run afterwards."""

from typing import Any

import torch
from torch import Tensor

from fxrank.passes.discovery.layer import Layer, matrices_of
from fxrank.passes.spectra.exact import singular_values, truncation_error
from fxrank.plan import Plan
from fxrank.policies.scene import Scene
from fxrank.torch_private.dtensor import in_shards

POINTS = 96
"""Of a spectrum are kept, at most."""
WORK = 2e9
"""Multiplications, at most, that the singular values of all weights together may take, by `rows · cols · full rank`: some 0.3 s of one core."""

NUMBERS = 2**16
"""Of a weight, at most, whose singular values are taken: the switch is to need no more memory than the factors and one layer."""


def cut_spectra(plan: Plan, scene: Scene) -> dict[str, dict[str, Any]]:
    """By factorized layer: `of`, whether they are `"outputs"` (of the layer, on live data: what its rank was chosen by) or its `"weight"`;
    `rank`; `full_rank`; `ranks`, at most `POINTS` of them, the chosen one among these; and `left_out`, the share of the squares that a pair of each
    of these ranks leaves out, in all groups together. A layer whose outputs were not looked at has its weight's as far as `NUMBERS` and `WORK` go.
    """
    layers = {layer.name: layer for layer in scene.layers}
    found: dict[str, dict[str, Any]] = {}
    work = 0.0
    for decision in plan.layers:
        if decision.rank is None:
            continue
        layer = layers[decision.name]
        layer = layer if decision.form == layer.form else layer.in_form(decision.form)
        sigma, of = scene.outputs.get(layer.key), "outputs"
        if sigma is None:
            if layer.groups * layer.rows * layer.cols > NUMBERS:
                continue
            work += float(layer.groups) * layer.rows * layer.cols * layer.full_rank
            if work > WORK or (sigma := _of_weight(layer, scene)) is None:
                continue
            of = "weight"
        ranks = _points(layer.full_rank, decision.rank)
        found[layer.name] = {
            "of": of,
            "rank": decision.rank,
            "full_rank": layer.full_rank,
            "ranks": ranks,
            "left_out": [float(f"{truncation_error(sigma, rank) ** 2:.4g}") for rank in ranks],
        }
    return found


def _of_weight(layer: Layer, scene: Scene) -> Tensor | None:
    weights = matrices_of(layer, scene.model).detach()
    return None if weights.is_meta or in_shards(weights) else singular_values(weights)


def _points(full_rank: int, rank: int) -> list[int]:
    spaced = torch.linspace(0, full_rank, min(POINTS, full_rank + 1)).round().int().tolist()
    return sorted({*spaced, rank})
