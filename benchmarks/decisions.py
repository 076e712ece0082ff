"""The table that decides fxrank's defaults: eight training jobs, each as full-rank, by every default in question, and as a narrower model.

    python -m benchmarks.decisions --data FOLDER --budget-minutes 120 --processes 2
    python -m benchmarks.decisions --data FOLDER --time      # steps, on a quiet machine, after the training
    python -m benchmarks.decisions --table

FOLDER holds the data sets that `benchmarks.subjects.tasks` names. A cell is a job (`benchmarks.subjects.jobs`), a row (`rows`) and a
seed, trained in a process of its own with one thread. Cells are kept in a ledger as they come, those that decide most first; the same
command goes on where it was stopped, and trains anew what a changed row or job means.
"""

import argparse
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import campaign
from benchmarks.campaign import Campaign, Cell, in_order
from benchmarks.subjects import cells, verdicts
from benchmarks.subjects.jobs import JOBS, Job
from benchmarks.subjects.rows import DECIDING, ROWS


class Book(campaign.Book):
    """The ledger with cells and timed steps in it."""

    def __init__(self, path: Path, jobs: Mapping[str, Job]) -> None:
        super().__init__(path, "decisions", jobs, ROWS)

    def of_job(self, job: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
        """Its cells by row, in the order of rows, and the steps that were timed."""
        return self.known(job), {row: found[-1] for row, found in self.known(job, "steps").items()}


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
    p = campaign.parser(__doc__, JOBS, ROWS, "all but the first only of rows that decide, or of --rows")
    p.add_argument("--time", action="store_true", help="time the steps of what was trained, on a quiet machine")
    return p


def jobs_of(small: bool) -> dict[str, Job]:
    """The jobs, or the same with next to nothing to do."""
    return campaign.small(JOBS) if small else JOBS


def main(arguments: Sequence[str] | None = None) -> Book | None:
    """Train, time, or print. Returns the ledger."""
    options = campaign.read(parser(), arguments)
    jobs = jobs_of(options.small)
    if options.cell is not None:

        def train(cell: Cell) -> Mapping[str, Any]:
            setup = ROWS[cell.row](jobs[cell.job])
            assert not isinstance(setup, str), setup
            setup = setup if options.share is None else replace(setup, narrow=options.share)
            return cells.train(jobs[cell.job], setup, cell.seed, Path(options.data), Path(options.cache))

        campaign.train_cell(options, train)
        return None
    book = Book(campaign.ledger_of("decisions", options), jobs)
    rows = list(ROWS) if options.rows is None else options.rows
    ordered = in_order(options.jobs, rows, options.seeds, DECIDING if options.rows is None else rows)
    options.rows = rows
    if options.time:
        time_all(book, options)
    elif not options.table:
        campaign.decode(jobs, options)
        Campaign(book, options).run([cell for cell in ordered if not isinstance(book.setup(cell), str)])
    print(table(book, options.jobs))
    return book


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # terminated as interrupted: no cell goes on alone
    main()
