"""The comparison of a layer with its pair, before it is taken."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from exact import full, randn
from middle import WIDTH, around, decision
from torch import nn
from torch.nn.utils import parametrizations

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.pairs.convolution import LowRankConv2d
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.passes.pairs.registry import PAIRS


@pytest.fixture
def register():
    before = {cls: dict(there) for cls, there in PAIRS.items()}
    yield fxrank.register_pair
    PAIRS.clear()
    PAIRS.update(before)


def registered(of_output):
    """A class of a user's own that claims to be a Linear."""

    class Claimed(nn.Linear):
        def forward(self, x):
            return of_output(self, F.linear(x, self.weight, self.bias), x)

    return Claimed


CLAIMS = {
    "the same": (lambda m, out, x: out, None),
    "mode": (lambda m, out, x: 1.5 * out if m.training else out, r"its pair differs by 0\.\d in training mode"),
    "evaluation": (lambda m, out, x: out if m.training else out.relu(), "in evaluation mode"),
    "chance": (lambda m, out, x: out + torch.randn_like(out), "it computes more than its weight"),
    "input": (lambda m, out, x: out * x.mean(), "it computes more than its weight"),
    "input, by a millionth": (lambda m, out, x: out * (1 + 1e-6 * x.mean()), "it computes more than its weight"),
    "size": (lambda m, out, x: out / len(x), "it computes more than its weight"),
    "gradient": (lambda m, out, x: out.detach() + 0 * x.sum(), "it computes more than its weight"),
    "reversed": (lambda m, out, x: 2 * out.detach() - out, "it computes more than its weight"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_class_that_computes_something_else_than_its_pair_stays_dense(name, register):
    of_output, reason = CLAIMS[name]
    kind = registered(of_output)
    register(kind, LowRankLinear)
    model = around(kind(WIDTH, WIDTH))
    small = full(model, randn(3, WIDTH))
    found = decision(small)
    assert (found.rank == WIDTH) == (reason is None)
    if reason is not None:
        assert type(small[1]) is kind and re.search(reason, found.reason)


def test_each_kind_of_layer_is_compared_once_and_each_instance_that_differs_by_itself(register):
    calls = []

    class Scaled(nn.Linear):
        def __init__(self, scale):
            super().__init__(WIDTH, WIDTH)
            self.scale = scale

        def forward(self, x):
            calls.append(self.scale)
            return self.scale * F.linear(x, self.weight, self.bias)

    register(Scaled, LowRankLinear)
    model = nn.Sequential(*[Scaled(scale) for scale in (1, 1, 1, 2, 2)]).double()
    gm = fxrank.trace(model, randn(3, WIDTH))
    calls.clear()
    layers = {a.name: a.reason is None for a in discover(gm, model)}
    assert layers == {"0": True, "1": True, "2": True, "3": False, "4": False}
    assert calls.count(1) == 8  # two inputs in two modes, each tried and compared


def test_the_comparison_leaves_nothing_in_the_model(register):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(WIDTH, WIDTH)
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.calls, self.seen = 0, []
            self.generator = torch.Generator()

        def forward(self, x):
            self.calls += 1
            self.seen.append(len(x))
            self.mean += x.detach().mean(0)
            torch.randn(3, generator=self.generator)
            return F.linear(x, self.weight, self.bias)

    register(Counting, LowRankLinear)
    model = around(Counting())
    gm = fxrank.trace(model, randn(3, WIDTH))
    state, drawn, own = copy.deepcopy(model.state_dict()), torch.get_rng_state(), model[1].generator.get_state()
    modes = [m.training for m in model.modules()]
    assert {a.reason for a in discover(gm, model)} == {None}
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state()) and torch.equal(own, model[1].generator.get_state())
    assert (model[1].calls, model[1].seen, [m.training for m in model.modules()]) == (0, [], modes)
    assert all(p.grad is None for p in model.parameters())


def test_without_data_nothing_is_compared():
    with torch.device("meta"):
        normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), normed, nn.Linear(WIDTH, 4))
        small = fxrank.factorize(model, torch.randn(3, WIDTH), rank=2)
    assert isinstance(small[1], fxrank.FactorPair)


@pytest.mark.parametrize("needs", ["any size", "its size", "its size, and doubles"])
def test_inputs_are_small_unless_the_layer_needs_large_ones(needs, register):
    shapes = []

    class Sized(nn.Conv2d):
        def forward(self, x):
            assert needs == "any size" or x.shape[-1] == 40
            shapes.append(tuple(x.shape))
            return super().forward(x) * (2 if "doubles" in needs and self.training else 1)

    register(Sized, LowRankConv2d)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Sized(4, 4, 3, dilation=2), nn.Flatten(), nn.Linear(4 * 36 * 36, 2))
    gm = fxrank.trace(model, torch.randn(5, 3, 40, 40))
    shapes.clear()
    reasons = {a.name: a.reason for a in discover(gm, model)}
    assert set(shapes) == ({(2, 4, 12, 12), (3, 4, 12, 12)} if needs == "any size" else {(5, 4, 40, 40)})
    assert (reasons["1"] is None) == ("doubles" not in needs)
