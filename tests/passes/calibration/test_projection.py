"""Factors that know the data: least output error, whatever the data are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxrank.passes.calibration.moments import Moments
from fxrank.passes.calibration.projection import Projection
from fxrank.passes.spectra.exact import truncated_factors


def sample(seed, groups=1, rows=6, cols=9, count=40, offset=1.0):
    """A stack of matrices and inputs `(count, groups, cols)` with a spread of scales and a mean."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(count, groups, cols) @ (draw(groups, cols, cols) * 2.0 ** -torch.arange(cols)).sum(0) + offset * draw(
        groups, cols
    )
    return draw(groups, rows, cols), x


def projection(w, x, side, centred=True):
    vectors = torch.einsum("grc,ngc->ngr", w, x) if side == "outputs" else x
    moments = Moments(*vectors.shape[1:])
    for part in vectors.split(7):
        moments.add(part)
    return Projection(w, moments, side, centred)


def squared_error(w, x, factors):
    u, v, *gained = factors
    z = torch.einsum("grc,ngc->ngr", w - v @ u, x)
    return float((z - (gained[0] if gained else 0)).square().sum((1, 2)).mean())


shapes = st.tuples(st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.integers(1, 30))


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 2**16), st.sampled_from(["outputs", "inputs"]), st.booleans(), st.data())
def test_no_pair_of_this_rank_gives_outputs_that_differ_less(shape, seed, side, centred, data):
    groups, rows, cols, count = shape
    w, x = sample(seed, groups, rows, cols, count)
    rank = data.draw(st.integers(1, min(rows, cols)))
    found = projection(w, x, side, centred)
    z = torch.einsum("grc,ngc->gnr", w, x)
    z = z - z.mean(1, keepdim=True) if centred else z
    least = float(torch.linalg.svdvals(z)[:, rank:].square().sum()) / count  # Eckart-Young, on the outputs themselves
    scale = float(z.square().sum()) / count + 1e-12
    assert squared_error(w, x, found.factors(rank)) <= least + 1e-7 * scale
    assert found.lost(rank) == pytest.approx(least, abs=1e-7 * scale)
    assert len(found.factors(rank)) == (3 if centred else 2)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16), st.sampled_from(["outputs", "inputs"]))
def test_full_rank_is_exact_whatever_was_seen(seed, side):
    """One sample, fewer than inputs, inputs that are always zero, or the same one always."""
    w, x = sample(seed, rows=5, cols=7)
    dead = x * (torch.arange(7) % 2)
    for seen in (x, x[:1], x[:3], dead, x[:1].expand(9, -1, -1), 0 * x):
        u, v, gained = projection(w, seen, side).factors(5)
        torch.testing.assert_close(v @ u, w, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(gained, torch.zeros_like(gained), rtol=0, atol=1e-7)


def test_what_was_never_seen_is_left_to_the_weight():
    """Of a layer whose outputs never vary, the factors are the weight's own; of one that saw one direction, it comes first."""
    w, x = sample(0)
    constant = projection(w, x[:1].expand(5, -1, -1), "outputs")
    u, v, _ = constant.factors(2)
    best = torch.linalg.matrix_norm(w - torch.linalg.multi_dot([p[0] for p in reversed(truncated_factors(w, 2))]))
    torch.testing.assert_close(torch.linalg.matrix_norm(w - v @ u), best, rtol=1e-6, atol=0)
    assert constant.output_error(1) == pytest.approx(0, abs=1e-6)
    one = torch.zeros_like(x)
    one[..., 3] = x[..., 3]
    u, v, _ = projection(w, one, "outputs").factors(3)
    torch.testing.assert_close((v @ u)[..., 3], w[..., 3], rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16), st.integers(1, 4))
def test_rows_of_a_table_count_as_often_as_they_are_looked_up(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(1, 12, 5, generator=generator, dtype=torch.float64)
    looked_up = torch.randint(12, (50,), generator=generator).clamp(max=3)
    moments = Moments(1, 5)
    moments.add(table[0, looked_up][:, None])
    found = Projection(table, moments, "lookups", centred=False)
    u, v = found.factors(rank)
    rows = table[0, looked_up]
    least = float(torch.linalg.svdvals(rows)[rank:].square().sum()) / 50
    assert float((rows - (v @ u)[0, looked_up]).square().sum()) / 50 <= least + 1e-7
    assert found.lost(rank) == pytest.approx(least, abs=1e-7)


def test_both_factors_are_of_one_size_and_of_the_weights_dtype():
    w, x = sample(3)
    half = Projection(w.bfloat16(), projection(w, x, "outputs").moments, "outputs", True)
    u, v, gained = half.factors(4)
    assert {u.dtype, v.dtype, gained.dtype} == {torch.bfloat16}
    torch.testing.assert_close(u.float().norm(dim=2), v.float().norm(dim=1), rtol=2e-2, atol=0)  # bfloat16 has 8 bits


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**16), st.floats(-1e6, 1e6))
def test_moments_are_those_of_all_vectors_at_once(seed, offset):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 2, 4, generator=generator, dtype=torch.float64) + offset
    moments = Moments(2, 4)
    for part in x.split([1, 9, 0, 20]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    expected = torch.stack([torch.cov(x[:, g].T, correction=0) for g in range(2)])
    torch.testing.assert_close(moments.second(centred=True), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        moments.second(centred=False), torch.einsum("ngi,ngj->gij", x, x) / 30, rtol=1e-9, atol=1e-9
    )


def test_moments_of_interleaved_parts_are_those_of_the_parts():
    x = torch.randn(30, 2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    whole, parts = Moments(2, 12), Moments(2, 4)
    whole.add(x)
    for part in x.unflatten(2, (4, 3)).unbind(3):
        parts.add(part)
    found = whole.of_parts(3)
    assert found.count == parts.count
    torch.testing.assert_close(found.mean, parts.mean)
    for centred in (True, False):
        torch.testing.assert_close(found.second(centred=centred), parts.second(centred=centred))
