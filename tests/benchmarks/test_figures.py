"""The papers' figures: both runs are measured, every chart is drawn, in the page's colours, and again from what was written."""

import json
import re
from dataclasses import replace

import pytest
from test_real_runs import data  # noqa: F401 - a fixture

from benchmarks import figures, tables
from benchmarks.subjects.paper_rows import JOBS

ALL = {"rank_curves", "rank_heat", "stack_times", "roofline", "ranks_chosen", "kept"}


def report(pairs):
    layer = {"name": "conv", "kind": "conv2d", "form": "channel", "weight_shape": [8, 8, 3, 3], "full_rank": 8}
    stack = {"names": ["conv"], "probe_rank": 2, "dense_ms": 2.0, "pair_ms": 1.0, "speedup": 2.0, "spread": 0.1}
    stack |= {"flops": 900, "bytes_moved": 90, "pair_flops": 300, "pair_bytes_moved": 60}
    cut = {"of": "outputs", "rank": 3, "full_rank": 8, "ranks": [0, 3, 8], "left_out": [1.0, 0.1, 0.0], "after": None}
    curves = {"steps": [1, 2, 3], "ranks": {"conv": [4.0, 3.0, 2.5]}, "full_ranks": {"conv": 8}}
    return {
        "E": 1.5 if pairs else None,
        "epochs": 2,
        "plan": {"layers": [layer | {"rank": 3 if pairs else None}]},
        "details": {
            "curves": curves,
            "steps_per_epoch": 2,
            "stacks": [stack] if pairs else [],
            "roofline": {"flops": 1e9, "bandwidth": 1e8} if pairs else None,
            "spectra": {"conv": cut} if pairs else {},
        },
    }


def test_every_chart_is_drawn_in_the_colours_of_the_page(tmp_path):
    pytest.importorskip("vl_convert")
    written = figures.draw({"watched": report(False), "fxrank": report(True)}, tmp_path)
    assert {path.name for path in written} == {f"papers_{name}.svg" for name in ALL}
    for path in written:
        text = path.read_text()
        assert text.startswith("<svg") and "@" not in text, path.name
    assert figures.colours()["pair"] in (tmp_path / "papers_ranks_chosen.svg").read_text()
    found = {path.stem for path in figures.draw(dict.fromkeys(("watched", "fxrank"), report(False)), tmp_path / "none")}
    assert found == {"papers_rank_curves", "papers_rank_heat", "papers_ranks_chosen"}


def test_what_is_kept_has_a_point_at_the_rank_that_was_chosen():
    lines, points = figures.kept(report(True))["layer"]
    assert [round(v["kept"], 6) for v in lines["data"]["values"]] == [0.0, 0.9, 1.0]
    assert points["data"]["values"] == [{"layer": "conv", "ratio": 3 / 8, "kept": 0.9}]


def test_both_runs_are_measured_and_drawn_again_from_what_was_written(data, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("vl_convert")
    job = JOBS[figures.JOB]
    small = replace(job, options=dict(job.options) | {"width": 8, "depth": 1, "train": 4, "batch": 4})
    monkeypatch.setattr(figures, "JOBS", {figures.JOB: small})
    given = ["--data", str(data), "--cache", str(data / "cache"), "--epochs", "1", "--results", str(tmp_path)]
    written = figures.main([*given, "--output", str(tmp_path / "first")])
    assert {"papers_rank_curves.svg", "papers_rank_heat.svg", "papers_ranks_chosen.svg"} <= {p.name for p in written}
    (path,) = tmp_path.glob("figures_*.json")
    results = json.loads(path.read_text())["results"]
    assert results["watched"]["E"] is None and results["watched"]["details"]["curves"]["ranks"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    again = figures.main(["--output", str(tmp_path / "again")])
    assert [unnumbered(p) for p in again] == [unnumbered(p) for p in written]


def unnumbered(path):
    """The drawing without the numbers that Vega counts its gradients and clips by."""
    return re.sub(r"(gradient_|clip)\d+", r"\1", path.read_text())
