"""Everything that is examined before a session hooks anything: options, optimizers, the graph, its layers, their speed.

Nothing of the user's is changed here. What is found is an `Attachment`, with which a session begins.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxrank.distributed.team import Team
from fxrank.loggers import Logger
from fxrank.passes.discovery.copies import without_followed
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.layer import Layer, stack_of
from fxrank.passes.discovery.selection import Selector, candidates, require_some
from fxrank.passes.discovery.stacks import stacks
from fxrank.passes.model.calls import Example
from fxrank.passes.profiling.timing import Profiler
from fxrank.passes.spectra.exact import check_finite
from fxrank.passes.tracing.trace import TracedModule, trace
from fxrank.policies.base import Policy
from fxrank.policies.monitor import RankMonitor, spacing
from fxrank.policies.scene import Clock, Scene
from fxrank.session.companions import left_dense, shared_outside
from fxrank.switch.averages import Average, averaged_in
from fxrank.switch.freeze import frozen_names
from fxrank.switch.optimizer import optimizers_of, refused_by
from fxrank.switch.trial import misfits, with_reasons
from fxrank.torch_private.dtensor import is_sharded
from fxrank.wrappers import check_not_graphed, own_forward


@dataclass(frozen=True, eq=False)
class Attachment:
    """A model with its team and its optimizers, fit to be watched, and what is known of it before the first step; `scene` has
    the layers and, where the policy wants them, the profiles and a monitor without a sample.
    """

    team: Team
    optimizers: tuple[Optimizer, ...]
    policy: Policy
    clock: Clock
    example: Example
    graph_module: TracedModule
    scene: Scene
    averages: tuple[Average, ...]
    logger: Logger | None
    """What all processes call; the first one's writes."""
    notes: tuple[str, ...] = ()
    """What a report should say of what was examined."""


def clock_of(total_steps: int, steps_per_epoch: int | None) -> Clock:
    """The clock of a training that begins; without `steps_per_epoch` it is one epoch. Raises `ValueError`."""
    steps_per_epoch = total_steps if steps_per_epoch is None else steps_per_epoch
    numbers = isinstance(total_steps, Real) and isinstance(steps_per_epoch, Real)
    if not (numbers and total_steps >= 1 and steps_per_epoch >= 1):  # NaN is not
        raise ValueError(
            f"total_steps and steps_per_epoch must be at least 1; got {total_steps} and {steps_per_epoch}. Count optimizer steps."
        )
    return Clock(0, total_steps, steps_per_epoch)


def examine(
    team: Team,
    optimizer: Optimizer | Sequence[Optimizer],
    policy: Policy,
    clock: Clock,
    example_inputs: Example,
    *,
    include: Iterable[Selector] | Selector = (),
    exclude: Iterable[Selector] | Selector = (),
    amp: torch.dtype | None = None,
    seed: int = 0,
    logger: Logger | None = None,
    followers: Iterable[object] = (),
    state: dict[str, Any] | None = None,
) -> Attachment:
    """Check all that `LowRankSession.attach` is given, trace the model, list its layers and, without a `state` that has the
    timings already, profile them. Errors as of `LowRankSession.attach`.
    """
    team.check_alike(
        total_steps=clock.total_steps, steps_per_epoch=clock.steps_per_epoch, state="one" if state else "none"
    )
    model = team.model
    check_not_graphed(model)
    optimizers = optimizers_of(optimizer, model)
    if not isinstance(followers, Iterable) or isinstance(followers, (nn.Module, Tensor)):
        raise TypeError(f"followers are several averages of the model; got {type(followers).__name__}. Give a list.")
    averages = tuple(averaged_in(follower, model) for follower in followers)
    frozen_names(model, policy.training.freeze)
    notes: list[str] = []
    if is_sharded(model) and policy.by_weights != policy:
        policy = policy.by_weights
        notes.append(
            "the model is in shards, whose layers cannot be run by themselves: what is decided at the switch knows the weights alone"
        )
    if policy.knows_data and is_sharded(model):
        raise TypeError(
            'factors="data" needs a model that is whole in each process, whose layers are run by themselves; this one is in shards. '
            "Leave it out, for factors of the weights alone, or train with DistributedDataParallel."
        )
    if policy.known_plan is not None:
        team.check_plan(policy.known_plan)
    structure = team.structure
    with own_forward(structure):
        graph_module = trace(structure, team.example(example_inputs))
    _check_trains(model)
    found = [layer.if_in_form(policy.form) for layer in discover(graph_module, structure)]
    layers = candidates(found, structure, include=include, exclude=exclude)
    held = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    layers = without_followed(layers, structure, held)
    if policy.known_plan is None:  # else it was decided when the plan was made
        with own_forward(structure):
            reasons = misfits(layers, structure, team.example(example_inputs), graph_module, notes, policy.form)
        layers = with_reasons(layers, team.agree(lambda: reasons))
    scene = Scene(structure, _checked(layers, team, optimizers, policy))
    policy.check(scene)
    logger = team.logger(logger)
    _profile(scene, team, policy, clock, amp, known=state is not None)
    detector = policy.detector(clock)
    if detector is not None:
        interval = policy.interval(clock)
        wider = interval if interval >= clock.steps_per_epoch else spacing(scene.layers, interval, clock.total_steps)
        if wider > interval and (spaced := detector.spaced(wider / interval)) is not None:
            detector, interval = spaced, wider
        scene.monitor = RankMonitor(scene.layers, structure, detector, interval, seed=seed, agree=team.agree)
    return Attachment(
        team, optimizers, policy, clock, example_inputs, graph_module, scene, averages, logger, tuple(notes)
    )


def _check_trains(model: nn.Module) -> None:
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    name = next((name for name, parameter in trained if parameter.is_inference()), None)
    if name is not None:
        raise ValueError(
            f"a weight that is trained must be made outside of torch.inference_mode(); {name!r} was made in it. "
            "Build the model outside, or train a copy that is made there: copy.deepcopy(model)."
        )


def _checked(layers: list[Layer], team: Team, optimizers: Sequence[Optimizer], policy: Policy) -> list[Layer]:
    """The layers, with a reason for those that the engine or an optimizer does not let go. Raises for weights that are not
    finite, and where a switch is wanted and nothing is left for it.
    """
    known = {} if policy.known_plan is None else policy.known_plan.R
    reasons = team.agree(lambda: shared_outside(layers, team.model))
    layers = left_dense(layers, reasons)
    layers = refused_by(optimizers, team.refused(layers), team.model, known)
    for layer in layers:
        if layer.reason is None:
            check_finite(stack_of(layer, team.structure), layer.name)
    followed = any(
        layer.guarded and layer.name in known for layer in layers
    )  # in a plan that was made before it was guarded
    if policy.may_switch and not followed:
        require_some(layers)
    return layers


def _profile(scene: Scene, team: Team, policy: Policy, clock: Clock, amp: torch.dtype | None, *, known: bool) -> None:
    """Time the stacks, if the policy asks for it, in the first process for all; the profiles of a state that is `known` come
    with it.
    """
    threshold = policy.speedup_needed
    if threshold is None:
        return
    profiler = scene.profiler = Profiler(scene.model, next(team.model.parameters()).device, amp=amp)
    found = [] if known else stacks(scene.layers)
    measured = team.agree(lambda: profiler.stacks(found, policy.probe, threshold, clock.total_steps))
    for profile in measured:
        scene.profiles.update(dict.fromkeys(profile.names, profile))
