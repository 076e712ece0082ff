"""A session's state: everything that later decisions depend on, and no damaged state half-loaded."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import SOON, UNTIMED, ConvNet, images, mlp, settings_of, snapshot, train, vectors

import fxrank

X, Y = vectors()
TIMED = fxrank.Cuttlefish(speedup_threshold=0.0, latest=None)


def attached(policy, make=mlp, seed=0, x=X, **options):
    model = make(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"total_steps": 30} | options
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, policy=policy, **options)
    return model, optimizer, session


@pytest.mark.parametrize("by_attach", [False, True])
@pytest.mark.parametrize("make", [mlp, ConvNet])
def test_the_rank_curves_go_on_to_the_last_bit(make, by_attach, tmp_path):
    batch = images() if make is ConvNet else vectors()
    policy = fxrank.Cuttlefish(speedup_threshold=None, latest=None, epsilon=1e-9, window=3)
    model, optimizer, session = attached(policy, make, x=batch[0])
    train(model, optimizer, 7, batch)
    saved = copy.deepcopy((session.state_dict(), model.state_dict(), optimizer.state_dict()))
    torch.save(saved[0], tmp_path / "session.pt")
    state = torch.load(tmp_path / "session.pt", weights_only=True)
    train(model, optimizer, 20, batch)
    options = {"state": state} if by_attach else {}
    again, other, resumed = attached(policy, make, 1, batch[0], **options)
    if not by_attach:
        resumed.load_state_dict(state)
    again.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    train(again, other, 20, batch)
    assert resumed.scene.monitor.curves == session.scene.monitor.curves
    assert resumed.scene.monitor.steps == list(range(28))
    assert resumed.scene.monitor.settled == session.scene.monitor.settled


def test_without_the_tracker_the_curves_would_differ():
    """What the state of version 1 left out matters."""
    model, optimizer, session = attached(UNTIMED, ConvNet, x=images()[0])
    train(model, optimizer, 7, images())
    saved = session.state_dict()
    del saved["monitor"]["tracker"]
    weights = copy.deepcopy(model.state_dict())
    momentum = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 5, images())
    again, other, resumed = attached(UNTIMED, ConvNet, 1, images()[0], state=saved)
    again.load_state_dict(weights)
    other.load_state_dict(momentum)
    train(again, other, 5, images())
    ours, theirs = (s.scene.monitor.curves for s in (resumed, session))
    assert ours != theirs
    for name, curve in theirs.items():  # as far apart as two estimates of one rank
        assert ours[name] == pytest.approx(curve, rel=1e-3)


def test_timings_notes_and_seconds_are_taken_over():
    model, optimizer, session = attached(TIMED)
    train(model, optimizer, 3)
    session.notes.append("a note")
    saved = session.state_dict()
    _, _, resumed = attached(TIMED, seed=1, state=saved)
    assert resumed.scene.profiles == session.scene.profiles
    assert resumed.seconds == session.seconds
    assert resumed.notes == ["a note"]
    assert resumed.step_ms == session.step_ms
    assert len(resumed.step_ms["full-rank"]) == 3
    assert resumed.state_dict()["profiles"] == saved["profiles"]


def test_a_policy_that_switches_at_once_keeps_the_plan_it_made():
    model, optimizer, session = attached(fxrank.SpectralInit())
    train(model, optimizer, 2)
    saved = session.state_dict()
    _, _, resumed = attached(fxrank.SpectralInit(), seed=1, state=saved)
    assert resumed.plan == session.plan
    _, _, loaded = attached(fxrank.SpectralInit(), seed=1)
    assert loaded.plan != session.plan  # of other weights
    loaded.load_state_dict(saved)
    assert loaded.plan == session.plan
    foreign = saved | {"plan": None}
    message = (
        "a session's state belongs into a session that has not switched yet; this one has made a plan of its own at"
    )
    with pytest.raises(fxrank.CheckpointError, match=re.escape(message)):
        loaded.load_state_dict(foreign)


def test_the_pause_for_a_state_is_not_part_of_a_step():
    model, optimizer, session = attached(UNTIMED)
    for _ in range(6):
        train(model, optimizer, 1)
        session.state_dict()
    train(model, optimizer, 3)
    session.pause()
    assert len(session.step_ms["full-rank"]) == 9


def test_a_state_of_version_1_is_read():
    model, optimizer, session = attached(SOON)
    train(model, optimizer, 20)
    state = session.state_dict()
    old = {name: state[name] for name in ("clock", "plan")} | {"version": 1}
    old["monitor"] = {name: state["monitor"][name] for name in ("steps", "curves", "settled")}
    again, _, resumed = attached(SOON, seed=1)
    resumed.load_state_dict(old)
    assert (resumed.plan, resumed.clock) == (session.plan, session.clock)
    assert fxrank.plan_of(again) == session.plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 40}, "this one has 40 (40 an epoch), the saved one 30 (30 an epoch). Pass the same, or start"),
        (
            {"steps_per_epoch": 10},
            "this one has 30 (10 an epoch), the saved one 30 (30 an epoch). Pass the same, or start",
        ),
    ],
)
def test_another_number_of_steps_is_refused(options, message):
    state = attached(UNTIMED)[2].state_dict()
    with pytest.raises(fxrank.CheckpointError, match=re.escape(message)):
        attached(UNTIMED, state=state, **options)


def test_another_policy_is_refused():
    state = attached(UNTIMED)[2].state_dict()
    model, optimizer, session = attached(TIMED)
    before, settings = snapshot(model), settings_of(optimizer)
    with pytest.raises(fxrank.CheckpointError, match="a run resumes with the policy it was started with; this one has"):
        session.load_state_dict(state)
    assert (snapshot(model), settings_of(optimizer)) == (before, settings)
    with pytest.raises(fxrank.CheckpointError, match="a run resumes with the policy it was started with; this one has"):
        fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=X, total_steps=30, policy=fxrank.FullRank(), state=state
        )
    assert (snapshot(model), settings_of(optimizer)) == (before, settings)


def places(tree, path=()):
    """Every place in a nest."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.just(torch.zeros(3)),
)


