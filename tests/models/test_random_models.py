"""A sample of random models in CI, ten thousand with `-m random_models`: see `random_models` in `tests/support`."""

import pytest
from random_models import PARTS, build, check

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
