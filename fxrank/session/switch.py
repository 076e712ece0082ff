"""The switch itself: pairs in the model, its graph and its averages; then the optimizers, the wrapper and the later steps."""

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.locate import dense_at
from fxrank.plan import Plan
from fxrank.session.attach import Attachment
from fxrank.switch.apply_plan import Replacement
from fxrank.switch.averages import switch_average
from fxrank.switch.freeze import freeze
from fxrank.switch.later_steps import FactorRegime
from fxrank.switch.optimizer import swap_parameters


def put_pairs(attached: Attachment, averages: Iterable[nn.Module], plan: Plan, *, split: bool) -> list[Replacement]:
    """The plan's pairs in the model, in its graph and in its averages. `split=False` leaves the factors unfilled."""
    team, scene = attached.team, attached.scene
    averages, before = list(averages), {}
    if averages and split and plan.calibration_batches is not None:
        for name in plan.R:
            dense = dense_at(team.model, name)
            bias = getattr(dense, "bias", None)
            before[name] = weight_of(dense).detach(), None if bias is None else bias.detach().clone()
    replacements = team.apply(plan, attached.graph_module, attached.example, scene.factors, split=split)
    for average in averages:
        switch_average(average, team.model, plan, split=split, before=before)
    return replacements


def hand_over(
    attached: Attachment,
    plan: Plan,
    replacements: Sequence[Replacement],
    step: Callable[[], int],
    *,
    split: bool = True,
) -> tuple[dict[Optimizer, FactorRegime], list[str]]:
    """Give the optimizers, and what averages the gradients, the factors in their weights' places. Returns what the factors
    need in each later step, and notes for the report. `step` tells how many steps were made. Factors that were not `split` are
    without numbers: they get no gradients from their weights'.
    """
    for parameter in () if split else (p for r in replacements for p in r.parameters):
        parameter.grad = None
    team, training = attached.team, attached.policy.training
    held = {id(p) for o in attached.optimizers for group in o.param_groups for p in group["params"]}
    off = [r.name for r in replacements if id(r.weight) in held and not r.pair.u.weight.requires_grad]
    notes = [f"{', '.join(off)}: frozen when the switch was made, and so are the factors"] if off else []
    notes += freeze(team.model, training.freeze) + [r.hook_note for r in replacements if r.hooked]
    notes += [note for o in attached.optimizers for note in swap_parameters(o, replacements)]
    if (missing := team.rewrap(p for r in replacements for p in r.parameters)) is not None:
        notes.append(missing)
    ramp = max(1, round(training.rewarmup * attached.clock.total_steps)) if training.rewarmup else 0
    scale, first = training.lr_scale, plan.switch_step or 0
    regimes = {}
    for optimizer in attached.optimizers:
        regime = regimes[optimizer] = FactorRegime(optimizer, replacements, training.frobenius_decay)
        regime.expect_new_gradients()
        if ramp or scale != 1.0:
            regime.scale_lr(lambda: scale * (min(1.0, (step() - first + 1) / ramp) if ramp else 1.0))
        notes += regime.notes
    return regimes, notes
