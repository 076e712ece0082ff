"""The plan that a rewritten model carries."""

from torch import nn

from fxrank.passes.model.compiled import uncompiled
from fxrank.plan import Plan

_PLAN = "_fxrank_plan"


_NESTED = "_fxrank_use_nested_tensor"


def remember_plan(model: nn.Module, plan: Plan) -> None:
    """Keep the plan with the model: it survives deepcopy and pickle and is not in the state dict."""
    uncompiled(model).__dict__[_PLAN] = plan


def has_plan(model: nn.Module) -> bool:
    """Whether `plan_of` has an answer."""
    return isinstance(uncompiled(model).__dict__.get(_PLAN), Plan)


def forget_plan(model: nn.Module) -> None:
    """Take away what `apply_plan` leaves on a model, for one that is dense again."""
    uncompiled(model).__dict__.pop(_PLAN, None)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.__dict__.pop(_NESTED, module.use_nested_tensor)


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model that fxrank has rewritten or loaded. Raises `ValueError` for any other model."""
    plan = uncompiled(model).__dict__.get(_PLAN)
    if not isinstance(plan, Plan):
        raise ValueError(
            f"only a model that fxrank has rewritten has a plan; this {type(model).__name__} has none. Rewrite it with fxrank.factorize or fxrank.auto_lowrank."
        )
    return plan
