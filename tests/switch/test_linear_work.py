"""Twice the layers, twice the work: nothing walks the whole model for each of its layers."""

import sys
import warnings

import pytest
import torch
from torch import nn

import fxrank
from fxrank.passes.rewriting.install import pairs_in

X = torch.randn(2, 8)


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.w


class Asks(nn.Module):
    """Asks for data, so that its layer is in a region of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) if x.sum() > -1e9 else x


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x)


KINDS = [Linear, Raw, Asks]


def net(kind, count):
    model = nn.Sequential(*[kind() for _ in range(count)])
    everybody = list(model)
    for module in model:
        module.everybody = everybody  # gone through once, not once for each who holds it
    return model


def work(function):
    """How many functions are called, and what the function returns."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.setprofile(count)
        try:
            result = function()
        finally:
            sys.setprofile(before)
    return calls, result


def attached(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = fxrank.Pufferfish(E=0, ratio=0.25)
    return fxrank.LowRankSession.attach(model, optimizer, example_inputs=X, total_steps=2, policy=policy)


def check_linear(counts):
    """Of 8, 16 and 32 layers. What is done once for each pair of them would grow by four times as much at the second step."""
    first, second, third = counts
    assert third - second < 2.5 * (second - first), counts


@pytest.mark.parametrize("kind", KINDS)
def test_factorize_save_load_and_merge(kind, tmp_path):
    done = {name: [] for name in ("factorize", "save", "load", "merge")}
    for count in (2, 8, 16, 32):  # the first fills what is remembered for good
        calls, small = work(lambda: fxrank.factorize(net(kind, count), X, rank=2, include="*"))  # noqa: B023 (called here)
        done["factorize"].append(calls)
        done["save"].append(work(lambda: fxrank.save(small, tmp_path))[0])  # noqa: B023
        calls, loaded = work(lambda: fxrank.load(net(kind, count), tmp_path))  # noqa: B023
        done["load"].append(calls)
        calls, dense = work(lambda: fxrank.merge(small))  # noqa: B023
        done["merge"].append(calls)
        assert len(fxrank.plan_of(small).R) == count
        assert torch.equal(loaded(X), small(X))
        assert not pairs_in(dense) and dense[1].everybody[1] is dense[1]
    for counts in done.values():
        check_linear(counts[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_attach_and_the_switch(kind):
    counts = []
    for count in (3, 8, 16, 32):
        calls, session = work(lambda: attached(net(kind, count)))  # noqa: B023
        counts.append(calls)
        assert len(session.plan.R) == count - 2 and session.model[1].everybody[1] is session.model[1]
        session.detach()
    check_linear(counts[1:])
