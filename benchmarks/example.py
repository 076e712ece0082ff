"""The README's example, run as it stands there, and what it prints.

python -m benchmarks.example
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import record

README = Path(__file__).parent.parent / "README.md"


def code() -> str:
    """The example of the README."""
    (found,) = re.findall(r"<!-- example: .*? -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return str(found)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write. Returns the path of the JSON."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run([sys.executable, "-c", code()], cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the README's example must run; it ended with {done.returncode}: {done.stderr[-2000:]}")
    print(done.stdout)
    return record.write(
        "example",
        {"configuration": {"code": code()}, "results": {"output": done.stdout.rstrip()}},
        device=torch.device("cpu"),
        folder=options.results,
    )


if __name__ == "__main__":
    print(f"written: {main().name}")