@pytest.fixture(scope="module")
def states():
    """Before a switch, with timings, and after one."""
    model, optimizer, timed = attached(TIMED)
    train(model, optimizer, 3)
    model, optimizer, switched = attached(SOON)
    train(model, optimizer, 20)
    return [(TIMED, timed.state_dict()), (SOON, switched.state_dict())]


@given(data=st.data())
def test_a_damaged_state_is_refused_whole(states, data):
    policy, state = copy.deepcopy(data.draw(st.sampled_from(states)))
    by_depth = {}
    for path in places(state):
        by_depth.setdefault(len(path), []).append(path)
    # Places high up as often as the many numbers far down.
    path = data.draw(st.sampled_from(by_depth[data.draw(st.sampled_from(sorted(by_depth)))]))
    inside = state
    for key in path[:-1]:
        inside = inside[key]
    if isinstance(inside, dict) and data.draw(st.booleans()):
        del inside[path[-1]]
    else:
        inside[path[-1]] = data.draw(JUNK)
    model, optimizer, session = attached(policy, seed=1)
    before, settings = snapshot(model), settings_of(optimizer)
    clock, curves = session.clock, copy.deepcopy(session.scene.monitor.curves)
    try:
        session.load_state_dict(state)
    except fxrank.FxrankError:
        assert (snapshot(model), settings_of(optimizer)) == (before, settings)
        assert (session.clock, session.scene.monitor.curves, session.plan) == (clock, curves, None)
    else:  # a number for a number, a text for a text: the session goes on
        optimizer.zero_grad()
        train(model, optimizer, 30 - session.clock.step)
