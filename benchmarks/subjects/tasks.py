"""Five real training jobs for two CPU cores: an image classifier, a fine-tuned text encoder, a character model, a word
model and a translator.

Each function in `TASKS` takes a folder of data sets and returns a `Task`. The folder holds `cifar10-jpeg.tar.xz` (see
`benchmarks.subjects.data`), `glue/SST-2/{train,dev}.tsv`, `text/tinyshakespeare.txt`, `text/wikitext2-{valid,test}.txt` and
`multi30k/{train,val}.{de,en}.gz`; a task reads its own part. `scale` multiplies the number of training examples.
"""

import gzip
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import fxrank
from benchmarks.subjects import glue
from benchmarks.subjects.data import Cifar, DeviceLoader, cifar10, reduced
from benchmarks.subjects.text_models import PAD, CharTransformer, LstmLanguageModel, Translator
from benchmarks.subjects.texts import END, START, Batches, numbers, padded, vocabulary, windows
from fxrank.training.batches import IGNORED, LossFn


@dataclass(frozen=True)
class Task:
    """One job. `build(seed)` makes a fresh model, `loaders(seed)` a fresh training and validation loader, `optimizer`
    takes the model, `schedule` the optimizer and the number of steps and gives a scheduler and `"batch"` or
    `"epoch"`, `policy` takes the number of epochs. `metric` is a name in `METRICS` (or of `glue`'s), `data` says what is trained and
    tested on, and `loss_fn=None` stands for the model's own loss. `build(seed, size)` makes one of another width, or of
    another depth where it arrives pretrained.
    """

    name: str
    data: str
    metric: str
    epochs: int
    build: Callable[..., nn.Module]
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
    """A quarter of the rate after each epoch without a better validation loss (as Pufferfish trains its LSTM)."""
    return ReduceLROnPlateau(optimizer, factor=0.25, patience=0), "epoch"


# -- texts

Pair = tuple[list[str], list[str]]


def sentence_pairs(data: Path, split: str) -> list[Pair]:
    """Sentence pairs of Multi30k, German first, in lower case, as words and signs."""
    sides = []
    for language in ("de", "en"):
        with gzip.open(data / "multi30k" / f"{split}.{language}.gz", "rt", encoding="utf-8") as file:
            sides.append([re.findall(r"\w+|[^\w\s]", line.lower()) for line in file])
    return list(zip(*sides, strict=True))


def known_words(data: Path, at_least: int) -> dict[str, int]:
    """The vocabulary of Multi30k, of both languages together."""
    pairs = sentence_pairs(data, "train")
    return vocabulary((word for pair in pairs for side in pair for word in side), at_least)


def sources(pairs: Sequence[Pair], known: Mapping[str, int], length: int) -> Tensor:
    """What is translated, as numbers `(N, length)`."""
    return padded([[*numbers(de, known), END] for de, _ in pairs], length, PAD)


# -- tasks


def _seeded(make: Callable[[int], nn.Module], size: int) -> Callable[..., nn.Module]:

    def build(seed: int, size: int = size) -> nn.Module:
        torch.manual_seed(seed)
        return make(size)

    return build


def small_cifar10(data: Path, cache: Path | None, side: int) -> Cifar:
    """CIFAR-10 as JPEG, images of side² pixels; the decoded ones are kept in the folder `cache`."""
    decoded = None if cache is None else cache / "cifar10-jpeg.pt"
    return reduced(cifar10(data, data / "cifar10-jpeg.tar.xz", decoded), side)


