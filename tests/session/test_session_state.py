"""A session's state: a stopped run goes on as if it had not been, and no damaged state is half-loaded."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import (
    HALFWAY,
    SOON,
    UNTIMED,
    ConvNet,
    Net,
    Tied,
    attach,
    clusters,
    images,
    mlp,
    settings_of,
    sgd,
    snapshot,
    train,
    vectors,
)

import fxrank
from fxrank.passes.spectra import tracked

X, Y = vectors()
TIMED = fxrank.Cuttlefish(speedup_threshold=0.0, latest=None)


def attached(policy, make=mlp, seed=0, x=X, **options):
    model = make(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, attach(model, optimizer, policy, x, **({"total_steps": 30} | options))


# -- stopped, saved, rebuilt, resumed


def stopped_and_resumed(make_optimizer, policy, stop, steps=12, make=mlp, batch=(X, Y), **options):
    """Final weights and plan of an uninterrupted run, and of one stopped, saved, rebuilt and resumed."""

    def fresh(seed):
        model = make(seed)
        optimizer = make_optimizer(model)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return model, optimizer, scheduler, attach(model, optimizer, policy, x=batch[0], total_steps=steps, **options)

    model, optimizer, scheduler, session = fresh(0)
    train(model, optimizer, stop, batch, scheduler)
    saved = copy.deepcopy([o.state_dict() for o in (session, model, optimizer, scheduler)])
    train(model, optimizer, steps - stop, batch, scheduler)
    again, *others, again_session = fresh(1)
    for target, state in zip((again_session, again, *others), saved, strict=True):
        target.load_state_dict(state)
    assert again_session.phase == ("low-rank" if saved[0]["plan"] else "full-rank")
    train(again, others[0], steps - stop, batch, others[1])
    return model, session, again, again_session


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "groups": lambda m: torch.optim.Adam(
        [
            {"params": [p for p in m.parameters() if p.ndim > 1]},
            {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.01,
        weight_decay=0.1,
    ),
}


@pytest.mark.parametrize("stop", [0, 5, 6, 7, 11])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_can_be_stopped_anywhere(optimizer, stop):
    model, session, again, again_session = stopped_and_resumed(OPTIMIZERS[optimizer], SOON, stop)
    assert session.finish().R == again_session.finish().R == {"2": 4, "4": 4}
    assert session.plan.switch_step == again_session.plan.switch_step == 6
    state, again_state = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[k], again_state[k]) for k in state)


@pytest.mark.parametrize("stop", [4, 9])
@pytest.mark.parametrize("make", [ConvNet, Tied])
def test_a_stopped_run_with_extra_bn_ramp_and_shared_weights(make, stop):
    policy = fxrank.Pufferfish(E=6, ratio=0.25, extra_bn=True, lr_scale=0.5, rewarmup=0.5)
    batch = images() if make is ConvNet else vectors()
    model, session, again, again_session = stopped_and_resumed(
        OPTIMIZERS["groups"], policy, stop, make=make, batch=batch, steps_per_epoch=1
    )
    assert session.finish() == again_session.finish()
    state, again_state = model.state_dict(), again.state_dict()
    assert all(torch.equal(state[k], again_state[k]) for k in state)


def test_the_state_survives_a_file(tmp_path):
    model = mlp()
    optimizer = sgd(model)
    session = attach(model, optimizer)
    train(model, optimizer, 7)
    torch.save(session.state_dict(), tmp_path / "session.pt")
    state = torch.load(tmp_path / "session.pt", weights_only=True)
    again = mlp(1)
    other = attach(again, sgd(again))
    other.load_state_dict(state)
    assert other.plan == session.plan
    assert other.clock == session.clock
    assert other.scene.monitor.curves == session.scene.monitor.curves
    assert fxrank.plan_of(again) == session.plan


@pytest.mark.parametrize("stop", [3, 9])
def test_state_dict_brings_a_fresh_session_to_the_same_point(stop, tmp_path):
    x, y = clusters()

    def steps(model, optimizer, first, last):
        for i in range(first, last):
            part = slice(8 * (i % 6), 8 * (i % 6) + 8)
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return (
            model,
            optimizer,
            fxrank.LowRankSession.attach(model, optimizer, example_inputs=x[:8], total_steps=12, policy=HALFWAY),
        )

    model, optimizer, session = fresh()
    steps(model, optimizer, 0, stop)
    torch.save(session.state_dict(), tmp_path / "session.pt")
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, stop, 12)
    again, again_optimizer, again_session = fresh()
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1)  # whatever it was: the checkpoint counts
    again_session.load_state_dict(torch.load(tmp_path / "session.pt", weights_only=True))
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    steps(again, again_optimizer, stop, 12)
    assert again_session.plan.R == session.plan.R
    assert again_session.clock == session.clock
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(fxrank.FxrankError, match="session state must have version 1 or 2; got 7"):
        again_session.load_state_dict({"version": 7})


# -- what the state holds


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


def test_without_the_tracker_the_curves_would_differ(monkeypatch):
    """What the state of version 1 left out matters."""
    monkeypatch.setattr(tracked, "NARROW", 0)
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


# -- what is refused


def test_a_state_of_another_model_is_refused_and_nothing_is_changed():
    model = ConvNet()
    session = attach(model, sgd(model), fxrank.SpectralInit(), x=images()[0])
    other = mlp()
    optimizer = sgd(other)
    fresh = attach(other, optimizer, fxrank.Pufferfish(E=1))
    before, settings = snapshot(other), settings_of(optimizer)
    with pytest.raises(
        fxrank.PlanMismatchError,
        match=re.escape("every layer of a plan must exist in the model; Sequential has no 'conv2'."),
    ):
        fresh.load_state_dict(session.state_dict())
    assert snapshot(other) == before
    assert settings_of(optimizer) == settings
    assert (fresh.phase, fresh.plan, fresh.clock.step) == ("full-rank", None, 0)
    tied = Tied()
    strange = attach(tied, sgd(tied)).state_dict()
    message = "saved rank histories must be of the layers of this model; '0' is only in one of them. Build the model that was saved."
    with pytest.raises(ValueError, match=re.escape(message)):
        attach(other, optimizer).load_state_dict(strange)
    with pytest.raises(
        fxrank.FxrankError, match=re.escape("session state must have version 1 or 2; got None. Install the fxrank")
    ):
        fresh.load_state_dict({})


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
