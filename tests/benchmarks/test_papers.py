"""The papers' comparison: its rows, the sizes that are matched, the table beside the papers' figures, and a ledger that is gone on with."""

import argparse
import json
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from typing import ClassVar

import pytest
from digit_tasks import digits, needs_torch_pruning, perceptron
from test_real_runs import data  # noqa: F401 - a fixture

from benchmarks import campaign, paper_page, papers
from benchmarks.baselines.base import Sizeable
from benchmarks.campaign import Book, Campaign, Cell
from benchmarks.subjects.jobs import SIDE, size
from benchmarks.subjects.paper_rows import JOBS, MATCHED, ROWS, SpectralInitOfSize, Trial, train
from benchmarks.subjects.rows import Setup
from fxrank import NothingFactorizedWarning, factorize, plan_of
from fxrank.policies.ranks import ratio_rank

TINY = {
    "resnet18-cifar10": {"width": 8, "depth": 1, "train": 4, "batch": 4},
    "vgg19-cifar10": {"width": 4, "train": 4, "batch": 4},
}
RESNET = "resnet18-cifar10"


def tiny(name):
    return replace(JOBS[name], epochs=2, options=dict(JOBS[name].options) | TINY[name])


def cell(score, parameters, seconds, **more):
    scores = {"scores": {"accuracy": score}, "parameters": parameters, "training_seconds": seconds, "quiet": True}
    return {"data": "images", "dense_parameters": 1_000_000, "dense_fixed": 0, "cell_seconds": 9.0} | scores | more


# -- rows and jobs


def test_every_row_is_plain_and_matched_ones_can_be_sized():
    for job in JOBS.values():
        for name, row in ROWS.items():
            found = row(job)
            assert isinstance(found, (Setup, Trial)), name
            assert " at 0x" not in repr(found), name  # another in every process: no ledger would ever be gone on with
            if campaign.like(found):
                assert found.like == MATCHED and isinstance(found.baseline, Sizeable)
    assert [n for n, row in ROWS.items() if campaign.like(row(JOBS[RESNET]))] == ["si-fd", "imp", "grasp", "early-bird"]
    assert list(ROWS).index(MATCHED) < list(ROWS).index("si-fd")


def test_switches_are_at_the_papers_share_of_the_run():
    for name, at in ((RESNET, 82.3), ("vgg19-cifar10", 97.3)):
        assert ROWS[MATCHED](JOBS[name]).policy.latest == pytest.approx(at / 300)
    given = [ROWS["pufferfish"](job).policy for job in JOBS.values()]
    assert [(policy.E, policy.K) for policy in given] == [
        (pytest.approx(80 / 300 * 6), 3),
        (pytest.approx(80 / 300 * 6), 9),
    ]


def test_cuttlefish_leaves_the_papers_layers_dense(data):  # noqa: F811
    for name, leading in ((RESNET, 5), ("vgg19-cifar10", 4)):
        job = JOBS[name]
        task, setup = job.task(data, data / "cache"), ROWS[MATCHED](job)
        model = task.build(0)
        plan = plan_of(factorize(model, next(iter(task.loaders(0)[1]))[0], 1, exclude=setup.options["exclude"]))
        first, kept = plan.K, [d.name for d in plan.layers[leading:] if not d.factorized]
        assert first == leading
        assert kept == [n for n in kept if "shortcut" in n or n in ("linear", "classifier")]


def test_vgg_has_the_papers_layers_and_loses_the_pooling_that_has_no_pixels_left(data):  # noqa: F811
    job = JOBS["vgg19-cifar10"]
    task = job.task(data, data / "cache")
    model = task.build(0)
    assert model.order.count(None) == 4 and len(model.order) == 20  # 16 convolutions
    assert [model.get_submodule(f"conv{i}").out_channels for i in (1, 3, 5, 9, 16)] == [16, 32, 64, 128, 128]
    image = next(iter(task.loaders(0)[1]))[0]
    assert image.shape[1:] == (3, SIDE, SIDE)
    assert model.eval()(image).shape == (len(image), 10)
    assert (
        replace(job, options=dict(job.options) | {"side": 32}).task(data, data / "cache").build(0).order.count(None)
        == 5
    )


