"""One-shot factorization of trained Transformers within a budget: what is left of their metric, by what the factors know, by form, and by
how ranks are chosen.

    python -m benchmarks.oneshot_text --source FOLDER --task minilm-sst2      # fine-tuned first, if the file of --weights is not there
    python -m benchmarks.oneshot_text --source FOLDER --task char-transformer

FOLDER holds the data sets that `benchmarks.subjects.tasks` names. Each row: the metric as it comes, after the same few steps of training,
the share of the dense model's time for a forward call (medians of interleaved calls), seconds that the call took. With `--no-timing` the
last two are left out: on a busy machine they say nothing. `layers` tells whether tables, first and last layer may be factorized too
("all") or not ("inner"). Rows are kept in a ledger as they come; the same command goes on after the last one.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxrank
from benchmarks import record
from benchmarks.oneshot import relative_time
from benchmarks.real_runs import evaluate
from benchmarks.subjects.allocations import unweighed
from benchmarks.subjects.tasks import METRICS, TASKS, Task
from benchmarks.subjects.text_models import CharTransformer
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.errors import BudgetError
from fxrank.passes.model.calls import call_arguments
from fxrank.passes.tracing.trace import trace
from fxrank.policies.ranks import ratio_rank
from fxrank.training.batches import run_batch, split_batch

NAMES = ("minilm-sst2", "char-transformer")
CPU = torch.device("cpu")


def train(task: Task, model: nn.Module, steps: int, seed: int, rate: float = 1.0) -> None:
    """So many steps of the task's own training, in place, at this share of its learning rate; evaluation mode afterwards."""
    loader, _ = task.loaders(seed)
    optimizer = task.optimizer(model)
    for group in optimizer.param_groups:
        group["lr"] *= rate
    scheduler, _ = task.schedule(optimizer, steps)
    model.train()
    for batch in islice(_endless(loader), steps):
        run_batch(model, batch, task.loss_fn).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    model.eval()


def _endless(loader: Iterable[Any]) -> Iterable[Any]:
    return (batch for again in cycle([loader]) for batch in again)


def metric(task: Task, model: nn.Module) -> float:
    """On the validation data."""
    return METRICS[task.metric](*evaluate(model, task.loaders(0)[1], CPU))


class _Called(nn.Module):
    """A model that is called with a whole batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Any:
        args, kwargs = call_arguments(self.model, split_batch(batch)[0])
        return self.model(*args, **kwargs)


def even_ratio(model: nn.Module, example: Any, share: float, form: str) -> float:
    """The largest ratio of full rank of all inner layers with which the model keeps to its share of the parameters. Raises `BudgetError`
    if there is none.
    """
    found = candidates(discover(trace(model, example), model), model)
    layers = [layer.if_in_form(form) for layer in found if layer.reason is None]
    total = sum(p.numel() for p in model.parameters())
    rest = total - sum(layer.parameters for layer in layers)

    def fits(ratio: float) -> bool:
        ranks = ((layer, ratio_rank(layer.full_rank, ratio)) for layer in layers)
        return rest + sum(layer.pair_parameters(rank) for layer, rank in ranks) <= share * total

    if not fits(0.0):
        raise BudgetError(f"a share of {share} is out of reach with rank 1 in every inner layer")
    low, high = 0.0, 1.0
    for _ in range(20):
        ratio = (low + high) / 2
        low, high = (ratio, high) if fits(ratio) else (low, ratio)
    return low


def narrower(task: Task, dense: nn.Module, share: float) -> nn.Module | None:
    """A character model of less width with no more parameters than that share, before training; None for other tasks."""
    if not isinstance(dense, CharTransformer):
        return None
    total = sum(p.numel() for p in dense.parameters())
    length, width = (int(n) for n in dense.positions.shape)
    heads, vocabulary = 6, dense.head.out_features  # the task's own, whatever its width
    for smaller in range(width - heads, 0, -heads):
        torch.manual_seed(0)
        model = CharTransformer(vocabulary, length, smaller, heads, len(dense.blocks), 0.1)
        if sum(p.numel() for p in model.parameters()) <= share * total:
            return model
    return None


Made = tuple[dict[str, Any], Callable[[], nn.Module | None]]


def ways(task: Task, dense: nn.Module, options: argparse.Namespace, steps: int) -> list[Made]:
    """What makes each row: its name, and a call that makes the model, None if there is none."""
    calibration = list(islice(task.loaders(1)[0], options.calibration))
    example = split_batch(calibration[0])[0]
    found = discover(trace(dense, example), dense)
    forms = ["channel", *(["auto"] if any(layer.other_forms for layer in found) else [])]
    made: list[Made] = [({"budget": 1.0, "way": "dense"}, lambda: copy.deepcopy(dense))]

    def add(make: Callable[..., nn.Module | None], **name: Any) -> None:
        made.append((name, lambda: make(**{k: v for k, v in name.items() if k != "way"})))

    def even(budget: float, form: str, factors: str, **_: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "ranks at or above break-even")
            ratio = even_ratio(dense, example, budget, form)
            return fxrank.factorize(dense, example, ratio, form=form, calibration=known(factors))

    def chosen(budget: float, form: str, factors: str, layers: str, **_: Any) -> nn.Module:
        include = "*" if layers == "all" else ()
        given = known(factors)
        return fxrank.factorize(dense, example, form=form, target_params=budget, include=include, calibration=given)

    def own(**name: Any) -> nn.Module:
        with unweighed():
            return chosen(**name)

    def known(factors: str) -> Any:
        return calibration if factors == "data" else None

    def small(budget: float) -> nn.Module | None:
        model = narrower(task, dense, budget)
        if model is not None:
            train(task, model, steps, seed=0)
        return model

    for budget in options.budgets:
        for factors in ("weight", "data"):
            about = {"budget": budget, "way": "pairs", "factors": factors}
            add(even, **about, form="channel", ranks="uniform", layers="inner")
            for form in forms:
                add(chosen, **about, form=form, ranks="chosen", layers="inner")
            add(chosen, **about, form=forms[-1], ranks="chosen", layers="all")
            if factors == "data":
                add(own, **about, form=forms[-1], ranks="own losses", layers="inner")
                add(own, **about, form=forms[-1], ranks="own losses", layers="all")
        if options.narrower:
            add(small, budget=budget, way="narrower")
    return made


def measure(task: Task, dense: nn.Module, options: argparse.Namespace, steps: int, ledger: record.Ledger) -> None:
    """Every row that the ledger lacks."""
    batch = next(iter(task.loaders(1)[0]))
    for name, make in ways(task, dense, options, steps):
        if ledger.found(name) is not None:
            continue
        start = time.perf_counter()
        try:
            model = make()
        except BudgetError as error:
            ledger.add(name, {"refused": str(error)})
            continue
        seconds = time.perf_counter() - start
        if model is None:
            continue
        found: dict[str, Any] = {
            "parameters": sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters()),
            "raw": metric(task, model),
        }
        if not options.no_timing:
            found |= {
                "forward": relative_time(_Called(dense), _Called(model), batch)[0],
                "seconds": seconds,
            }
        if options.steps:
            train(task, model, options.steps, seed=2, rate=options.healing_rate)
            found["healed"] = metric(task, model)
        ledger.add(name, found)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row."""
    columns = (
        "budget",
        "way",
        "factors",
        "form",
        "ranks",
        "layers",
        "parameters",
        "raw",
        "healed",
        "forward",
        "seconds",
    )
    kept = [c for c in columns if any(c in row for row in rows)]
    lines = [[f"{row[c]:.4f}" if isinstance(row.get(c), float) else row.get(c, "-") for c in kept] for row in rows]
    return tabulate(lines, headers=kept, disable_numparse=True)


