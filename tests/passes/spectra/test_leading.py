"""Leading singular vectors of large weights, without a decomposition in full."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graded import check_optimal, graded
from torch import nn

import fxrank
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.spectra import exact
from fxrank.passes.spectra import leading as module
from fxrank.passes.spectra.exact import Spectrum, singular_values, stable, stable_rank_of, truncation_error
from fxrank.policies.ranks import RANK_RULES, Evidence

MODEST = 160


@pytest.fixture
def modest(monkeypatch):
    """What counts as large is small enough for a test, and a decomposition in full is an error."""
    monkeypatch.setattr(module, "LARGE", MODEST)
    for place, name in ((exact, "decompose"), (exact, "singular_values")):
        real = getattr(place, name)

        def only_small(stack, real=real):
            assert min(stack.shape[1:]) < MODEST, "in full"
            return real(stack)

        monkeypatch.setattr(place, name, only_small)


def drawn(kind, shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    if kind == "graded":
        return graded(shape, 6, 1.0, dtype, seed)
    stack = torch.randn(shape, generator=generator) / shape[2] ** 0.5
    if kind == "leaders":
        stack += (
            10
            * torch.randn(*shape[:2], 2, generator=generator)
            @ torch.randn(shape[0], 2, shape[2], generator=generator)
        )
    if kind == "low rank":
        stack = stack[:, :, :3] @ stack[:, :3]
    if kind == "twins":  # four equal leading values, and a rank that cuts through them
        stack = graded(shape, 0, 1.0, torch.float32, seed) + 0
        q = torch.linalg.qr(torch.randn(shape[0], shape[1], 4, generator=generator)).Q
        p = torch.linalg.qr(torch.randn(shape[0], shape[2], 4, generator=generator)).Q
        stack = 0.1 * stack + q @ p.mT
    return stack.to(dtype)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["random", "graded", "leaders", "low rank", "twins"]),
    shape=st.sampled_from([(1, 160, 300), (1, 300, 160), (1, 200, 200), (2, 160, 170)]),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_factors_are_the_best_ones_of_their_rank(modest, kind, shape, rank, dtype, seed):
    stack = drawn(kind, shape, seed, dtype)
    u, v = Spectrum(stack).factors(rank)
    assert u.shape == (shape[0], rank, shape[2]) and v.shape == (shape[0], shape[1], rank)
    exact_stack = stack.double()
    error = torch.linalg.vector_norm(exact_stack - v.double() @ u.double())
    sigma = torch.linalg.svdvals(exact_stack)
    norm = torch.linalg.vector_norm(sigma)
    best = torch.linalg.vector_norm(sigma[:, rank:])
    assert error <= (1 + 1e-5) * best + 4e-7 * norm  # float32
    found = Spectrum(stack)
    assert found.truncation_error(rank) == pytest.approx(truncation_error(sigma, rank), rel=2e-5, abs=1e-6)
    torch.testing.assert_close(
        torch.linalg.vector_norm(u, dim=2), torch.linalg.vector_norm(v, dim=1), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", ["random", "graded", "leaders", "low rank", "twins"])
@pytest.mark.parametrize("shape", [(1, 160, 300), (2, 200, 160)])
def test_stable_ranks_need_no_full_spectrum(modest, kind, shape):
    stack = drawn(kind, shape, 1)
    sigma = torch.linalg.svdvals(stack.double())
    expected = sum(stable(row) for row in sigma) / len(sigma)
    assert stable_rank_of(stack) == pytest.approx(expected, rel=2e-5)
    assert Spectrum(stack).stable_rank == pytest.approx(expected, rel=2e-5)
    evidence = Evidence(Spectrum(stack), 2.0, 0.8, 0.25)
    assert RANK_RULES["scaled_stable_rank"](evidence) == pytest.approx(2 * expected, rel=2e-5)
    assert evidence.full_rank == 160


def test_the_start_is_the_same_in_every_call_and_the_users_random_numbers_are_left_alone(modest):
    stack, state = drawn("random", (1, 160, 300), 3), torch.get_rng_state()
    first, second = Spectrum(stack).factors(4), Spectrum(stack).factors(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_fewer_are_part_of_more(modest, monkeypatch):
    found = Spectrum(drawn("random", (1, 160, 300), 3))
    found.factors(5)
    monkeypatch.setattr(exact, "leading", lambda *_: pytest.fail("again"))
    u, _ = found.factors(3)
    assert u.shape == (1, 3, 300) and 0 < found.truncation_error(4) < 1


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
def test_what_is_not_found_in_time_is_found_in_full(scale, monkeypatch):
    monkeypatch.setattr(module, "LARGE", MODEST)
    monkeypatch.setattr(module, "MAX_STEPS", 1)
    stack = drawn("random", (1, 160, 300), 3)
    assert module.leading(stack[0].mT, 4, lambda _, rest: 1e-5 * rest) is None
    check_optimal(stack, 4)
    assert stable_rank_of(stack) == pytest.approx(stable(singular_values(stack)[0]), rel=1e-12)
    monkeypatch.setattr(module, "MAX_STEPS", 40)
    tiny = (stack.double() * scale).float()
    check_optimal(tiny, 4)  # float32 has no squares of it
    assert not any(t.any() for t in Spectrum(torch.zeros(1, 160, 300)).factors(4))


def test_a_large_rank_and_a_small_weight_go_the_full_way(monkeypatch):
    monkeypatch.setattr(exact, "leading", lambda *_: pytest.fail("iterated"))
    Spectrum(torch.randn(1, 100, 200)).factors(2)
    monkeypatch.setattr(module, "LARGE", MODEST)
    Spectrum(torch.randn(1, 160, 300)).factors(14)
    found = Spectrum(torch.randn(1, 160, 300))
    assert found.sigma.shape == (1, 160)
    found.factors(2)  # the decomposition is there


def test_factorize_attach_and_switch_of_a_large_layer(modest):
    """In the first sample, at the switch, and in one shot."""
    model = nn.Sequential(nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 160), nn.ReLU(), nn.Linear(160, 4))
    model[2].weight.data = drawn("leaders", (1, 160, 200), 0)[0]
    x = torch.randn(4, 8)
    small = fxrank.factorize(model, x, rank={"2": 3})
    error = pair_error(model[2], small[2])
    assert error.relative <= (1 + 1e-5) * error.relative_bound + 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    policy = fxrank.Cuttlefish(
        rank_metric="scaled_stable_rank", speedup_threshold=None, latest=0.0, wait=False, round_to=1, xi=1.0
    )
    weight = model[2].weight.detach().clone()
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=4, policy=policy)
    decision = session.plan.layer("2")
    sigma = torch.linalg.svdvals(weight.double())
    assert decision.rank == math.ceil(float(stable(sigma))) < 5
    assert decision.truncation_error == pytest.approx(truncation_error(sigma[None], decision.rank), abs=2e-6)
    assert torch.linalg.matrix_norm(model[2].weight - weight) <= (1 + 1e-4) * torch.linalg.vector_norm(
        sigma[decision.rank :]
    )
