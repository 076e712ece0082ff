"""Calibration in several processes, each with its own part of the data."""

from collections.abc import Callable
from typing import Any

from fxrank.passes.errors import CalibrationError

OfAll = Callable[[Any], list[Any]]
"""What every process gives, in each of them, in the order of their ranks. Every process calls it as often as the others."""


def alone(value: Any) -> list[Any]:
    """The `OfAll` of one process."""
    return [value]


def together(act: Callable[[], None], of_all: OfAll) -> None:
    """Do this in every process. If it raises in any, all raise, so that none waits for another."""
    failure: Exception | None = None
    try:
        act()
    except Exception as error:
        failure = error
    failures = of_all(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, theirs in enumerate(failures):
        if theirs is not None:
            raise CalibrationError(
                f"all processes must get through their calibration data; process {rank} did not: {theirs}"
            )
