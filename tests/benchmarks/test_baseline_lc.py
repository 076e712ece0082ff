"""LC compression: the best rank by brute force, both steps, and pairs at the end."""

import pytest
import torch
from digit_tasks import ResDigits, digits, perceptron
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxrank
from benchmarks.baselines import lc
from benchmarks.baselines.base import CPU
from benchmarks.baselines.lc import LC, Coupled, best_rank
from benchmarks.real_runs import evaluate
from benchmarks.subjects.jobs import size

SIGMA = st.lists(st.floats(0, 3), min_size=1, max_size=8)
POSITIVE = st.floats(1e-3, 3)


@given(SIGMA, POSITIVE, POSITIVE, POSITIVE, POSITIVE)
def test_the_rank_is_the_best_of_all(values, rank_cost, dense_cost, price, mu):
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    totals = {r: price * r * rank_cost + mu / 2 * float((sigma[r:] ** 2).sum()) for r in range(1, len(sigma) + 1)}
    totals[None] = price * dense_cost
    found = best_rank(sigma, rank_cost, dense_cost, price, mu)
    assert totals[found] == pytest.approx(min(totals.values()), rel=1e-9)


@given(st.integers(0, 10**6), st.floats(0.01, 2), st.floats(0.1, 10))
def test_no_other_matrix_of_any_rank_does_better(seed, price, mu):
    """By the matrices themselves: Θ against truncations at every rank, and the layer as it is."""
    torch.manual_seed(seed)
    weight = nn.Parameter(torch.randn(4, 6) @ torch.diag(torch.logspace(0, -1.5, 6)))
    layer = Coupled("w", weight, 10 / 24, 1.0)
    layer.beta = 0.1 * torch.randn(4, 6)
    target = weight.detach() - layer.beta / mu
    layer.compress(price, mu)
    u, s, vh = torch.linalg.svd(target)

    def total(theta, cost):
        return price * cost + mu / 2 * float((target - theta).square().sum())

    mine = total(layer.theta, 1.0 if layer.rank is None else layer.rank * 10 / 24)
    others = [total((u[:, :r] * s[:r]) @ vh[:r], r * 10 / 24) for r in range(1, 5)] + [total(target, 1.0)]
    assert mine == pytest.approx(min(others), rel=1e-4, abs=1e-5)  # float32
    if layer.rank is not None:
        assert int(torch.linalg.matrix_rank(layer.theta, rtol=1e-4)) <= layer.rank < 24 / 10


def test_costs_decide_between_pairs_and_the_layer():
    sigma = torch.tensor([3.0, 2.0, 1.0, 0.5])
    assert best_rank(sigma, 0.5, 1.0, price=1e-9, mu=1.0) is None  # parameters cost nothing
    assert best_rank(sigma, 0.5, 1.0, price=1e9, mu=1.0) == 1
    assert best_rank(sigma, 0.25, 1.0, price=1.0, mu=1.0) == 3  # 3 · 0.25 + 0.125 < 1
    assert best_rank(torch.zeros(4), 0.25, 1.0, price=1.0, mu=1.0) == 1


def coupled(shape=(4, 6)):
    torch.manual_seed(0)
    layer = Coupled("w", nn.Parameter(torch.randn(shape)), 0.4, 1.0)
    layer.theta, layer.beta = torch.randn(4, layer.matrix.shape[1]), torch.randn(4, layer.matrix.shape[1])
    return layer


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 2, 2)])
def test_the_penalty_has_its_gradient(shape):
    layer, mu = coupled(shape), 0.7
    weight = layer.weight.detach().clone().requires_grad_()
    (mu / 2 * (weight.flatten(1) - layer.theta - layer.beta / mu).square().sum()).backward()
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.push(mu)
    torch.testing.assert_close(layer.weight.grad, 1 + weight.grad)


def test_multipliers_take_up_the_difference():
    layer, mu = coupled(), 0.5
    beta = layer.beta.clone()
    layer.compress(20.0, mu)
    assert layer.rank == 1  # 0.4 of the layer's cost
    torch.testing.assert_close(layer.beta, beta - mu * (layer.matrix - layer.theta))
    assert layer.gap == pytest.approx(float((layer.matrix - layer.theta).norm() / layer.matrix.norm()))
    layer.compress(0.0, mu)  # dense: Θ is what the weight should be, and nothing pushes any more
    assert layer.rank is None
    torch.testing.assert_close(layer.beta, torch.zeros(4, 6), atol=1e-6, rtol=0)


def test_at_the_end_there_are_pairs_of_the_learned_ranks(monkeypatch):
    steps = []
    step = Coupled.compress

    def recorded(self, price, mu):
        step(self, price, mu)
        steps.append((self.name, mu, self.theta))

    monkeypatch.setattr(Coupled, "compress", recorded)
    dense = []
    factorize = lc.fxrank.factorize

    def seen(model, example, rank, **options):
        dense.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return factorize(model, example, rank, **options)

    monkeypatch.setattr(lc.fxrank, "factorize", seen)
    task = digits(lambda: perceptron(32), images=1024)
    method = LC(price=1.0, mu=1e-2, growth=2.2, rounds=12, length=2.0, exclude=("5",))
    found = method(task, 3, 0)
    assert found.facts["ranks"].keys() == {"3"}  # the first layer of the graph stays dense
    rank = found.facts["ranks"]["3"]
    pair = found.model.get_submodule("3")
    assert isinstance(pair, fxrank.FactorPair) and pair.rank == rank
    assert found.remaining == size(found.model) == found.dense_parameters - 32 * 32 + 64 * rank
    assert [mu for _, mu, _ in steps[1:]] == [pytest.approx(1e-2 * 2.2**i) for i in range(12)]
    weight = dense[-1]["3.weight"]
    assert torch.equal(weight, steps[-1][2])  # Θ takes the weight's place
    torch.testing.assert_close(pair.v.weight @ pair.u.weight, weight, rtol=1e-4, atol=1e-5)
    gaps = [r["gap"] for r in found.facts["rounds"]]
    assert gaps[-1] < 0.05 < gaps[0]
    assert found.facts["rounds"][-1]["share"] == pytest.approx(64 * rank / 1024)
    assert evaluate(found.model, task.loaders(0)[1], CPU)[1] > 0.8


def test_a_higher_price_leaves_fewer_parameters():
    task = digits(lambda: perceptron(32), images=512)
    shares = [LC(price=price, growth=3.0, rounds=10)(task, 3, 0).share for price in (1e-6, 3.0, 30.0)]
    assert shares[0] == 1.0
    assert shares[0] > shares[1] > shares[2]


def test_convolutions_are_layers_and_others_are_not():
    task = digits()
    model = task.build(0)
    layers = LC(exclude=("*shortcut*",)).coupled(model, next(iter(task.loaders(0)[0]))[0])
    assert [a.name for a in layers] == [f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2)]
    assert sum(a.dense_cost for a in layers) == pytest.approx(1)
    first = layers[0]
    assert first.matrix.shape == (8, 72)
    assert first.rank_cost / first.dense_cost == pytest.approx(80 / 576)
    grouped = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
    )
    assert [a.name for a in LC().coupled(grouped, torch.randn(2, 1, 8, 8))] == ["2"]
    with pytest.raises(fxrank.NothingToFactorizeError):
        LC(exclude=("*",)).coupled(ResDigits(), torch.randn(2, 1, 8, 8))


def test_options_out_of_bounds():
    with pytest.raises(ValueError, match="price, mu and length must be above 0, growth and rounds at least 1"):
        LC(growth=0.9)
