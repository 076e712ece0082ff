"""Loops that turn parameters off for a moment and on again by heart: Lightning's `toggle_optimizer`, alternating players, freezers."""

from contextlib import contextmanager

import pytest
import torch
from nets import SOON, mlp
from torch import nn

import fxrank


class Players(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = mlp(0), nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 1))

    def forward(self, x):
        return self.two(self.one(x))


@contextmanager
def toggled(optimizer, optimizers):
    """As Lightning does it: all off but this one's, and on again those that are remembered."""
    remembered = {p: p.requires_grad for o in optimizers for g in o.param_groups for p in g["params"]}
    own = {p for g in optimizer.param_groups for p in g["params"]}
    for parameter, on in remembered.items():
        parameter.requires_grad_(on and parameter in own)
    yield
    for o in optimizers:
        for parameter in (p for g in o.param_groups for p in g["params"] if p in remembered):
            parameter.requires_grad_(remembered[parameter])


def run(model, optimizers, steps=8, every=1, after=lambda step: None, policy=SOON):
    """The second player steps each time, the first one every so often."""
    x = torch.randn(8, 12)
    session = fxrank.LowRankSession.attach(model, optimizers, example_inputs=x, total_steps=steps, policy=policy)
    for step in range(steps):
        for number, optimizer in enumerate(optimizers):
            if number or step % every == 0:
                with toggled(optimizer, optimizers):
                    optimizer.zero_grad()
                    model(x).square().mean().backward()
                    optimizer.step()
        after(step)
    return session


def two(model):
    return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (model.one, model.two)]


@pytest.mark.parametrize("every", [1, 3], ids=["in-turn", "one-of-three"])
def test_what_is_off_for_a_moment_at_the_switch_goes_on_training(every):
    model = Players()
    values = {}

    def after(step):
        values[step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    session = run(model, two(model), 9, every, after)
    assert {"one.2", "one.4", "two.2"} < set(session.plan.R) and not session.notes
    assert all(p.requires_grad for p in model.parameters())
    switched = session.plan.switch_step
    for name, before in values[switched - 1].items():
        assert not torch.equal(before, values[8][name]), name


def test_what_a_user_has_frozen_stays_frozen_and_is_named():
    model = Players()
    model.one[2].weight.requires_grad_(False)

    def freeze_later(step):
        if step == 1:
            model.two[2].weight.requires_grad_(False)

    session = run(model, two(model), after=freeze_later)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"one.2.u.weight", "one.2.v.weight", "two.2.u.weight", "two.2.v.weight"}
    assert session.notes == ["one.2, two.2: frozen when the switch was made, and so are the factors"]


def test_the_momentary_state_of_what_stays_is_as_before():
    model = Players()
    optimizers = two(model)
    seen = {}

    def listener(event, session):
        seen[event] = {name: p.requires_grad for name, p in model.named_parameters()}

    x = torch.randn(8, 12)
    fxrank.LowRankSession.attach(model, optimizers, example_inputs=x, total_steps=4, policy=SOON, listener=listener)
    for _ in range(4):
        for optimizer in optimizers:
            with toggled(optimizer, optimizers):
                model(x).square().mean().backward()
                optimizer.step()
    before, after = seen["before_switch"], seen["after_switch"]
    stayed = before.keys() & after.keys()
    assert not before["one.0.weight"] and {n: before[n] for n in stayed} == {n: after[n] for n in stayed}
    assert all(p.grad is not None for p in model.parameters())


def test_options_that_freeze_come_after_it():
    model = Players()
    policy = fxrank.Cuttlefish(
        speedup_threshold=None, rank_metric="ratio", latest=0.5, epsilon=1e-9, freeze=("one.2.weight",)
    )
    session = run(model, two(model), policy=policy)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"one.2.u.weight", "one.2.v.weight"}
    assert [note for note in session.notes if "frozen when" in note] == []


def test_no_dense_weight_is_held_by_what_is_remembered():
    model = Players()
    session = run(model, two(model))
    assert session._hooks.trained == {}
    other = Players()
    session = fxrank.LowRankSession.attach(other, two(other), example_inputs=torch.randn(8, 12), total_steps=9)
    for optimizer in session.optimizers:
        optimizer.step()
    session.detach()
    assert session._hooks.trained == {}
