"""The README's example runs, and its numbers are those in benchmarks/results."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from benchmarks.readme import tables
from fxrank.plan import LayerDecision, Plan, Training

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path):
    (code,) = re.findall(r"<!-- example: .*? -->\n```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    printed, shown = done.stdout, re.findall(r"```text\n(.*?)```", README, re.DOTALL)[0]
    # Times vary, and with them the layers worth it; what is measured without a clock does not.
    for output in (printed, shown):
        assert "policy Cuttlefish: E = " in output
        assert "first layer of the graph, left dense by default" in output
        assert "last layer of the graph, left dense by default" in output
    layers = [line.split()[0] for line in shown.splitlines()[2:13]]
    assert [line.split()[0] for line in printed.splitlines()[2:13]] == layers
    assert (tmp_path / "run/digits/plan.json").exists()


def test_the_tables_are_the_results():
    assert tables() in README


def test_links_lead_somewhere():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target


def test_every_field_of_a_plan_is_described():
    for cls in (Plan, Training, LayerDecision):
        for field in fields(cls):
            assert f"`{field.name}`" in README, field.name
