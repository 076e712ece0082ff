"""What shares a model's layers and weights outside of the model: second networks, loss modules, globals."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.pairs.base import FactorPair

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
OUTSIDE = {}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class InAGlobal(Net):
    def forward(self, x):
        return self.c(torch.tanh(OUTSIDE["b"](torch.tanh(self.a(x)))))


def in_a_class(model):
    layer = model.b

    class InAClass(Net):
        held = (layer,)

        def forward(self, x):
            return self.c(torch.tanh(layer(torch.tanh(self.held[0](torch.tanh(self.a(x)))))))

    model.__class__ = InAClass


def in_a_global(model):
    OUTSIDE["b"] = model.b
    model.__class__ = InAGlobal


def attached(model, optimizer=None, E=0.0, steps=9):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    policy = fxrank.Pufferfish(E=E, K=0, ratio=0.25)
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=X, total_steps=steps, policy=policy)
    return session, optimizer


def gradients(pair):
    assert isinstance(pair, FactorPair)
    return [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in (pair.u.weight, pair.v.weight, pair.bias)]


@pytest.mark.parametrize("hold", [in_a_class, in_a_global])
def test_what_only_classes_and_globals_hold_is_the_pair_too(hold):
    model = Net()
    hold(model)
    session, _ = attached(model)
    assert list(session.plan.R) == ["b"]
    model(X).square().sum().backward()
    assert all(gradients(model.b))
    OUTSIDE.clear()


class Decorrelation(nn.Module):
    """A loss with a weight of its own, which looks at a layer of the model."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.ones(()))

    def forward(self, out):
        return self.scale * self.layer.weight.square().sum() + self.layer(out.new_ones(1, 32)).square().sum()


@pytest.mark.parametrize("plain", [False, True])
def test_a_loss_that_looks_at_a_layer_trains_its_pair(plain):
    model = Net()
    loss = Decorrelation(model.b)
    if plain:  # a function in a user's script
        layer = model.b
        call = lambda out: layer.weight.square().sum()  # noqa: E731
    else:
        call = loss
    optimizer = torch.optim.SGD([*model.parameters(), loss.scale], lr=0.01)
    session, _ = attached(model, optimizer, E=1 / 9 * 2)
    for _ in range(4):
        optimizer.zero_grad()
        call(model(X)).backward()
        optimizer.step()
    assert session.phase == "low-rank" and loss.layer is model.b
    assert gradients(model.b)[:2] == [True, True]
    dense = model.b.v.weight @ model.b.u.weight
    torch.testing.assert_close(model.b.weight.square().sum(), dense.square().sum(), rtol=1e-4, atol=0)


def test_a_second_network_with_the_layer_trains_its_pair():
    model, second = Net(), Net()
    second.b = model.b
    optimizer = torch.optim.SGD([*model.parameters(), *second.a.parameters(), *second.c.parameters()], lr=0.01)
    attached(model, optimizer)
    second(X).square().sum().backward()
    assert all(gradients(model.b)) and second.b is model.b
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in [*model.parameters(), *second.parameters()]} == held


def test_a_weight_of_another_module_stays_dense():
    model = Net()
    model.d = nn.Linear(32, 32)
    model.forward = lambda x: model.c(model.d(model.b(model.a(x))))
    decoder = nn.Linear(32, 32)
    decoder.weight = model.b.weight
    session, _ = attached(model, torch.optim.SGD([*model.parameters(), decoder.bias], lr=0.01))
    assert list(session.plan.R) == ["d"]
    reason = "its weight is also 'weight' of a Linear outside of the model, which would keep the dense one"
    assert session.plan.layer("b").reason == reason
    del decoder
    session.detach()
    fresh = Net()
    assert list(attached(fresh)[0].plan.R) == ["b"]


class ReadsAGlobal(Net):
    def forward(self, x):
        return self.c(torch.tanh(F.linear(torch.tanh(self.a(x)), OUTSIDE["w"], self.b.bias)))


class ReadsParameters(Net):
    def forward(self, x):
        return super().forward(x) + 1e-3 * sum(p.square().sum() for p in self.b.parameters())


@pytest.mark.parametrize("kind", [ReadsAGlobal, ReadsParameters])
def test_a_weight_that_is_read_past_its_layer_stays_dense(kind):
    model = kind()
    model.d = nn.Linear(4, 4)
    OUTSIDE["w"] = model.b.weight
    with pytest.warns(fxrank.NothingFactorizedWarning, match=re.escape("where no pair can take its place")):
        attached(model)
    OUTSIDE.clear()


def test_a_replaced_weight_that_still_gets_gradients_is_named():
    model = Net()
    session, optimizer = attached(model, E=2 / 9)
    held = model.b.weight

    def step():
        optimizer.zero_grad()
        (model(X).square().sum() + held.square().sum()).backward()
        optimizer.step()

    for _ in range(2):
        step()
    assert session.phase == "low-rank"
    with pytest.warns(UserWarning, match="a weight must not be used after the switch has replaced it; b got gradients"):
        step()
