"""The gradients of the step in which the switch happens: they are there after it, as those of the factors."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import weight_norm

import fxrank
from tests.support.exact import full, randn
from tests.switch.test_moments import EVERY, built

TOKENS = torch.randint(6, (3, 5))


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return x @ self.w


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.lstm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        return self.lstm(self.attention(x, x, x, need_weights=False)[0])[0]


def tied():
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 6, bias=False))
    model[1].weight = model[0].weight
    return model


KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), randn(5, 6)),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 4, 3)), randn(2, 4, 7, 7)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2)), randn(2, 4, 5, 5)),
    "channels last": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last),
        randn(2, 4, 7, 7),
    ),
    "table": (lambda: nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 4)), TOKENS),
    "sparse table": (lambda: nn.Sequential(nn.Embedding(6, 8, sparse=True)), TOKENS),
    "tied": (tied, TOKENS),
    "product": (lambda: nn.Sequential(Product()), randn(5, 6)),
    "sequence": (Sequence, randn(2, 3, 8)),
}


def loss(model, x):
    return (model(x) ** 2).mean()


def attached(model, x, optimizer):
    return fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=9, policy="full-rank")


def gradients(model):
    return {n: None if p.grad is None else p.grad.to_dense().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", KINDS)
def test_at_full_rank_they_are_those_that_a_backward_pass_would_give(name):
    torch.manual_seed(0)
    make, x = KINDS[name]
    model = make().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = attached(model, x, optimizer)
    plan = fxrank.plan_of(full(model, x))
    loss(model, x).backward()
    session.install(plan)
    found = gradients(model)
    assert plan.R and None not in found.values()
    for parameter in model.parameters():
        assert parameter.grad.stride() == parameter.stride()
    model.zero_grad()
    loss(model, x).backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)  # float64, through a split


def switching(name, **options):
    torch.manual_seed(0)
    sizes = ((6, 16), (16, 12), (12, 4))
    parts = [nn.Linear(*size, bias=name != "Muon") for size in sizes]  # which takes matrices only
    model = nn.Sequential(parts[0], nn.Tanh(), parts[1], nn.Tanh(), parts[2]).double()
    x = randn(5, 6)
    optimizer = built(name, model.parameters())
    policy = fxrank.Pufferfish(E=2, ratio=0.25, **options)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=4, steps_per_epoch=1, policy=policy
    )
    return model, x, optimizer, session


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("clipped", [False, True])
def test_after_every_step_of_every_optimizer(name, clipped):
    model, x, optimizer, session = switching(name)
    for step in range(4):
        optimizer.zero_grad()
        loss(model, x).backward()
        if clipped:
            clip_grad_norm_(list(model.parameters()), 1e-3)
        dense = model[2].weight.grad.clone() if session.phase == "full-rank" else None
        optimizer.step()
        assert all(p.grad is not None for p in model.parameters())
        if step == 1:
            pair = model[2]
            torch.testing.assert_close(pair.u.weight.grad, pair.v.weight.detach().T @ dense, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(pair.v.weight.grad, dense @ pair.u.weight.detach().T, rtol=1e-12, atol=1e-15)
    assert session.phase == "low-rank"


def test_what_is_accumulated_without_zero_grad_goes_on():
    model, x, optimizer, session = switching("SGD")
    for _ in range(2):
        loss(model, x).backward()
        optimizer.step()
    assert session.phase == "low-rank"
    before, fresh = gradients(model), copy.deepcopy(model)
    fresh.zero_grad()
    loss(fresh, x).backward()
    loss(model, x).backward()
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, before[key] + gradients(fresh)[key], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_clears_them(to_none):
    model, x, optimizer, session = switching("AdamW")
    for _ in range(2):
        loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    assert session.phase == "low-rank"
    for parameter in model.parameters():
        assert parameter.grad is None if to_none else not parameter.grad.any()


@pytest.mark.parametrize("to_none", [True, False])
def test_factors_that_get_none_in_the_next_step_are_noticed_as_before(to_none):
    model, x, optimizer, session = switching("SGD")
    for _ in range(2):
        loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
    assert session.phase == "low-rank"
    with pytest.warns(UserWarning, match="none of them has any"):
        optimizer.step()


def test_what_nobody_knows_is_zero():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), weight_norm(nn.Conv2d(8, 8, 1)), nn.Flatten()
    )
    model.append(nn.Linear(8 * 36, 4))
    x = torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = attached(model, x, optimizer)
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=2, extra_bn=True))
    assert {"1", "2"} <= plan.R.keys()
    loss(model, x).backward()
    session.install(plan)
    assert all(p.grad is not None for p in model.parameters())
    assert not any(p.grad.any() for p in (*model[1].norm.parameters(), model[2].u.weight, model[2].v.weight))
    assert model[1].u.weight.grad.any() and model[2].v.bias.grad.any()


def test_a_frozen_weight_and_one_without_a_gradient_get_none():
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    x = torch.randn(5, 6)
    model[1].weight.requires_grad = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = attached(model, x, optimizer)
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=2, include="*"))
    loss(model[:2], x).backward()
    session.install(plan)
    assert model[0].u.weight.grad is not None
    for index in (1, 2):
        assert model[index].u.weight.grad is None and model[index].v.weight.grad is None


def test_factors_without_numbers_get_none():
    model, x, optimizer, session = switching("SGD")
    state = None
    for _ in range(3):
        loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = session.state_dict()
    again, x, _, fresh = switching("SGD")
    loss(again, x).backward()
    fresh.load_state_dict(state)
    assert fresh.phase == "low-rank"
    assert again[2].u.weight.grad is None and again[2].v.weight.grad is None
