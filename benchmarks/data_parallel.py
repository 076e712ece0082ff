"""Several processes that train one model: what gradient compression saves, and what a factorized model does.

    python -m benchmarks.data_parallel --data FOLDER --processes 2 4

A ResNet-18 in the CIFAR shape on CIFAR-10 (FOLDER as in `benchmarks.subjects.tasks`) under `DistributedDataParallel`, gloo on a CPU, NCCL
on GPUs. Full-rank with each of `baselines.gradients`, and with plain averaging Pufferfish's factorized model and the one that fxrank's
default comes to. Each row is trained for the same number of epochs, for its accuracy, and kept in a ledger: the same command goes on
where it was broken off. Then the models that came out are stepped in turn in one group of processes, so that their times are of the same
moment: medians and quartiles over the rounds. The paper's full network is `--width 64 --side 32`.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

import fxrank
from benchmarks import record
from benchmarks.baselines.gradients import COMPRESSIONS, compress
from benchmarks.real_runs import measured
from benchmarks.subjects import tasks
from benchmarks.subjects.cells import plan_data, with_pairs
from benchmarks.subjects.jobs import resnet_cifar10
from benchmarks.subjects.tasks import Task

WARM_UP = 4
"""Steps before the measured ones: a new reducer and PowerSGD begin with plain ones."""


@dataclass(frozen=True)
class Row:
    """A way to train: a policy, given the number of epochs, and one of `COMPRESSIONS`."""

    policy: Callable[[int], fxrank.Policy]
    hook: str


def full_rank(epochs: int) -> fxrank.Policy:
    """The dense model."""
    return fxrank.FullRank()


def pufferfish(epochs: int) -> fxrank.Policy:
    """A quarter of full rank after three layers, switched at 80/300 of the run (Wang et al., MLSys 2021, §4.1)."""
    return fxrank.Pufferfish(E=epochs * 80 / 300, K=3, ratio=0.25)


ROWS: dict[str, Row] = {
    **{f"full-rank, {hook}": Row(full_rank, hook) for hook in COMPRESSIONS},
    "Pufferfish, SGD": Row(pufferfish, "SGD"),
    "Pufferfish, PowerSGD, rank 4": Row(pufferfish, "PowerSGD, rank 4"),
    "fxrank, SGD": Row(lambda epochs: fxrank.Cuttlefish(), "SGD"),
}
"""Rows by name. The first is what the others' times are compared with."""


class Contender:
    """A model under its wrapper and the optimizer of its hook, stepped on request. `group` counts the bytes that it sends."""

    def __init__(self, model: nn.Module, hook: str, device: torch.device) -> None:
        # One bucket: gloo may not keep the order of what PowerSGD sends for several.
        self.wrapper = DistributedDataParallel(
            model.to(device), device_ids=[device.index] if device.type == "cuda" else None, bucket_cap_mb=512
        )
        self.group = compress(self.wrapper, hook)
        found = COMPRESSIONS[hook]
        self.optimizer = torch.optim.SGD(model.parameters(), lr=found.lr, momentum=found.momentum, weight_decay=5e-4)

    def step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """Milliseconds of one step, and the bytes that it sent and received."""
        sent, received = self.group.sent, self.group.received
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.wrapper(x), y).backward()
        self.optimizer.step()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        seconds = time.perf_counter() - start
        return {
            "step_ms": 1000 * seconds,
            "bytes_per_step": self.group.sent - sent,
            "received_per_step": self.group.received - received,
        }


