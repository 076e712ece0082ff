"""The measured parts of the README and the docs, written from `results/`; a test compares them.

python -m benchmarks.pages
"""

import re
from pathlib import Path

from benchmarks import decision_tables as d
from benchmarks import paper_page
from benchmarks import tables as t

ROOT = Path(__file__).parent.parent


def benchmarks() -> str:
    """The page of numbers."""
    return f"""# Benchmarks

Each number comes from a file in `benchmarks/results`, which says the hardware, versions, configuration and command.

## The default

`Cuttlefish()` beside the full-rank model and a dense one that is narrower and has no more parameters, trained as long, on 2 CPU cores.
Parameters are the share outside of embeddings, the step is that of the model that came out, of the dense one's. A model of which no pair is faster is left dense, as the LSTM is.
"fxrank itself" is what watching, timing and switching took of the run, mostly beside other runs. The cells of the default are of {d.states()} of fxrank's files, as the ledger says.

{d.default_table()}

{d.elsewhere_line()}

{d.with_tables_line()}

## What was tried

Each beside what was the default then, which switched as soon as the ranks had settled, at half of the run at the latest; on the same job and seeds, by one line of
`benchmarks/subjects/rows.py`. An idea becomes the default if it wins over all jobs. The later switch became it though it is behind on MiniLM, with one seed and
on another processor; the LSTM stays dense, and differs by the processor alone.

{d.tried_table()}

{d.elsewhere_line()}

## One call, without training

{t.oneshot_images()}

{t.oneshot_texts()}

## By the papers' ranks

`rank_metric="scaled_stable_rank"`: {t.accuracy_table()}

Real jobs by policies after the papers, short and with one seed each, beside their full-rank twins:

{t.runs_table()}

## What fxrank itself costs

On ResNet-18 in the CIFAR shape:

{t.cost_table()}

## Compiled

`torch.compile` (inductor), pairs at a quarter of full rank, times relative to full-rank and eager; gradients of the compiled low-rank model against the eager one:

{t.compiled_table()}

## The model zoo

Reached: share of the weights that a layer multiplies with. float32, float64, gradients: largest relative difference between a model and its full-rank factorization, in evaluation, and in float64 in training mode too:

{t.zoo_table()}

{t.random_models_line()}
"""


def faults() -> str:
    """The page of what was done to training runs."""
    return f"""# Faults

Each tried on the real thing by a test that fails if anything is lost, or if a refusal changes anything or names no way out.

{t.faults_table()}
"""


def readme() -> str:
    """The README with its table and what its example prints."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    output = t.load("example")["results"]["output"]
    text, outputs = re.subn(r"```text\n.*?```", lambda _: f"```text\n{output}\n```", text, count=1, flags=re.DOTALL)
    table = f"<!-- wins -->\n{d.wins_table()}\n\n- {d.elsewhere_line()}\n{d.verdict()}\n<!-- /wins -->"
    text, wins = re.subn(r"<!-- wins -->.*?<!-- /wins -->", lambda _: table, text, flags=re.DOTALL)
    if (outputs, wins) != (1, 1):
        raise ValueError("the README must have one ```text block and one pair of <!-- wins --> and <!-- /wins -->.")
    return text


def pages() -> dict[Path, str]:
    """Everything, by file."""
    docs = ROOT / "docs"
    return {
        ROOT / "README.md": readme(),
        docs / "benchmarks.md": benchmarks(),
        docs / "faults.md": faults(),
        docs / "papers.md": paper_page.page(),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
