"""The path from the dense model to ever cheaper ones: against brute force, and the search along it."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import SixLayers, vectors

from fxrank.passes.discovery.discover import discover
from fxrank.passes.tracing.trace import trace
from fxrank.policies.budget import Ladder, Option, counted, ladders_of
from fxrank.policies.path import NEAR, TRIES, Path, _hull, farthest

MODEL = SixLayers()
LAYERS = {a.name: a for a in discover(trace(MODEL, vectors()[0]), MODEL) if a.reason is None}
SPECTRA = st.lists(st.floats(0.01, 10), min_size=1, max_size=16)


def made(steps, losses):
    """A path whose cost falls to nothing, evenly."""
    costs = tuple(1 - i / len(steps) for i in range(len(steps) + 1))
    return Path(tuple(steps), tuple(losses), costs)


def ladders(names, spectra):
    found = {}
    for name, values in zip(names, spectra, strict=True):
        layer = LAYERS[name]
        sigma = torch.zeros(1, layer.full_rank, dtype=torch.float64)
        sigma[0, : len(values)] = torch.tensor(sorted(values, reverse=True)[: layer.full_rank], dtype=torch.float64)
        found[name] = [(layer, sigma)]
    return ladders_of(found, counted("params"))


def reached(options: dict[str, Ladder], path: Path, number: int):
    """Cost and loss after so many steps."""
    ways = path.at(number)
    chosen = [
        next(
            o for o in ladder.options if (o.layer.form, o.rank) == ways.get(name, (ladder.options[-1].layer.form, None))
        )
        for name, ladder in options.items()
    ]
    return sum(o.cost for o in chosen), sum(o.loss for o in chosen)


@given(SPECTRA, SPECTRA)
def test_no_pairs_lose_less_at_their_size_than_the_corners_of_the_path(first, second):
    options = ladders(("l1", "l2"), (first, second))
    path = Path.of(options)
    assert path.at(0) == {}
    every = [
        (sum(o.cost for o in chosen), sum(o.loss for o in chosen))
        for chosen in itertools.product(*(ladder.options for ladder in options.values()))
    ]
    points = [reached(options, path, number) for number in range(len(path.steps) + 1)]
    for number, (cost, loss) in enumerate(points):
        assert loss == pytest.approx(path.losses[number], abs=1e-12)
        assert cost == pytest.approx(path.costs[number] * points[0][0])
        if number:
            assert cost < points[number - 1][0] and loss >= points[number - 1][1]
    corners = _hull([Option(cost, loss, None, 1) for cost, loss in reversed(points)])[::-1]
    costs, losses = [o.cost for o in corners], [o.loss for o in corners]
    for cost, loss in every:
        assert loss >= np.interp(cost, costs, losses) - 1e-12
    # The last is the cheapest of all.
    assert costs[0] == min(at_cost for at_cost, _ in every)


@given(SPECTRA, SPECTRA, st.floats(0, 1))
def test_a_floor_ends_the_path_as_low_as_it_lets(first, second, floor):
    options = ladders(("l1", "l2"), (first, second))
    path, part = Path.of(options), Path.of(options, floor)
    number = len(part.steps)
    end = number if part.steps == path.steps[:number] else number - 1
    assert (part.steps[:end], part.losses[: end + 1]) == (path.steps[:end], path.losses[: end + 1])
    assert part.costs[-1] >= floor - 1e-9
    cost, loss = reached(options, part, number)
    assert loss == pytest.approx(part.losses[-1], abs=1e-12)
    if end < len(path.steps):  # no pair of the layer that was stopped costs less and is let
        name = path.steps[end][0]
        dense = options[name].options[-1]
        now = next((o for o in options[name].options if (o.layer.form, o.rank) == part.at(number).get(name)), dense)
        others = cost - now.cost
        lower = [o.cost for o in options[name].options if o.cost < now.cost]
        total = sum(ladder.options[-1].cost for ladder in options.values())
        assert all(others + one < floor * total + 1e-6 for one in lower)


@given(SPECTRA, st.floats(0, 2))
def test_until_is_the_last_point_that_loses_no_more(values, most):
    path = Path.of(ladders(("l1",), (values,)))
    number = path.until(most)
    assert path.losses[number] <= most
    assert number == len(path.steps) or path.losses[number + 1] > most


@given(st.floats(0.3, 3), st.floats(1e-3, 1), st.floats(1e-4, 0.5), st.integers(2, 400))
def test_the_search_keeps_to_what_may_be_lost_and_comes_near_it(power, scale, most, count):
    """Where the model loses a power of what its layers lose, as is the case nearly."""
    path = made([("a", ("channel", count - i)) for i in range(count)], [i / count for i in range(count + 1)])
    asked = []

    def lost(ways):
        number = count - ways["a"][1] + 1 if ways else 0
        asked.append(number)
        return scale * path.losses[number] ** power

    ways, found = farthest(path, lost, most)
    assert found <= most and len(asked) <= TRIES and len(set(asked)) == len(asked)
    number = count - ways["a"][1] + 1 if ways else 0
    assert found == (pytest.approx(scale * path.losses[number] ** power) if ways else 0.0)
    best = min(count, int(count * (most / scale) ** (1 / power) + 1e-9))
    # All, or as near as the measure asks for, or the steps are too wide for that, or the search has run out of tries close by.
    assert number == best or found >= NEAR * most or number >= 0.8 * best - 1


def test_a_loss_that_does_not_follow_the_layers_ends_the_search_in_time():
    path = made([("a", ("channel", 9 - i)) for i in range(8)], map(float, range(9)))
    calls = []
    ways, found = farthest(path, lambda ways: calls.append(ways) or math.inf, 0.1)
    assert (ways, found) == ({}, 0.0) and len(calls) <= TRIES
    ways, found = farthest(path, lambda ways: 0.0, 0.1)
    assert found == 0.0 and ways["a"][1] <= 3


def test_the_search_does_not_go_step_by_step_where_the_power_changes():
    """As of MiniLM: flat at first, where the search begins, and steep below."""
    count = 1500
    path = made([("a", ("channel", count - i)) for i in range(count)], [(i / count) ** 3 for i in range(count + 1)])

    def lost(ways):
        number = count - ways["a"][1] + 1
        return 0.023 * (path.losses[number] / path.losses[1100]) ** (1.2 if number < 1100 else 0.2)

    _, found = farthest(path, lost, 0.02, 1.0)
    assert NEAR * 0.02 <= found <= 0.02


def test_the_search_gets_past_what_loses_more_with_less():
    """As of MiniLM, where of two points the one with more parameters lost more."""
    count = 1500
    losses = [0.0184 * (i / 1157) ** 3 for i in range(count + 1)]  # the search begins at the 1157th
    path = made([("a", ("channel", count - i)) for i in range(count)], losses)

    def lost(ways):
        number = count - ways["a"][1] + 1
        return 0.03 - 5e-6 * (number - 900) if number > 900 else 0.03 * (number / 900) ** 3

    _, found = farthest(path, lost, 0.02, 1.0)
    assert 0.5 * 0.02 <= found <= 0.02


def test_a_model_without_layers_is_at_its_end():
    path = Path.of({})
    assert farthest(path, lambda ways: pytest.fail("nothing to try"), 0.1) == ({}, 0.0)


def test_points_that_are_nearly_the_same_throw_the_search_nowhere():
    """No power of a number that overflows."""
    losses = {1: 0.005, 2: 0.00500001, 3: 0.1, 4: math.nan}
    path = made([("a", ("channel", 4 - i)) for i in range(4)], (0.0, 0.5, 2.0, 3.0, 4.0))
    ways, found = farthest(path, lambda ways: losses[4 - ways["a"][1] + 1], 0.02)
    assert found == 0.00500001 and ways == path.at(2)
