"""GLUE: a pretrained encoder fine-tuned as it is, by Cuttlefish, by fxrank's default, and two students of half its layers.

    python -m benchmarks.glue --data FOLDER
    python -m benchmarks.glue --table

MiniLM-L6 on SST-2, CoLA and STS-B, as FOLDER holds them (see `benchmarks.subjects.glue`). A cell is a data set, a row and a seed, about three
minutes of one core with the default numbers of sentences and epochs. Cells are kept in a ledger as they come: the same command goes on where
it was broken off. The students stand in for DistilBERT and TinyBERT (see `benchmarks.baselines.distilled`); their teacher is the full-rank
row's model of the same seed. The table has the Cuttlefish paper's figures beside each row: of BERT-base, all of the data, a GPU.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxrank
from benchmarks import record
from benchmarks.baselines.distilled import DistilBert, TinyBertLayers, TinyBertPrediction, student
from benchmarks.real_runs import trained
from benchmarks.subjects.glue import DATA_SETS, scores
from benchmarks.subjects.tasks import Task, minilm_glue

LAYERS = 3
"""Of the students: half of the teacher's."""


@dataclass(frozen=True)
class Paper:
    """A row of the paper's table: parameters in millions, and the metric of each data set, times 100."""

    name: str
    parameters: float
    metric: dict[str, float]


def _paper(name: str, parameters: float, sst2: float, cola: float, stsb: float) -> Paper:
    return Paper(name, parameters, {"SST-2": sst2, "CoLA": cola, "STS-B": stsb})


PAPER: dict[str, Paper] = {
    "full-rank": _paper("BERT-base", 108.3, 92.2, 60.1, 88.6),
    "cuttlefish": _paper("Cuttlefish", 48.8, 92.3, 56.8, 87.9),
    "distilbert": _paper("DistilBERT", 65.8, 90.6, 47.3, 83.4),
    "tinybert": _paper("TinyBERT6", 67.0, 91.5, 46.2, 89.3),
}
"""Cuttlefish (Wang et al., MLSys 2023), Table 4: accuracy on SST-2, Spearman's correlation on STS-B; on CoLA it says accuracy, and BERT's 60.1
is its Matthews correlation. Cuttlefish's 48.8 are those that are trained, as the feed-forward layers are frozen; BERT's are all.
"""


class Run:
    """A task and what its rows share: epochs, seed, device, and the fine-tuned teacher, which is kept in a file."""

    def __init__(self, task: Task, options: argparse.Namespace, seed: int) -> None:
        self.task, self.seed, self.epochs = task, seed, options.epochs
        self.device = torch.device(options.device)
        about = [task.name, options.train, options.epochs, seed]
        self._weights = Path(options.weights) / f"{'_'.join(map(str, about))}.pt"

    def fine_tuned(self, model: nn.Module, policy: fxrank.Policy, task: Task | None = None) -> fxrank.Result:
        """The model after all epochs."""
        return trained(task or self.task, model, self.epochs, self.seed, self.device, policy=policy)

    def full_rank(self) -> list[fxrank.Result]:
        """The model as it is, whose weights are kept for the students."""
        result = self.fine_tuned(self.task.build(self.seed), fxrank.FullRank())
        self._weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result.model.state_dict(), self._weights)
        return [result]

    def teacher(self) -> nn.Module:
        """The full-rank row's model, trained again if its weights are not there."""
        if not self._weights.is_file():
            self.full_rank()
        model = self.task.build(self.seed)
        model.load_state_dict(torch.load(self._weights, weights_only=True))
        return model.to(self.device).eval().requires_grad_(False)

    def taught(self, *losses: Callable[[nn.Module, nn.Module], Any]) -> list[fxrank.Result]:
        """A student of the teacher, for all epochs by one loss after the other, each made of the teacher and the student."""
        teacher = self.teacher()
        model = student(teacher, LAYERS).requires_grad_(True)
        return [
            self.fine_tuned(model, fxrank.FullRank(), replace(self.task, loss_fn=loss(teacher, model)))
            for loss in losses
        ]


