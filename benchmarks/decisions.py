"""The table that decides fxrank's defaults: eight training jobs, each as full-rank, by every default in question, and as a narrower model.

    python -m benchmarks.decisions --data FOLDER --budget-minutes 120 --processes 2
    python -m benchmarks.decisions --data FOLDER --time      # steps, on a quiet machine, after the training
    python -m benchmarks.decisions --table

FOLDER holds the data sets that `benchmarks.subjects.tasks` names. A cell is a job (`benchmarks.subjects.jobs`), a row (`rows`) and a
seed, trained in a process of its own with one thread. Cells are kept in a ledger as they come, those that decide most first; the same
command goes on where it was stopped, and trains anew what a changed row or job means.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fxrank
from benchmarks import record
from benchmarks.subjects import cells, tasks, verdicts
from benchmarks.subjects.jobs import JOBS, Job
from benchmarks.subjects.rows import DECIDING, ROWS, Setup

GUESS = 6.0
"""Minutes of a cell of a job of which none is known."""
CPU = torch.device("cpu")


class Cell(NamedTuple):
    """One training run."""

    job: str
    row: str
    seed: int


def in_order(jobs: Sequence[str], rows: Sequence[str], seeds: Sequence[int], further: Sequence[str]) -> list[Cell]:
    """All jobs in turn, row by row, of the first seed; then the rows in `further` of the other seeds."""
    first, *others = seeds
    found = [Cell(job, row, first) for row in rows for job in jobs]
    return found + [Cell(job, row, seed) for seed in others for row in rows if row in further for job in jobs]


def meaning(job: Job, row: str) -> str:
    """A fingerprint of what a row is for a job: another one is another measurement."""
    setup = ROWS[row](job)
    of_other = [meaning(job, setup.like)] if isinstance(setup, Setup) and setup.like else []
    text = json.dumps([job.configuration, repr(setup), *of_other], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code() -> str:
    """A fingerprint of fxrank's own files."""
    assert fxrank.__file__ is not None
    root = Path(fxrank.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12]


