"""Training runs in processes of their own, killed by SIGKILL where a test says; see killed.py."""

import json
import os
import subprocess
import sys

from places import PYTHONPATH, RUNS
from safetensors.torch import load_file


class Runs:
    """Forks the runs from a process that has everything imported."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, str(RUNS / "killed.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"PYTHONPATH": PYTHONPATH, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )

    def __call__(self, folder, **request):
        """The exit code: 0, or -9 for a killed run; those of all processes of a team."""
        self.server.stdin.write(json.dumps({"folder": str(folder)} | request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def spans(folder):
    """The first and last event of every call of the watched functions in a run that was counted, and how many events
    it had.
    """
    events = json.loads((folder / "events.json").read_text())
    found, begun = {}, {}
    for name, what, event in events["seen"]:
        if what == "call":
            begun[name] = event
        else:
            found.setdefault(name, []).append((begun.pop(name), event))
    return found, events["total"]


def results(folder):
    """What a run leaves that does not depend on the clock."""
    weights = load_file(folder / "model.safetensors")
    numbers = {name: (str(w.dtype), tuple(w.shape), w.numpy().tobytes()) for name, w in weights.items()}
    ends = {path.name: path.read_text() for path in [*folder.glob("history*.json"), folder / "plan.json"]}
    return numbers, ends


def moment(events, total, kind, chance):
    """An event at which to kill, counted from the start of the run."""
    first, last = events["_switch"][0]
    if kind == "anywhere":
        return chance.randint(1, total)
    if kind == "before":
        return chance.randint(first - 2000, first)
    if kind == "inside":
        return chance.randint(first, last)
    if kind == "after":
        return chance.randint(last, last + 4000)
    return chance.randint(*chance.choice(events["write_plain"]))
