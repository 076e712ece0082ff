"""The README's example runs, its numbers and those of the docs are those in benchmarks/results, and it is read in one sitting."""

import functools
import re
import subprocess
import sys
from dataclasses import fields

import torch
import torch.nn.functional as F
from nets import HALFWAY, Net, clusters
from places import ROOT

import fxrank
from benchmarks.decision_tables import wins_table
from benchmarks.example import code
from benchmarks.pages import pages
from benchmarks.tables import load
from fxrank.plan import LayerDecision, Plan, Training

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code()], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False
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


def block_after(heading):
    return re.search(rf"## {heading}\n.*?```python\n(.*?)```", README, re.DOTALL)[1]


def test_a_loop_of_ones_own_then_saved_loaded_merged_and_repeated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, y = clusters()
    model, loader = Net(), [(x[i : i + 8], y[i : i + 8]) for i in range(0, 48, 8)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    names = {"fxrank": fxrank, "Net": Net, "model": model, "optimizer": optimizer, "batch": loader[0], "n": 12}
    names |= {"loader": loader}
    with monkeypatch.context() as patch:
        patch.setattr("fxrank.session.session.as_policy", lambda _: HALFWAY)  # so that it switches in so short a run
        exec(block_after("In a loop of your own"), names)
    for inputs, targets in loader * 2:
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    plan = names["session"].finish()
    assert plan.R
    short = functools.partial(fxrank.auto_lowrank, epochs=2, progress=False, device="cpu")
    monkeypatch.setattr(fxrank, "auto_lowrank", short)
    exec(block_after("Saved, loaded, exported, repeated"), names)
    assert names["again"].plan.R == plan.R and names["again"].plan.switch_step == plan.switch_step
    assert fxrank.plan_of(names["model"]).R == plan.R
    Net().load_state_dict(names["dense"].state_dict())


def test_a_trained_model_in_one_call(capsys):
    torch.manual_seed(0)
    x, y = clusters()
    trained = fxrank.merge(fxrank.factorize(Net(), x[:8], 0.25))  # whose weights are of low rank
    names = {"fxrank": fxrank, "model": trained, "batch": x[:8], "loader": [(x[:24], y[:24]), (x[24:], y[24:])]}
    before = sum(p.numel() for p in names["model"].parameters())
    first, *rest = block_after("A trained model, in one call").splitlines()
    exec(first, names)
    assert sum(p.numel() for p in names["small"].parameters()) <= before / 2
    exec("\n".join(rest), names)
    assert "reason" in capsys.readouterr().out
    assert sum(p.numel() for p in names["model"].parameters()) == before


def test_measured_parts_are_the_results():
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m benchmarks.pages`"
    assert load("example")["configuration"]["code"] == code()
    assert wins_table() in README and f"```text\n{load('example')['results']['output']}\n```" in README


def test_the_readme_is_read_in_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 160] == []


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_sites_contents():
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": ([\w-]+\.md)$", contents, re.MULTILINE))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_every_field_of_a_plan_is_described():
    described = (ROOT / "docs/saving.md").read_text(encoding="utf-8")
    for cls in (Plan, Training, LayerDecision):
        for field in fields(cls):
            assert f"`{field.name}`" in described, field.name