def train(task: Task, row: Row, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train a row in this group of processes. Returns plain data, all of it in the first process, which measures for all; in the others the
    pairs alone.
    """
    contender = Contender(task.build(options.seed), row.hook, device)
    loader, tested = task.loaders(options.seed)
    mine = loader.share(dist.get_rank(), dist.get_world_size())  # type: ignore[attr-defined]
    scheduler, per = task.schedule(contender.optimizer, len(mine) * options.epochs)
    policy = row.policy(options.epochs)
    run = fxrank.auto_lowrank(
        contender.wrapper,
        mine,
        epochs=options.epochs,
        loss_fn=task.loss_fn,
        optimizer=contender.optimizer,
        scheduler=scheduler,
        scheduler_per=per,
        device=device,
        policy=policy,
        exclude=("*shortcut*",) if isinstance(policy, fxrank.Pufferfish) else (),
        seed=options.seed,
        progress=False,
    )
    pairs = plan_data(run.plan)
    if dist.get_rank():
        return {"pairs": pairs}
    # without its wrapper, which would send the others its buffers
    found = measured(task, replace(run, model=contender.wrapper.module), (mine, tested), device)
    kept = ("accuracy", "E", "K", "seconds", "note", "notes", "steps_per_epoch", "seconds_per_step_after")
    return {name: found[name] for name in kept} | {
        "parameters": found["parameters_after"],
        "bytes_of_run": contender.group.sent,
        "received_in_run": contender.group.received,
        "pairs": pairs,
    }


def time_steps(task: Task, pairs: dict[str, Any], rounds: int, seed: int, device: torch.device) -> dict[str, Any]:
    """Steps of all rows in turn, with the `pairs` that each has come to and fresh weights."""
    contenders = {
        name: Contender(with_pairs(task.build(seed), found) if found else task.build(seed), ROWS[name].hook, device)
        for name, found in pairs.items()
    }
    loader = task.loaders(seed)[0].share(dist.get_rank(), dist.get_world_size())  # type: ignore[attr-defined]
    x, y = (t.to(device) for t in next(iter(loader)))
    laps: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for i in range(WARM_UP + rounds):
        for name, contender in contenders.items():
            lap = contender.step(x, y)
            if i >= WARM_UP:
                laps[name].append(lap)
    first = [lap["step_ms"] for lap in next(iter(laps.values()))]
    return {
        name: {key: numpy.median([lap[key] for lap in found]).item() for key in found[0]}
        | {"step_ms_quartiles": _quartiles([lap["step_ms"] for lap in found])}
        | {"of_full_rank": numpy.median(ratios := [a["step_ms"] / b for a, b in zip(found, first, strict=True)]).item()}
        | {"of_full_rank_quartiles": _quartiles(ratios)}
        for name, found in laps.items()
    }


def _quartiles(values: Sequence[float]) -> list[float]:
    return numpy.quantile(values, [0.25, 0.75]).tolist()  # type: ignore[no-any-return]


def work(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What a process of a group does: train the rows that the ledger lacks, which the first one writes, and time the steps of all. Returns
    the rows in the first process.
    """
    size, first = dist.get_world_size(), dist.get_rank() == 0
    task = resnet_cifar10(
        Path(options.data),
        stages=4,
        depth=2,
        width=options.width,
        side=options.side,
        cache=Path(options.cache),
        batch=options.batch,
        train=options.train,
    )
    ledger = record.Ledger(Path(options.ledger), configuration(options))
    known: list[Any] = [{name: ledger.found(entry(size, name)) for name in options.rows}]
    dist.broadcast_object_list(known)  # as the first one reads it: it writes meanwhile
    rows: dict[str, Any] = known[0]
    for name in options.rows:
        if rows[name] is None:
            rows[name] = train(task, ROWS[name], options, device)
            if first:
                ledger.add(entry(size, name), rows[name], shown=False)
                print(f"{size} processes, {name}: {100 * rows[name]['accuracy']:.2f} %", flush=True)
    steps = time_steps(
        task, {name: found["pairs"] for name, found in rows.items()}, options.rounds, options.seed, device
    )
    return {name: found | steps[name] for name, found in rows.items()} if first else {}


def entry(size: int, name: str) -> dict[str, Any]:
    """A row's name in the ledger. At another rate it is another row."""
    found = COMPRESSIONS[ROWS[name].hook]
    return {"processes": size, "row": name, "lr": found.lr, "momentum": found.momentum}


def in_group(rank: int, size: int, store: str, output: str, options: argparse.Namespace) -> None:
    """One process of a group; the first one writes what was found."""
    cuda = torch.cuda.device_count() >= size
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    found = work(options, device)
    if rank == 0:
        torch.save(found, output)
    dist.barrier()
    dist.destroy_process_group()


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """What a row's accuracy depends on."""
    cuda = torch.cuda.device_count() >= min(options.processes)
    names = ("width", "side", "train", "epochs", "batch", "seed")
    return {name: getattr(options, name) for name in names} | {"device": "cuda" if cuda else "cpu"}


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line a row."""
    lines = [
        (
            size,
            name,
            f"{row['parameters']:,}",
            f"{row['bytes_per_step'] / 1e6:.3f}",
            f"{row['received_per_step'] / 1e6:.3f}",
            f"{row['bytes_of_run'] / 1e6:.1f}",
            f"{row['step_ms']:.1f} ({' - '.join(f'{ms:.1f}' for ms in row['step_ms_quartiles'])})",
            f"{row['of_full_rank']:.2f} ({' - '.join(f'{share:.2f}' for share in row['of_full_rank_quartiles'])})",
            f"{100 * row['accuracy']:.2f}",
        )
        for size, found in results.items()
        for name, row in found.items()
    ]
    headers = ("processes", "row", "parameters", "MB a step", "received", "MB a run", "step ms", "of full-rank", "%")
    return tabulate(lines, headers=headers, disable_numparse=True)


def main(arguments: Sequence[str] | None = None, spawn: Callable[..., Any] = start_processes) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", required=True, help="folder of the data sets")
    p.add_argument("--cache", default="data", help="folder for the decoded images (default %(default)s)")
    p.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    p.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=f"of {'; '.join(ROWS)}")
    p.add_argument("--width", type=int, default=16, help="channels of the first stage (default %(default)s)")
    p.add_argument("--side", type=int, default=16, help="pixels of an image's side (default %(default)s)")
    p.add_argument("--train", type=int, default=10_000, help="training images (default %(default)s)")
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--batch", type=int, default=64, help="images a step, of all processes (default %(default)s)")
    p.add_argument("--rounds", type=int, default=11, help="of timed steps (default %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ledger", default="run/data_parallel.jsonl", help="(default %(default)s)")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    tasks.small_cifar10(Path(options.data), Path(options.cache), options.side)  # decoded once, for all
    results = {}
    for size in options.processes:
        with tempfile.TemporaryDirectory() as scratch:
            found = Path(scratch) / "found.pt"
            spawn(
                in_group, (size, str(Path(scratch) / "store"), str(found), options), nprocs=size, start_method="spawn"
            )
            results[str(size)] = torch.load(found, weights_only=True)
    print(table(results))
    made_with = configuration(options) | {"processes": options.processes, "rounds": options.rounds}
    device = torch.device(made_with["device"])
    return record.write(
        "data_parallel", {"configuration": made_with, "results": results}, device=device, folder=options.results
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
