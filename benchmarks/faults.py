"""What was done to training runs (kills, processes, frameworks, optimizers, schedulers, bad files), and what was lost.

    python -m benchmarks.faults            # the tests that do it to the real thing, some minutes in two processes
    python -m benchmarks.faults --kills    # and 150 more kills around the switch and elsewhere, ten minutes in all
    python -m benchmarks.faults --kills --only FSDP2    # these rows again, in the JSON that there is

Each test asserts that nothing is lost; one that fails is counted as lost here, one that is skipped is named with its reason.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from tabulate import tabulate

from benchmarks import record

CPU = torch.device("cpu")
TESTS = Path(__file__).parent.parent / "tests"


@dataclass(frozen=True)
class Fault:
    """What is done, the tests that do it (`file::function`, without `test_`), and those of them whose cases end with the name of
    what they try.
    """

    what: str
    tests: tuple[str, ...]
    named: str = ""


FAULTS = (
    Fault("one process killed (SIGKILL) and resumed", ("resume::*",)),
    Fault("2 and 3 processes killed and resumed, also by torchrun", ("resume_team::*",)),
    Fault("resumed by another number of processes", ("resume_another_team::*", "session_team::*")),
    Fault("resumed with other loaders, optimizers, schedulers, precisions", ("resume_settings::*", "randoms::*")),
    Fault("killed between the two writes of a checkpoint; long runs", ("grown::*", "long_runs::*")),
    Fault("resumed as another run (refused)", ("resume_refusals::*",)),
    Fault("stopped and gone on in a loop of one's own", ("session_state::*", "session_ends::*")),
    Fault("`DistributedDataParallel`, 2 and 4 processes", ("distributed::*",), "options_outlive_the_switch"),
    Fault("engines that hold parameters in pieces (refused)", ("distributed_engines::*",)),
    Fault("one of several processes fails, leaves or differs", ("distributed_faults::*",)),
    Fault("post-local SGD; `torch.distributed.checkpoint`", ("local_sgd::*", "distributed_checkpoint::*")),
    Fault("`fully_shard` (FSDP2)", ("sharded::*", "sharded_states::*")),
    Fault("data parallelism of Transformers, Lightning, Accelerate", ("integrations_torchrun::*",)),
    Fault("Transformers", ("integrations_huggingface::*", "integrations_resume::*")),
    Fault("Lightning", ("integrations_lightning::*",)),
    Fault("Accelerate, timm's script, loggers", ("integrations_loops::*",)),
    Fault("torch's optimizers", ("optimizer_steps::*", "moments::*", "optim::*"), "with_the_identity*"),
    Fault("optimizers that are not torch's, timm's among them", ("foreign_*::*",)),
    Fault("several optimizers, hooks, CUDA graphs", ("several_optimizers::*",)),
    Fault("torch's schedulers", ("learning_rate::*",), "a_scheduler_sees_only*"),
    Fault("averages of the weights", ("averages::*",)),
    Fault(
        "layers and weights held elsewhere: containers, closures, second networks",
        ("held::*", "holdings::*", "companions::*"),
    ),
    Fault("accumulation, clipping, scaling, checkpointing", ("loops::*", "session::*")),
    Fault("`torch.compile`, whole models and parts", ("compile::*", "wrapped_parts::*")),
    Fault("exported (`torch.export`, ONNX, TorchScript)", ("export::*",)),
    Fault("code that asks what its parts are, or holds them aside", ("trial::*",)),
    Fault("random models, whose code asks, ties, derives, holds aside", ("random_models::*",)),
    Fault("layers that do more than their weight, or keep it constrained", ("beyond::*", "guarded::*", "alike::*")),
    Fault("toggled optimizers, several Lightning callbacks", ("toggled::*", "integrations_lightning_gans::*")),
    Fault("averages as lists of tensors", ("listed_averages::*",)),
    Fault("adapters (PEFT, loralib) beside factors", ("adapters::*", "integrations_adapters::*")),
    Fault("BatchNorm folded into pairs, projections fused, weights written", ("fused_*::*",)),
    Fault("quantized after factorizing", ("quantized::*",)),
    Fault("an optimizer built anew, wrong lengths, wrappers (refused)", ("truth::*", "wrapping_optimizers::*")),
    Fault("spectra over many orders of magnitude, tiny and huge weights", ("graded::*",)),
    Fault("large layers, without a decomposition in full", ("leading::*",)),
    Fault("weights read by code: what is counted and timed, what is mixed", ("made::*",)),
    Fault("damaged, foreign and newer files", ("checkpoint*::*", "plan::*", "plainfile::*")),
    Fault("gradients switched off, reversed, invented; inference mode", ("trace_gradients::*", "made_in_inference::*")),
    Fault("odd models, odd options", ("odd_models::*", "odd_parts::*")),
    Fault("traces and sessions in several threads", ("threads::*", "session_threads::*")),
    Fault("a busy machine, and pairs that do not pay (given back)", ("clock::*", "worth::*")),
)


def files_of(fault: Fault) -> list[Path]:
    """The test files behind a row."""
    return [f for pattern in fault.tests for f in sorted(TESTS.rglob(f"test_{pattern.partition('::')[0]}.py"))]


def outcomes(report: Path) -> list[dict[str, Any]]:
    """The cases of a JUnit report: test (`file::function`), what it was tried with, and what became of it."""
    found = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        verdict = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        function, _, tried = case.attrib["name"].partition("[")
        file = case.attrib["classname"].rpartition(".")[2]
        found.append(
            {
                "test": f"{file.removeprefix('test_')}::{function.removeprefix('test_')}",
                "with": tried.removesuffix("]"),
                "outcome": "nothing lost" if verdict is None else "skipped" if verdict.tag == "skipped" else "lost",
                "reason": None if verdict is None else verdict.attrib.get("message", "").partition("\n")[0],
            }
        )
    return found


def row(fault: Fault, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was tried and lost of one kind of fault; every test with the number of its cases."""
    own = [c for c in cases if any(fnmatch(c["test"], pattern) for pattern in fault.tests)]
    done = [c for c in own if c["outcome"] != "skipped"]
    named = [c["with"].rpartition("-")[2] for c in done if fnmatch(c["test"].partition("::")[2], fault.named)]
    return {
        "tried": len(done),
        "lost": sum(c["outcome"] == "lost" for c in own),
        "skipped": len(own) - len(done),
        "named": list(dict.fromkeys(named)),
        "tests": dict(Counter(c["test"] for c in done)),
        "not as hoped": [c for c in own if c["outcome"] != "nothing lost"],
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--only",
        action="append",
        default=None,
        help="rows whose text has this in it; the others stay as they were measured",
    )
    p.add_argument("--kills", action="store_true", help="the long series of kills as well")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    faults = [f for f in FAULTS if options.only is None or any(text in f.what for text in options.only)]
    if not faults:
        p.error(f"--only must be part of a row's text; the rows are: {', '.join(f.what for f in FAULTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        chosen = ["-m", "not zoo and not random_models" + ("" if options.kills else " and not kills")]
        files = dict.fromkeys(str(file) for fault in faults for file in files_of(fault))
        command = [sys.executable, "-m", "pytest", "-q", "-n2", "--dist=loadfile", f"--junitxml={report}", *chosen]
        code = subprocess.run([*command, *files], cwd=TESTS.parent, stdout=subprocess.DEVNULL, check=False).returncode
        if code not in (0, 1):  # all passed, or some did not
            raise RuntimeError(f"pytest must run through; it ended with {code} on {', '.join(files)}.")
        cases = outcomes(report)
    results = {fault.what: row(fault, cases) for fault in faults}
    columns = ("tried", "lost", "skipped")
    print(tabulate([(what, *(r[c] for c in columns)) for what, r in results.items()], headers=("", *columns)))
    configuration: dict[str, Any] = {"kills": options.kills}
    path = record.path_of("faults", CPU, options.results)
    if options.only is not None and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        again = {*before["configuration"].get("measured again", ()), *results}
        configuration |= {"measured again": sorted(again)}
        results = {what: (before["results"] | results)[what] for what in before["results"] | results}
    data = {"configuration": configuration, "results": results}
    return record.write("faults", data, device=CPU, folder=options.results)


if __name__ == "__main__":
    print(f"written: {main().name}")
