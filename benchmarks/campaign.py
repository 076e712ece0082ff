"""What campaigns of training runs share: cells, each trained in a process of its own with one thread, a ledger that they are kept in as they
come, and a command that goes on where it was stopped and trains anew what a changed row or job means.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fxrank
from benchmarks import record
from benchmarks.subjects import tasks
from benchmarks.subjects.jobs import Job

GUESS = 6.0
"""Minutes of a cell of a job of which none is known."""
CPU = torch.device("cpu")
Rows = Mapping[str, Callable[[Job], Any]]
"""By name, what a row is for a job: plain in its `repr`, a string if there is no such row for it. One with a `like` is made as large as the row
of that name has come to.
"""


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


def like(setup: Any) -> str | None:
    """The row that another is to be as large as."""
    name: str | None = getattr(setup, "like", None)
    return name


def meaning(rows: Rows, job: Job, row: str) -> str:
    """A fingerprint of what a row is for a job: another one is another measurement."""
    setup = rows[row](job)
    of_other = [meaning(rows, job, other)] if (other := like(setup)) else []
    text = json.dumps([job.configuration, repr(setup), *of_other], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code() -> str:
    """A fingerprint of fxrank's own files."""
    assert fxrank.__file__ is not None
    root = Path(fxrank.__file__).parent
    text = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(text).hexdigest()[:12]


class Book:
    """The ledger of a campaign with what is known of its cells, of several kinds. Those of which the meaning has changed are there and are not
    looked at.
    """

    def __init__(self, path: Path, campaign: str, jobs: Mapping[str, Job], rows: Rows) -> None:
        self.campaign, self.jobs, self.rows = campaign, jobs, rows
        self._ledger = record.Ledger(path, {"benchmark": campaign})

    def setup(self, cell: Cell) -> Any:
        """What the cell's row is for its job."""
        return self.rows[cell.row](self.jobs[cell.job])

    def _name(self, cell: Cell, kind: str) -> dict[str, Any]:
        return {"kind": kind} | cell._asdict() | {"meaning": meaning(self.rows, self.jobs[cell.job], cell.row)}

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
        """What a cell may have of the parameters outside of embeddings: those of the row that it is like, of the same seed, None if that is not
        trained.
        """
        other = like(self.setup(cell))
        found = self.found(cell._replace(row=other)) if other else None
        if found is None or "parameters" not in found:
            return None
        fixed = found["dense_fixed"]
        return float((found["parameters"] - fixed) / (found["dense_parameters"] - fixed))

    def minutes(self, job: str) -> float:
        """The most that a cell of a job has taken."""
        known = [row["cell_seconds"] / 60 for row in self._ledger.rows if row["job"] == job and "cell_seconds" in row]
        return max(known, default=GUESS)

    def known(self, job: str, kind: str = "cell") -> dict[str, list[dict[str, Any]]]:
        """What is known of a job's cells by row, in the order of rows, and of seeds."""
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in self._ledger.rows:
            name = row["row"]
            here = row["job"] == job and row["kind"] == kind and name in self.rows
            if here and row["meaning"] == meaning(self.rows, self.jobs[job], name):
                found[name].append(row)
        return {name: sorted(found[name], key=lambda r: r["seed"]) for name in self.rows if name in found}


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
            print(f"{len(waiting)} cells were left: those that are like rows that are not trained")
        if self._left_out:
            print(f"{self._left_out} cells were left for another time: they would not have ended within the budget")
        if self.failed:
            print(f"{len(self.failed)} cells have failed and will be tried again")

    def _next(self, waiting: deque[Cell]) -> Cell | None:
        """The next cell that can be trained now; of one that is like another, which is not trained yet, later."""
        for cell in list(waiting):
            if like(self.book.setup(cell)) and self.book.share(cell) is None:
                continue
            waiting.remove(cell)
            if time.monotonic() + 60 * self.book.minutes(cell.job) <= self._ends:
                return cell
            self._left_out += 1
        return None

    def _begin(self, cell: Cell, folder: Path) -> Running:
        output = folder / f"{cell.job}_{cell.row}_{cell.seed}.json"
        module = f"benchmarks.{self.book.campaign}"
        command = [sys.executable, "-m", module, "--cell", *map(str, cell), "--output", str(output)]
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


# -- the command


def parser(description: str | None, jobs: Mapping[str, Job], rows: Rows, seeds: str) -> argparse.ArgumentParser:
    """The options of every campaign; `seeds` says which cells have more than one."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=None, help="folder of the data sets")
    p.add_argument("--cache", default="data", help="folder for the decoded images (default %(default)s)")
    p.add_argument("--jobs", nargs="+", default=list(jobs), choices=jobs, metavar="JOB", help=f"of {', '.join(jobs)}")
    p.add_argument("--rows", nargs="+", default=None, choices=rows, metavar="ROW", help=f"of {', '.join(rows)}")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help=seeds)
    p.add_argument("--processes", type=int, default=1, help="cells beside each other (default %(default)s)")
    p.add_argument("--budget-minutes", type=float, default=None, help="no cell is begun that would not end within it")
    p.add_argument("--table", action="store_true", help="print the table from the ledger, and train nothing")
    p.add_argument("--small", action="store_true", help="next to nothing, to try it out; a ledger of its own")
    p.add_argument("--ledger", default=None, help="(default: in benchmarks/results)")
    p.add_argument("--cell", nargs=3, default=None, metavar=("JOB", "ROW", "SEED"), help=argparse.SUPPRESS)
    p.add_argument("--share", type=float, default=None, help=argparse.SUPPRESS)
    p.add_argument("--output", default=None, help=argparse.SUPPRESS)
    return p


def small(jobs: Mapping[str, Job], epochs: int = 1) -> dict[str, Job]:
    """The same jobs with next to nothing to do."""
    return {
        name: replace(job, epochs=epochs, options=dict(job.options) | dict(job.small)) for name, job in jobs.items()
    }


def read(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options that were given, for which there are data unless only a table is asked for."""
    options = parser.parse_args(arguments)
    if options.data is None and not options.table:
        raise SystemExit("--data FOLDER is where the data sets are")
    return options


def decode(jobs: Mapping[str, Job], options: argparse.Namespace) -> None:
    """Decode the images once, for all cells, if a job has images."""
    if any("side" in jobs[name].options for name in options.jobs):
        tasks.small_cifar10(Path(options.data), Path(options.cache), 32)


def ledger_of(campaign: str, options: argparse.Namespace) -> Path:
    """The file that is asked for, or that of this machine and month."""
    name = f"{campaign}_small" if options.small else campaign
    return Path(options.ledger or record.place(name, record.environment(CPU), ending="jsonl"))


def train_cell(options: argparse.Namespace, train: Callable[[Cell], Mapping[str, Any]]) -> None:
    """What the process of one cell does: train it with one thread, and write what it finds."""
    torch.set_num_threads(1)
    job, row, seed = options.cell
    found = train(Cell(job, row, int(seed)))
    Path(options.output).write_text(json.dumps(found, default=str), encoding="utf-8")
