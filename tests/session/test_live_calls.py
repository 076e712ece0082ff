"""From which calls of a model the factors at a switch know the data."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from live import DATA, X, Y, attached, run
from nets import SixLayers, batches, mlp, train, vectors

import fxrank
from fxrank.session import live_data
from fxrank.session.live_data import CALLS


def calls_of(session):
    return session._calls._kept


def test_calls_in_evaluation_or_without_gradients_do_not_count():
    model = mlp()
    _, session = attached(model)
    model.eval()(X)
    model.train()
    with torch.no_grad():
        model(X)
    assert not calls_of(session)
    model(X)
    assert len(calls_of(session)) == 1


def test_all_calls_of_one_step_count_and_no_others():
    model = mlp()
    optimizer, session = attached(model)
    for _ in range(3):
        optimizer.zero_grad()
        for x, y in batches(4):
            (F.cross_entropy(model(x), y) / 4).backward()
        optimizer.step()
    assert session.plan.calibration_batches == 4
    model = mlp()
    _, session = attached(model)
    for x, _ in batches(CALLS + 2):
        model(x)
    assert len(calls_of(session)) == CALLS


def test_a_checkpoint_within_a_step_parts_its_calls():
    model = mlp()
    _, session = attached(model)
    model(X)
    session.pause()  # who goes on from here has not made the call
    model(X + 1)
    (kept,) = calls_of(session)
    assert torch.equal(kept.call[0][0], X + 1)


@pytest.mark.parametrize(("total_steps", "steps"), [(39, 1), (119, 2), (640, 16), (10**6, 16)])
def test_the_last_steps_of_a_long_run_count(total_steps, steps):
    model = mlp()
    _, session = attached(model, total_steps=total_steps)
    for step in range(20):
        model(X + step)
        model(X - step)
        session._calls.step_made()
    kept = [int(k.call[0][0][0, 0] - X[0, 0] + 0.5) for k in calls_of(session)]
    assert len(kept) == min(CALLS, 2 * steps) and kept[-2] == 19
    assert session._calls.steps == steps


def test_arguments_take_little_memory_but_all_of_the_last_step_are_there(monkeypatch):
    monkeypatch.setattr(live_data, "KEPT_BYTES", 3 * X.nbytes)
    model = mlp()
    _, session = attached(model, total_steps=10**6)
    for step in range(5):
        model(X + step)
        session._calls.step_made()
    assert len(calls_of(session)) == 3
    for _ in range(5):
        model(X)
    assert len(calls_of(session)) == 5


def test_what_was_written_into_is_left_out():
    def plan_of_step(spoil):
        model = mlp()
        optimizer, session = attached(model, x=X + 1)
        train(model, optimizer, 2, (X, Y))
        x = X.clone()
        for batch in (x, X):
            F.cross_entropy(model(batch), Y).backward()
        if spoil:
            x.zero_()
        optimizer.step()
        return session.plan

    assert plan_of_step(False).calibration_batches == 2
    assert plan_of_step(True).calibration_batches == 1


def test_without_a_call_the_example_stands_in():
    at_once = fxrank.SpectralInit(K=0, factors="data")
    _, session, _ = run(at_once, steps=0)
    assert session.plan.switch_step == 0 and session.plan.calibration_batches == 1
    assert all(d.output_error is not None for d in session.plan.layers if d.factorized)


@pytest.mark.parametrize("end", ["switch", "detach"])
def test_nothing_is_left_on_the_model(end):
    model = mlp()
    optimizer, session = attached(model)
    assert len(model._forward_pre_hooks) == 1
    train(model, optimizer, 3 if end == "switch" else 1, (X, Y))
    if end == "detach":
        session.detach()
    assert not model._forward_pre_hooks and not calls_of(session)
    assert not run(replace(DATA, factors="weight"), steps=1)[0]._forward_pre_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "stored"])
def test_a_copy_of_the_model_keeps_no_calls(copied):
    model = mlp()
    _, session = attached(model)
    model(X)
    twin = copied(model)
    twin(X)
    (hook,) = twin._forward_pre_hooks.values()
    assert not hook._kept
    assert len(calls_of(session)) == 1


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_a_model_that_is_compiled_whole(how):
    torch._dynamo.reset()
    model = mlp()
    called = torch.compile(model, backend="eager", fullgraph=True) if how == "wrapper" else model
    if how == "in place":
        model.compile(backend="eager", fullgraph=True)
    optimizer, session = attached(model)
    torch._dynamo.utils.counters.clear()
    for seed in range(3):
        x, y = vectors(64, seed)
        optimizer.zero_grad()
        F.cross_entropy(called(x), y).backward()
        if seed < 2:
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        optimizer.step()
    assert session.plan.calibration_batches == 1
    eager = mlp()
    other, eager_session = attached(eager)
    for seed in range(3):
        train(eager, other, 1, vectors(64, seed))
    assert [d.output_error for d in session.plan.layers] == [d.output_error for d in eager_session.plan.layers]


def test_calls_under_autocast_are_made_again_under_it():
    model = mlp()
    optimizer, session = attached(model)
    train(model, optimizer, 2, (X, Y))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(X.bfloat16()), Y)  # which fails without autocast
    loss.backward()
    optimizer.step()
    assert session.plan.calibration_batches == 1
    assert not torch.is_autocast_enabled("cpu")


def test_numbers_that_are_not_finite_leave_the_factors_of_the_weights():
    def switched(policy):
        model = mlp()
        optimizer, session = attached(model, policy)
        train(model, optimizer, 2, (X, Y))
        F.cross_entropy(model(X), Y).backward()
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.full_like(X, torch.inf))
        optimizer.step()
        assert not torch.is_autocast_enabled("cpu")
        return model, session

    model, session = switched(DATA)
    plain, _ = switched(replace(DATA, factors="weight"))
    assert session.plan.calibration_batches is None
    (note,) = session.notes
    assert note.startswith("factors were made of the weights alone: activations must be finite to calibrate on")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_many_rounds_make_the_same_factors(monkeypatch):
    model, session, _ = run(make=SixLayers)
    monkeypatch.setattr("fxrank.session.live_data.ROUND_BYTES", 1)
    again, other, _ = run(make=SixLayers)
    assert session.plan == other.plan and len(session.plan.R) > 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