def vit_cifar10(
    data: Path,
    scale: float = 1.0,
    *,
    cache: Path | None = None,
    side: int = 32,
    depth: int = 6,
    width: int = 192,
    train: int = 3200,
    test: int = 800,
    batch: int = 32,
) -> Task:
    """timm's ViT-tiny with patches of 4×4 on CIFAR-10 as JPEG: images `(N, 3, side, side)`, labels `(N,)`.

    Half of its 12 blocks by default: the whole takes twice the time. The decoded images are kept in the folder `cache`.
    """
    images = small_cifar10(data, cache, side)
    count = max(batch, round(train * scale))

    def make(width: int) -> nn.Module:
        sizes = {"img_size": side, "patch_size": 4, "num_classes": 10, "depth": depth, "embed_dim": width}
        model: nn.Module = importlib.import_module("timm").create_model("vit_tiny_patch16_224", **sizes)
        return model

    def loaders(seed: int) -> tuple[DeviceLoader, DeviceLoader]:
        common: dict[str, Any] = {"augment": True, "seed": seed, "subset": count, "drop_last": True}
        tested: dict[str, Any] = {"augment": False, "seed": 0, "subset": test}
        return (
            DeviceLoader(images.train_x, images.train_y, batch, **common),
            DeviceLoader(images.test_x, images.test_y, 250, **tested),
        )

    return Task(
        "vit-cifar10",
        f"CIFAR-10 as JPEG, {count} training and {min(test, len(images.test_y))} test images",
        "accuracy",
        4,
        _seeded(make, width),
        loaders,
        lambda logits, labels: F.cross_entropy(logits, labels),
        adamw(1e-3, 0.05),
        cosine,
        # The papers give vision Transformers one ratio for all layers; a short run from scratch hardly moves the ranks.
        lambda epochs: fxrank.Pufferfish(E=epochs / 4, K=1, ratio=0.5),
    )


def minilm_glue(data: Path, name: str, *, train: int, test: int | None = None, batch: int = 32) -> Task:
    """The pretrained MiniLM-L6 on one of `glue.DATA_SETS`: dicts of `input_ids`, `attention_mask` (and `token_type_ids` of two sentences)
    `(N, ≤ 64)`, and `labels` `(N,)`. The metric is a name in `glue.METRICS`.

    Switched after one of three epochs at the latest, with the learning rate raised from 3e-5 to 4e-5, as the
    reference code does with BERT. The encoder arrives pretrained, so ξ is that of a random matrix.
    """
    about = glue.DATA_SETS[name]
    columns = glue.columns(data, name, "train", max(batch, train))
    tested = glue.columns(data, name, "dev", test)
    pads = [None if column == "labels" else PAD for column in columns]
    what = "pairs" if len(about.sentences) == 2 else "sentences"
    return Task(
        f"minilm-{name.lower().replace('-', '')}",
        f"GLUE {name}, {len(columns['labels'])} training {what}, {len(tested['labels'])} of the development split",
        about.metrics[0],
        3,
        partial(glue.pretrained, outputs=about.outputs),
        lambda seed: (
            Batches(columns, batch, shuffle=True, seed=seed, pads=pads),
            Batches(tested, 64, shuffle=False, pads=pads),
        ),
        None,
        adamw(3e-5, 0.01),
        linear,
        lambda epochs: fxrank.Cuttlefish(
            rank_metric="max_scaled_accumulative",
            speedup_threshold=1.5,
            share=0.8,
            xi="random",
            latest=1 / max(3, epochs),
            lr_scale=4 / 3,
        ),
    )


def minilm_sst2(data: Path, scale: float = 1.0, *, train: int = 3072, test: int | None = None, batch: int = 32) -> Task:
    """`minilm_glue` on SST-2."""
    return minilm_glue(data, "SST-2", train=round(train * scale), test=test, batch=batch)


def char_transformer(
    data: Path,
    scale: float = 1.0,
    *,
    length: int = 128,
    width: int = 192,
    depth: int = 4,
    train: int = 1920,
    test: int = 200,
    batch: int = 16,
) -> Task:
    """A causal Transformer on the characters of Shakespeare: tokens and targets `(N, length)`, 90 % to train on."""
    text = (data / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    known = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[c] for c in text])
    cut = int(0.9 * len(ids))
    columns = _sample(windows(ids[:cut], length), round(train * scale), batch)
    tested = _sample(windows(ids[cut:], length), test, 1)
    return Task(
        "char-transformer",
        f"tinyshakespeare, {columns[0].numel()} training and {tested[0].numel()} validation characters",
        "bits_per_character",
        5,
        _seeded(lambda width: CharTransformer(len(known), length, width, 6, depth, 0.1), width),
        lambda seed: (Batches(columns, batch, shuffle=True, seed=seed), Batches(tested, 64, shuffle=False)),
        token_loss,
        adamw(2e-3, 0.05, betas=(0.9, 0.98)),
        cosine,
        lambda epochs: fxrank.Cuttlefish(rank_metric="scaled_stable_rank", speedup_threshold=1.5, min_ratio=0.5),
    )


