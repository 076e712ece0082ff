"""What a session knows, as plain data, and back.

Everything that a decision still to come depends on is in it: rank histories, the rank tracker's vectors and random
numbers (so that the next sample is the same to the last bit), the timings behind K, the plan.
"""

import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from typing import Any, Protocol

from torch import nn

from fxrank.distributed.team import Team
from fxrank.passes.errors import CheckpointError
from fxrank.passes.profiling.timing import StackProfile
from fxrank.plan import Plan
from fxrank.policies.base import Policy
from fxrank.policies.monitor import RankMonitor
from fxrank.policies.scene import Clock, Scene
from fxrank.switch.sites import sites

STATE_VERSION = 2
FULL, LOW = "full-rank", "low-rank"
"""The phases of a training, before and after the switch."""


class StatefulSession(Protocol):
    """What a `LowRankSession` knows, as far as its state is concerned; the session imports this file."""

    team: Team
    policy: Policy
    clock: Clock
    scene: Scene
    plan: Plan | None
    notes: list[str]
    spectra: dict[str, dict[str, Any]]
    ready_since: int | None
    """The step at which the policy first wanted the switch, if it waits to be made."""
    seconds: dict[str, float]
    step_ms: dict[str, deque[float]]

    def install(self, plan: Plan, *, split: bool = True) -> None:
        """Make the switch that a plan describes."""


def session_state(session: StatefulSession) -> dict[str, Any]:
    """See `LowRankSession.state_dict`."""
    clock, monitor = session.clock, session.scene.monitor
    profiles = {id(profile): profile for profile in session.scene.profiles.values()}
    return {
        "version": STATE_VERSION,
        "policy": described(session.policy),
        "clock": [clock.step, clock.total_steps, clock.steps_per_epoch],
        "plan": None if session.plan is None else session.plan.to_json(),
        "monitor": None if monitor is None else monitor.state_dict(),
        "profiles": [_listed(asdict(profile)) for profile in profiles.values()],
        "notes": list(session.notes),
        "spectra": session.spectra,
        "ready_since": session.ready_since,
        "seconds": dict(session.seconds),
        "step_ms": {phase: list(times) for phase, times in session.step_ms.items()},
    }


def restore_session(session: StatefulSession, state: dict[str, Any]) -> None:
    """See `LowRankSession.load_state_dict`."""
    dense = session.scene.model if session.plan is None else None
    plan, profiles = check_state(state, session.policy, session.clock, session.scene.monitor, dense)
    if session.plan is not None and (plan is None or _pairs(plan) != _pairs(session.plan)):
        raise CheckpointError(
            f"a session's state belongs into a session that has not switched yet; this one has made a plan of its own at step {session.clock.step}. "
            "Attach to a freshly built model, with state= if the policy switches at once."
        )
    if plan is not None and session.plan is None:
        session.team.check_plan(plan)
    if session.scene.monitor is not None:
        session.scene.monitor.load_state_dict(state["monitor"])
    session.clock = Clock(*state["clock"])
    for profile in profiles:
        session.scene.profiles.update(dict.fromkeys(profile.names, profile))
    if plan is not None and session.plan is None:
        session.install(plan, split=False)
    session.plan = plan
    session.notes[:] = state.get("notes", session.notes)
    session.spectra = state.get("spectra", {})
    session.ready_since = state.get("ready_since")
    session.seconds.update(state.get("seconds", {}))
    for phase, times in state.get("step_ms", {}).items():
        session.step_ms[phase].extend(times)