class Book:
    """The ledger with cells and timed steps in it. Those of which the meaning has changed are there and are not looked at."""

    def __init__(self, path: Path, jobs: Mapping[str, Job]) -> None:
        self.jobs = jobs
        self._ledger = record.Ledger(path, {"benchmark": "decisions"})

    def _name(self, cell: Cell, kind: str) -> dict[str, Any]:
        return {"kind": kind} | cell._asdict() | {"meaning": meaning(self.jobs[cell.job], cell.row)}

    def found(self, cell: Cell, kind: str = "cell") -> dict[str, Any] | None:
        """What is known of a cell."""
        return self._ledger.found(self._name(cell, kind))

    def add(self, cell: Cell, found: Mapping[str, Any], kind: str = "cell") -> None:
        """Keep it, with where it comes from."""
        about = {
            "configuration": self.jobs[cell.job].configuration,
            "code": code(),
            "environment": record.environment(CPU),
        }
        self._ledger.add(self._name(cell, kind), dict(found) | about, shown=False)

    def share(self, cell: Cell) -> float | None:
        """What a narrower twin may have of the parameters outside of embeddings: those of the row that it is like, of the same seed, None if
        that is not trained.
        """
        setup = ROWS[cell.row](self.jobs[cell.job])
        assert isinstance(setup, Setup), setup
        found = self.found(cell._replace(row=setup.like)) if setup.like else None
        if found is None or "parameters" not in found:
            return None
        fixed = found["dense_fixed"]
        return float((found["parameters"] - fixed) / (found["dense_parameters"] - fixed))

    def minutes(self, job: str) -> float:
        """The most that a cell of a job has taken."""
        known = [row["cell_seconds"] / 60 for row in self._ledger.rows if row["job"] == job and "cell_seconds" in row]
        return max(known, default=GUESS)

    def of_job(self, job: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
        """Its cells by row, in the order of rows, and the steps that were timed."""
        trained: dict[str, list[dict[str, Any]]] = defaultdict(list)
        steps = {}
        for row in self._ledger.rows:
            name = row["row"]
            if row["job"] != job or name not in ROWS or row["meaning"] != meaning(self.jobs[job], name):
                continue
            if row["kind"] == "steps":
                steps[name] = row
            else:
                trained[name].append(row)
        return {name: sorted(trained[name], key=lambda r: r["seed"]) for name in ROWS if name in trained}, steps


@dataclass
class Running:
    """A cell in its process, which writes what it finds to `output`."""

    cell: Cell
    process: subprocess.Popen[bytes]
    output: Path
    started: float


class Campaign:
    """Cells that are trained, some beside each other, until all are or the time is up."""

    def __init__(self, book: Book, options: argparse.Namespace) -> None:
        self.book, self.options = book, options
        self.failed: list[Cell] = []
        self._ends = time.monotonic() + 60 * (options.budget_minutes or 10**6)
        self._left_out = 0

    def run(self, wanted: Sequence[Cell]) -> None:
        """Train what the book lacks. A keyboard interrupt ends the cells that are being trained, of which nothing is kept."""
        waiting = deque(cell for cell in wanted if self.book.found(cell) is None)
        running: list[Running] = []
        with tempfile.TemporaryDirectory() as folder:
            try:
                while True:
                    while len(running) < self.options.processes and (cell := self._next(waiting)) is not None:
                        running.append(self._begin(cell, Path(folder)))
                    if not running:
                        break
                    time.sleep(0.1)
                    for one in [r for r in running if r.process.poll() is not None]:
                        running.remove(one)
                        self._end(one)
            except KeyboardInterrupt:
                print("stopped; the same command goes on from here", flush=True)
            finally:
                for one in running:
                    one.process.kill()
                    one.process.wait()
        if waiting:
            print(f"{len(waiting)} cells were left: of twins, those whose rows are not trained")
        if self._left_out:
            print(f"{self._left_out} cells were left for another time: they would not have ended within the budget")

    def _next(self, waiting: deque[Cell]) -> Cell | None:
        """The next cell that can be trained now; of one that is like another, which is not trained yet, later."""
        for cell in list(waiting):
            setup = ROWS[cell.row](self.book.jobs[cell.job])
            if isinstance(setup, Setup) and setup.like and self.book.share(cell) is None:
                continue
            waiting.remove(cell)
            if time.monotonic() + 60 * self.book.minutes(cell.job) <= self._ends:
                return cell
            self._left_out += 1
        return None

    def _begin(self, cell: Cell, folder: Path) -> Running:
        output = folder / f"{cell.job}_{cell.row}_{cell.seed}.json"
        command = [sys.executable, "-m", "benchmarks.decisions", "--cell", *map(str, cell), "--output", str(output)]
        command += ["--data", self.options.data, "--cache", self.options.cache]
        command += ["--small"] if self.options.small else []
        command += [] if (share := self.book.share(cell)) is None else ["--share", str(share)]
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=os.environ | one_thread)
        print(f"{time.strftime('%H:%M:%S')} begins: {' '.join(map(str, cell))}", flush=True)
        return Running(cell, process, output, time.monotonic())

    def _end(self, one: Running) -> None:
        seconds = time.monotonic() - one.started
        if one.process.returncode != 0 or not one.output.is_file():
            self.failed.append(one.cell)
            print(f"FAILED: {' '.join(map(str, one.cell))}, exit status {one.process.returncode}", flush=True)
            return
        found = json.loads(one.output.read_text(encoding="utf-8"))
        found |= {"beside": self.options.processes - 1, "quiet": self.options.processes == 1}
        self.book.add(one.cell, found)
        what = found.get("refused") or " ".join(f"{k} {v:.4f}" for k, v in found["scores"].items())
        print(
            f"{time.strftime('%H:%M:%S')} ends:   {' '.join(map(str, one.cell))}, {seconds:.0f} s: {what}", flush=True
        )


def time_all(book: Book, options: argparse.Namespace) -> None:
    """Time the steps of every job's rows that were trained, beside each other; those of a job are timed anew if one is missing."""
    torch.set_num_threads(1)
    for name in options.jobs:
        trained, steps = book.of_job(name)
        first = {row: of_row[0] for row, of_row in trained.items() if row in options.rows and "plan" in of_row[0]}
        if not set(first) <= set(steps):
            print(f"{time.strftime('%H:%M:%S')} steps of {name}: {len(first)} rows", flush=True)
            timed = cells.time_steps(book.jobs[name], first, Path(options.data), Path(options.cache))
            for row, found in timed.items():
                book.add(Cell(name, row, first[row]["seed"]), found | {"load": os.getloadavg()[0]}, "steps")


