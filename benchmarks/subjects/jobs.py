"""The training jobs of the decision table: the real runs at a scale of minutes, CIFAR-10 with all its images made small, and a network that is
plainly too large.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxrank
from benchmarks.subjects import tasks
from benchmarks.subjects.data import Cifar, DeviceLoader
from benchmarks.subjects.models import VGG, VGG19, ResNet
from benchmarks.subjects.tasks import Task
from benchmarks.subjects.text_models import PAD, Translator
from benchmarks.subjects.texts import END, START, Batches

SIDE = 16
"""Pixels of an image's side in the jobs with images."""


@dataclass(frozen=True)
class Job:
    """A training job: `make(data, **options)` gives the task, `sizes` the sizes of its model that a narrower twin may have, and `paper` is
    the preset of the papers for it, with `exclude`. `planar`: it has two-dimensional kernels. `tables`: it has embeddings, which no
    plain budget counts: a share is one of the other parameters. `bare`: two arguments alone, without an optimizer or a schedule.
    `score` is a measure of the trained model that its validation loss does not give. `small` are options that leave next to nothing to do.
    """

    name: str
    make: Callable[..., Task]
    options: Mapping[str, Any]
    epochs: int
    sizes: tuple[int, ...]
    paper: fxrank.Policy = field(default_factory=fxrank.Cuttlefish.paper)
    exclude: tuple[str, ...] = ()
    planar: bool = False
    tables: bool = False
    bare: bool = False
    score: Callable[[nn.Module, Path], tuple[str, float] | str] | None = None
    small: Mapping[str, Any] = field(default_factory=dict)

    @property
    def configuration(self) -> dict[str, Any]:
        """What its numbers depend on, beside the row and the seed."""
        return {"task": self.make.__name__, "epochs": self.epochs, "bare": self.bare} | dict(self.options)

    def task(self, data: Path, cache: Path | None) -> Task:
        """Its data, read."""
        own = {"cache": cache} if "side" in self.options else {}
        return self.make(data, **self.options, **own)


def fixed(job: Job, model: nn.Module) -> int:
    """Parameters of the embeddings of a model, in a job with tables."""
    if not job.tables:
        return 0
    found = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(weight.numel() for weight in found)


def size(model: nn.Module) -> int:
    """All its parameters."""
    return sum(p.numel() for p in model.parameters())


def target(job: Job, share: float, model: nn.Module) -> float:
    """The share of all parameters that is `share` of those outside of tables, which stay."""
    tables = fixed(job, model)
    return (tables + share * (size(model) - tables)) / size(model)


def narrower(job: Job, task: Task, share: float, seed: int) -> nn.Module | None:
    """The largest model of the job with no more parameters than the whole one under a budget; None if all have more."""
    dense = task.build(seed)
    limit = target(job, share, dense) * size(dense)
    for number in sorted(job.sizes, reverse=True):
        model: nn.Module = task.build(seed, number)
        if size(model) <= limit:
            return model
    return None


# -- tasks of this table alone


def resnet_cifar10(
    data: Path,
    *,
    stages: int,
    depth: int,
    width: int,
    side: int,
    cache: Path | None = None,
    batch: int = 128,
    train: int = 50_000,
    test: int | None = None,
) -> Task:
    """A CIFAR ResNet of `stages` with `depth` blocks each on small images."""
    images = tasks.small_cifar10(data, cache, side)
    return _of_images(
        "resnet-cifar10",
        images,
        lambda w: ResNet([w * 2**i for i in range(stages)], depth, 10),
        width,
        batch,
        train,
        test,
    )


def vgg_cifar10(
    data: Path,
    *,
    width: int,
    side: int,
    cache: Path | None = None,
    batch: int = 128,
    train: int = 50_000,
    test: int | None = None,
) -> Task:
    """VGG-19 with BatchNorm, `width` channels in the first convolution, on small images: without the last poolings, which have no pixels left."""
    images = tasks.small_cifar10(data, cache, side)

    def make(width: int) -> VGG:
        plan = [channels * width // VGG19[0] for channels in VGG19]
        while 2 ** plan.count(0) > side:
            del plan[len(plan) - 1 - plan[::-1].index(0)]
        return VGG(plan, 10)

    return _of_images("vgg-cifar10", images, make, width, batch, train, test)


def _of_images(
    name: str, images: Cifar, make: Callable[[int], nn.Module], width: int, batch: int, train: int, test: int | None
) -> Task:
    """Training by SGD on CIFAR-10, the images augmented."""
    tested = len(images.test_y) if test is None else min(test, len(images.test_y))

    def build(seed: int, width: int = width) -> nn.Module:
        torch.manual_seed(seed)
        return make(width)

    def loaders(seed: int) -> tuple[DeviceLoader, DeviceLoader]:
        return (
            DeviceLoader(images.train_x, images.train_y, batch, augment=True, seed=seed, subset=train, drop_last=True),
            DeviceLoader(images.test_x, images.test_y, 1000, augment=False, subset=test),
        )

    side = images.train_x.shape[-1]
    return Task(
        name,
        f"CIFAR-10 as JPEG, {min(train, len(images.train_y))} training and {tested} test images, {side}x{side}",
        "accuracy",
        5,
        build,
        loaders,
        lambda logits, labels: F.cross_entropy(logits, labels),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        tasks.cosine,
        lambda epochs: fxrank.Cuttlefish.paper(),
    )


def wide_digits(data: Path, *, width: int, batch: int = 64) -> Task:
    """A network that is plainly too large for scikit-learn's digits `(N, 8, 8)`: four square layers after the first. The images are as they
    are: the demo shifts whole batches, which a network without convolutions learns worse with (95.6 % of full-rank, 98.1 % without).
    """
    digits = importlib.import_module("sklearn.datasets").load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    held_out = torch.arange(len(images)) % 5 == 0
    train, test = ((images[chosen], labels[chosen]) for chosen in (~held_out, held_out))

    def build(seed: int, width: int = width) -> nn.Module:
        torch.manual_seed(seed)
        sizes = [64, *[width] * 5]
        layers = [
            part for m, n in itertools.pairwise(sizes) for part in (nn.Linear(m, n), nn.BatchNorm1d(n), nn.ReLU())
        ]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))

    return Task(
        "wide-digits",
        "scikit-learn's digits, every fifth held out",
        "accuracy",
        30,
        build,
        lambda seed: (Batches(train, batch, shuffle=True, seed=seed), Batches(test, 512, shuffle=False)),
        lambda logits, labels: F.cross_entropy(logits, labels),
        tasks.adamw(1e-3, 0.05),
        tasks.cosine,
        lambda epochs: fxrank.Cuttlefish(),
    )