def main(arguments: Sequence[str] | None = None, tasks: dict[str, Callable[..., Task]] = TASKS) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", required=True, help="folder of the data sets")
    p.add_argument("--task", choices=NAMES, default=NAMES[0])
    p.add_argument("--scale", type=float, default=1.0, help="of the number of training examples (default %(default)s)")
    p.add_argument("--weights", default=None, help="state dict, written after training if it is not there")
    p.add_argument("--epochs", type=int, default=None, help="of the training before (default: the task's)")
    p.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    p.add_argument("--calibration", type=int, default=16, help="batches (default %(default)s)")
    p.add_argument(
        "--no-narrower",
        dest="narrower",
        action="store_false",
        help="leave out the narrower models, whose training takes as long as the dense one's",
    )
    p.add_argument("--steps", type=int, default=100, help="of training for a column; 0 leaves it out")
    p.add_argument("--healing-rate", type=float, default=0.5, help="of the task's learning rate (default %(default)s)")
    p.add_argument("--no-timing", action="store_true", help="leave out the columns of time")
    p.add_argument("--ledger", default="run/oneshot_text.jsonl", help="(default %(default)s)")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    task = tasks[options.task](Path(options.source), options.scale)
    task = task if options.epochs is None else replace(task, epochs=options.epochs)
    steps = task.epochs * len(task.loaders(0)[0])  # type: ignore[arg-type]
    weights = Path(options.weights or f"data/oneshot_{task.name}.pt")
    dense = task.build(0)
    if weights.is_file():
        dense.load_state_dict(torch.load(weights, weights_only=True))
        dense.eval()
    else:
        train(task, dense, steps, seed=0)
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dense.state_dict(), weights)
    places = ("source", "weights", "results", "ledger", "budgets", "narrower")
    configuration = {k: v for k, v in vars(options).items() if k not in places} | {
        "data": task.data,
        "metric": task.metric,
    }
    ledger = record.Ledger(Path(options.ledger), configuration)
    measure(task, dense, options, steps, ledger)
    print(table(ledger.rows))
    name = f"oneshot_{task.name.replace('-', '_')}"
    data = {"configuration": configuration, "results": ledger.rows}
    return record.write(name, data, device=CPU, folder=options.results)


if __name__ == "__main__":
    print(main())
