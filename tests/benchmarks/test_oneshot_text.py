"""The benchmark of one-shot factorization on texts, at a tiny size."""

import json
from functools import partial

import pytest
import torch

from benchmarks import oneshot_text
from benchmarks.subjects.tasks import TASKS


@pytest.fixture
def command(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/tinyshakespeare.txt").write_text("the cat sees a dog, and the dog likes it.\n" * 200)
    places = {"source": tmp_path, "weights": tmp_path / "w.pt", "ledger": tmp_path / "rows.jsonl", "results": tmp_path}
    options = {"task": "char-transformer", "epochs": 1, "calibration": 2, "steps": 2, **places}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def tasks():
    sizes = {"length": 16, "width": 24, "depth": 2, "train": 8, "test": 6, "batch": 4}
    return TASKS | {"char-transformer": partial(TASKS["char-transformer"], **sizes)}


def rows_of(path):
    return json.loads(path.read_text())["results"]


def test_there_is_a_row_for_each_way_and_none_is_made_twice(command, tasks, monkeypatch, capsys):
    rows = rows_of(oneshot_text.main([*command, "--budgets", "0.8", "0.01"], tasks))
    assert rows[0]["way"] == "dense"
    at = {budget: [r for r in rows if r["budget"] == budget] for budget in (0.8, 0.01)}
    pairs = [(r["factors"], r["form"], r["ranks"], r["layers"]) for r in at[0.8] if r["way"] == "pairs"]
    assert len(set(pairs)) == len(pairs) == 10
    assert all(0.5 < r["parameters"] <= 0.83 for r in at[0.8])  # so small a model has biases and tables in the main
    assert {r["way"] for r in at[0.8]} == {"pairs", "narrower"}
    assert all({"raw", "healed", "forward", "seconds"} <= r.keys() for r in at[0.8])
    refused = {r["ranks"]: r["refused"] for r in at[0.01]}
    assert "target_params must be at least" in refused["chosen"]
    assert "out of reach with rank 1" in refused["uniform"]
    assert "narrower" in capsys.readouterr().out

    def made(*_):
        raise AssertionError("a row that is in the ledger is made again")

    monkeypatch.setattr(oneshot_text, "metric", made)
    again = rows_of(oneshot_text.main([*command, "--budgets", "0.8", "0.01"], tasks))
    assert again == rows
    with pytest.raises(AssertionError, match="made again"):  # of another configuration
        oneshot_text.main([*command, "--budgets", "0.8", "--healing-rate", "0.1"], tasks)


def test_on_a_busy_machine_no_times_are_told(command, tasks, capsys):
    rows = rows_of(oneshot_text.main([*command, "--budgets", "0.8", "--no-timing"], tasks))
    assert not any({"forward", "seconds"} & r.keys() for r in rows)
    assert "forward" not in capsys.readouterr().out


def test_a_narrower_model_is_the_widest_that_fits(tasks, tmp_path, command):
    task = tasks["char-transformer"](tmp_path)
    dense = task.build(0)
    total = sum(p.numel() for p in dense.parameters())
    small = oneshot_text.narrower(task, dense, 0.8)
    assert small.positions.shape[1] == 18
    assert sum(p.numel() for p in small.parameters()) <= 0.8 * total
    assert oneshot_text.narrower(task, torch.nn.Linear(2, 2), 0.8) is None
