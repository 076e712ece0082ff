"""What the switch replaces is freed at once: the tests here never run Python's cyclic collector, and it never runs by itself."""

import gc
import weakref

import pytest
import torch
from torch import nn

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.tracing import trace as tracing
from fxrank.passes.tracing.fake_values import Values

X = torch.randn(4, 16)
WIDE = 48


@pytest.fixture(autouse=True)
def no_collector():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, WIDE), nn.Linear(WIDE, 4)
        self.parts = nn.ModuleList([nn.Linear(WIDE, WIDE) for _ in range(4)])

    def body(self, x):
        for part in self.parts:
            x = torch.relu(part(x)) + x
        return x

    def forward(self, x):
        return self.last(self.body(self.first(x)))


class TwoModes(Plain):
    def body(self, x):
        return nn.functional.dropout(super().body(x), 0.1, self.training)


class AsksInside(Plain):
    """Has a part that cannot be traced, and layers in it."""

    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(WIDE, WIDE)

        def forward(self, x):
            return self.layer(x) if x.sum() > -1e9 else x

    def __init__(self):
        super().__init__()
        self.asking = self.Asking()

    def body(self, x):
        return self.asking(super().body(x))


class AsksItself(Plain):
    """Cannot be traced at all."""

    def body(self, x):
        return super().body(x) if x.sum() > -1e9 else x


class CountsCalls(Plain):
    """Gives another answer each time, so that the graph is given up after it was made."""

    def body(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().body(x) * self.calls


KINDS = [Plain, TwoModes, AsksInside, AsksItself, CountsCalls]


def dense_weights(model):
    return [weakref.ref(p) for p in model.parameters() if p.shape == (WIDE, WIDE)]


def alive(weights):
    return sum(w() is not None for w in weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_after_the_switch_no_dense_weight_is_alive(kind, optimizer_class):
    model = kind()
    weights = dense_weights(model)
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    policy = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", wait=False, latest=0.5)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=4, steps_per_epoch=1, policy=policy
    )
    for _ in range(4):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(session.plan.R) == len(weights) and session.phase == "low-rank"
    assert alive(weights) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_factorize_and_profile_keep_nothing_of_their_copies_and_graphs(kind):
    model = kind()
    before = sum(type(thing) is nn.Parameter and thing.shape == (WIDE, WIDE) for thing in gc.get_objects())
    small = fxrank.factorize(model, X, rank=0.25)
    assert fxrank.plan_of(small).R
    after = sum(type(thing) is nn.Parameter and thing.shape == (WIDE, WIDE) for thing in gc.get_objects())
    assert after == before
    weights = dense_weights(model)
    fxrank.profile(model, X)
    del model
    assert alive(weights) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_trace_is_gone_when_it_returns(kind, monkeypatch):
    made = []

    class Watched(Values):
        def __init__(self):
            super().__init__()
            made.append(weakref.ref(self))

    monkeypatch.setattr(tracing, "Values", Watched)
    model = kind()
    gm = fxrank.trace(model, X)
    assert made and not any(values() for values in made)
    discover(gm, model)
    weights = dense_weights(model)
    gm.let_go()
    del gm, model
    assert alive(weights) == 0


def test_a_graph_keeps_the_shapes_of_a_real_run_and_not_its_numbers():
    model = AsksInside()
    region = fxrank.trace(model, X).regions["asking.layer"]
    values = [node.meta["val"] for node in region.graph.nodes if "val" in node.meta]
    assert [tuple(v.shape) for v in values] == [(4, WIDE), (4, WIDE)]
    assert all(isinstance(v, torch._subclasses.fake_tensor.FakeTensor) and v.device == X.device for v in values)


def test_a_failed_trace_keeps_nothing_either():
    class Refuses(Plain):
        def body(self, x):
            raise ValueError("no")

    model = Refuses()
    weights = dense_weights(model)
    with pytest.raises(fxrank.TraceError, match="no"):
        fxrank.trace(model, X)
    del model
    assert alive(weights) == 0
