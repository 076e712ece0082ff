"""A weight that something else in the model holds as a tensor leaves its layer dense, with the reason."""

import copy
import functools
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.discovery.copies import without_followed
from fxrank.passes.discovery.discover import discover

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.other = nn.Linear(32, 32)

    def forward(self, x):
        return self.c(torch.tanh(self.other(torch.tanh(self.b(torch.tanh(self.a(x)))))))


class Reads(Net):
    """Multiplies with the weight that it holds aside."""

    def __init__(self):
        super().__init__()
        self.weights = [self.b.weight]

    def forward(self, x):
        return self.c(torch.tanh(self.other(torch.tanh(F.linear(torch.tanh(self.a(x)), self.weights[0])))))


def first_of_all(model):
    model.a.weight.requires_grad_(False)
    model.__dict__["first"] = next(p for p in model.parameters() if p.shape == (32, 32))


def closure(model):
    weight = model.b.weight
    model.penalty = lambda: weight.square().sum()


def module_aside(model):
    aside = nn.Linear(32, 32)
    aside.weight = model.b.weight
    model.aside = [aside]


HELD = {
    "list": lambda m: setattr(m, "weights", [m.b.weight]),
    "dict": lambda m: setattr(m, "weights", {"b": m.b.weight}),
    "key": lambda m: setattr(m, "scales", {m.b.weight: 2.0}),
    "nested": lambda m: setattr(m.c, "weights", ({"b": [m.b.weight]},)),
    "object": lambda m: setattr(m, "of", SimpleNamespace(weight=m.b.weight)),
    "next": first_of_all,
    "partial": lambda m: setattr(m, "penalty", functools.partial(torch.norm, m.b.weight)),
    "method": lambda m: setattr(m, "penalty", m.b.weight.norm),
    "closure": closure,
    "hook": lambda m: m.a.register_forward_hook(lambda *_, w=m.b.weight: None),
    "weak": lambda m: setattr(m, "weight", weakref.ref(m.b.weight)),
    "module aside": module_aside,
}


def layers_of(model):
    return {layer.name: layer for layer in discover(fxrank.trace(model, X), model)}


@pytest.mark.parametrize("how", HELD)
def test_a_weight_held_aside(how):
    model = Net()
    HELD[how](model)
    layer = layers_of(model)["b"]
    assert not layer.supported
    assert re.fullmatch(r"its weight is also held in '[\w.]+', where no pair can take its place", layer.reason)
    assert layers_of(model)["other"].reason is None
    assert list(fxrank.plan_of(fxrank.factorize(model, X, rank=0.25)).R) == ["other"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=4, policy=fxrank.SpectralInit()
    )
    assert "b" not in session.plan.R and session.plan.layer("b").reason == layer.reason


def test_a_weight_that_is_read_where_it_is_held_goes_on_training():
    model = Reads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=4, policy=fxrank.SpectralInit()
    )
    assert list(session.plan.R) == ["other"]
    before = model.b.weight.detach().clone()
    model(X).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.b.weight, before)


def whole(model):
    model.other.weight = nn.Parameter(model.b.weight.data)


def rows(model):
    model.part = nn.Linear(32, 8)
    model.part.weight = nn.Parameter(model.b.weight.data[:8])


def transposed(model):
    model.other.weight = nn.Parameter(model.b.weight.data.t())


def buffer(model):
    model.register_buffer("view", model.b.weight.data[4:6])


def attribute(model):
    model.view = [model.b.weight.detach()[:, 3]]


MEMORY = {f.__name__: f for f in (whole, rows, transposed, buffer, attribute)}