def table(book: Book, jobs: Sequence[str]) -> str:
    """All jobs, in markdown."""
    parts = []
    for name in jobs:
        trained, steps = book.of_job(name)
        if not trained:
            parts.append(f"### {name}\n\nnothing yet")
            continue
        all_cells = [cell for of_row in trained.values() for cell in of_row]
        codes = sorted({cell["code"] for cell in all_cells})
        about = next((cell["data"] for cell in all_cells if "data" in cell), "")
        said = [f"- {sentence}" for sentence in verdicts.criteria(trained, steps)]
        if len(codes) > 1:
            said.append(f"- of {len(codes)} states of fxrank's files")
        parts.append(
            "\n".join(
                [
                    f"### {name}",
                    "",
                    f"{about}; {book.jobs[name].epochs} epochs",
                    "",
                    verdicts.job_table(trained, steps),
                    *said,
                ]
            )
        )
    return "\n\n".join(parts)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=None, help="folder of the data sets")
    p.add_argument("--cache", default="data", help="folder for the decoded images (default %(default)s)")
    p.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS, metavar="JOB", help=f"of {', '.join(JOBS)}")
    p.add_argument("--rows", nargs="+", default=None, choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="all but the first only of rows that decide, or of --rows"
    )
    p.add_argument("--processes", type=int, default=1, help="cells beside each other (default %(default)s)")
    p.add_argument("--budget-minutes", type=float, default=None, help="no cell is begun that would not end within it")
    p.add_argument("--time", action="store_true", help="time the steps of what was trained, on a quiet machine")
    p.add_argument("--table", action="store_true", help="print the table from the ledger, and train nothing")
    p.add_argument(
        "--small", action="store_true", help="one epoch of next to nothing, to try it out; a ledger of its own"
    )
    p.add_argument("--ledger", default=None, help="(default: in benchmarks/results)")
    p.add_argument("--cell", nargs=3, default=None, metavar=("JOB", "ROW", "SEED"), help=argparse.SUPPRESS)
    p.add_argument("--share", type=float, default=None, help=argparse.SUPPRESS)
    p.add_argument("--output", default=None, help=argparse.SUPPRESS)
    return p


def jobs_of(small: bool) -> dict[str, Job]:
    """The jobs, or the same with next to nothing to do."""
    return (
        {name: replace(job, epochs=1, options=dict(job.options) | dict(job.small)) for name, job in JOBS.items()}
        if small
        else JOBS
    )


def main(arguments: Sequence[str] | None = None) -> Book | None:
    """Train, time, or print. Returns the ledger."""
    options = parser().parse_args(arguments)
    jobs = jobs_of(options.small)
    if options.data is None and not options.table:
        raise SystemExit("--data FOLDER is where the data sets are")
    if options.cell is not None:
        torch.set_num_threads(1)
        job, row, seed = options.cell
        setup = ROWS[row](jobs[job])
        assert not isinstance(setup, str), setup
        setup = setup if options.share is None else replace(setup, narrow=options.share)
        found = cells.train(jobs[job], setup, int(seed), Path(options.data), Path(options.cache))
        Path(options.output).write_text(json.dumps(found, default=str), encoding="utf-8")
        return None
    name = "decisions_small" if options.small else "decisions"
    path = Path(options.ledger or record.place(name, record.environment(CPU), ending="jsonl"))
    book = Book(path, jobs)
    rows = list(ROWS) if options.rows is None else options.rows
    ordered = in_order(options.jobs, rows, options.seeds, DECIDING if options.rows is None else rows)
    wanted = [cell for cell in ordered if not isinstance(ROWS[cell.row](jobs[cell.job]), str)]
    options.rows = rows
    if options.time:
        time_all(book, options)
    elif not options.table:
        if any("side" in jobs[job].options for job in options.jobs):
            tasks.small_cifar10(Path(options.data), Path(options.cache), 32)  # decoded once, for all
        campaign = Campaign(book, options)
        campaign.run(wanted)
        if campaign.failed:
            print(f"{len(campaign.failed)} cells have failed and will be tried again")
    print(table(book, options.jobs))
    return book


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # terminated as interrupted: no cell goes on alone
    main()
