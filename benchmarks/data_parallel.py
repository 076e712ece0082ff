"""What a factorized model saves when several processes train it: bytes averaged per step, and step time.

    python -m benchmarks.data_parallel --processes 2 4

ResNet-18 in the CIFAR shape at Pufferfish's ratio of 1/4, full-rank against factorized, each with plain averaging and
with PowerSGD of rank 4, under `DistributedDataParallel` (gloo on a CPU, NCCL on GPUs). All four are stepped in turn in
one group of processes, so that their times are of the same moment; medians over the rounds.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

import fxrank
from benchmarks import record
from benchmarks.subjects.models import resnet18
from benchmarks.switch_cost import NAMES
from fxrank.oneshot import copied

POWERSGD_RANK = 4
WARM_UP = 4
"""Steps before the measured ones: a new reducer and PowerSGD begin with plain ones."""


class Contender:
    """One model under its wrapper, stepped on request. Counts the bytes that each step sends."""

    def __init__(self, model: nn.Module, powersgd: bool, device: torch.device) -> None:
        # One bucket: gloo may not keep the order of what PowerSGD sends for several.
        self.wrapper = DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, bucket_cap_mb=512
        )
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.sent = 0
        self.state: Any = None
        if powersgd:
            self.state = powerSGD_hook.PowerSGDState(None, POWERSGD_RANK, start_powerSGD_iter=2)
            self.wrapper.register_comm_hook(self.state, powerSGD_hook.powerSGD_hook)
        else:
            self.wrapper.register_comm_hook(None, self._average)

    def _average(self, state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        self.sent += bucket.buffer().nbytes
        return default_hooks.allreduce_hook(self.wrapper.process_group, bucket)

    def step(self, x: Tensor, y: Tensor) -> tuple[float, int]:
        """Seconds of one step, and the bytes that it sent."""
        before = self._bytes()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        dist.barrier()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.wrapper(x), y).backward()
        self.optimizer.step()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - start, self._bytes() - before

    def _bytes(self) -> int:
        return self.sent if self.state is None else 4 * self.state.total_numel_after_compression  # float32


def measure(rank: int, size: int, store: str, folder: str, batch: int, rounds: int) -> None:
    """One process of a group; the first one writes what it measured."""
    cuda = torch.cuda.device_count() >= size
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if not cuda:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    full = resnet18()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = fxrank.factorize(full, torch.randn(2, 3, 32, 32), rank=dict.fromkeys(NAMES, 0.25))
    parameters = {"full-rank": full, "low-rank": small}
    contenders = {
        (name, hook): Contender(copied(model).to(device), hook == "PowerSGD", device)
        for name, model in parameters.items()
        for hook in ("plain", "PowerSGD")
    }
    x = torch.randn(batch, 3, 32, 32, device=device)
    y = torch.randint(0, 10, (batch,), device=device)
    laps: dict[tuple[str, str], list[tuple[float, int]]] = {key: [] for key in contenders}
    for i in range(WARM_UP + rounds):
        for key, contender in contenders.items():
            lap = contender.step(x, y)
            if i >= WARM_UP:
                laps[key].append(lap)
    if rank == 0:
        torch.save(
            {
                f"{name}, {hook}": {
                    "parameters": sum(p.numel() for p in parameters[name].parameters()),
                    "bytes_per_step": statistics.median(sent for _, sent in found),
                    "step_ms": 1000 * statistics.median(seconds for seconds, _ in found),
                    "of_full_rank": statistics.median(
                        mine / whole for (mine, _), (whole, _) in zip(found, laps["full-rank", "plain"], strict=True)
                    ),
                }
                for (name, hook), found in laps.items()
            },
            folder,
        )
    dist.barrier()
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None, spawn: Callable[..., Any] = start_processes) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    p.add_argument("--batch", type=int, default=16, help="images per process")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    results = {}
    for size in options.processes:
        with tempfile.TemporaryDirectory() as scratch:
            found = Path(scratch) / "found.pt"
            spawn(
                measure,
                (size, str(Path(scratch) / "store"), str(found), options.batch, options.rounds),
                nprocs=size,
                start_method="spawn",
            )
            results[str(size)] = torch.load(found, weights_only=True)
        for name, row in results[str(size)].items():
            print(
                f"{size} processes  {name:20} {row['bytes_per_step'] / 1e6:8.2f} MB  {row['step_ms']:8.1f} ms  {row['of_full_rank']:.2f}"
            )
    configuration = {k: v for k, v in vars(options).items() if k != "results"} | {"powersgd_rank": POWERSGD_RANK}
    cuda = torch.cuda.device_count() >= min(options.processes)
    return record.write(
        "data_parallel",
        {"configuration": configuration, "results": results},
        device=torch.device("cuda" if cuda else "cpu"),
        folder=options.results,
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
