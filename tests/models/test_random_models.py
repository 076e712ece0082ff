"""A sample of random models in CI, ten thousand with `-m random_models`: see `random_models` in `tests/support`."""

import pytest
import torch
from random_models import PARTS, build, check, checking

import fxrank

SAMPLE = 161
CHUNK = 100


@pytest.mark.parametrize("seed", range(SAMPLE))
def test_what_must_hold_holds_of_a_random_model(seed):
    check(seed)


def test_the_sample_has_every_part():
    drawn = {name for seed in range(SAMPLE) for name in build(seed).names}
    assert drawn == {cls.__name__ for parts in PARTS.values() for cls in parts}


@pytest.mark.random_models
@pytest.mark.parametrize("first", range(SAMPLE, 10000, CHUNK))
def test_what_must_hold_holds_of_ten_thousand(first):
    failed = {}
    for seed in range(first, min(first + CHUNK, 10000)):
        try:
            check(seed)
        except Exception as error:
            failed[seed] = f"{type(error).__name__}: {error}"
    assert failed == {}


def spoiled(change):
    """`factorize` as the check calls it, with something wrong done to the copy, or to the model."""
    honest = checking.factorize

    def factorize(model, example, **options):
        small = honest(model, example, **options)
        with torch.no_grad():
            change(model, small)
        return small

    return factorize


SPOILS = {
    "a factor": lambda model, small: next(m for m in small.modules() if isinstance(m, fxrank.FactorPair)).u.weight.add_(
        1e-6
    ),
    "a bias": lambda model, small: next(p for n, p in small.named_parameters() if n.endswith("bias")).add_(1e-6),
    "the original": lambda model, small: next(model.parameters()).add_(1e-12),
    "a random number": lambda model, small: torch.rand(1),
    "a reason": lambda model, small: vars(small).update(_fxrank_plan=fxrank.Plan("factorize", ())),
}


@pytest.mark.parametrize("what", SPOILS)
def test_the_check_can_fail(monkeypatch, what):
    monkeypatch.setattr(checking, "factorize", spoiled(SPOILS[what]))
    with pytest.raises(checking.WrongError):
        check(3)
