"""A switch right after a checkpoint waits for the calls that it would know without it, and so does a run that goes on from there."""

import copy

import pytest
import torch
from nets import attach, mlp, train, vectors

import fxrank

X = vectors()[0]
AFTER_HALF = fxrank.Cuttlefish(
    rank_metric="ratio", ratio=0.25, round_to=1, factors="data", speedup_threshold=None, epsilon=1e-9, latest=0.5
)
KNOWN = 4
"""Calls that factors are made of, of the last five steps of a run of 200. Ranks are looked at every third step of it."""


def attached(policy, seed=0, **options):
    model = mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, attach(model, optimizer, policy, X, **options)


def steps_with_states(session, model, optimizer, last, saves):
    """Train up to step `last`; a state is taken after each step in `saves`, and returned by its step."""
    states = {}
    while session.clock.step < last:
        train(model, optimizer, 1)
        if session.clock.step in saves:
            states[session.clock.step] = copy.deepcopy(
                [session.state_dict(), model.state_dict(), optimizer.state_dict()]
            )
    return states


@pytest.mark.parametrize(
    ("saves", "switch", "known"),
    [
        ((), 102, KNOWN),
        ((97,), 102, KNOWN),  # as many steps ago as are known
        ((98,), 105, KNOWN),
        ((101,), 108, KNOWN),
        ((101, 106), 108, 2),  # it waits no longer than it would after one
        (range(1, 200), 108, 1),
    ],
)
def test_it_waits_for_the_calls_that_it_would_know_without_the_checkpoint(saves, switch, known):
    model, optimizer, session = attached(AFTER_HALF, total_steps=200)
    states = steps_with_states(session, model, optimizer, 120, saves)
    assert session.scene.monitor.due(3) and not session.scene.monitor.due(4)
    assert (session.plan.switch_step, session.plan.calibration_batches) == (switch, known)
    for step, (state, weights, moments) in states.items():
        if step > switch or (len(states) > 2 and step not in (1, 99, 102, 103, 107)):
            continue
        again, other, resumed = attached(AFTER_HALF, seed=1, total_steps=200)
        for target, saved in ((resumed, state), (again, weights), (other, moments)):
            target.load_state_dict(saved)
        steps_with_states(resumed, again, other, 120, [s for s in saves if s > step])
        assert resumed.plan == session.plan
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_switch_at_a_given_step_does_not_wait():
    policy = fxrank.Pufferfish(E=100, K=0, ratio=0.25, factors="data")
    model, optimizer, session = attached(policy, total_steps=200, steps_per_epoch=1)
    steps_with_states(session, model, optimizer, 110, (98,))
    assert (session.plan.switch_step, session.plan.calibration_batches) == (100, 2)


def test_a_state_of_before_there_was_a_wait_is_read():
    _, _, session = attached(AFTER_HALF, total_steps=200)
    state = session.state_dict()
    assert state.pop("ready_since") is None
    _, _, again = attached(AFTER_HALF, total_steps=200)
    again.load_state_dict(state)
    with pytest.raises(fxrank.CheckpointError, match="'ready_since' is damaged"):
        again.load_state_dict(state | {"ready_since": -1})
