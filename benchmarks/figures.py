"""The papers' figures, of a run here: rank curves and their heat map over a whole training, times of stacks and the roofline, ranks chosen, and what
they leave out.

    python -m benchmarks.figures --data FOLDER     # trains twice, some ten minutes of one core, and draws
    python -m benchmarks.figures                   # draws again what was measured

A network of `benchmarks.papers` on CIFAR-10: once full-rank to the end with its ranks watched, as in the papers' figures, and once by fxrank's
default. The charts are those of the page of a run, as SVG, in its light colours.
"""

import argparse
import importlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import fxrank
from benchmarks import record
from benchmarks.campaign import CPU
from benchmarks.real_runs import trained
from benchmarks.subjects.paper_rows import JOBS
from benchmarks.tables import load
from fxrank.page import courses, ranks, times
from fxrank.page.parts import Data, Spec

IMAGES = Path(__file__).parent.parent / "docs" / "images"
JOB = "resnet18-cifar10"
WIDTH = 640
"""Pixels of a chart."""
WATCHED = fxrank.Cuttlefish(epsilon=1e-9, latest=None)
"""Never switches: no rank stands as still as that."""
KEPT = ("details", "plan", "E", "epochs")
"""What charts need of a report."""


def measure(data: Path, cache: Path, seed: int, epochs: int | None = None) -> dict[str, Any]:
    """Both runs' reports, as far as they are drawn."""
    job = JOBS[JOB]
    task = job.task(data, cache)
    found = {}
    for name, policy in (("watched", WATCHED), ("fxrank", fxrank.Cuttlefish())):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)  # the first never switches
            run = trained(task, task.build(seed), epochs or job.epochs, seed, CPU, policy=policy)
        report = run.report.to_dict()
        kept = {key: report[key] for key in KEPT if key in report}
        kept["details"] = {key: value for key, value in kept["details"].items() if key != "graph"}
        found[name] = kept
    return found


def charts(results: Mapping[str, Data]) -> Iterator[tuple[str, Spec]]:
    """By the names of their files; those of which nothing was measured are left out."""
    watched, ours = results["watched"], results["fxrank"]
    stacks = ours["details"]["stacks"]
    found = {
        "rank_curves": courses.rank_curves(watched),
        "rank_heat": courses.rank_heat(watched),
        "stack_times": times.stack_bars(stacks),
        "roofline": times.roofline(stacks, ours["details"]["roofline"]),
        "ranks_chosen": ranks.chosen_ranks(ours),
        "kept": kept(ours),
    }
    yield from ((name, spec) for name, spec in found.items() if spec is not None)


def kept(report: Data) -> Spec | None:
    """What pairs of each rank would keep of their layers' outputs, in squares, with the ranks that were chosen: the papers' distribution of singular
    values (Cuttlefish Fig. 9), of outputs instead of weights where these are known.
    """
    values, marks = [], []
    for name, cut in report["details"]["spectra"].items():
        full = cut["full_rank"]
        for rank, left in zip(cut["ranks"], cut["left_out"], strict=True):
            point = {"layer": name, "ratio": rank / full, "kept": 1 - left}
            values.append(point)
            if rank == cut["rank"]:
                marks.append(point)
    if not values:
        return None
    shared = {
        "x": {"field": "ratio", "type": "quantitative", "title": "rank / full rank", "axis": {"format": ".0%"}},
        "y": {
            "field": "kept",
            "type": "quantitative",
            "title": "kept of a layer's outputs",
            "axis": {"format": ".0%"},
            "scale": {"zero": False},
        },
        "color": {"field": "layer", "type": "nominal", "sort": None, "legend": {"title": None, "labelLimit": 220}},
    }
    return {
        "height": 280,
        "encoding": shared,
        "layer": [
            {"data": {"values": values}, "mark": {"type": "line", "interpolate": "monotone", "strokeWidth": 1.5}},
            {"data": {"values": marks}, "mark": {"type": "point", "filled": True, "size": 60}},
        ],
    }


def colours() -> dict[str, str]:
    """Of the page's light theme, by name."""
    style = resources.files("fxrank.page").joinpath("page.css").read_text("utf-8")
    light = style[: style.index("}")]
    return dict(re.findall(r"--(\w+): (#\w+)", light))


def svg(spec: Spec) -> str:
    """A chart, `WIDTH` wide, on the page's own background. Needs vl-convert (`pip install vl-convert-python`)."""
    shades = colours()
    text = re.sub(r'"@(\w+)"', lambda name: json.dumps(shades[name[1]]), json.dumps({**spec, "width": WIDTH}))
    soft = {"labelColor": shades["soft"], "titleColor": shades["soft"], "titleFontWeight": 500}
    config = {
        "background": shades["back"],
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": {**soft, "gridColor": shades["line"], "domainColor": shades["line"], "tickColor": shades["line"]},
        "legend": {**soft, "labelColor": shades["text"]},
        "text": {"color": shades["text"]},
    }
    found: str = importlib.import_module("vl_convert").vegalite_to_svg(json.loads(text) | {"config": config})
    return found


def draw(results: Mapping[str, Data], folder: Path) -> list[Path]:
    """Write all charts; returns their files, `papers_<name>.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, spec in charts(results):
        path = folder / f"papers_{name}.svg"
        path.write_text(svg(spec) + "\n", encoding="utf-8")
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Measure, if there are data, and draw. Returns the files of the charts."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=None, help="folder of the data sets; without it the last results are drawn")
    p.add_argument("--cache", default="data", help="folder for the decoded images (default %(default)s)")
    p.add_argument("--epochs", type=int, default=None, help="(default: the job's)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", default=None, help="folder for the charts (default docs/images)")
    p.add_argument("--results", default=None, help="folder for the JSON (default benchmarks/results)")
    options = p.parse_args(arguments)
    if options.data is None:
        results = load("figures")["results"]
    else:
        results = measure(Path(options.data), Path(options.cache), options.seed, options.epochs)
        configuration = {"job": JOB, "epochs": options.epochs or JOBS[JOB].epochs, "seed": options.seed}
        data = {"configuration": configuration, "results": results}
        record.write("figures", data, device=CPU, folder=options.results)
    return draw(results, IMAGES if options.output is None else Path(options.output))


if __name__ == "__main__":
    for path in main():
        print(path.name)
