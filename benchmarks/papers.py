"""What the papers compare Cuttlefish with, trained here on their two CIFAR-10 networks at a scale of minutes, beside the papers' own figures.

    python -m benchmarks.papers --data FOLDER --budget-minutes 120 --processes 2
    python -m benchmarks.papers --table

Networks are a quarter as wide, images half as large, runs six epochs instead of 300: what can be compared is how a row stands to the full-rank
one, in points, parameters and time. Cells (`benchmarks.subjects.paper_rows`) are kept in a ledger as they come; the same command goes on where
it was stopped. SI&FD, IMP, GraSP and EB Train are made as large as Cuttlefish's model has come out, and wait for it.
"""

import argparse
import json
import signal
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from benchmarks import campaign
from benchmarks.campaign import Book, Campaign, Cell, in_order
from benchmarks.subjects.jobs import Job
from benchmarks.subjects.paper_rows import JOBS, ROWS, train

FIGURES = Path(__file__).parent / "subjects" / "paper_figures.json"
SMALL_SHARE = 0.5
"""With `--small`, where nothing has learned enough for a rank below full."""


class Figure(NamedTuple):
    """What a paper reports of a row: accuracy in percent, and against its full-rank model's, parameters, time; all as they are shown."""

    accuracy: str = "-"
    difference: str = "-"
    parameters: str = "-"
    time: str = "-"
    source: str = "-"


def figure(job: str, row: str) -> Figure:
    """The papers' figure of a row of a job; of another network where there is none of this one; dashes where there is none at all."""
    tables = json.loads(FIGURES.read_text(encoding="utf-8"))["tables"]
    for table in sorted((t for t in tables if t["job"] in (job, None)), key=lambda t: t["job"] is None):
        if found := table["rows"].get(row):
            return _shown(table, found)
    return Figure()


def _shown(table: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> Figure:
    (full,) = table["rows"]["full"]
    accuracies, differences, parameters, times = [], [], [], []
    for one in found:
        spread = f" ± {one['spread']:.2f}" if "spread" in one else ""
        accuracies.append(f"{one['accuracy']:.2f}{spread}")
        differences.append(f"{one['accuracy'] - full['accuracy']:+.2f}")
        share = one.get("share", one["parameters_millions"] / full["parameters_millions"])
        parameters.append(f"{one['parameters_millions']:.1f} M ({share:.3f})")
        times.append(f"{one['hours']:.2f} h ({one['hours'] / full['hours']:.2f})" if "hours" in one else "-")
    settings = ", ".join(one["setting"] for one in found if "setting" in one)
    source = ", ".join([table["source"], *([] if table["job"] else [f"{table['model']} on {table['data']}"])])
    accuracy, difference, parameter, time = (
        " / ".join(dict.fromkeys(part)) for part in (accuracies, differences, parameters, times)
    )
    return Figure(accuracy, difference, parameter, time, f"{source} ({settings})" if settings else source)


def table(book: Book, jobs: Sequence[str]) -> str:
    """All jobs, in markdown: each row's score, what is left of the parameters and the wall-clock of its training beside the paper's."""
    return "\n\n".join(job_table(book, job) for job in jobs)


def job_table(book: Book, job: str) -> str:
    """One job; a row's numbers are means over its seeds, times of cells that ran beside others are marked `~`."""
    known = book.known(job)
    trained = {row: [c for c in cells if "refused" not in c] for row, cells in known.items()}
    trained = {row: cells for row, cells in trained.items() if cells}
    full = trained.get("full")
    metric = next((next(iter(cells[0]["scores"])) for cells in trained.values()), "accuracy")
    rows = []
    for name in book.rows:
        papers = figure(job, name)
        if name not in trained:
            rows.append((name, "-", "-", "-", "-", "-", *papers))
            continue
        cells = trained[name]
        scores = [100 * cell["scores"][metric] for cell in cells]
        spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        left = statistics.fmean(cell["parameters"] for cell in cells)
        share = statistics.fmean(cell["parameters"] / cell["dense_parameters"] for cell in cells)
        seconds = statistics.fmean(cell["training_seconds"] for cell in cells)
        busy = "" if all(cell.get("quiet") for cell in [*cells, *(full or [])]) else "~"
        difference, times = "-", ""
        if full:
            difference = f"{statistics.fmean(scores) - statistics.fmean(100 * c['scores'][metric] for c in full):+.2f}"
            times = f" ({seconds / statistics.fmean(c['training_seconds'] for c in full):.2f})"
        rows.append(
            (
                name,
                str(len(cells)),
                f"{statistics.fmean(scores):.2f}{spread}",
                difference,
                f"{left / 1e6:.3f} M ({share:.3f})",
                f"{busy}{seconds:.0f} s{times}",
                *papers,
            )
        )
    headers = (
        *("row", "seeds", f"{metric} %", "to full", "parameters (share)", "training (of full)"),
        *("paper: accuracy %", "to full", "parameters (share)", "time (of full)", "source"),
    )
    about = next((cell["data"] for cells in trained.values() for cell in cells), "nothing yet")
    codes = {cell["code"] for cells in trained.values() for cell in cells}
    said = [f"- {row}: {cells[0]['refused']}" for row, cells in known.items() if "refused" in cells[0]]
    said += [f"- of {len(codes)} states of fxrank's files"] * (len(codes) > 1)
    grid = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return "\n".join([f"### {job}", "", f"{about}; {book.jobs[job].epochs} epochs", "", grid, "", *said]).rstrip()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    return campaign.parser(__doc__, JOBS, ROWS, "of every row")


def jobs_of(small: bool) -> dict[str, Job]:
    """The jobs, or the same with next to nothing to do; two epochs, as EB Train needs one before its ticket and one after."""
    return campaign.small(JOBS, epochs=2) if small else JOBS


def main(arguments: Sequence[str] | None = None) -> Book | None:
    """Train, or print. Returns the ledger."""
    options = campaign.read(parser(), arguments)
    jobs = jobs_of(options.small)
    if options.cell is not None:

        def train_one(cell: Cell) -> Mapping[str, Any]:
            share = SMALL_SHARE if options.small and options.share == 1 else options.share
            setup = ROWS[cell.row](jobs[cell.job])
            return train(jobs[cell.job], setup, cell.seed, Path(options.data), Path(options.cache), share)

        campaign.train_cell(options, train_one)
        return None
    book = Book(campaign.ledger_of("papers", options), "papers", jobs, ROWS)
    if not options.table:
        campaign.decode(jobs, options)
        rows = list(ROWS) if options.rows is None else options.rows
        Campaign(book, options).run(in_order(options.jobs, rows, options.seeds, rows))
    print(table(book, options.jobs))
    return book


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # terminated as interrupted: no cell goes on alone
    main()