# -- BLEU


def bleu(model: nn.Module, data: Path, at_least: int, length: int) -> tuple[str, float] | str:
    """BLEU of greedy translations of the validation sentences, in lower case, by sacrebleu; if it is not installed, that."""
    try:
        sacrebleu = importlib.import_module("sacrebleu")
    except ImportError:
        return "no BLEU: sacrebleu is not installed (pip install 'fxrank[runs]')"
    known = tasks.known_words(data, at_least)
    words = {number: word for word, number in known.items()}
    pairs = tasks.sentence_pairs(data, "val")
    source = tasks.sources(pairs, known, length)
    assert isinstance(model, Translator)
    found = [" ".join(words[i] for i in sentence) for sentence in translations(model, source, length)]
    wanted = [" ".join(target) for _, target in pairs]
    return "bleu", float(sacrebleu.corpus_bleu(found, [wanted], tokenize="none", force=True).score)


def translations(model: Translator, source: Tensor, length: int, batch: int = 128) -> list[list[int]]:
    """The most likely next word, again and again, until the sentence ends: words of each sentence `(N, S)`."""
    model.eval()
    order = (source != PAD).sum(1).argsort(stable=True)
    found: list[list[int]] = [[] for _ in source]
    with torch.no_grad():
        for rows in order.split(batch):
            sentences = source[rows]
            sentences = sentences[:, : int((sentences != PAD).sum(1).max())]
            padding = sentences == PAD
            memory = model.transformer.encoder(model.embedded(sentences), src_key_padding_mask=padding)
            target = torch.full((len(rows), 1), START)
            ended = torch.zeros(len(rows), dtype=torch.bool)
            while not ended.all() and target.shape[1] < min(length, math.ceil(1.5 * sentences.shape[1]) + 5):
                decoded = model.decoded(target, memory, padding)
                word = model.head(decoded[:, -1]).argmax(1)
                ended |= word == END
                target = torch.cat([target, word[:, None].where(~ended[:, None], torch.tensor(PAD))], 1)
            for row, words in zip(rows.tolist(), target[:, 1:].tolist(), strict=True):
                found[row] = [w for w in words if w != PAD]
    return found


TRANSFORMER = fxrank.Cuttlefish.transformer
_IMAGES = {"side": SIDE}
_PAIRS: dict[str, Any] = {"width": 128, "depth": 2, "at_least": 8, "train": 29_000, "batch": 64}


def _resnet(name: str, stages: int, depth: int, epochs: int) -> Job:
    return Job(
        name,
        resnet_cifar10,
        _IMAGES | {"stages": stages, "depth": depth, "width": 16},
        epochs,
        tuple(range(4, 16)),
        exclude=("*shortcut*",),
        planar=True,
        small={"train": 256, "test": 500},
    )


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("wide-digits", wide_digits, {"width": 512, "batch": 64}, 30, tuple(range(16, 512, 4)), bare=True),
        _resnet("resnet20-cifar10", stages=3, depth=3, epochs=5),
        _resnet("resnet18-cifar10", stages=4, depth=2, epochs=6),
        Job(
            "vit-cifar10",
            tasks.vit_cifar10,
            _IMAGES | {"depth": 4, "width": 144, "train": 50_000, "test": 10_000, "batch": 64},
            5,
            tuple(range(24, 144, 6)),
            TRANSFORMER(),
            small={"train": 128, "test": 128},
        ),
        Job(
            "char-transformer",
            tasks.char_transformer,
            {"width": 120, "train": 10_000, "test": 600},
            4,
            tuple(range(24, 120, 6)),
            TRANSFORMER(),
            small={"train": 64, "test": 32},
        ),
        Job(
            "lstm-wikitext2",
            tasks.lstm_wikitext2,
            {"at_least": 10},
            6,
            tuple(range(32, 320, 4)),
            tables=True,
            small={"width": 64},
        ),
        Job(
            "multi30k",
            tasks.multi30k,
            _PAIRS,
            4,
            tuple(range(16, 128, 4)),
            TRANSFORMER(),
            ("*.layers.0.*",),
            tables=True,
            score=partial(bleu, at_least=8, length=40),
            small={"train": 128},
        ),
        Job(
            "minilm-sst2",
            tasks.minilm_sst2,
            {"train": 3072},
            3,
            tuple(range(1, 6)),
            TRANSFORMER(xi="random"),
            tables=True,
            small={"train": 64, "test": 64},
        ),
    )
}
"""Jobs by name. The sizes of twins are widths, and layers of the pretrained encoder."""
