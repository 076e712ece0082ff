"""Where a run is, and what it has measured so far: all that changes from batch to batch, but model and optimizer."""

import time
from dataclasses import dataclass, field
from typing import Any

from fxrank.session.state import FULL, LOW
from fxrank.training.progress import Totals


def _by_phase() -> dict[str, int | None]:
    return {FULL: None, LOW: None}


def _around_switch() -> dict[str, float | None]:
    return {"before_switch": None, "after_switch": None}


@dataclass
class RunState:
    """One run of `auto_lowrank`, at one moment. The trainer goes on from it; a keeper writes it down and brings it back."""

    totals: Totals
    """The sums of this epoch."""
    epoch: int = 0
    taken: int = 0
    """Batches taken of the epoch."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row for each epoch that is over."""
    memory: dict[str, int | None] = field(default_factory=_by_phase)
    """Peak bytes of a step in each phase."""
    at_switch: dict[str, float | None] = field(default_factory=_around_switch)
    """Validation accuracy just before and just after the switch."""
    evaluation_seconds: float = 0.0
    seconds_before: float = 0.0
    """What the run took in processes that were killed."""
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """What the run has taken."""
        return self.seconds_before + time.perf_counter() - self.started

    def next_epoch(self) -> None:
        """The epoch is over."""
        self.epoch, self.taken, self.totals = self.epoch + 1, 0, Totals(self.totals.loss.device)
