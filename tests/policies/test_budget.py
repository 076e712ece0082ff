"""Ranks under a budget: kept to, and as good as an exact solver's."""

import functools
import math
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxrank.passes.discovery.discover import discover
from fxrank.passes.errors import BudgetError
from fxrank.passes.tracing.trace import trace
from fxrank.plan import Budget
from fxrank.policies.budget import Ladder, allocate, counted, ranks_within, why_unspent


def layers_of(widths):
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(widths)])
    return model, discover(trace(model, torch.randn(2, widths[0])), model)


def spectrum(layer, decay):
    return (decay ** torch.arange(layer.full_rank, dtype=torch.float64))[None]


def brute_force(ladders, budget):
    """The least loss, by trying all."""
    ways = product(*(ladder.options for ladder in ladders.values()))
    return min(sum(o.loss for o in way) for way in ways if sum(o.cost for o in way) <= budget)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(4, 12), min_size=3, max_size=4),
    st.lists(st.floats(0.3, 0.99), min_size=3, max_size=3),
    st.floats(0.05, 1.0),
    st.sampled_from(["params", "macs"]),
)
def test_the_budget_is_kept_and_nothing_better_fits(widths, decays, share, of):
    _, layers = layers_of(widths)
    ladders = {a.name: Ladder([(a, spectrum(a, d))], counted(of)) for a, d in zip(layers, decays, strict=False)}
    least = sum(ladder.options[0].cost for ladder in ladders.values())
    budget = max(least, share * sum(ladder.options[-1].cost for ladder in ladders.values()))
    chosen = allocate(ladders, budget)
    assert sum(o.cost for o in chosen.values()) <= budget * (1 + 1e-12)
    assert sum(o.loss for o in chosen.values()) <= brute_force(ladders, budget) * 1.001 + 1e-6


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_random_models_come_as_near_to_their_targets_as_whole_ranks_can(data):
    sizes = st.integers(1, 12) | st.integers(24, 400)
    widths = data.draw(st.lists(sizes, min_size=3, max_size=6))
    of, target = data.draw(st.sampled_from(["params", "macs"])), data.draw(st.floats(0.02, 1.0))
    powers = data.draw(st.lists(st.floats(0.1, 2), min_size=5, max_size=5))
    model, layers = layers_of(widths)
    forms = {a.name: [(a, ((1 + torch.arange(a.full_rank)) ** -p)[None])] for a, p in zip(layers, powers, strict=False)}

    def cost(layer, rank):
        count, pair = (layer.parameters, layer.pair_parameters) if of == "params" else (layer.macs, layer.pair_macs)
        return count if rank is None else pair(rank)

    total = sum(p.numel() for p in model.parameters()) if of == "params" else sum(a.macs for a in layers)
    cheapest = sum(min(cost(a, None), cost(a, 1)) for a in layers)
    least = (total - sum(cost(a, None) for a in layers) + cheapest) / total
    if least > target:
        with pytest.raises(BudgetError, match=f"must be at least {least:.4f} here"):
            ranks_within(Budget(of, target, 0.0), layers, model, forms)
        return
    chosen, budget = ranks_within(Budget(of, target, 0.0), layers, model, forms)
    spent = total - sum(cost(a, None) - cost(a, chosen[a.name].rank) for a in layers)
    assert budget.reached == pytest.approx(spent / total) and spent <= target * total * (1 + 1e-12)
    if spent < 0.99 * target * total:
        assert not reachable([open_costs(a, cost) for a in layers], total, 0.99 * target * total, target * total)
        assert why_unspent(budget).startswith(f"target_{of}={target:g} is kept to with {budget.reached:.4f}: no ranks")
    else:
        assert why_unspent(budget) == ""


def open_costs(layer, cost):
    """What a layer may cost, less than dense; and dense."""
    return {c for r in range(1, layer.full_rank + 1) if (c := cost(layer, r)) < cost(layer, None)} | {cost(layer, None)}


def reachable(costs, total, least, most):
    """Whether one of the costs of each layer, and what no layer has, make a sum in these bounds."""
    sums = 1 << (total - sum(map(max, costs)))
    for of_layer in costs:
        sums = functools.reduce(lambda a, c, sums=sums: a | sums << c, of_layer, 0)
    return any(sums >> number & 1 for number in range(math.ceil(least), math.floor(most) + 1))


