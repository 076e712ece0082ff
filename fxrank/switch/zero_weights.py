"""Weights of zeros, as the last layers of residual branches have at the start (DiT, ControlNet): a plan leaves them dense.

Both factors would be zero, and stay so: the gradient of each is a product with the other.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fxrank.passes.model.weights import numbers_of, weight_of
from fxrank.passes.pairs.registry import pair_class
from fxrank.plan import LayerDecision, Plan
from fxrank.switch.sites import sites


def why_dead(stack: Tensor) -> str | None:
    """Why the factors of these matrices, `(groups, rows, cols)`, would not train; None if they would."""
    if stack.is_meta:
        return None
    zero = int((torch.linalg.vector_norm(stack, ord=torch.inf, dim=(1, 2)) == 0).sum())
    if not zero:
        return None
    if zero == len(stack):
        return "its weight is zero (stable rank 0)"
    return f"{zero} of the {len(stack)} matrices in its weight {'is' if zero == 1 else 'are'} zero (stable rank 0)"


def without_zero_weights(model: nn.Module, plan: Plan) -> Plan:
    """The plan, with the layers kept dense whose weight is zero in this model. Raises as `sites` does."""
    dense = []
    for site in sites(model, plan):
        pair = pair_class(site.dense, site.decision.form)
        assert pair is not None, site.name
        reason = why_dead(pair.spectral_view(site.dense, numbers_of(weight_of(site.dense)).detach()))
        if reason is not None:
            dense.append(_kept(site.decision, reason))
    return plan.with_layers(dense) if dense else plan


def _kept(decision: LayerDecision, reason: str) -> LayerDecision:
    return replace(
        decision,
        rank=None,
        reason=reason,
        form=LayerDecision.form,
        extra_bn=False,
        pair_parameters=None,
        pair_macs=None,
        truncation_error=None,
    )
