"""Whether a plan pays: the whole training step with its pairs, on copies, against the present one, before anything is changed.

That each pair is faster by itself does not say so: what is small may be lost between the layers. Where the step is not faster, the pairs
that save least are given back, half of them at a time. Parts that are compiled run as Python here: to compile two copies takes longer
than a pair saves in many steps.
"""

import copy
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import nn

from fxrank.decisions import keep
from fxrank.passes.model.calls import call_arguments
from fxrank.passes.model.restored import tensors_of
from fxrank.passes.profiling.clock import Share
from fxrank.passes.rewriting.install import uncompile_parts
from fxrank.passes.tracing.proof import observers_off
from fxrank.plan import Plan
from fxrank.policies.scene import Clock, Scene
from fxrank.policies.times import Trials
from fxrank.session.attach import Attachment
from fxrank.torch_private.dtensor import is_sharded

SHARE = 0.005
"""Of the time of a training, what the ranks' timing may take beyond the first rounds, and the whole step's beyond `LEAST`."""
LEAST = 3


def decided(
    attached: Attachment, clock: Clock, why: str, step_ms: Sequence[float]
) -> tuple[Plan, Share | None, list[str]]:
    """The policy's plan with the pairs that pay, what the training step takes with them of the present one's time (None if that was not
    measured), and notes. `step_ms` are the last steps' own times: they say what the training takes, of which timing may have its share.
    """
    scene, policy = attached.scene, attached.policy
    run_ms = statistics.median(step_ms) * clock.total_steps if step_ms else 0.0
    profiler = scene.profiler
    if profiler is None:
        return policy.plan(scene, clock, why), None, []
    profiler.budget_ms = min(profiler.budget_ms, SHARE * run_ms / len(scene.layers))
    plan = policy.plan(scene, clock, why)
    start = time.perf_counter()
    found = _timed_whole(plan, attached, profiler.amp, SHARE * run_ms)
    profiler.seconds += time.perf_counter() - start
    return found


def _timed_whole(
    plan: Plan, attached: Attachment, amp: torch.dtype | None, budget_ms: float
) -> tuple[Plan, Share | None, list[str]]:
    must, scene = attached.policy.must_pay, attached.scene
    if must is None or not plan.R:
        return plan, None, []
    # One process alone would wait for ever in a part that talks to the others, as SyncBatchNorm does; and what pairs save where gradients are
    # averaged would not be in it.
    if attached.team.size > 1 or is_sharded(attached.team.model):
        return plan, None, ["the training step was not timed as a whole: several processes make it"]
    with ExitStack() as meanwhile:
        example = attached.team.example(attached.example)
        call = call_arguments(scene.model, example)

        def copied() -> nn.Module:
            twin = uncompile_parts(apart(scene.model))
            meanwhile.enter_context(observers_off(twin, *call))
            return twin

        trials = Trials(copied, example, backward=True, amp=amp, least=LEAST, budget_ms=budget_ms)
        try:
            return _paying(plan, trials, scene, must)
        except Exception as error:  # of a model that cannot be copied, or for want of memory
            words = f"{type(error).__name__}: {error}".partition("\n")[0]
            return plan, None, [f"the training step was not timed as a whole: a copy of the model fails with {words}"]


def _paying(plan: Plan, trials: Trials, scene: Scene, must: bool) -> tuple[Plan, Share | None, list[str]]:
    notes: list[str] = []
    while plan.R:
        times = trials.times(plan)
        share = times.shares[1]
        found = f"the training step with pairs in {len(plan.R)} layers took {share.median:.2f} ± {share.spread:.2f} of the dense one's time"
        if times.how != "clock":
            found += f", by {times.how}: the machine is busy"
        notes.append(f"measured on copies before the switch: {found}")
        if not must or share.median - share.spread <= 1:
            return plan, share, notes
        plan = _without(plan, scene, found)
    return replace(plan, note=f"{plan.note}; no pair pays: {found}"), None, notes


def _without(plan: Plan, scene: Scene, why: str) -> Plan:
    """The plan without the half of its pairs that saves least, by what the layers took alone."""
    layers = {layer.name: layer for layer in scene.layers}
    saved = {
        d.name: scene.profiles[d.name].dense_ms * (1 - 1 / d.speedup) if d.speedup and d.name in scene.profiles else 0.0
        for d in plan.layers
        if d.factorized
    }
    back = set(sorted(saved, key=saved.__getitem__)[: -(-len(saved) // 2)])
    decisions = [
        replace(keep(layers[d.name], f"given back: {why}"), stable_rank=d.stable_rank, xi=d.xi, speedup=d.speedup)
        if d.name in back
        else d
        for d in plan.layers
    ]
    for name in back:
        scene.factors.pop(name, None)
    return replace(plan, layers=tuple(decisions))


def apart(model: nn.Module) -> nn.Module:
    """A copy with numbers of its own, also of tensors in attributes, which may have a history."""
    own = {
        id(t): nn.Parameter(t.detach().clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach().clone()
        for t in tensors_of(model)
    }
    return copy.deepcopy(model, own)