# -- cells


@pytest.mark.parametrize(
    ("name", "row"),
    [*((RESNET, row) for row in ROWS), ("vgg19-cifar10", "cuttlefish"), ("vgg19-cifar10", "early-bird")],
)
def test_every_row_is_trained(name, row, data):  # noqa: F811
    if row == "early-bird":
        needs_torch_pruning()
    job = tiny(name)
    setup = ROWS[row](job)
    if row == "lc":
        setup = Trial(replace(setup.baseline, rounds=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingFactorizedWarning)  # two steps have taught the ranks nothing
        found = train(job, setup, 0, data, data / "cache", 0.6 if campaign.like(setup) else None)
    json.dumps(found)
    assert 0 <= found["scores"]["accuracy"] <= 1
    assert found["training_seconds"] > 0
    dense = size(job.task(data, data / "cache").build(0))
    assert found["dense_parameters"] == dense
    share = found["parameters"] / dense
    if campaign.like(setup):
        assert 0.4 < share < 0.62
    elif row == "xnor":
        assert share < 0.2
    else:
        assert 0 < share <= 1
    assert papers.table(Book(data / "none", "papers", {name: job}, ROWS), [name])


def test_where_the_other_row_is_dense_there_is_no_size_to_match(data):  # noqa: F811
    job = tiny(RESNET)
    found = train(job, ROWS["imp"](job), 0, data, data / "cache", 1.0)
    assert found == {"refused": "the row cuttlefish is dense: there is no size to match"}


def test_the_ratio_of_spectral_initialization_is_the_largest_for_the_size():
    task = digits(lambda: perceptron(40))
    model, method = task.build(0), SpectralInitOfSize().sized(0.8)
    ratio = method.ratio(model, next(iter(task.loaders(0)[0])))
    found = method(task, 2, 0)
    assert found.facts["ratio"] == ratio
    assert found.facts["ranks"] == {"3": ratio_rank(40, ratio)}
    more = found.remaining + 80  # one rank more
    assert found.remaining == size(found.model) <= 0.8 * found.dense_parameters < more
    with pytest.raises(
        ValueError, match=r"pairs of rank 1 leave 0\.\d+ of the parameters; the share given is 0.010. Raise share."
    ):
        method.sized(0.01).ratio(model, next(iter(task.loaders(0)[0])))


# -- the papers' figures and the table


def test_figures_are_of_rows_and_jobs_that_there_are():
    tables = json.loads(papers.FIGURES.read_text(encoding="utf-8"))["tables"]
    for table in tables:
        assert table["job"] in (*JOBS, None)
        assert set(table["rows"]) <= set(ROWS)
        (full,) = table["rows"]["full"]
        for name, figures in table["rows"].items():
            for one in figures:
                assert (
                    {"accuracy", "parameters_millions"}
                    <= set(one)
                    <= {*("accuracy", "spread", "parameters_millions", "share", "hours", "setting")}
                )
                if "share" in one and name != "xnor":  # rounded twice, as typed
                    assert one["share"] == pytest.approx(
                        one["parameters_millions"] / full["parameters_millions"], abs=0.005
                    )


def test_a_figure_stands_beside_its_own_full_rank_model():
    assert papers.figure(RESNET, "imp") == (
        "95.04 ± 0.03",
        "+0.63",
        "1.9 M (0.168)",
        "6.55 h (7.99)",
        "Cuttlefish (MLSys 2023), Table 1",
    )
    found = papers.figure("vgg19-cifar10", "grasp")  # none on CIFAR-10
    assert (found.accuracy, found.difference, found.time) == ("74.64 / 74.02", "-1.35 / -1.97", "-")
    assert found.source == "Cuttlefish (MLSys 2023), Table 18, ResNet-50 on ImageNet (30 % pruned, 60 % pruned)"
    assert set(papers.figure(RESNET, "lc")) == {"-"}  # the paper has it for VGG-19 alone
    assert papers.figure("vgg19-cifar10", "lc").accuracy == "93.23 ± 0.15"


def lines(text, row):
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {row} ")]
    return [part.strip() for part in line.strip("|").split("|")]


def test_the_table_has_means_beside_the_papers_figures(tmp_path):
    book = Book(tmp_path / "ledger.jsonl", "papers", JOBS, ROWS)
    text = papers.table(book, [RESNET])
    assert "nothing yet; 6 epochs" in text
    assert lines(text, "full")[1:6] == ["-"] * 5 and lines(text, "full")[6] == "94.41 ± 0.15"
    book.add(Cell(RESNET, "imp", 0), cell(0.71, 300_000, 500.0))
    assert lines(papers.table(book, [RESNET]), "imp")[1:6] == ["1", "71.00", "-", "0.300 M (0.300)", "500 s"]
    for seed, score in enumerate((0.72, 0.724)):
        book.add(Cell(RESNET, "full", seed), cell(score, 1_000_000, 100.0))
    book.add(Cell(RESNET, "xnor", 0), cell(0.5, 40_000.5, 210.0, quiet=False))
    book.add(Cell(RESNET, "grasp", 0), {"refused": "the row cuttlefish is dense: there is no size to match"})
    text = papers.table(book, [RESNET])
    assert lines(text, "full")[1:6] == ["2", "72.20 ± 0.28", "+0.00", "1.000 M (1.000)", "100 s (1.00)"]
    assert lines(text, "imp")[1:6] == ["1", "71.00", "-1.20", "0.300 M (0.300)", "500 s (5.00)"]
    assert lines(text, "imp")[6:8] == ["95.04 ± 0.03", "+0.63"]
    assert lines(text, "xnor")[4:6] == ["0.040 M (0.040)", "~210 s (2.10)"]
    assert "- grasp: the row cuttlefish is dense" in text


# -- the campaign


class Sham(Campaign):
    """Cells that are over at once, but for those that are stopped."""

    begun: ClassVar[list] = []
    stops_at = None

    def _begin(self, cell, folder):
        if cell.row == self.stops_at:
            raise KeyboardInterrupt
        self.begun.append((cell.row, self.book.share(cell)))
        output = folder / "found.json"
        share = 0.4 if cell.row == MATCHED else 1
        output.write_text(
            json.dumps(
                {
                    "scores": {"accuracy": 0.5},
                    "parameters": 1000 * share,
                    "dense_parameters": 1000,
                    "dense_fixed": 0,
                    "data": "",
                    "training_seconds": 1.0,
                }
            )
        )
        return campaign.Running(cell, subprocess.Popen([sys.executable, "-c", ""]), output, time.monotonic())


@pytest.fixture
def sham(monkeypatch):
    monkeypatch.setattr(papers, "Campaign", Sham)
    monkeypatch.setattr(Sham, "begun", [])
    monkeypatch.setattr(Sham, "stops_at", None)
    return Sham


def test_the_same_command_goes_on_where_it_was_stopped(data, sham, capsys):  # noqa: F811
    given = ["--data", str(data), "--cache", str(data), "--jobs", RESNET, "--ledger", str(data / "l.jsonl")]
    sham.stops_at = "si-fd"
    papers.main(given)
    assert [row for row, _ in sham.begun] == ["full", "cuttlefish", "fxrank", "pufferfish"]
    assert "stopped; the same command goes on from here" in capsys.readouterr().out
    sham.stops_at, sham.begun = None, []
    papers.main(given)
    assert sham.begun == [
        ("si-fd", 0.4),
        ("lc", None),
        ("imp", 0.4),
        ("grasp", 0.4),
        ("early-bird", 0.4),
        ("xnor", None),
    ]
    sham.begun = []
    papers.main(given)
    assert sham.begun == []
    papers.main(["--table", "--jobs", RESNET, "--ledger", str(data / "l.jsonl")])
    assert lines(capsys.readouterr().out.rpartition("###")[2], "xnor")[2] == "50.00"


def test_rows_of_a_size_wait_for_the_row_that_has_it(data, sham, capsys):  # noqa: F811
    given = ["--data", str(data), "--cache", str(data), "--jobs", RESNET, "--ledger", str(data / "l.jsonl")]
    papers.main([*given, "--rows", "full", "grasp"])
    assert [row for row, _ in sham.begun] == ["full"]
    assert "1 cells were left: those that are like rows that are not trained" in capsys.readouterr().out
    papers.main([*given, "--rows", "grasp", "cuttlefish", "--seeds", "0"])
    assert [row for row, _ in sham.begun] == ["full", "cuttlefish", "grasp"]


def test_another_baseline_is_another_meaning(tmp_path, monkeypatch):
    book, one = Book(tmp_path / "l.jsonl", "papers", JOBS, ROWS), Cell(RESNET, "grasp", 0)
    book.add(one, cell(0.7, 400_000, 9.0))
    assert book.found(one)
    row = ROWS["grasp"](JOBS[RESNET])
    monkeypatch.setitem(ROWS, "grasp", lambda job: Trial(replace(row.baseline, temperature=1.0), row.like))
    assert Book(tmp_path / "l.jsonl", "papers", JOBS, ROWS).found(one) is None
    monkeypatch.setitem(ROWS, "grasp", lambda job: row)
    monkeypatch.setitem(ROWS, MATCHED, lambda job: ROWS["full"](job))  # what it is like
    assert Book(tmp_path / "l.jsonl", "papers", JOBS, ROWS).found(one) is None


def test_the_process_of_a_cell_writes_what_it_finds(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(papers, "JOBS", {name: replace(tiny(name), small={}) for name in TINY})
    output = tmp_path / "found.json"
    given = ["--data", str(data), "--cache", str(data / "cache"), "--small", "--output", str(output)]
    assert papers.main([*given, "--cell", RESNET, "grasp", "0", "--share", "1.0"]) is None
    found = json.loads(output.read_text())
    assert found["parameters"] / found["dense_parameters"] == pytest.approx(
        0.5, abs=1e-3
    )  # --small: half, as there is nothing to match
    assert "GraSP(share=0.5" in found["baseline"]
    with pytest.raises(SystemExit, match="--data FOLDER is where the data sets are"):
        papers.main(["--jobs", RESNET])


def test_options_are_those_of_every_campaign():
    options = papers.parser().parse_args(["--table", "--budget-minutes", "3", "--processes", "2"])
    assert isinstance(options, argparse.Namespace)
    assert (options.table, options.budget_minutes, options.processes, options.jobs) == (True, 3.0, 2, list(JOBS))


# -- the page


def test_the_page_says_who_is_ahead_and_at_what_price():
    def known(seed, score, parameters, seconds):
        return {"seed": seed} | cell(score, parameters, seconds)

    ours = [known(0, 0.70, 400_000, 100.0), known(1, 0.71, 400_000, 100.0)]
    rows = {"fxrank": ours, "full": [known(0, 0.72, 1_000_000, 110.0)], "imp": [known(1, 0.70, 300_000, 500.0)]}
    assert paper_page.ahead(rows) == (
        "Ahead of `fxrank` in accuracy: `full` by 2.00 points, with 2.50 times its parameters in 1.1 times its time."
    )
    rows["full"] = [{"seed": 0, "refused": "no"}]
    assert paper_page.ahead(rows) == "Ahead of `fxrank` in accuracy: none of the others."


def test_the_page_shows_the_networks_whose_dense_model_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_page, "RESULTS", tmp_path)
    assert set(paper_page.SYSTEMS) == set(ROWS)
    assert "Not run yet: CIFAR-10 (`python -m benchmarks.papers`), GLUE" in paper_page.page()
    book = Book(tmp_path / "papers_cpu2_202611.jsonl", "papers", JOBS, ROWS)
    book.add(Cell(RESNET, "full", 0), cell(0.72, 1_000_000, 100.0))
    book.add(Cell("vgg19-cifar10", "imp", 0), cell(0.72, 1_000_000, 100.0))
    shown = paper_page.images()
    assert f"### {RESNET}" in shown and "### vgg19-cifar10" not in shown
    assert lines(shown, "full")[2] == "72.00"
