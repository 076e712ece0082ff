"""The tracker of stable ranks against exact spectra, cold and warm."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxrank
from fxrank.passes.spectra import tracked
from fxrank.passes.spectra.exact import mean_over_groups, singular_values, stable
from fxrank.passes.spectra.tracked import MAX_STEPS, StableRankTracker


@pytest.fixture(scope="module", autouse=True, params=[tracked.NARROW, 0], ids=["squares", "processes"])
def narrow(request):
    """Narrow matrices by their squares, as on a CPU, and all by a Lanczos process, as elsewhere."""
    before, tracked.NARROW = tracked.NARROW, request.param
    yield
    tracked.NARROW = before


def exact(stack):
    return mean_over_groups(stable, singular_values(stack))


def with_spectrum(sigma, rows, cols, groups=1, seed=0):
    """A stack with these singular values in random directions."""
    generator = torch.Generator().manual_seed(seed)
    size = len(sigma)
    q = torch.linalg.qr(torch.randn(groups, rows, rows, dtype=torch.float64, generator=generator))[0][..., :size]
    p = torch.linalg.qr(torch.randn(groups, cols, cols, dtype=torch.float64, generator=generator))[0][..., :size]
    return ((q * torch.tensor(sigma, dtype=torch.float64)) @ p.mT).float()


def once(stack, seed=0):
    return StableRankTracker(seed)([stack], ["w"])[0]


@settings(max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24)),
    decay=st.sampled_from([1.0, 0.99, 0.9, 0.5]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_small_matrices_are_exact(shape, decay, dtype, seed):
    """A Lanczos process as long as the matrix is wide leaves nothing out."""
    groups, rows, cols = shape
    sigma = [decay**i for i in range(min(rows, cols))]
    stack = with_spectrum(sigma, rows, cols, groups, seed).to(dtype)
    assert once(stack, seed) == pytest.approx(exact(stack), rel=1e-3)  # the tracker's own promise


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("rows", [96, 200])
def test_near_equal_leading_values(rows, gap):
    """Two directions nearly as strong: the process may lock on the second, which is then as good an answer."""
    sigma = [1.0, 1.0 - gap] + [0.5 * 0.98**i for i in range(rows - 2)]
    stack = with_spectrum(sigma, rows, 256)
    tracker = StableRankTracker()
    for _ in range(3):
        assert tracker([stack], ["w"])[0] == pytest.approx(exact(stack), rel=1e-3)


@pytest.mark.parametrize("shape", [(128, 128), (128, 1152), (1152, 128), (64, 576)], ids=str)
def test_fresh_weights(shape):
    """The flat spectrum of random initialization, the hardest for any iteration."""
    stack = torch.randn(1, *shape) / shape[1] ** 0.5
    assert once(stack) == pytest.approx(exact(stack), rel=1e-3)


def test_rank_one_zero_and_identity():
    rank_one = torch.outer(torch.ones(30), torch.arange(40.0))[None]
    zero, one, tiny = torch.zeros(1, 5, 6), torch.full((1, 1, 1), -3.0), 1e-12 * torch.eye(4)[None]
    ranks = StableRankTracker()([rank_one, zero, one, tiny, torch.eye(7)[None]], list("abcde"))
    assert ranks == pytest.approx([1, 0, 1, 4, 7], rel=1e-5)  # float32
    assert ranks[1] == 0


def test_a_zero_matrix_may_come_alive_and_die_again():
    tracker, weight = StableRankTracker(), torch.diag(torch.tensor([2.0, 1, 1]))[None]
    found = [tracker([w], ["w"])[0] for w in (torch.zeros_like(weight), weight, torch.zeros_like(weight), weight)]
    assert found == pytest.approx([0, 1.5, 0, 1.5], rel=1e-5)


def test_groups_are_averaged():
    grouped = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 0, 0, 0])), torch.zeros(4, 4)])
    assert once(grouped) == pytest.approx(5 / 3, rel=1e-5)
    many = torch.randn(8, 12, 18)
    assert once(many) == pytest.approx(exact(many), rel=1e-3)


@pytest.mark.parametrize("rank", [1.0, 16.0])
def test_results_stay_in_range(rank):
    stack = with_spectrum([1.0] * int(rank), 16, 32)
    assert 1 <= once(stack) <= 16
    assert once(stack) == pytest.approx(rank, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_layer_that_is_not_finite_is_named(bad):
    weights = [torch.ones(1, 2, 2), torch.ones(2, 3, 3), torch.full((1, 2, 2), bad)]
    weights[1][1, 0, 2] = bad
    text = (
        "weights must be finite to have a stable rank; layer 'culprit' holds NaN or infinity. "
        "Lower the learning rate or restore an earlier checkpoint."
    )
    with pytest.raises(fxrank.NonFiniteWeightError, match=f"^{re.escape(text)}$"):
        StableRankTracker()(weights, ["fine", "culprit", "later"])


def test_an_error_leaves_the_tracker_usable():
    tracker, weight = StableRankTracker(), torch.randn(1, 20, 30)
    tracker([weight], ["w"])
    with pytest.raises(fxrank.NonFiniteWeightError):
        tracker([weight * math.nan], ["w"])
    assert tracker([weight], ["w"])[0] == pytest.approx(exact(weight), rel=1e-3)


def test_the_seed_fixes_every_number_and_the_users_random_state_is_untouched():
    weights = [torch.randn(1, 90, 120), torch.randn(2, 70, 40)]
    state = torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        tracker = StableRankTracker(7)
        runs.append([tracker(weights, ["a", "b"]) for _ in range(3)])
    assert runs[0] == runs[1]
    assert torch.equal(state, torch.random.get_rng_state())


def test_weights_are_neither_changed_nor_kept():
    weight = torch.nn.Parameter(torch.randn(40, 60))
    before = weight.detach().clone()
    once(weight[None])
    assert torch.equal(weight, before)
    assert weight.grad is None


def test_transposed_and_strided_views_need_no_copy():
    weight = torch.randn(70, 120)
    assert once(weight.t()[None]) == pytest.approx(exact(weight[None]), rel=1e-3)
    assert once(weight[::2, ::3][None]) == pytest.approx(exact(weight[::2, ::3][None]), rel=1e-3)


def test_warm_looks_cost_less_than_cold_ones(monkeypatch):
    monkeypatch.setattr(tracked, "NARROW", 0)
    steps = []
    advance = fxrank.passes.spectra.tracked._Run.advance
    monkeypatch.setattr(
        fxrank.passes.spectra.tracked._Run, "advance", lambda self, n: (steps.append(n), advance(self, n))[1]
    )
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 128, 1152, generator=generator)
    tracker = StableRankTracker()
    tracker([weight], ["w"])
    cold = sum(steps)
    steps.clear()
    tracker([weight + 1e-3 * torch.randn(weight.shape, generator=generator)], ["w"])
    assert 0 < sum(steps) < cold <= MAX_STEPS


def drifting(shapes, steps, seed):
    """Weights in training: noise, a few directions that grow at their own pace, some past others, and a slow decay."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(s, generator=generator) / s[2] ** 0.5 for s in shapes]
    towards = [
        [
            torch.randn(s[0], s[1], 1, generator=generator) @ torch.randn(s[0], 1, s[2], generator=generator)
            for _ in range(4)
        ]
        for s in shapes
    ]
    for step in range(steps):
        for weight, directions in zip(weights, towards, strict=True):
            weight *= 0.995
            for i, direction in enumerate(directions):
                pace = math.sin(0.2 * step + i) + 0.5
                weight += 0.02 * pace * direction / (weight.shape[1] * weight.shape[2]) ** 0.5
            weight += 2e-3 * torch.randn(weight.shape, generator=generator)
        yield [w.clone() for w in weights]