def check_state(
    state: Any, policy: Policy, clock: Clock, monitor: RankMonitor | None, dense: nn.Module | None
) -> tuple[Plan | None, list[StackProfile]]:
    """The plan and the profiles of a saved state, after a look at everything that is in it, and at the model that the
    plan is for if it is `dense` yet. Raises `CheckpointError`, or `PlanMismatchError` for the plan.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if type(version) is not int or version not in (1, STATE_VERSION):
        raise CheckpointError(
            f"session state must have version 1 or {STATE_VERSION}; got {version!r}. Install the fxrank that wrote it."
        )
    _need(state, "clock", lambda c: isinstance(c, list) and len(c) == 3 and all(map(_is_count, c)))
    if state["clock"][1:] != [clock.total_steps, clock.steps_per_epoch]:
        raise CheckpointError(
            f"a run resumes with as many steps as it was started with; this one has {clock.total_steps} ({clock.steps_per_epoch} an epoch), the saved one "
            f"{state['clock'][1]} ({state['clock'][2]} an epoch). Pass the same, or start afresh."
        )
    text = _need(state, "plan", lambda p: p is None or isinstance(p, str))
    plan = None if text is None else Plan.from_json(text)
    if plan is not None and dense is not None:
        sites(dense, plan)
    saved = _need(state, "monitor", lambda m: (isinstance(m, dict)) if monitor is not None else True)
    if monitor is not None:
        monitor.check_state(saved)
    if version == 1:
        return plan, []
    if _need(state, "policy", lambda p: isinstance(p, str)) != described(policy):
        raise CheckpointError(
            f"a run resumes with the policy it was started with; this one has {described(policy):.300}, the saved one {state['policy']:.300}. "
            "Pass the same, or start afresh."
        )
    _need(state, "notes", lambda n: isinstance(n, list) and all(isinstance(note, str) for note in n))
    _need(state, "seconds", lambda s: _are_numbers(s, ("monitor", "profile", "switch")))
    _need(
        state,
        "step_ms",
        lambda s: (
            isinstance(s, dict)
            and set(s) <= {FULL, LOW}
            and all(isinstance(t, list) and all(map(_is_number, t)) for t in s.values())
        ),
    )
    if "spectra" in state:  # earlier states have none
        _need(state, "spectra", lambda s: isinstance(s, dict) and all(map(_is_spectrum, s.values())))
    if "ready_since" in state:
        _need(state, "ready_since", lambda n: n is None or _is_count(n))
    _need(state, "profiles", lambda p: isinstance(p, list) and all(map(_is_profile, p)))
    return plan, [StackProfile(**_tupled(profile)) for profile in state["profiles"]]


def described(thing: object) -> str:
    """Its `repr` without addresses, which are others in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))


def _need(state: dict[str, Any], name: str, holds: Callable[[Any], bool]) -> Any:
    if name not in state or not holds(state[name]):
        found = f"{state[name]!r:.100}" if name in state else "nothing"
        raise CheckpointError(
            f"session state must be what state_dict() returned; its entry {name!r} is damaged: {found}. Load another copy, or start afresh."
        )
    return state[name]


def _pairs(plan: Plan) -> list[tuple[str, int, str, bool]]:
    return [(d.name, d.rank, d.form, d.extra_bn) for d in plan.layers if d.rank is not None]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_numbers(value: Any, names: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and set(value) == set(names) and all(map(_is_number, value.values()))


def _is_profile(value: Any) -> bool:
    lately = {f.name: f.default for f in fields(StackProfile) if f.default is not MISSING}  # earlier versions had none
    if not isinstance(value, dict) or set(value := lately | value) != {f.name for f in fields(StackProfile)}:
        return False
    shapes = all(isinstance(value[n], list) and all(map(_is_count, value[n])) for n in ("weight_shape", "input_shape"))
    names = isinstance(value["names"], list) and all(isinstance(n, str) for n in value["names"])
    words = isinstance(value["kind"], str) and isinstance(value["how"], str)
    numbers = value.keys() - {"names", "kind", "weight_shape", "input_shape", "how"}
    return shapes and names and words and all(_is_number(value[n]) and (value[n] > 0 or n == "spread") for n in numbers)


def _is_spectrum(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"of", "rank", "full_rank", "ranks", "left_out"}
        and value["of"] in ("outputs", "weight")
        and all(_is_count(value[n]) for n in ("rank", "full_rank"))
        and all(isinstance(value[n], list) and all(map(_is_number, value[n])) for n in ("ranks", "left_out"))
        and len(value["ranks"]) == len(value["left_out"])
    )


def _listed(profile: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in profile.items()}


def _tupled(profile: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in profile.items()}
