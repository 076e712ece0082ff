"""A process that has torch imported and forks training runs, to be killed and resumed; see test_resume.py.

Each request is a line of JSON on standard input, `{"folder": …, "event": …, "after_ms": …}`; the answer a line on
standard output. `event` is the call (Python's or C's) counted from the run's start at which the run kills itself by
SIGKILL (0: never, they are only counted, in events.json); `after_ms` the time after which it is killed from outside.
"""

import dataclasses
import importlib
import io
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import torch
from nets import UNTIMED
from torch import nn
from torch.utils.data import DataLoader, Dataset

import fxrank

WATCHED = ("_switch", "write_plain", "evaluate")
"""Functions of which the calls' first and last event are noted."""


class Noisy(Dataset):
    """Points with labels, augmented from every random number there is."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(64, 12, generator=generator)
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


def train(folder):
    """40 steps, the switch after 20 of them, in the middle of an epoch; a checkpoint every 3 steps."""
    torch.manual_seed(0)
    np.random.seed(1)
    random.seed(2)
    model, data = network(), Noisy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.9, weight_decay=4e-2)
    result = fxrank.auto_lowrank(
        model,
        DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(4)),
        val_loader=DataLoader(data, 32),
        epochs=5,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=40),
        scheduler_per="batch",
        policy=dataclasses.replace(UNTIMED, lr_scale=0.5, rewarmup=0.1),
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
    text = json.dumps({"history": history, "curves": result.curves, "switch": switch}, indent=1)
    (Path(folder) / "history.json").write_text(text)


class Counter:
    """Counts calls, notes where the watched functions are, and kills at `event`."""

    def __init__(self, event):
        self.count, self.event, self.seen = 0, event, []

    def __call__(self, frame, what, _):
        self.count += 1
        if self.count == self.event:
            os.kill(os.getpid(), signal.SIGKILL)
        if frame.f_code.co_name in WATCHED and what in ("call", "return"):
            self.seen.append((frame.f_code.co_name, what, self.count))


def child(folder, event):
    torch.set_num_threads(1)  # before any other thread asks: the pool of the parent did not come along
    warnings.simplefilter("error")
    if event is None:
        train(folder)
        return
    counter = Counter(event)
    sys.setprofile(counter)
    train(folder)
    sys.setprofile(None)
    (Path(folder) / "events.json").write_text(json.dumps({"total": counter.count, "seen": counter.seen}))


def main():
    # Once, not in every run. A backward pass here would forbid them to their children.
    for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes"):
        importlib.import_module(name)
    fxrank.factorize(network().eval(), torch.zeros(2, 12))
    matplotlib.pyplot.figure().savefig(io.BytesIO())
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                child(request["folder"], request.get("event"))
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if request.get("after_ms") is not None:
            time.sleep(request["after_ms"] / 1000)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


if __name__ == "__main__":
    main()
