"""What becomes of thousands of random models: each is traced, factorized, merged, saved and loaded, and all that must hold is checked.

    python -m benchmarks.random_models --count 10000 --processes 2

The models, and what must hold of them, are those of the test suite (`tests/support/random_models`). Results go into a ledger in the `--output`
folder as they come; a run that was broken off goes on from there. Remove the folder to begin anew.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks import record

ROOT = Path(__file__).parent.parent
SUPPORT = ROOT / "tests" / "support"
LEDGER = "ledger.jsonl"
CHUNK = 200
"""Models a process checks before another takes over."""

Found = dict[str, Any]
"""What came of one model: a line of the ledger."""


def run(seeds: Sequence[int]) -> Iterator[Found]:
    """Check these models in a process of its own, which may die of one of them."""
    while seeds:
        command = [sys.executable, "-m", "random_models", *map(str, seeds)]
        paths = os.pathsep.join([str(SUPPORT), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        done = 0
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                done += 1
                yield json.loads(line)
        if done < len(seeds):
            yield {"seed": seeds[done], "failed": f"the process ended with {process.returncode}", "parts": []}
            done += 1
        seeds = seeds[done:]


def in_ledger(path: Path) -> dict[int, Found]:
    """What is known already, by seed. A line that was not written to its end counts for nothing."""
    known: dict[int, Found] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        known[found["seed"]] = found
    return known


def all_of(seeds: Iterable[int], ledger: Path, processes: int) -> list[Found]:
    """What came of each of these models, in the order of the seeds; new results are added to the ledger."""
    seeds = list(seeds)
    known = in_ledger(ledger)
    missing = [seed for seed in seeds if seed not in known]
    chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
    lock = threading.Lock()
    with ledger.open("a", encoding="utf-8") as file, ThreadPoolExecutor(processes) as pool:

        def into_ledger(chunk: Sequence[int]) -> None:
            for found in run(chunk):
                with lock:
                    known[found["seed"]] = found
                    file.write(f"\n{json.dumps(found)}")  # on a line of its own, whatever a broken run has left
                    file.flush()

        for number, _ in enumerate(pool.map(into_ledger, chunks), 1):
            failed = sum("failed" in found for found in known.values())
            print(f"{number} of {len(chunks)} chunks, {failed} models failed", flush=True)
    return [known[seed] for seed in seeds]


def general(reason: str) -> str:
    """A reason without the names and numbers of its model."""
    reason = re.sub(r"read by .*, which", "read by …, which", reason)
    return re.sub(r"\d+(\.\d+)?(e-?\d+)?", "n", re.sub(r"'[^']*'", "'…'", reason))


def summary(found: Sequence[Found]) -> dict[str, Any]:
    """Counts over all models, most frequent first."""
    failed = [f for f in found if "failed" in f]
    passed = [f for f in found if "failed" not in f]
    failures: dict[str, list[int]] = {}
    for f in failed:
        failures.setdefault(f["failed"], []).append(f["seed"])

    def counts(values: Iterable[str]) -> dict[str, int]:
        return dict(Counter(values).most_common())

    return {
        "models": len(found),
        "passed": len(passed),
        "failed": len(failed),
        "failures": {what: {"count": len(seeds), "seeds": seeds[:50]} for what, seeds in failures.items()},
        "refused": counts(f["refused"] for f in passed if f["refused"]),
        "with modules left out of the graph": sum(f["leaves"] > 0 for f in passed),
        "parts": counts(part for f in found for part in f["parts"]),
        "factorized": counts(kind for f in passed for kind in f["factorized"]),
        "dense": counts(general(reason) for f in passed for reason in f["dense"]),
        "seconds a model, median": statistics.median(f["seconds"] for f in found if "seconds" in f),
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=10000)
    p.add_argument("--first", type=int, default=0, help="the first seed")
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--output", default="run/random_models", help="folder for the ledger")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(options.first, options.first + options.count)
    results = summary(all_of(seeds, folder / LEDGER, options.processes))
    print(tabulate([(key, value) for key, value in results.items() if not isinstance(value, dict)]))
    print(tabulate([(what, f["count"], str(f["seeds"][:8])) for what, f in results["failures"].items()]))
    configuration = {"first": options.first, "count": options.count, "processes": options.processes}
    return record.write(
        "random_models",
        {"configuration": configuration, "results": results},
        device=torch.device("cpu"),
        folder=options.results,
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
