"""What a session was told and is not so is said without `finish()`: another optimizer that steps, more steps, fewer steps."""

import gc
import subprocess
import sys
import warnings

import pytest
import torch
from nets import SOON, mlp, train, vectors
from torch.optim.optimizer import _global_optimizer_post_hooks

import fxrank

X, Y = vectors()


def attach(model, optimizer, steps=20, **options):
    return fxrank.LowRankSession.attach(model, optimizer, example_inputs=X, total_steps=steps, policy=SOON, **options)


@pytest.fixture(autouse=True)
def no_hook_is_left():
    gc.collect()
    before = dict(_global_optimizer_post_hooks)
    yield
    gc.collect()
    assert dict(_global_optimizer_post_hooks) == before


@pytest.mark.parametrize("after_switch", [False, True])
def test_an_optimizer_that_was_built_anew_is_named(after_switch):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = attach(model, optimizer)
    train(model, optimizer, 12 if after_switch else 4, (X, Y))
    anew = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, anew, 1, (X, Y))
    with pytest.warns(
        UserWarning, match="the SGD that it was given does not step any more, and another one, Adam, with"
    ):
        train(model, anew, 1, (X, Y))
    train(model, anew, 3, (X, Y))  # said once
    assert (
        session.clock.step == (12 if after_switch else 4)
        and "Attach to the optimizer that you step" in session.notes[-1]
    )
    session.detach()


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another, under a name of its own."""

    def __init__(self, inner, name):
        setattr(self, name, inner)
        super().__init__([{"params": g["params"]} for g in inner.param_groups], {})
        self.inner_step = inner.step

    def step(self, closure=None):
        return self.inner_step(closure)


@pytest.mark.parametrize("name", ["optimizer", "original_optimizer"])
def test_wrappers_and_optimizers_of_other_parameters_are_no_others(name):
    model, other = mlp(), mlp(1)
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    outer = Lookahead(inner, name)
    session = attach(model, inner)
    for _ in range(6):
        train(model, outer, 1, (X, Y))
        train(other, torch.optim.SGD(other.parameters(), lr=0.05), 1, (X, Y))
    assert session.clock.step == 6 and not session.notes
    session.detach()


def test_what_is_compiled_meanwhile_has_nothing_of_it():
    model, other = mlp(), mlp(1)
    session = attach(model, torch.optim.SGD(model.parameters(), lr=0.05))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    other(X).sum().backward()
    before = [p.clone() for p in other.parameters()]
    torch.compile(optimizer.step, backend="eager")()
    for old, new in zip(before, other.parameters(), strict=True):
        torch.testing.assert_close(new, old - 0.05 * new.grad)  # with an `alpha`, which rounds once
    session.detach()


def test_a_training_that_is_longer_than_it_was_to_be_is_noticed():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = attach(model, optimizer)
    train(model, optimizer, 22, (X, Y))
    assert not session.notes
    with pytest.warns(UserWarning, match=r"this one goes on after 22, and was to have 20\. Count the steps"):
        train(model, optimizer, 1, (X, Y))
    train(model, optimizer, 20, (X, Y))
    assert len(session.notes) == 1
    session.detach()


SCRIPT = """
import torch, fxrank
from torch import nn
def main(steps, end):
    model, x = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))), torch.randn(8, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    policy = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", latest=0.5, epsilon=1e-9)
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=100, policy=policy)
    for _ in range(steps):
        optimizer.zero_grad(); model(x).square().mean().backward(); optimizer.step()
    if end: getattr(session, end)()
"""


@pytest.mark.parametrize(
    ("steps", "end", "said"), [(10, "", True), (10, "detach", False), (60, "", False), (0, "", False)]
)
def test_a_training_that_ends_early_is_said_at_the_end_of_the_process(steps, end, said):
    call = f"{SCRIPT}\nmain({steps}, {end!r})"
    result = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=120, check=True)
    assert ("this one ended after 10 steps, and was to have 100. The model is full-rank." in result.stderr) is said


def test_a_session_that_goes_away_takes_its_hook_along():
    model = mlp()
    attach(model, torch.optim.SGD(model.parameters(), lr=0.05))
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, torch.optim.Adam(model.parameters()), 4, (X, Y))
