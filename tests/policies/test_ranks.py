import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxrank
from fxrank.passes.spectra.exact import Spectrum, singular_values, truncation_error
from fxrank.policies.ranks import RANK_RULES, Evidence, random_matrix_xi, rank_rule, ratio_rank, whole_rank

FULL = 20


def evidence(*rows, xi=1.0, share=0.8, ratio=0.25):
    return Evidence(Spectrum(torch.diag_embed(torch.tensor(rows, dtype=torch.float64))), xi, share, ratio)


FLAT = [1.0] * FULL
LEADER = [3.0] + [0.0] * (FULL - 1)
HALVING = [2.0**-i for i in range(FULL)]


@pytest.mark.parametrize(
    ("name", "flat", "leader"),
    [
        ("stable_rank", FULL, 1),
        ("scaled_stable_rank", 2 * FULL, 2),
        ("accumulative", 16, 1),
        ("max_scaled_accumulative", 2 * FULL, 2),
        ("entropy", FULL, 1),
        ("energy", 16, 1),
        ("ratio", 5, 5),
    ],
)
def test_rules_on_spectra_with_known_answers(name, flat, leader):
    # 1e-12: exp(log 20) is not exactly 20
    assert rank_rule(name)(evidence(FLAT, xi=2.0)) == pytest.approx(flat, rel=1e-12)
    assert rank_rule(name)(evidence(LEADER, xi=2.0)) == pytest.approx(leader, rel=1e-12)


def test_rules_on_a_geometric_spectrum():
    # Σσ² = 4/3 and Σσ = 2 up to the missing tail, 2^-19 and smaller
    assert rank_rule("stable_rank")(evidence(HALVING)) == pytest.approx(4 / 3, rel=1e-11)
    assert rank_rule("accumulative")(evidence(HALVING, share=0.8)) == 3  # 1/2, 3/4, 7/8
    assert rank_rule("accumulative")(evidence(HALVING, share=0.75)) == 2
    assert rank_rule("energy")(evidence(HALVING, share=0.8)) == 2  # 3/4, 15/16
    assert rank_rule("entropy")(evidence(HALVING)) == pytest.approx(
        4.0, rel=1e-4
    )  # the tail again, through a logarithm


def test_max_takes_the_larger():
    rule = rank_rule("max_scaled_accumulative")
    assert rule(evidence(HALVING, xi=1.0, share=0.99)) == 7
    assert rule(evidence(HALVING, xi=9.0, share=0.99)) == pytest.approx(12.0, rel=1e-11)  # the tail of the series


def test_groups_are_averaged():
    assert rank_rule("accumulative")(evidence(FLAT, LEADER)) == (16 + 1) / 2
    assert rank_rule("stable_rank")(evidence(FLAT, LEADER)) == (FULL + 1) / 2


@pytest.mark.parametrize("name", sorted(RANK_RULES))
def test_zero_has_rank_zero(name):
    assert rank_rule(name)(evidence([0.0] * FULL)) == (5 if name == "ratio" else 0)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 0.99), st.integers(0, 50))
def test_energy_bounds_the_truncation_error(rows, cols, share, seed):
    matrix = torch.randn(1, rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sigma = singular_values(matrix)
    rank = whole_rank(rank_rule("energy")(Evidence(Spectrum(matrix), 1.0, share, 0.25)), min(rows, cols))
    assert truncation_error(sigma, rank) <= math.sqrt(1 - share) + 1e-9  # rounding of the Gram matrix


def test_unknown_rule():
    names = ", ".join(map(repr, sorted([*RANK_RULES, "outputs"])))
    with pytest.raises(
        ValueError, match=re.escape(f"rank_metric must be one of {names}; got 'stable'. Did you mean 'stable_rank'?")
    ):
        rank_rule("stable")


@given(st.floats(0, 1e6), st.integers(1, 5000))
def test_whole_rank(value, full):
    rank = whole_rank(value, full)
    assert 1 <= rank <= full
    assert rank == full or rank >= value - 1e-9
    assert rank == 1 or rank - 1 < value


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_whole_rank_keeps_whole_numbers(value, full):
    assert whole_rank(float(value), full) == min(value, full)


@given(st.integers(1, 4096), st.integers(1, 4096))
def test_at_initialization_the_scaled_rank_is_the_full_rank(full, stable):
    assert whole_rank(stable * (full / stable), full) == full


@given(st.integers(1, 5000), st.integers(1, 100))
def test_ratio_rank_is_the_exact_floor(full, percent):
    assert ratio_rank(full, percent / 100) == max(1, full * percent // 100)


@pytest.mark.parametrize("shape", [(400, 400), (200, 800), (800, 200), (64, 2000)])
def test_xi_of_a_random_matrix(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    # the Marchenko-Pastur edge is a limit; at these sizes σ_max² is within 4 % of it
    assert random_matrix_xi(*shape) == pytest.approx(min(shape) / fxrank.stable_rank(weight), rel=0.04)
    assert random_matrix_xi(*shape) == random_matrix_xi(*shape[::-1])
