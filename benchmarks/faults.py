"""What was done to a training run, and what was lost: kills, processes, frameworks, optimizers, schedulers, bad files.

    python -m benchmarks.faults            # the tests that do it to the real thing, most of a quarter of an hour
    python -m benchmarks.faults --kills    # and fifty kills around the switch

Each test asserts that nothing is lost; a failed one is counted as lost here, a skipped one is named with its reason.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from tabulate import tabulate

from benchmarks import record

TESTS = Path(__file__).parent.parent / "tests"
KINDS = {
    "killed and resumed": ("resume*", "session_state"),
    "several processes": ("distributed", "session_team", "sharded*"),
    "frameworks": ("integrations_*",),
    "optimizers, schedulers, loops": (
        "averages",
        "learning_rate",
        "loops",
        "moments",
        "optim",
        "optimizer_steps",
        "session",
        "several_optimizers",
    ),
    "compiled and exported": ("compile", "export"),
    "damaged and foreign files": ("checkpoint*", "plan", "plainfile"),
}
"""What is tried, and the test files that do it."""


def outcomes(report: Path) -> list[dict[str, Any]]:
    """The cases of a JUnit report: file, name, seconds, and what became of each."""
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        verdict = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        found.append(
            {
                "file": case.attrib["classname"].rpartition(".")[2],
                "name": case.attrib["name"],
                "seconds": round(float(case.attrib["time"]), 2),
                "outcome": "nothing lost" if verdict is None else "skipped" if verdict.tag == "skipped" else "lost",
                "reason": None if verdict is None else verdict.attrib.get("message", "").partition("\n")[0],
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kind", action="append", choices=sorted(KINDS), default=None)
    p.add_argument("--kills", action="store_true", help="the long series of kills as well")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    results = {}
    for kind, names in KINDS.items():
        files = [str(f) for name in names for f in sorted(TESTS.glob(f"test_{name}.py"))]
        if not files or (options.kind and kind not in options.kind):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.xml"
            chosen = ["-m", "not zoo" if options.kills else "not zoo and not kills"]
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen]
            code = subprocess.run(
                [*command, *files], cwd=TESTS.parent, stdout=subprocess.DEVNULL, check=False
            ).returncode
            if code not in (0, 1):  # all passed, or some did not
                raise RuntimeError(f"pytest must run through; it ended with {code} on {', '.join(files)}.")
            cases = outcomes(report)
        counts = {what: sum(c["outcome"] == what for c in cases) for what in ("nothing lost", "lost", "skipped")}
        results[kind] = {"tried": len(cases) - counts["skipped"], **counts, "cases": cases}
    print(
        tabulate(
            [(k, r["tried"], r["lost"], r["skipped"]) for k, r in results.items()],
            headers=("", "tried", "lost", "skipped"),
        )
    )
    return record.write(
        "faults",
        {"configuration": {"kills": options.kills}, "results": results},
        device=torch.device("cpu"),
        folder=options.results,
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