def lstm_wikitext2(
    data: Path, scale: float = 1.0, *, length: int = 35, width: int = 320, at_least: int = 3, batch: int = 20
) -> Task:
    """Pufferfish's LSTM, trained on WikiText-2's validation split and tested on its test split: words and targets
    `(N, 35)`. E is a quarter of the epochs, the rate is halved at the switch, as Pufferfish does (E = 10 of 40).
    """
    words = [
        [w for line in file.read_text(encoding="utf-8").splitlines() for w in [*line.split(), "</s>"]]
        for file in (data / "text/wikitext2-valid.txt", data / "text/wikitext2-test.txt")
    ]
    known = vocabulary(words[0], at_least)
    train, test = (windows(torch.tensor(numbers(split, known)), length) for split in words)
    columns = _sample(train, round(len(train[0]) * scale), batch)
    tested = _sample(test, 600, 1)
    return Task(
        "lstm-wikitext2",
        f"WikiText-2, {columns[0].numel()} words of valid, {tested[0].numel()} of test, {len(known)} in the vocabulary",
        "perplexity",
        4,
        _seeded(lambda width: LstmLanguageModel(len(known), width, 0.3), width),
        lambda seed: (Batches(columns, batch, shuffle=True, seed=seed), Batches(tested, 50, shuffle=False)),
        token_loss,
        lambda model: clipped(torch.optim.SGD(model.parameters(), lr=20.0), 0.25),
        plateau,
        lambda epochs: fxrank.Pufferfish(E=epochs / 4, K=0, ratio=0.25, lr_scale=0.5),
    )


def multi30k(
    data: Path,
    scale: float = 1.0,
    *,
    length: int = 40,
    width: int = 192,
    depth: int = 3,
    at_least: int = 5,
    train: int = 9600,
    batch: int = 32,
) -> Task:
    """A Transformer from German to English: source and target so far `(N, ≤ 40)`, targets `(N, ≤ 40)` with -100 for
    padding. The first encoder and decoder layer stay dense and the warm-up is repeated, as Pufferfish does.
    """
    pairs, known = sentence_pairs(data, "train"), known_words(data, at_least)

    def columns(pairs: Sequence[Pair]) -> list[Tensor]:
        target = [[START, *numbers(en, known), END] for _, en in pairs]
        inputs = padded([t[:-1] for t in target], length, PAD)
        return [sources(pairs, known, length), inputs, padded([t[1:] for t in target], length, IGNORED)]

    trained, tested, pads = (
        _sample(columns(pairs), round(train * scale), batch),
        columns(sentence_pairs(data, "val")),
        (PAD, PAD, IGNORED),
    )
    return Task(
        "multi30k",
        f"Multi30k, {len(trained[0])} training and {len(tested[0])} validation pairs, {len(known)} in the vocabulary",
        "perplexity",
        2,
        _seeded(lambda width: Translator(len(known), -(-length // 8) * 8, width, 4, depth, 0.1), width),
        lambda seed: (
            Batches(trained, batch, shuffle=True, seed=seed, pads=pads),
            Batches(tested, 64, shuffle=False, pads=pads),
        ),
        lambda logits, targets: token_loss(logits, targets, 0.1),
        lambda model: clipped(torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-9), 1.0),
        noam,
        lambda epochs: fxrank.Pufferfish(E=epochs / 4, K=0, ratio=0.25, rewarmup=0.05),
        exclude=("*.layers.0.*",),
    )


TASKS: dict[str, Callable[..., Task]] = {
    "vit-cifar10": vit_cifar10,
    "minilm-sst2": minilm_sst2,
    "char-transformer": char_transformer,
    "lstm-wikitext2": lstm_wikitext2,
    "multi30k": multi30k,
}
"""Tasks by name."""