@pytest.mark.parametrize("seed", range(3))
def test_errors_over_a_drifting_sequence(seed):
    shapes = [(1, 32, 288), (1, 64, 288), (4, 24, 72), (1, 100, 96), (1, 10, 64)]
    tracker, errors = StableRankTracker(seed), []
    for weights in drifting(shapes, 40, seed):
        found = tracker(weights, [str(s) for s in shapes])
        truths = [exact(w) for w in weights]
        errors += [abs(f - truth) / truth for f, truth in zip(found, truths, strict=True)]
    assert len(errors) == 200
    assert max(errors) < 5e-3
    assert sum(e < 1e-3 for e in errors) >= 0.99 * len(errors)


@pytest.mark.parametrize("seed", range(3))
def test_a_new_leader_is_found(seed):
    """A hidden direction grows past the tracked one: the trap of a warm start."""
    generator = torch.Generator().manual_seed(seed)
    tracker = StableRankTracker(seed)
    noise = torch.randn(96, 400, generator=generator) / 20
    old, new = torch.randn(2, 96, 1, generator=generator), torch.randn(2, 1, 400, generator=generator)
    errors = []
    for step in range(60):
        weight = noise + old[0] @ new[0] / 60 + (step / 1000) * old[1] @ new[1] / 20
        truth = fxrank.stable_rank(weight)
        errors.append(abs(tracker([weight[None]], ["w"])[0] - truth) / truth)
    assert max(errors) < 5e-3
    assert sum(e < 1e-3 for e in errors) >= 0.99 * len(errors)


def test_a_leader_that_appears_at_once_orthogonal_to_the_old_one():
    tracker, weight = StableRankTracker(), with_spectrum([1.0] + [0.1] * 63, 64, 256)
    tracker([weight], ["w"])
    u, _, vh = torch.linalg.svd(weight[0], full_matrices=False)
    changed = (weight[0] + 2 * torch.outer(u[:, 40], vh[40]))[None]
    assert tracker([changed], ["w"])[0] == pytest.approx(exact(changed), rel=1e-3)


def test_a_square_has_no_state_and_no_random_number():
    generator = torch.Generator().manual_seed(0)
    narrow, wide = torch.randn(1, 40, 300, generator=generator), torch.randn(1, 160, 200, generator=generator)
    tracker, alone = StableRankTracker(), StableRankTracker()
    both = tracker([narrow, wide], ["a", "b"])
    assert both == alone([narrow], ["a"]) + StableRankTracker()([wide], ["b"]) or tracked.NARROW == 0
    assert both[0] == pytest.approx(exact(narrow), rel=1e-5 if tracked.NARROW else 1e-3)
    assert [entry[0] for entry in tracker.state_dict()["ritz"]] == ([1] if tracked.NARROW else [0, 1])
    fresh = StableRankTracker().state_dict()["generator"]
    assert torch.equal(alone.state_dict()["generator"], fresh) == bool(tracked.NARROW)
