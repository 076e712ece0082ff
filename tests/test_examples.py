"""Every example runs as it stands, and prints what it promises."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
from places import ROOT

EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
PRINTS = {
    # what stands in the output of each, and the optional libraries that it needs
    "images": (r"loaded again: (8[5-9]|9\d|100)\.\d\d%", ["sklearn"]),
    "own_loop": (
        r"resumed after epoch 7, low-rank[\s\S]*bit for bit[\s\S]*validation accuracy 9\d\.\d\d%",
        ["sklearn"],
    ),
    "timm_model": (r"accuracy of the average [89]\d\.\d\d%[\s\S]*outputs \d\.\de-0[5-9]", ["timm", "sklearn"]),
    "transformers_trainer": (
        r"held-out text ([123]\.\d+), read back from its folder \1",
        ["transformers", "accelerate"],
    ),
    "lightning_module": (
        r"validation accuracy 9\d\.\d\d%\n39,434 parameters; before: 85,002",
        ["lightning", "sklearn"],
    ),
    "ddp": (r"all 2 processes have the same \d\d,\d{3} parameters", ["sklearn"]),
    "compress": (
        r"reached 0\.2[45]\d*\n[\s\S]*healed +validation accuracy [89]\d\.\d\d%, 10,\d{3} parameters",
        ["sklearn"],
    ),
    "own_layer": (r"equal_linear[\s\S]*LowRankEqualLinear\([\s\S]*outputs \d\.\de-0[5-9]", ["sklearn"]),
    "onnx_export": (
        r"outputs \d\.\de-0[5-9]\nonnxruntime reads [89]\d\.\d\d%",
        ["onnx", "onnxscript", "onnxruntime", "sklearn"],
    ),
    "notebook": (r"policy Cuttlefish[\s\S]*K = 1, R = \{'3': \d+\}\nrank \d+ of 256", ["sklearn"]),
}
SLOW = {"ddp", "timm_model", "transformers_trainer"}


def run_notebook(path):
    """The code cells in one namespace, as a kernel runs them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {cell['id']}", "exec"), names)


def run_processes(path, folder):
    """What torchrun's first process prints."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(path)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Others' own: Lightning's remarks on few workers and on what torch is about to drop, torch's while it exports.
@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning",
    "ignore:.*isinstance.treespec, LeafSpec.*:DeprecationWarning",
)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in PRINTS])
def test_an_example_runs_and_prints_its_result(name, tmp_path, monkeypatch, capsys):
    promised, needs = PRINTS[name]
    for library in needs:
        pytest.importorskip(library, reason=f"{name} needs {library}")
    monkeypatch.chdir(tmp_path)
    if name == "ddp":
        printed = run_processes(EXAMPLES / "ddp.py", tmp_path)
        assert (tmp_path / "run/ddp/plan.json").exists()
    elif name == "notebook":
        run_notebook(EXAMPLES / "notebook.ipynb")
        printed = capsys.readouterr().out
    else:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr().out
    assert re.search(promised, printed), printed


def test_the_readme_and_the_folder_have_the_same_examples():
    """Each with the command that its first lines tell, and short enough to be read."""
    files = [path for path in sorted(EXAMPLES.iterdir()) if path.suffix in (".py", ".ipynb")]
    assert {path.stem for path in files} == PRINTS.keys()
    named = re.findall(r"`[^`]* examples/([\w.]+)`", README)
    assert sorted(named) == [path.name for path in files]
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            assert len(text.splitlines()) < 100, path.name
            command = re.search(rf"^\S.* examples/{re.escape(path.name)}(?=$|    \()", text, re.MULTILINE)[0]
            assert f"`{command}`" in README, path.name
        else:
            assert not any(cell.get("outputs") for cell in json.loads(text)["cells"]), (
                "a notebook is kept without what it printed"
            )