ROWS: dict[str, Callable[[Run], list[fxrank.Result]]] = {
    "full-rank": Run.full_rank,
    "cuttlefish": lambda run: [run.fine_tuned(run.task.build(run.seed), run.task.policy(run.epochs))],
    "fxrank": lambda run: [run.fine_tuned(run.task.build(run.seed), fxrank.Cuttlefish())],
    "distilbert": lambda run: run.taught(lambda teacher, model: DistilBert(teacher)),
    "tinybert": lambda run: run.taught(TinyBertLayers, lambda teacher, model: TinyBertPrediction(teacher)),
}
"""Rows by name: the trainings of each, one after the other; the last one's model counts."""
SHOWN = {
    "full-rank": "MiniLM-L6",
    "cuttlefish": "Cuttlefish, max(scaled stable, accumulative rank), after an epoch",
    "fxrank": "fxrank's default",
    "distilbert": f"{LAYERS}-layer student, DistilBERT's loss",
    "tinybert": f"{LAYERS}-layer student, TinyBERT's losses",
}


def cell(run: Run, row: str, metrics: Sequence[str]) -> dict[str, Any]:
    """Train a row and measure it on the development split. Returns plain data; the seconds are without evaluation."""
    results = ROWS[row](run)
    last = results[-1]
    found = scores(last.model, run.task.loaders(run.seed)[1], metrics, run.device)
    seconds = [result.report.seconds for result in results]
    plan = last.plan
    return {
        "scores": found,
        "data": run.task.data,
        "parameters": sum(p.numel() for p in last.model.parameters()),
        "seconds": sum(s["total"] - s.get("evaluation", 0.0) for s in seconds),
        "E": plan.E,
        "factorized": len(plan.R),
        "layers": len(plan.layers),
        "note": plan.note,
        "load": round(os.getloadavg()[0], 2),
    }


def table(rows: Sequence[dict[str, Any]], style: str = "simple") -> str:
    """One line a data set and row: means over seeds, the students' seconds without their teacher's, and the paper's figures. `style` is one of
    tabulate's.
    """
    lines = []
    for name, about in DATA_SETS.items():
        for row, shown in SHOWN.items():
            cells = [found for found in rows if (found["data_set"], found["row"]) == (name, row)]
            if not cells:
                continue
            means = [f"{metric} {100 * fmean(c['scores'][metric] for c in cells):.1f}" for metric in about.metrics]
            paper = PAPER.get(row)
            beside = (
                ("-", "-", "-")
                if paper is None
                else (paper.name, f"{paper.metric[name]:.1f}", f"{paper.parameters:.1f}")
            )
            size = fmean(c["parameters"] for c in cells) / 1e6
            seconds = f"{fmean(c['seconds'] for c in cells):.0f}"
            lines.append((name, shown, ", ".join(means), f"{size:.1f}", seconds, len(cells), *beside))
    headers = (
        "data",
        "model",
        "metric x 100",
        "parameters, M",
        "seconds",
        "seeds",
        "paper's",
        "metric",
        "parameters, M",
    )
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=None, help="folder of the data sets")
    p.add_argument("--sets", nargs="+", default=list(DATA_SETS), choices=DATA_SETS, metavar="SET", help="default all")
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)}")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--train", type=int, default=2048, help="sentences, or pairs, to train on (default %(default)s)")
    p.add_argument("--test", type=int, default=None, help="of the development split (default all)")
    p.add_argument("--epochs", type=int, default=3, help="of each training (default %(default)s)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--weights", default="run/glue", help="folder of the teachers (default %(default)s)")
    p.add_argument("--ledger", default=None, help="(default: in benchmarks/results)")
    p.add_argument("--table", action="store_true", help="print the table from the ledger, and train nothing")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    return p


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Train what the ledger lacks, print and write. Returns the path of the JSON."""
    options = parser().parse_args(arguments)
    configuration = {name: getattr(options, name) for name in ("train", "test", "epochs", "device")}
    device = torch.device(options.device)
    place = options.ledger or record.place("glue", record.environment(device), ending="jsonl")
    ledger = record.Ledger(Path(place), configuration)
    if options.table:
        print(table(ledger.rows))
        return None
    if options.data is None:
        raise SystemExit("--data FOLDER is where the data sets are")
    for name in options.sets:
        cells = [(row, seed) for seed in options.seeds for row in options.rows]
        names = [{"data_set": name, "row": row, "seed": seed} for row, seed in cells]
        missing = [found for found in names if ledger.found(found) is None]
        if not missing:
            continue
        task = minilm_glue(Path(options.data), name, train=options.train, test=options.test)
        for one in missing:
            run = Run(task, options, int(one["seed"]))
            ledger.add(one, cell(run, str(one["row"]), DATA_SETS[name].metrics))
    print(table(ledger.rows))
    data = {"configuration": configuration, "results": ledger.rows}
    return record.write("glue", data, device=device, folder=options.results)


if __name__ == "__main__":
    if (path := main()) is not None:
        print(f"written: {path.name}")
