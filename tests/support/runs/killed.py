"""A process that has torch imported and forks training runs, to be killed and resumed; see test_resume.py.

Each request is a line of JSON on standard input, `{"folder": …, "event": …, "after_ms": …}`; the answer a line on
standard output. `event` is the call (Python's or C's) counted from the run's start at which the run kills itself by
SIGKILL (0: never, they are only counted, in events.json); `after_ms` the time after which it is killed from outside.

`"factors"` is the policy's option. With `"size": n` a team of n processes trains on gloo; the answer lists their exit codes. The process `"rank"` counts the
events, and takes the whole team with it, or dies `"alone"`. `"ddp"` holds options of DistributedDataParallel.
"""

import dataclasses
import functools
import hashlib
import importlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import torch
import torch.distributed as dist
from nets import UNTIMED
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import fxrank
from fxrank.distributed.launch import in_shares

# A page takes as many calls as the training of this network. It is written as the other files are, after them.
sys.modules["jinja2"] = None  # type: ignore[assignment]

WATCHED = ("_switch", "write_plain", "evaluate")
"""Functions of which the calls' first and last event are noted."""


class Noisy(Dataset):
    """Points with labels, augmented from every random number there is."""

    def __init__(self, count=64):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 12, generator=generator)
        self.y = (self.x[:, :2] > 0).long() @ torch.tensor([1, 2])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        noise = torch.randn(12) * 0.01 + np.random.rand() * 0.01 + random.random() * 0.01
        return self.x[i] + noise, self.y[i]


def network():
    """Four Linear layers with BatchNorms and a dropout between them; "3" and "7" are eligible."""
    layers = [nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.Dropout(0.1), nn.BatchNorm1d(32)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


def train(folder, rank=0, size=1, ddp=None, factors="weight"):
    """40 steps, the switch after 20 of them, in the middle of an epoch; a checkpoint every 3 steps. Each process draws
    random numbers of its own.
    """
    torch.manual_seed(0)
    np.random.seed(1 + rank)
    random.seed(2 + rank)
    batch = -(-(8 if factors == "weight" else 40) // size)  # 32 numbers go into a layer
    model, data = network(), Noisy(8 * batch * size)
    inner = model
    if size > 1:
        model = DistributedDataParallel(model, **(ddp or {}))
        torch.manual_seed(rank)
    metric = "scaled_stable_rank" if factors == "weight" else "outputs"
    policy = dataclasses.replace(UNTIMED, lr_scale=0.5, rewarmup=0.1, factors=factors, rank_metric=metric, keep=0.8)
    if size > 1:  # where ranks fall more slowly
        policy = dataclasses.replace(policy, rank_metric="ratio", ratio=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9, weight_decay=4e-2)
    dealt = torch.Generator().manual_seed(4)
    result = fxrank.auto_lowrank(
        model,
        in_shares(DataLoader(data, batch, shuffle=True, generator=dealt)),
        val_loader=in_shares(DataLoader(data, 32)),
        epochs=5,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=40),
        scheduler_per="batch",
        policy=policy,
        device="cpu",
        progress=False,
        output_dir=folder,
        resume=True,
        checkpoint_every=3,
    )
    assert set(result.plan.R) == {"3", "7"}
    assert result.plan.switch_step == 20
    history = [{k: v for k, v in row.items() if k != "step_ms"} for row in result.history]
    switch = [result.report.accuracy_before_switch, result.report.accuracy_after_switch]
    state = hashlib.sha256(b"".join(v.numpy().tobytes() for v in inner.state_dict().values())).hexdigest()
    parameters = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in inner.parameters())).hexdigest()
    end = {"history": history, "curves": result.curves, "switch": switch, "state": state, "parameters": parameters}
    place = Path(folder) / ("history.json" if rank == 0 else f"history{rank}.json")
    place.write_text(json.dumps(end | {"notes": result.report.notes}, indent=1))


class Counter:
    """Counts calls, notes where the watched functions are, and kills at `event`."""

    def __init__(self, event, alone=True):
        self.count, self.event, self.seen, self.alone = 0, event, [], alone

    def __call__(self, frame, what, _):
        self.count += 1
        if self.count == self.event:
            (os.kill if self.alone else os.killpg)(os.getpid() if self.alone else os.getpgrp(), signal.SIGKILL)
        if frame.f_code.co_name in WATCHED and what in ("call", "return"):
            self.seen.append((frame.f_code.co_name, what, self.count))


def child(folder, event, rank=0, size=1, ddp=None, alone=False, factors="weight"):
    torch.set_num_threads(1)  # before any other thread asks: the pool of the parent did not come along
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # and has no successor that does as much
    if event is None:
        train(folder, rank, size, ddp, factors)
        return
    counter = Counter(event, alone or size == 1)
    sys.setprofile(counter)
    train(folder, rank, size, ddp, factors)
    sys.setprofile(None)
    (Path(folder) / "events.json").write_text(json.dumps({"total": counter.count, "seen": counter.seen}))


def member(request, rank, store):
    """One process of a team."""
    size, counts = request["size"], rank == request.get("rank", 0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    event = request.get("event") if counts else None
    factors = request.get("factors", "weight")
    child(request["folder"], event, rank, size, request.get("ddp"), request.get("alone", False), factors)
    dist.destroy_process_group()


def forked(group, act, error):
    """The id of a process that does `act`, in the process group `group` (0: its own)."""
    pid = os.fork()
    if pid:
        if group is not None:
            os.setpgid(pid, group)
        return pid
    try:
        if group is not None:
            os.setpgid(0, group)
        act()
    except BaseException:
        text = traceback.format_exc()
        error.write_text(text) if error.parent.is_dir() else None
        print(text, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main():
    # Answers alone go to standard output: gloo of torch 2.8 prints there, in the middle of a line if it likes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Once, not in every run. A backward pass here would forbid them to their children.
    for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
        importlib.import_module(name)
    fxrank.factorize(network().eval(), torch.zeros(2, 12))
    matplotlib.pyplot.figure().savefig(io.BytesIO())
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        with tempfile.TemporaryDirectory() as place:
            if "size" in request:
                pids = []
                for rank in range(request["size"]):
                    act = functools.partial(member, request, rank, Path(place) / "store")
                    pids.append(forked(pids[0] if pids else 0, act, folder / f"error{rank}.txt"))
            else:
                factors = request.get("factors", "weight")
                act = functools.partial(child, request["folder"], request.get("event"), factors=factors)
                pids = [forked(None, act, folder / "error0.txt")]
            if request.get("after_ms") is not None:
                time.sleep(request["after_ms"] / 1000)
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes if "size" in request else codes[0]), file=answers, flush=True)


if __name__ == "__main__":
    main()
