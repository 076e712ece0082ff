"""When a clock can be believed, and what stands in for it (never how long anything takes, but beside busy processes)."""

import os
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import torch
from torch import nn

import fxrank
from fxrank.passes.profiling.clock import Lap, Share, Stopwatch, Times, compare

CPU = torch.device("cpu")


class Prepared:
    """A stopwatch that tells prepared rounds of laps, and a record of what ran between its marks."""

    def __init__(self, rounds):
        self.rounds, self.marks, self.threads = iter(rounds), [], []

    def mark(self):
        self.marks.append("mark")

    def laps(self):
        self.marks.append("read")
        self.threads.append(torch.get_num_threads())
        return [Lap(*lap) if isinstance(lap, tuple) else Lap(lap, lap) for lap in next(self.rounds)]


def measured(laps, **options):
    watch = Prepared(laps)
    steps = [lambda name=name: watch.marks.append(name) for name in ("dense", "pair")]
    return compare(steps, watch, **({"rounds": 11, "budget_ms": 200.0} | options)), watch


def test_rounds_are_interleaved_and_warmed_up():
    times, watch = measured([[3.0, 1.0], [9.0, 2.0], [4.0, 8.0]], rounds=3)
    assert times.ms == [4.0, 2.0] and times.how == "clock"
    assert watch.marks == ["dense", "pair"] + ["mark", "dense", "mark", "pair", "mark", "read"] * 3


def test_the_budget_bounds_the_rounds_but_three_are_made():
    times, watch = measured([[100.0, 100.0]] * 11, budget_ms=50)
    assert watch.marks.count("read") == 3
    _, watch = measured([[10.0, 10.0]] * 11, budget_ms=95)
    assert watch.marks.count("read") == 5
    _, watch = measured([[1.0, 1.0]] * 11)
    assert watch.marks.count("read") == 11
    assert times.ms == [100.0, 100.0]


def test_shares_are_of_the_same_round():
    """A clock that drifts hits both alike."""
    times, _ = measured([[10.0, 5.0], [10.0, 6.0], [20.0, 12.0], [10.0, 9.0]], rounds=4)
    assert times.shares[0] == Share(1.0, 0.0)
    assert times.shares[1] == Share(pytest.approx(0.6), pytest.approx((0.675 - 0.575) / 2))
    assert measured([[10.0, 7.0]], rounds=1, least=1)[0].shares[1] == Share(pytest.approx(0.7), 0.0)


def test_rounds_without_a_core_do_not_count():
    bad, good = [(10.0, 5.0), 2.0], [4.0, (2.0, 1.81)]
    times, watch = measured([bad, good, bad, good, bad, good], rounds=3)
    assert times == Times([4.0, 2.0], [Share(1.0, 0.0), Share(0.5, 0.0)], "clock")
    assert watch.marks.count("read") == 6


@pytest.mark.parametrize(
    ("options", "tried"),
    [({"rounds": 5}, 10), ({"budget_ms": 24.0}, 6), ({"budget_ms": 84.0}, 7), ({"budget_ms": 0.0}, 6)],
)
def test_without_rounds_that_count_processor_time_of_one_thread_stands_in(options, tried):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bad = [(10.0, 5.0), (2.0, 2.0)]
        times, watch = measured([bad] * tried + [[(30.0, 8.0), (9.0, 4.0)]] * 99, **options)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert times == Times([8.0, 4.0], [Share(1.0, 0.0), Share(0.5, 0.0)], "processor time")
    assert watch.threads[:tried] == [2] * tried
    assert set(watch.threads[tried:]) == {1} and len(watch.threads) >= tried + 3


def test_where_there_is_one_thread_nothing_is_done_once_more():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times, watch = measured([[(10.0, 5.0), (2.0, 2.0)]] * 9, budget_ms=0.0)
    finally:
        torch.set_num_threads(before)
    assert times == Times([5.0, 2.0], [Share(1.0, 0.0), Share(0.4, 0.0)], "processor time")
    assert watch.marks.count("read") == 6


def test_the_stopwatch_counts_between_marks_and_forgets():
    watch = Stopwatch(CPU)
    assert watch.laps() == []
    watch.mark()
    while time.thread_time() < (end := getattr(watch, "end", time.thread_time() + 0.02)):
        watch.end = end
    watch.mark()
    time.sleep(0.05)
    watch.mark()
    busy, idle = watch.laps()
    assert busy.ms >= busy.busy_ms >= 20
    assert idle.ms >= 50 > 25 > idle.busy_ms and not idle.counts
    assert watch.laps() == []


class Clear(nn.Module):
    """One layer of which a pair is much faster, and one of which it is much slower, on any processor."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(512, 512, 3, padding=1, bias=False)
        self.tiny = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.tiny(self.wide(x)[:, :16].mean((2, 3)))


def test_beside_busy_processes_what_is_clear_is_decided_as_on_a_quiet_machine():
    """By the clock on the wall two threads that wait for each other took this pair for half as fast as its layer."""
    threads = torch.get_num_threads()
    with ExitStack() as busy:
        for _ in range(2 * (os.cpu_count() or 1)):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            busy.callback(process.wait)
            busy.callback(process.kill)
        busy.callback(torch.set_num_threads, threads)
        torch.set_num_threads(2)
        wide, tiny = fxrank.profile(Clear(), torch.randn(16, 512, 2, 2), include="*").stacks
    assert wide.names == ("wide",) and wide.speedup > 1.5
    assert tiny.names == ("tiny",) and tiny.speedup < 1.0
    assert {wide.how, tiny.how} <= {"clock", "processor time"}
