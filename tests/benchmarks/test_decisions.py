import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_real_runs import data  # noqa: F401 - a fixture

import fxrank
from benchmarks import campaign, decisions, record
from benchmarks.campaign import Campaign, Cell, in_order
from benchmarks.decisions import Book
from benchmarks.subjects import cells, verdicts
from benchmarks.subjects.jobs import JOBS, bleu, fixed, narrower, size, target, translations
from benchmarks.subjects.rows import DECIDING, ROWS, Setup
from benchmarks.subjects.texts import END, START

TINY = {
    "wide-digits": {"width": 48},
    "resnet20-cifar10": {"width": 8, "depth": 1, "train": 4, "batch": 4},
    "resnet18-cifar10": {"width": 8, "depth": 1, "train": 4, "batch": 4},
    "vit-cifar10": {"depth": 2, "width": 48, "train": 4, "test": 4, "batch": 4},
    "char-transformer": {"length": 16, "width": 24, "depth": 2, "train": 8, "test": 6, "batch": 4},
    "lstm-wikitext2": {"length": 7, "width": 32, "at_least": 1, "batch": 4},
    "multi30k": {"length": 12, "width": 32, "depth": 2, "at_least": 1, "train": 8, "batch": 4},
}
SIZES = {
    "wide-digits": (8, 16, 24),
    "vit-cifar10": (12, 24),
    "char-transformer": (6, 12),
    "lstm-wikitext2": (4, 8),
    "multi30k": (8, 16),
}
HAND = {
    "dense_parameters": 1000,
    "dense_fixed": 0,
    "epochs": 4,
    "validation_loss": 0.5,
    "accuracy_before_switch": None,
    "accuracy_after_switch": None,
    "macs_before": 100,
    "macs_after": 100,
    "E": None,
    "K": 5,
    "seconds": {"total": 110.0, "evaluation": 10.0, "monitor": 0.0, "profile": 0.0, "switch": 0.0},
    "layers": 5,
    "factorized": 0,
    "narrow": None,
    "cell_seconds": 120.0,
    "notes": [],
}


def tiny(name):
    return replace(JOBS[name], epochs=1, options=dict(JOBS[name].options) | TINY[name], score=None)


def cell(score, parameters, metric="accuracy", **more):
    return HAND | {"scores": {metric: score}, "parameters": parameters} | more


def options(tmp_path, **more):
    given = ["--data", str(tmp_path), "--ledger", str(tmp_path / "ledger.jsonl")]
    found = decisions.parser().parse_args(given)
    for name, value in more.items():
        setattr(found, name, value)
    return found


# -- order, meaning, budget


def test_jobs_come_in_turn_and_then_the_seeds_of_rows_that_decide():
    found = in_order(["a", "b"], ["full", "paper"], [0, 1, 2], ["full"])
    assert found[:4] == [("a", "full", 0), ("b", "full", 0), ("a", "paper", 0), ("b", "paper", 0)]
    assert found[4:] == [("a", "full", 1), ("b", "full", 1), ("a", "full", 2), ("b", "full", 2)]


def test_rows_that_decide_come_first():
    assert tuple(ROWS)[: len(DECIDING)] == DECIDING


def test_every_row_is_a_setup_or_says_why_not():
    for job in JOBS.values():
        for name, row in ROWS.items():
            found = row(job)
            assert isinstance(found, (Setup, str)), name
            assert " at 0x" not in repr(found), name  # another in every process: no ledger would ever be gone on with
    assert ROWS["0.5-spatial"](JOBS["char-transformer"]) == "no two-dimensional kernels"
    assert ROWS["0.5-tables"](JOBS["wide-digits"]) == "no embeddings"


def test_another_policy_or_scale_is_another_meaning(monkeypatch):
    job = JOBS["wide-digits"]
    before = campaign.meaning(ROWS, job, "0.5")
    assert campaign.meaning(ROWS, job, "0.5") == before
    assert campaign.meaning(ROWS, replace(job, epochs=7), "0.5") != before
    assert campaign.meaning(ROWS, replace(job, options={"width": 40}), "0.5") != before
    monkeypatch.setitem(ROWS, "0.5", lambda job: Setup(fxrank.Cuttlefish(target_params=0.4)))
    assert campaign.meaning(ROWS, job, "0.5") != before


