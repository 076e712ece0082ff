"""Ranks within a budget by other losses than fxrank's own choice, in the same integer program: by what the layers lose, `s(r) = tail(r)`,
relative, and after LEMS (ICML 2026) by `s(r) = KL(r₀) · tail(r) / tail(r₀)`, with the KL of the whole model's outputs and one layer's pair.
"""

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrank
from fxrank.policies.outputs import Outputs


def kl_weights(dense: nn.Module, small: nn.Module, x: Tensor) -> dict[str, float]:
    """`KL(r₀) / tail(r₀)` of each layer that is a pair in `small`, by name, over the median of all: KL of the outputs `(N, classes)` on a batch
    `x` with this pair alone in the dense model, and the share of the layer's energy that it lost.
    """
    with torch.no_grad():
        wanted = F.log_softmax(dense(x), 1)
        found = {}
        for decision in fxrank.plan_of(small).layers:
            if decision.factorized and decision.output_error:
                model = copy.deepcopy(dense)
                model.set_submodule(decision.name, small.get_submodule(decision.name))
                got = F.log_softmax(model(x), 1)
                loss = F.kl_div(got, wanted, log_target=True, reduction="batchmean")
                found[decision.name] = float(loss) / decision.output_error**2
    middle = sorted(found.values())[len(found) // 2]
    return {name: value / middle for name, value in found.items()}


def unweighed(weights: Mapping[str, float] | None = None) -> AbstractContextManager[object]:
    """Meanwhile what layers lose counts as it is, or times these weights, 1 where there is none."""

    def given(self: Outputs, alone: object, before: object = None) -> Mapping[str, float]:
        return weights or {}

    return patch.object(Outputs, "weights", given)


def weighted(weights: Mapping[str, float], model: nn.Module, example: Tensor, **options: Any) -> nn.Module:
    """`fxrank.factorize(model, example, **options)` under a target, with these weights of the layers' losses."""
    with unweighed(weights):
        return fxrank.factorize(model, example, **options)


def by_kl(
    model: nn.Module, calibration: list[tuple[Tensor, Tensor]], share: float, form: str, at: float | None
) -> nn.Module:
    """Ranks by KL at a share `at` of each layer's break-even rank, or, if None, at those that the layers' own losses choose."""
    x = calibration[0][0]
    options: dict[str, Any] = {"form": form, "calibration": calibration, "recalibrate": False}
    small = weighted({}, model, x[:2], target_params=share, **options)
    if at is not None:
        ranks = {}
        for d in fxrank.plan_of(fxrank.factorize(model, x[:2], 1, form=form)).layers:
            if d.factorized and d.pair_parameters:
                ranks[d.name] = max(1, round(at * d.parameters / d.pair_parameters))
        small = fxrank.factorize(model, x[:2], ranks, **options)
    return weighted(kl_weights(model, small, x), model, x[:2], target_params=share, **options)
