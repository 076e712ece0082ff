"""Five real jobs, each trained twice from the same seed: full-rank, and low-rank by `auto_lowrank`.

    python -m benchmarks.real_runs --data FOLDER
    python -m benchmarks.real_runs --data FOLDER --task char-transformer lstm-wikitext2 --scale 0.5

FOLDER holds the data sets that `benchmarks.subjects.tasks` names. One JSON per task: its metric of both runs on the same
validation data, parameters, MACs, E, K, R, seconds, seconds per step, and what became of every layer.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import fxrank
from benchmarks import record
from benchmarks.subjects.tasks import METRICS, TASKS, Task
from fxrank.passes.model.calls import call_arguments
from fxrank.training.batches import IGNORED, split_batch, to_device


def evaluate(model: nn.Module, loader: Iterable[Any], device: torch.device) -> tuple[float, float]:
    """Mean cross-entropy per prediction in nats, and the share of correct predictions.

    A prediction is one label that is not -100: an image, a sentence, a character or a word. Every one counts the
    same, whatever its batch, and labels are not smoothed.
    """
    model.eval()
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in loader:
            inputs, targets = split_batch(batch)
            inputs = to_device(inputs, device)
            args, kwargs = call_arguments(model, inputs)
            outputs = model(*args, **kwargs)
            logits = getattr(outputs, "logits", outputs).flatten(0, -2).float()
            labels = (targets["labels"] if isinstance(targets, dict) else targets).to(device).flatten()
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum())
            count += int((labels != IGNORED).sum())
    return loss / count, correct / count


def train(task: Task, policy: fxrank.Policy, epochs: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Train a fresh model with one policy and measure it on the validation data. Returns plain data."""
    result = trained(task, task.build(seed), epochs, seed, device, policy=policy, exclude=task.exclude)
    return measured(task, result, task.loaders(seed), device)


def trained(
    task: Task, model: nn.Module, epochs: int, seed: int, device: torch.device, **options: Any
) -> fxrank.Result:
    """`auto_lowrank` of a model with the task's data, optimizer and schedule, unless `options` have others."""
    loader, validation = task.loaders(seed)
    model.to(device)
    if "optimizer" not in options:
        optimizer = task.optimizer(model)
        scheduler, per = task.schedule(optimizer, len(loader) * epochs)  # type: ignore[arg-type]
        options |= {"optimizer": optimizer, "scheduler": scheduler, "scheduler_per": per}
    return fxrank.auto_lowrank(
        model,
        loader,
        epochs=epochs,
        val_loader=validation,
        loss_fn=task.loss_fn,
        device=device,
        seed=seed,
        progress=False,
        **options,
    )


def measured(
    task: Task, result: fxrank.Result, loaders: tuple[Iterable[Any], Iterable[Any]], device: torch.device
) -> dict[str, Any]:
    """The model of a run on the validation data, and what the report says, as plain data."""
    loader, validation = loaders
    loss, accuracy = evaluate(result.model, validation, device)
    report, plan = result.report, result.plan
    full, low = (_seconds(report.step_ms.get(phase)) for phase in ("full-rank", "low-rank"))
    found = {
        task.metric: METRICS[task.metric](loss, accuracy),
        "validation_loss": loss,
        "validation_accuracy": accuracy,
        "accuracy_before_switch": report.accuracy_before_switch,
        "accuracy_after_switch": report.accuracy_after_switch,
        "parameters_before": report.parameters_before,
        "parameters_after": report.parameters_after,
        "macs_before": report.macs_before,
        "macs_after": report.macs_after,
        "E": plan.E,
        "K": plan.K,
        "R": plan.R,
        "seconds": report.seconds,
        "seconds_per_step_before": full,
        "seconds_per_step_after": low,
        "speedup": report.measured_speedup,
        "overhead": report.overhead,
        "memory_bytes": report.memory_bytes,
        "steps_per_epoch": len(loader),  # type: ignore[arg-type]
        "policy": report.settings["policy"],
        "note": plan.note,
        "notes": report.notes,
    }
    layers = [asdict(layer) for layer in plan.layers]
    summary = [{key: layer[key] for key in ("name", "kind", "full_rank", "rank", "reason")} for layer in layers]
    history = [{k: v for k, v in row.items() if k != "stable_ranks"} for row in result.history]
    return found | {"plan": summary, "history": history}


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def run(task: Task, epochs: int | None, seed: int, device: torch.device) -> dict[str, Any]:
    """Both runs of one task."""
    epochs = task.epochs if epochs is None else epochs
    return {
        "task": task.name,
        "data": task.data,
        "metric": task.metric,
        "epochs": epochs,
        "full_rank": train(task, fxrank.FullRank(), epochs, seed, device),
        "low_rank": train(task, task.policy(epochs), epochs, seed, device),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder of the data sets")
    p.add_argument(
        "--task", nargs="+", default=list(TASKS), metavar="NAME", help=f"of {', '.join(TASKS)} (default all)"
    )
    p.add_argument("--epochs", type=int, default=None, help="default: each task's own")
    p.add_argument("--scale", type=float, default=1.0, help="times the training examples of an epoch")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--cache", default="data", help="folder for the decoded images (default %(default)s)")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    return p


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Run and write. Returns the paths of the JSON files, one a task."""
    options = parser().parse_args(arguments)
    if unknown := sorted(set(options.task) - set(TASKS)):
        raise SystemExit(f"--task must be among {', '.join(TASKS)}; got {', '.join(unknown)}")
    data, device = Path(options.data), torch.device(options.device)
    written, results = [], []
    for name in options.task:
        own = {"cache": Path(options.cache)} if name == "vit-cifar10" else {}
        found = run(TASKS[name](data, options.scale, **own), options.epochs, options.seed, device)
        configuration = {key: found[key] for key in ("task", "data", "metric", "epochs")}
        configuration |= {"scale": options.scale, "seed": options.seed, "device": str(device)}
        slug = f"run_{name.replace('-', '_')}"
        content = {"configuration": configuration, "results": {k: found[k] for k in ("full_rank", "low_rank")}}
        written.append(record.write(slug, content, device=device, folder=options.results))
        results.append(found)
    print(table(results))
    return written


def table(results: Sequence[dict[str, Any]]) -> str:
    """One row per task."""
    rows = []
    for found in results:
        full, low = found["full_rank"], found["low_rank"]
        before, after = low["seconds_per_step_before"], low["seconds_per_step_after"]
        rows.append(
            (
                found["task"],
                found["metric"],
                f"{full[found['metric']]:.4g}",
                f"{low[found['metric']]:.4g}",
                f"{low['parameters_before'] / low['parameters_after']:.2f}x",
                f"{low['macs_before'] / max(1, low['macs_after']):.2f}x",
                "-" if low["E"] is None else f"{low['E']:.2f}/{found['epochs']}",
                f"{len(low['R'])}/{len(low['plan'])}",
                "-" if before is None else f"{1000 * before:.0f}",
                "-" if after is None else f"{1000 * after:.0f}",
                f"{full['seconds']['total']:.0f}",
                f"{low['seconds']['total']:.0f}",
            )
        )
    headers = (
        "task",
        "metric",
        "full-rank",
        "low-rank",
        "parameters",
        "MACs",
        "E",
        "layers",
        "full step ms",
        "low step ms",
        "full s",
        "low s",
    )
    return tabulate(rows, headers=headers, disable_numparse=True)


if __name__ == "__main__":
    for path in main():
        print(f"written: {path.name}")