def test_large_layers_meet_their_target_to_half_a_hundredth():
    model, layers = layers_of([1024, 2048, 1024, 700, 1300])
    forms = {a.name: [(a, spectrum(a, d))] for a, d in zip(layers, (0.999, 0.995, 0.9995, 0.99), strict=True)}
    for of, target in product(["params", "macs"], [0.1, 0.333, 0.7, 0.97]):
        _, budget = ranks_within(Budget(of, target, 0.0), layers, model, forms)
        assert 0.995 * target < budget.reached <= target


def test_losses_may_be_weighed():
    model, layers = layers_of([64, 64, 64, 64])
    forms = {a.name: [(a, spectrum(a, 0.95))] for a in layers}
    budget = Budget("params", 0.4, 0.0)
    plain, _ = ranks_within(budget, layers, model, forms)
    weighed, _ = ranks_within(budget, layers, model, forms, weights={"1": 3.0})
    assert weighed["1"].rank > plain["1"].rank and weighed["0"].rank < plain["0"].rank
    assert weighed["1"].loss == pytest.approx(
        3 * (1 - sum(0.95 ** (2 * i) for i in range(weighed["1"].rank)) / sum(0.95 ** (2 * i) for i in range(64)))
    )


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6])
def test_only_the_proportions_of_weights_matter(scale):
    """The solver has bounds of its own for what is nothing."""
    model, layers = layers_of([48, 64, 40, 56, 32])
    forms = {a.name: [(a, spectrum(a, d))] for a, d in zip(layers, (0.99, 0.9, 0.97, 0.8), strict=True)}
    weights = {a.name: w for a, w in zip(layers, (1.0, 30.0, 0.3, 2.0), strict=True)}
    budget = Budget("params", 0.5, 0.0)
    wanted, _ = ranks_within(budget, layers, model, forms, weights=weights)
    scaled, _ = ranks_within(budget, layers, model, forms, weights={n: scale * w for n, w in weights.items()})
    lost, least = (sum(o.loss for o in found.values()) for found in (scaled, wanted))
    assert lost == pytest.approx(scale * least, rel=2e-3)  # the solver's gap


def test_a_flat_spectrum_gets_more_ranks_than_a_steep_one():
    _, layers = layers_of([32, 32, 32])
    ladders = {
        a.name: Ladder([(a, spectrum(a, d))], counted("params")) for a, d in zip(layers, (0.98, 0.5), strict=True)
    }
    chosen = allocate(ladders, 1024)
    flat, steep = (chosen[a.name] for a in layers)
    assert (flat.rank, steep.rank) == (13, 3)
    assert allocate(ladders, 2048) == {a.name: ladders[a.name].options[-1] for a in layers}  # dense again


def test_of_several_forms_the_better_is_taken():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    layers = discover(trace(model, torch.randn(1, 8, 9, 9)), model)
    forms = {}
    for layer, good in zip(layers, ("channel", "spatial"), strict=True):
        in_forms = [layer, layer.in_form("spatial")]
        forms[layer.name] = [(a, spectrum(a, 0.3 if a.form == good else 0.95)) for a in in_forms]
    chosen, reached = ranks_within(Budget("params", 0.4, 0.0), layers, model, forms)
    assert [chosen[a.name].layer.form for a in layers] == ["channel", "spatial"]
    assert 0.35 < reached.reached <= 0.4


def test_a_budget_out_of_reach_says_what_can_be_reached():
    model, layers = layers_of([16, 16, 16])
    forms = {a.name: [(a, spectrum(a, 0.9))] for a in layers}
    with pytest.raises(
        BudgetError,
        match=r"target_params must be at least 0\.1765 here, where each of 2 layers has rank 1; got 0\.1\. Raise it",
    ):
        ranks_within(Budget("params", 0.1, 0.0), layers, model, forms)
    chosen, reached = ranks_within(Budget("params", 0.1766, 0.0), layers, model, forms)
    assert {o.rank for o in chosen.values()} == {1}
    assert reached.reached == pytest.approx(96 / 544)
    with pytest.raises(ValueError, match=r"target_params is a share in \(0, 1\]; got 1\.5"):
        Budget("params", 1.5, 0.0)
    with pytest.raises(
        ValueError, match="a budget's quantity must be one of 'latency', 'macs', 'params', 'step_time'; got 'bytes'"
    ):
        Budget("bytes", 0.5, 0.0)