def test_ledger_goes_on_after_a_cut_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    book = Book(path, JOBS)
    one, two = Cell("wide-digits", "full", 0), Cell("wide-digits", "0.5", 0)
    book.add(one, cell(0.9, 1000))
    whole = path.read_bytes()
    book.add(two, cell(0.8, 500))
    for cut in (len(whole) + 1, len(whole) + 40, len(path.read_bytes()) - 1):
        path.write_bytes(path.read_bytes()[:cut] if cut < len(path.read_bytes()) else path.read_bytes())
        again = Book(path, JOBS)
        assert again.found(one) is not None
        assert again.found(two) is None
        again.add(two, cell(0.7, 500))
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        assert [e["name"]["row"] for e in entries] == ["full", "0.5"]
        assert Book(path, JOBS).found(two)["scores"] == {"accuracy": 0.7}


def test_a_line_in_the_middle_that_is_no_json_is_an_error(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"half\n{}\n')
    with pytest.raises(json.JSONDecodeError):
        record.Ledger(path, {})


def test_changed_rows_are_not_looked_at(tmp_path, monkeypatch):
    path, one = tmp_path / "ledger.jsonl", Cell("wide-digits", "0.5", 0)
    Book(path, JOBS).add(one, cell(0.9, 1000))
    monkeypatch.setitem(ROWS, "0.5", lambda job: Setup(fxrank.Cuttlefish(target_params=0.4)))
    book = Book(path, JOBS)
    assert book.found(one) is None
    assert book.of_job("wide-digits") == ({}, {})
    assert book.minutes("wide-digits") == pytest.approx(2.0)  # its time is as good as any


class Sham(Campaign):
    """Cells that are over at once."""

    def _begin(self, cell, folder):
        self.begun.append(cell)
        output = folder / "found.json"
        output.write_text(json.dumps(HAND | {"scores": {"accuracy": 0.5}, "parameters": 10}))
        process = subprocess.Popen([sys.executable, "-c", ""])
        return campaign.Running(cell, process, output, time.monotonic())


def test_nothing_is_begun_that_would_not_end_within_the_budget(tmp_path, capsys):
    book = Book(tmp_path / "ledger.jsonl", JOBS)
    known, unknown = Cell("wide-digits", "full", 0), Cell("vit-cifar10", "full", 0)
    book.add(known, cell(0.9, 1000, cell_seconds=30.0))
    campaign = Sham(book, options(tmp_path, budget_minutes=3.0))
    campaign.begun = []
    campaign.run([known, unknown, known._replace(row="0.5"), unknown._replace(row="0.5")])
    assert campaign.begun == [
        ("wide-digits", "0.5", 0)
    ]  # half a minute; of the other nothing is known, and one is done
    assert book.found(known._replace(row="0.5"))["quiet"] is True
    assert "2 cells were left for another time" in capsys.readouterr().out


def test_failed_cells_are_named_and_not_kept(tmp_path, capsys):
    book = Book(tmp_path / "ledger.jsonl", JOBS)
    campaign = Campaign(book, options(tmp_path, processes=2))
    one = Cell("char-transformer", "full", 0)
    campaign.run([one])  # there is no text there
    assert campaign.failed == [one]
    assert book.found(one) is None
    assert "FAILED: char-transformer full 0" in capsys.readouterr().out


def test_interrupt_leaves_a_ledger_to_go_on_with(tmp_path):
    class Interrupted(Sham):
        def _begin(self, cell, folder):
            if self.begun:
                raise KeyboardInterrupt
            return super()._begin(cell, folder)

    book = Book(tmp_path / "ledger.jsonl", JOBS)
    campaign = Interrupted(book, options(tmp_path))
    campaign.begun = []
    wanted = [Cell("wide-digits", row, 0) for row in ("full", "0.5")]
    campaign.run(wanted)
    assert [Book(tmp_path / "ledger.jsonl", JOBS).found(c) is not None for c in wanted] == [True, False]


# -- jobs


@pytest.mark.parametrize("name", TINY)
def test_every_job_is_trained_as_full_rank_within_a_budget_and_narrower(name, data):  # noqa: F811
    if name == "vit-cifar10":
        pytest.importorskip("timm")
    job = replace(tiny(name), sizes=SIZES.get(name, JOBS[name].sizes))
    found = {
        row: cells.train(job, ROWS[row](job), 0, data, data / "cache") for row in ("full", "0.5-data", "narrow-0.5")
    }
    dense = found["full"]
    assert dense["parameters"] == dense["dense_parameters"]
    assert not dense["plan"]
    assert "refused" not in found["0.5-data"]
    assert 0.4 < verdicts.Line("", "", [found["0.5-data"]]).share <= 0.5
    assert found["0.5-data"]["plan"]
    assert found["0.5-data"]["E"] is not None
    assert verdicts.Line("", "", [found["narrow-0.5"]]).share <= 0.5
    json.dumps(found)
    timed = cells.time_steps(job, found, data, data / "cache", rounds=3)
    assert set(timed) == set(found)
    assert all(one["step_ms"] > 0 and len(one["ratio"]) == 2 for one in timed.values())


def test_model_of_recorded_pairs_has_the_parameters_that_were_trained(data):  # noqa: F811
    job = tiny("resnet18-cifar10")
    found = cells.train(
        job, Setup(fxrank.Cuttlefish(target_params=0.4, form="spatial", latest=0.0)), 0, data, data / "cache"
    )
    entries = json.loads(json.dumps(found["plan"]))
    assert {entry["form"] for entry in entries if "form" in entry} == {"spatial"}
    again = cells.with_pairs(job.task(data, data / "cache").build(0), entries)
    assert size(again) == found["parameters"] < found["dense_parameters"]


def test_budget_that_nothing_keeps_to_says_so(data):  # noqa: F811
    job = tiny("wide-digits")
    found = cells.train(job, Setup(fxrank.Cuttlefish(target_params=0.01)), 0, data, None)
    assert found["refused"].startswith("target_params must be at least")


def test_share_is_of_what_no_table_has():
    model = torch.nn.Sequential(
        torch.nn.Embedding(30, 2), torch.nn.Linear(2, 10, bias=False), torch.nn.Linear(10, 2, bias=False)
    )
    model[2].weight = torch.nn.Parameter(model[2].weight.detach())
    words, images = JOBS["multi30k"], JOBS["vit-cifar10"]
    assert (fixed(words, model), fixed(images, model), size(model)) == (60, 0, 100)
    assert target(words, 0.5, model) == pytest.approx(0.8)
    assert target(images, 0.5, model) == 0.5


def test_narrower_model_is_the_largest_that_is_small_enough():
    job = JOBS["wide-digits"]
    task = job.task(Path(), None)
    dense, small = task.build(0), narrower(job, task, 0.5, 0)
    width = small[1].out_features
    assert size(small) <= 0.5 * size(dense) < size(task.build(0, width + 4))
    assert narrower(replace(job, sizes=(508,)), task, 0.5, 0) is None


def test_translations_are_the_likeliest_word_again_and_again(data):  # noqa: F811
    job = tiny("multi30k")
    task = job.task(data, None)
    model = task.build(0).eval()
    source = torch.cat([next(iter(task.loaders(0)[1]))[0]])
    length = 12
    for sentence, got in zip(source, translations(model, source, length, batch=3), strict=True):
        sentence = sentence[sentence != 0][None]
        words = [START]
        while len(words) < len(got) + 1:
            words.append(int(model(sentence, torch.tensor([words]))[0, -1].argmax()))
        assert words[1:] == got
        assert END not in got
    assert any(translations(model, source, length))


def test_bleu_is_reported_or_why_not(data, monkeypatch):  # noqa: F811
    job = tiny("multi30k")
    model = job.task(data, None).build(0)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert bleu(model, data, 1, 12) == "no BLEU: sacrebleu is not installed (pip install 'fxrank[runs]')"
    monkeypatch.undo()
    pytest.importorskip("sacrebleu")
    name, score = bleu(model, data, 1, 12)
    assert name == "bleu"
    assert 0 <= score <= 100


# -- the table


@pytest.fixture
def book(tmp_path):
    found = Book(tmp_path / "ledger.jsonl", JOBS)

    def add(row, seed, one, job="wide-digits"):
        found.add(Cell(job, row, seed), one)

    for seed, score in enumerate((0.980, 0.984)):
        add("full", seed, cell(score, 1000))
    switched = {
        "E": 1.0,
        "accuracy_before_switch": 0.9,
        "accuracy_after_switch": 0.88,
        "factorized": 4,
        "macs_after": 50,
    }
    add("0.5", 0, cell(0.981, 500, **switched))
    add("0.3", 0, cell(0.960, 300, **switched | {"accuracy_after_switch": 0.895}))
    add("narrow-0.5", 0, cell(0.975, 480, narrow=0.5))
    add("0.3-tables", 0, {"refused": "target_params must be at least 0.4"})
    return found


def test_table_has_means_and_spreads(book):
    text = decisions.table(book, ["wide-digits", "multi30k"])
    assert "| 98.20 ± 0.28 |" in text
    assert "| 90.00 → 88.00 " in text
    assert "- 0.3-tables: target_params must be at least 0.4" in text
    assert "### multi30k\n\nnothing yet" in text
    assert "of 2 states" not in text


def test_criteria_of_a_job(book):
    trained, steps = book.of_job("wide-digits")
    a, b, c, d = verdicts.criteria(trained, steps)
    assert a.startswith(
        "(a) within the limit of full-rank with at most half of the parameters: yes, `0.5` 98.10 against 98.20"
    )
    assert b.startswith("(b) better than a narrower model of that size: yes, `narrow-0.5` 97.50")
    assert c == "(c) at most 1 point of accuracy lost at the switch: NO, 2.00"
    assert d == "(d) time of the run against full-rank: 1.00, by the wall, not quiet"
    book.add(Cell("wide-digits", "0.5", 0), {"ratio": [0.6, 0.2], "step_ms": 2}, "steps")
    trained, steps = book.of_job("wide-digits")
    # a quarter of the run before the switch, three at 0.6
    assert verdicts.criteria(trained, steps)[3] == "(d) time of the run against full-rank: 0.70, by timed steps"


def test_criteria_that_are_not_met(book):
    book.add(Cell("wide-digits", "0.5", 0), cell(0.97, 500))
    a, b, c, _ = verdicts.criteria(*book.of_job("wide-digits"))
    assert "parameters: NO, `0.5` 97.00" in a
    assert "size: NO" in b
    assert c.endswith("no switch")


@pytest.mark.parametrize(
    ("metric", "full", "good", "bad"),
    [("perplexity", 50.0, 50.4, 50.6), ("bits_per_character", 2.0, 2.0143, 2.0145), ("bleu", 20.0, 19.6, 19.4)],
)
def test_limits_of_other_measures(metric, full, good, bad):
    dense, near, far = (verdicts.Line("", metric, [cell(score, 500, metric)]) for score in (full, good, bad))
    assert near.within(dense)
    assert not far.within(dense)
    assert near.beats(far)
    assert not far.beats(near)


def test_measure_is_one_that_all_rows_have():
    both = {"perplexity": 9.0, "bleu": 20.0}
    rows = {"full": [cell(0, 10, scores=both)], "0.5": [cell(0, 5, scores=both)]}
    assert verdicts.lines(rows, {})["full"].metric == "bleu"
    rows["0.3"] = [cell(0, 5, scores={"perplexity": 9.0})]
    assert verdicts.lines(rows, {})["full"].metric == "perplexity"


def test_nothing_is_said_before_it_is_known(book):
    trained, _ = book.of_job("wide-digits")
    del trained["full"]
    assert verdicts.criteria(trained, {}) == [
        "not known yet: it takes `full` and a row with at most half of the parameters"
    ]
    assert verdicts.criteria({}, {}) == verdicts.criteria(trained, {})


# -- the command


def test_command_trains_times_and_prints_from_the_ledger_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    common = [
        "--jobs",
        "wide-digits",
        "--rows",
        "full",
        "0.5-spatial",
        "--small",
        "--ledger",
        str(tmp_path / "l.jsonl"),
    ]
    book = decisions.main(["--data", str(tmp_path), *common])
    assert book.found(Cell("wide-digits", "full", 0))["quiet"]
    assert "begins: wide-digits full 0" in capsys.readouterr().out
    monkeypatch.setattr(cells, "ROUNDS", 2)
    decisions.main(["--data", str(tmp_path), "--time", *common])
    assert "steps of wide-digits: 1 rows" in capsys.readouterr().out
    assert set(Book(tmp_path / "l.jsonl", decisions.jobs_of(small=True)).of_job("wide-digits")[1]) == {"full"}
    decisions.main(["--table", *common])
    text = capsys.readouterr().out
    assert "begins" not in text
    assert "### wide-digits" in text
    with pytest.raises(SystemExit, match="--data FOLDER is where the data sets are"):
        decisions.main(common)