@pytest.mark.parametrize("how", MEMORY)
def test_two_tensors_on_one_memory_are_one_weight(how):
    model = Net()
    MEMORY[how](model)
    layers = layers_of(model)
    name = {"whole": "other.weight", "rows": "part.weight", "transposed": "other.weight"}.get(how, "view")
    assert layers["b"].reason == f"its weight is in one memory with {name!r}, which no pair can take the place of"
    assert not layers["b"].supported
    if how in ("whole", "transposed"):
        reason = "its weight is in one memory with 'b.weight', which no pair can take the place of"
        assert layers["other"].reason == reason
    else:
        assert layers["other"].reason is None


def test_neighbours_in_one_memory_are_two_weights():
    model = Net()
    flat = torch.randn(2 * 32 * 32)
    model.b.weight = nn.Parameter(flat[: 32 * 32].view(32, 32))
    model.other.weight = nn.Parameter(flat[32 * 32 :].view(32, 32))
    assert layers_of(model)["b"].reason is None and layers_of(model)["other"].reason is None


def test_what_is_nobody_elses_is_taken():
    """Ties by one parameter, recurrent layers that list their own weights, optimizers and copies of numbers."""
    model = Net()
    model.other.weight = model.b.weight
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.best = {"b": model.b.weight.detach().clone()}
    model.wrapped = functools.wraps(model.b)(lambda x: x)
    model.names = [name for name, _ in model.named_parameters()]
    assert layers_of(model)["b"].reason is None
    recurrent = nn.Sequential(nn.Linear(16, 16), nn.LSTM(16, 16))
    assert all(layer.reason is None for layer in layers_of(recurrent).values())


# -- copies that follow


class Momentum(nn.Module):
    """`online` is trained; `target` follows it."""

    def __init__(self, hold=setattr):
        super().__init__()
        torch.manual_seed(0)
        self.online = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))

    def update(self, by=0.1):
        with torch.no_grad():
            for p, t in zip(self.online.parameters(), self.target.parameters(), strict=True):
                t.lerp_(p, by)

    def forward(self, x):
        return self.head(self.online(x)) - self.target(x)[:, :4]


class UpdatesItself(Momentum):
    def forward(self, x):
        self.update()
        return super().forward(x)


class NeverCalled(Momentum):
    def forward(self, x):
        return self.head(self.online(x))


COPIES = [Momentum, UpdatesItself, NeverCalled]


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_part_that_follows_another_stays_dense_with_it(kind, frozen):
    model = kind()
    model.target.requires_grad_(not frozen)  # else it is only in no optimizer
    trained = [*model.online.parameters(), *model.head.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    for _ in range(3):
        model.update()
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    policy = fxrank.Pufferfish(E=0, K=0, ratio=0.25)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=4, policy=policy, include="*"
    )
    assert list(session.plan.R) == ["head.0", "head.2"]
    assert "'target.2.weight' is a copy of its weight in the model" in session.plan.layer("online.2").reason
    for _ in range(2):
        model.update()
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if frozen:
        assert list(fxrank.plan_of(fxrank.factorize(kind(), X, rank=0.25, include="*")).R) == ["head.0", "head.2"]


def test_frozen_layers_of_the_same_shape_are_no_copies():
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(6)])
    model[:3].requires_grad_(False)
    assert not any(layer.reason for layer in without_followed(layers_of(model).values(), model))
    model.requires_grad_(False)
    model[4] = copy.deepcopy(model[1])  # for inference only: nobody will average them
    assert not any(layer.reason for layer in without_followed(layers_of(model).values(), model))
    zero = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16).requires_grad_(False))
    for layer in zero:
        nn.init.zeros_(layer.weight)
    assert not any(layer.reason for layer in without_followed(layers_of(zero).values(), zero))


class Raw(nn.Module):
    """Raw parameters, one of which the forward finds in a list."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.u, self.v = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))
        self.weights = [self.u]

    def forward(self, x):
        return self.last(torch.tanh(torch.tanh(self.first(x)) @ self.weights[0]) @ self.v)


def test_raw_parameters_in_a_list():
    layers = layers_of(Raw())
    assert layers["v"].reason is None and "where no pair can take its place" in layers["u"].reason
