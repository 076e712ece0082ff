"""The page of what the papers compare with, made from `results/`: their systems trained here, beside their own figures."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from benchmarks import glue, papers
from benchmarks.campaign import Book
from benchmarks.paper_tables import paper_sizes_table
from benchmarks.record import RESULTS
from benchmarks.subjects.paper_rows import JOBS, ROWS
from benchmarks.tables import load, parallel_table

SYSTEMS = {
    "full": "the dense model",
    "cuttlefish": "Cuttlefish by its own rule, the scaled stable rank, with E and K of its Table 8",
    "fxrank": "`Cuttlefish()`, the default",
    "pufferfish": "Pufferfish: a quarter of the full rank after 80 of 300 epochs",
    "si-fd": "spectral initialization with Frobenius decay",
    "lc": "LC compression: ranks learned, three times as many steps",
    "imp": "iterative magnitude pruning with rewinding, all rounds",
    "grasp": "GraSP: pruned by gradient signals before the training",
    "early-bird": "early-bird tickets: thinner, by the scales of BatchNorms",
    "xnor": "XNOR-Net: binary weights and activations, simulated in float",
}


def page() -> str:
    """The page, with a section for each of which there are results; it says which there are not yet."""
    sections = {
        "papers": ("CIFAR-10", images),
        "glue": ("GLUE", language),
        "data_parallel": ("Several processes", processes),
        "paper_sizes": ("Sizes", paper_sizes_table),
        "figures": ("Figures", drawings),
    }
    known = {name for name in sections if any(RESULTS.glob(f"{name}_*"))}
    shown = [f"## {title}\n\n{text()}\n" for name, (title, text) in sections.items() if name in known]
    missing = [f"{title} (`python -m benchmarks.{name}`)" for name, (title, _) in sections.items() if name not in known]
    return "\n".join([_HEAD, *([f"Not run yet: {', '.join(missing)}.\n"] if missing else []), *shown])


_HEAD = """# The papers' systems

What Cuttlefish and Pufferfish are compared with in their papers, trained by the same code on the same data, beside the papers' own figures. None of it is part of fxrank: it is in
`benchmarks/baselines`, each with tests of what makes it right. The scale is that of a small machine, so that rows can be compared with each other, and not with the papers' numbers.
"""


def images() -> str:
    """The papers' networks on CIFAR-10, those of which the dense model is trained."""
    found = book()
    jobs = [job for job in JOBS if "full" in found.known(job)]
    systems = "\n".join(f"- `{row}`: {what}." for row, what in SYSTEMS.items())
    tables = "\n\n".join(f"{papers.job_table(found, job)}\n\n{ahead(found.known(job))}" for job in jobs)
    return f"Networks are a quarter as wide as the papers'. `~` marks times of runs beside others.\n\n{systems}\n\n{tables}"


def book() -> Book:
    """The newest ledger on a CPU."""
    return Book(max(RESULTS.glob("papers_cpu*.jsonl"), key=lambda p: p.name[-12:]), "papers", JOBS, ROWS)


def ahead(known: dict[str, list[dict[str, Any]]]) -> str:
    """Which rows have a higher accuracy than fxrank's default, and what they take for it, in a sentence; on the seeds of both."""
    ours = {cell["seed"]: cell for cell in known.get("fxrank", []) if "scores" in cell}
    said = []
    for row, cells in known.items():
        same = [(cell, ours[cell["seed"]]) for cell in cells if "scores" in cell and cell["seed"] in ours]
        if row == "fxrank" or not same:
            continue
        more = fmean(100 * (it["scores"]["accuracy"] - own["scores"]["accuracy"]) for it, own in same)
        size = fmean(it["parameters"] / own["parameters"] for it, own in same)
        time = fmean(it["training_seconds"] / own["training_seconds"] for it, own in same)
        if more > 0:
            said.append(
                f"`{row}` by {more:.2f} points, with {size:.2f} times its parameters in {time:.1f} times its time"
            )
    return f"Ahead of `fxrank` in accuracy: {'; '.join(said) or 'none of the others'}."


def language() -> str:
    """A pretrained encoder on GLUE."""
    data = load("glue")
    c, rows = data["configuration"], data["results"]
    return (
        f"MiniLM-L6, {c['train']:,} training examples of each data set, {c['epochs']} epochs, {_seeds(rows)}; the papers' figures are of BERT-base on all of the data. "
        f"The students stand in for DistilBERT and TinyBERT; their seconds are without those of their teacher, the full-rank row.\n\n{glue.table(rows, 'github')}"
    )


def _seeds(rows: Sequence[dict[str, Any]]) -> str:
    count = len({row["seed"] for row in rows})
    return "one seed" if count == 1 else f"{count} seeds"


def processes() -> str:
    """Gradient compression beside factorized models."""
    data = load("data_parallel")
    c = data["configuration"]
    trained = any("accuracy" in row for found in data["results"].values() for row in found.values())
    about = "Of one machine, step time relative to full-rank with plain averaging"
    if trained:
        about += (
            f", and accuracy after {c['epochs']} epochs of {c['train']:,} images of CIFAR-10 at {c['side']}x{c['side']} by a ResNet-18, {c['width']} wide, one seed. "
            "Gloo sends every byte through the memory of one machine: what compression saves is worth more where there is a network between"
        )
    return f"{about}:\n\n{parallel_table()}"


CAPTIONS = {
    "rank_curves": "Stable rank of every layer over a training that stays full-rank (Cuttlefish Figs. 2 and 10 to 17)",
    "rank_heat": "The same, layer by layer (Fig. 3)",
    "stack_times": "Time of a layer of each stack, dense and as a pair (Fig. 4)",
    "roofline": "The stacks under what the device can do at best (Fig. 6)",
    "ranks_chosen": "Ranks chosen by the default, beside full ranks (Figs. 5, 7, 8)",
    "kept": "What pairs of each rank keep of their layers' outputs, with the ranks that were chosen (Fig. 9, of outputs instead of weights)",
}


def drawings() -> str:
    """The papers' figures of a run here."""
    c = load("figures")["configuration"]
    images = [f"![{caption}](images/papers_{name}.svg)\n\n*{caption}.*" for name, caption in CAPTIONS.items()]
    return "\n\n".join([f"Of `{c['job']}`, {c['epochs']} epochs, seed {c['seed']}.", *images])
