"""Which of several pieces of work takes how long, on a machine that others may be using.

Rounds are interleaved: each runs every piece once, so that a drifting clock rate hits all alike, and medians count. While other processes
want the same cores a clock on the wall tells lies, and steady ones, which no spread gives away: of two threads that work together one
waits for the other, and a pair of small products waits more often than one large product. The processor's own account shows it: a round
counts only if the calling thread had a core nearly all of the time. If too few do, the work is measured by the processor time of one
thread, of which others take nothing.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fxrank.passes.spectra.linalg import one_thread

LOST = 0.1
"""A lap counts if no more than this share of it went by without the thread on a core."""
PATIENCE = 2
"""Rounds that count are waited for this many times as long as is meant for all of them."""
_ACCOUNTED = time.get_clock_info("thread_time").resolution < 1e-4
"""Whether the processor's account is fine enough to tell; on Windows it is not."""


class Lap(NamedTuple):
    """Milliseconds between two marks by the clock, and those of them in which the calling thread had a core; a GPU's are all its own."""

    ms: float
    busy_ms: float

    @property
    def counts(self) -> bool:
        """Whether the clock can be believed."""
        return self.busy_ms >= (1 - LOST) * self.ms


class Stopwatch:
    """Elapsed time on a device: CUDA events there (no synchronization until read), the monotonic clock elsewhere.
    One code path.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note the present moment of the device's queue."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            now = time.perf_counter()
            self._marks.append((now, time.thread_time() if _ACCOUNTED else now))

    def laps(self) -> list[Lap]:
        """Between successive marks; forgets them. Waits for the device."""
        marks, self._marks = self._marks, []
        if self._cuda and marks:
            marks[-1].synchronize()
            return [Lap(ms, ms) for ms in (a.elapsed_time(b) for a, b in itertools.pairwise(marks))]
        return [Lap((b[0] - a[0]) * 1e3, (b[1] - a[1]) * 1e3) for a, b in itertools.pairwise(marks)]


class Share(NamedTuple):
    """Of the milliseconds of one piece of work, what another takes: the median over rounds, and half the distance between their quartiles."""

    median: float
    spread: float


class Times(NamedTuple):
    """Of several pieces of work: the milliseconds of each, medians over the rounds that count, and the shares of the first one's."""

    ms: list[float]
    shares: list[Share]
    how: str
    """`"clock"`, or what stood in where the clock could not be believed: `"processor time"` of one thread, or the `"roofline"`."""


def compare(
    steps: Sequence[Callable[[], None]], watch: Stopwatch, rounds: int, budget_ms: float, least: int = 3
) -> Times:
    """How long the steps take, after one round that is not counted: at most `rounds`, and no more than `least` of them beyond
    `budget_ms`. Where too few of `PATIENCE` times as many count, as on a busy machine, it is the processor time of one thread.
    """
    for step in steps:
        step()
    rows, spent = _rounds(steps, watch), 0.0
    tried: list[list[Lap]] = []
    while len(tried) < PATIENCE * least or (len(tried) < PATIENCE * rounds and spent < budget_ms):
        tried.append(next(rows))
        spent += sum(lap.ms for lap in tried[-1])
        counted = [row for row in tried if all(lap.counts for lap in row)]
        if len(counted) == rounds or (len(counted) >= least and spent >= budget_ms):
            return times_of([[lap.ms for lap in row] for row in counted], "clock")
    if torch.get_num_threads() > 1:
        tried, spent = [], 0.0
        with one_thread():
            while len(tried) < least or (len(tried) < rounds and spent < budget_ms):
                tried.append(next(rows))
                spent += sum(lap.busy_ms for lap in tried[-1])
    return times_of([[lap.busy_ms for lap in row] for row in tried], "processor time")


def _rounds(steps: Sequence[Callable[[], None]], watch: Stopwatch) -> Iterator[list[Lap]]:
    """A lap of each step, again and again."""
    while True:
        watch.mark()
        for step in steps:
            step()
            watch.mark()
        yield watch.laps()


def times_of(rounds: Sequence[Sequence[float]], how: str) -> Times:
    """From the milliseconds of each step, round by round."""
    columns = list(zip(*rounds, strict=True))
    return Times([statistics.median(of_one) for of_one in columns], [_share(columns[0], one) for one in columns], how)


def _share(whole: Sequence[float], part: Sequence[float]) -> Share:
    shares = [b / a for a, b in zip(whole, part, strict=True)]
    low, median, high = statistics.quantiles(shares, n=4, method="inclusive") if len(shares) > 1 else shares * 3
    return Share(median, (high - low) / 2)
