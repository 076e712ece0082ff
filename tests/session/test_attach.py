"""What is examined before a session hooks anything, and what a session is without its hooks."""

import dataclasses

import pytest
import torch
from nets import mlp, settings_of, sgd, snapshot, vectors

import fxrank
from fxrank.distributed.team import Team
from fxrank.policies.scene import Clock
from fxrank.session.attach import clock_of, examine
from fxrank.session.session import LowRankSession

X, Y = vectors()
PUFFERFISH = fxrank.Pufferfish(E=1, K=0, ratio=0.25)


def step(model, optimizer):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def test_nothing_is_hooked_or_changed_before_a_session_begins():
    model = mlp()
    optimizer = sgd(model)
    before, settings = snapshot(model), settings_of(optimizer)
    attached = examine(Team.of(model), optimizer, fxrank.Cuttlefish(speedup_threshold=None), clock_of(4, 1), X)
    assert [layer.name for layer in attached.scene.layers] == ["0", "2", "4", "6"]
    assert attached.scene.monitor.steps == [] and attached.scene.profiles == {}
    session = LowRankSession(attached)
    assert snapshot(model) == before and settings_of(optimizer) == settings
    session.begin()
    assert settings_of(optimizer)["hooks"] == (1, 1) and session.scene.monitor.steps == [0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        attached.policy = fxrank.FullRank()


def test_a_clock_counts_one_epoch_unless_told():
    assert clock_of(6, None) == Clock(0, 6, 6) and clock_of(6, 2) == Clock(0, 6, 2)
    with pytest.raises(ValueError, match="total_steps and steps_per_epoch must be at least 1; got 6 and 0"):
        clock_of(6, 0)


def test_the_phase_follows_from_the_plan():
    model = mlp()
    optimizer = sgd(model)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=4, steps_per_epoch=2, policy=PUFFERFISH
    )
    phases = []
    for _ in range(4):
        phases.append((session.phase, session.plan is not None))
        step(model, optimizer)
    assert phases == [("full-rank", False)] * 2 + [("low-rank", True)] * 2
    with pytest.raises(AttributeError):
        session.phase = "full-rank"


def test_a_plan_that_leaves_all_dense_is_no_low_rank_phase():
    model = mlp()
    session = fxrank.LowRankSession.attach(model, sgd(model), example_inputs=X, total_steps=4, policy="full-rank")
    assert session.finish().R == {} and session.phase == "full-rank"


def test_detached_it_watches_no_more_and_has_made_no_plan():
    model = mlp()
    optimizer = sgd(model)
    settings = settings_of(optimizer)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=4, steps_per_epoch=2, policy=PUFFERFISH
    )
    session.detach()
    session.detach()
    assert settings_of(optimizer) == settings
    for _ in range(3):
        step(model, optimizer)
    assert session.plan is None and session.clock.step == 0
