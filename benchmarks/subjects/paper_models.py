"""The papers' models with the layers and ranks that the papers factorize, and the figures that they print of them.

Two of the models are written here, Pufferfish's language model and its translator; the others are the benchmark's own, torchvision's,
timm's and transformers'.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.subjects.models import build, resnet18, vgg19_bn

PUFFERFISH, CUTTLEFISH = "Pufferfish (MLSys 2021), Table", "Cuttlefish (MLSys 2023), Table"


class Lstm(nn.Module):
    """The language model of Pufferfish: two layers, tied. `(length, N)` of words to `(length, N, 33278)`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(33278, 1500), nn.LSTM(1500, 1500, 2)
        self.decoder = nn.Linear(1500, 33278)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of each word that may come next, from a state of zeros."""
        out: Tensor = self.decoder(self.rnn(self.encoder(tokens))[0])
        return out


class Attention(nn.Module):
    """Eight heads of 64 with a residual, normalized afterwards: `(N, a, 512)` and `(N, b, 512)` to `(N, a, 512)`."""

    def __init__(self, d: int = 512) -> None:
        super().__init__()
        self.w_qs, self.w_ks, self.w_vs, self.fc = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.layer_norm = nn.LayerNorm(d)

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        """`q` looks at `kv`, all of it: masks change no size."""
        heads = [
            w(x).unflatten(-1, (8, -1)).transpose(1, 2) for w, x in ((self.w_qs, q), (self.w_ks, kv), (self.w_vs, kv))
        ]
        found = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        out: Tensor = self.layer_norm(self.fc(found) + q)
        return out


class FeedForward(nn.Module):
    """`(N, length, 512)` to the same through 2,048, with a residual, normalized afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.w_1, self.w_2, self.layer_norm = nn.Linear(512, 2048), nn.Linear(2048, 512), nn.LayerNorm(512)

    def forward(self, x: Tensor) -> Tensor:
        """Position by position."""
        out: Tensor = self.layer_norm(self.w_2(torch.relu(self.w_1(x))) + x)
        return out


class Layer(nn.Module):
    """One of the encoder, or one of the decoder, which looks at what the encoder gives too. Keeps `(N, length, 512)`."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.slf_attn, self.pos_ffn = Attention(), FeedForward()
        self.enc_attn = Attention() if decoder else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """`memory` is the encoder's output, `(N, length of the source, 512)`."""
        x = self.slf_attn(x, x)
        out: Tensor = self.pos_ffn(x if self.enc_attn is None else self.enc_attn(x, memory))
        return out


class Stack(nn.Module):
    """The encoder, or the decoder: six layers above a table of words. `(N, length)` of words to `(N, length, 512)`."""

    def __init__(self, embedding: nn.Embedding, decoder: bool) -> None:
        super().__init__()
        self.embedding, self.layer_norm = embedding, nn.LayerNorm(512)
        self.layer_stack = nn.ModuleList([Layer(decoder) for _ in range(6)])

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        """As `Layer.forward`, of words."""
        x: Tensor = self.layer_norm(self.embedding(tokens))
        for layer in self.layer_stack:
            x = layer(x, memory)
        return x


class Translator(nn.Module):
    """The encoder-decoder Transformer of Pufferfish: one shared table of 9,521 words, 6 + 6 layers. Positions, which have no parameters,
    are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        table = nn.Embedding(9521, 512)
        self.encoder, self.decoder = Stack(table, False), Stack(table, True)
        self.projection = nn.Linear(512, 9521, bias=False)
        self.projection.weight = table.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """`(N, a)` and `(N, b)` of words to `(N, b, 9521)`."""
        out: Tensor = self.projection(self.decoder(target, self.encoder(source)))
        return out


def bert_base_cased() -> nn.Module:
    """transformers' BERT-base with the table of its cased words and two classes."""
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(vocab_size=28996, num_labels=2)
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


@dataclass(frozen=True, kw_only=True)
class PaperModel:
    """One row. Pairs of two are of the full-rank model and of the factorized one; figures are as the paper prints them, with their
    unit, None where it prints none.
    """

    model: str
    ranks: str
    """Whose they are, in words."""
    source: str
    """The paper and its table."""
    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    """What `macs` are counted of: one call's inputs."""
    of: str = "image"
    """The example in words: so much is counted."""
    layers: str
    """A regular expression of the whole names of the layers that get pairs."""
    ratio: float
    """Of their full ranks, rounded down."""
    extra_bn: bool = False
    frozen: tuple[str, ...] = ()
    """Globs of the parameters that no longer train when the model is factorized."""
    part: str = ""
    """The module whose multiply-adds the paper counts; all, if it is empty."""
    parameters: tuple[str, str]
    trainable_only: bool = False
    """Whether the paper's count of the factorized model leaves out what is frozen."""
    macs: tuple[str | None, str | None] = (None, None)
    reference: tuple[str | None, str | None] = (None, None)
    """Names of what the reference implementations counted, among the `models` of `tests/data/golden.json`."""
    more_parameters: tuple[int, int] = (0, 0)
    """What the reference's models have beyond these, for the reason in `remark`."""
    more_macs: tuple[int, int] = (0, 0)
    remark: str = ""
    timed: bool = False
    training: str | None = None
    """The command that trains it on a GPU, of benchmarks/README.md."""


def _images(side: int) -> Callable[[], Tensor]:
    return lambda: torch.empty(1, 3, side, side)


def _words(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.long)


QUARTER = "Pufferfish: a quarter, "
HALF = "Cuttlefish: a half, its lower bound, "
STRIDE = "The reference's pair of the downsampling layer has its stride in the second factor: the first is computed at 14 × 14 positions, not 7 × 7."
COUNTED = (
    "What is printed counts two for each value that BatchNorm scales and one for each that ReLU or pooling sees, too"
)
BIASES = (
    "The first factors of the reference have a bias each, which the second's makes redundant; there are none here. "
)
_DEIT: dict[str, Any] = {
    "model": "DeiT-base",
    "source": f"{CUTTLEFISH} 3",
    "build": lambda: build("timm:deit_base_patch16_224", 1000),
    "example": _images(224),
    "parameters": ("86.6 M", "58.3 M"),
    "macs": ("17.6 G", "12.0 G"),
}
_RESMLP: dict[str, Any] = {
    "model": "ResMLP-S36",
    "source": f"{CUTTLEFISH} 3",
    "build": lambda: build("timm:resmlp_36_224", 1000),
    "example": _images(224),
}

ROWS: dict[str, PaperModel] = {
    "resnet18": PaperModel(
        model="ResNet-18",
        ranks=QUARTER + "all but the stem, the first block and the shortcuts",
        source=f"{PUFFERFISH} 4",
        build=lambda: resnet18(stem_bn=False),
        example=_images(32),
        layers=r"layer(1\.1|[2-4]\.[01])\.conv[12]",
        ratio=0.25,
        parameters=("11,173,834", "3,336,138"),
        macs=("0.56 G", "0.22 G"),
        reference=("pufferfish_resnet18_full_original_repo", "pufferfish_resnet18_original_repo"),
    ),
    "vgg19": PaperModel(
        model="VGG-19",
        ranks=QUARTER + "from the tenth convolution on, and two of three Linear layers",
        source=f"{PUFFERFISH} 4",
        build=lambda: vgg19_bn(hidden_layers=2),
        example=_images(32),
        layers=r"conv1\d|hidden\.\d",
        ratio=0.25,
        parameters=("20,560,330", "8,370,634"),
        macs=("0.4 G", "0.29 G"),
        reference=("pufferfish_vgg19_full_original_repo", "pufferfish_vgg19_original_repo"),
    ),
    "resnet18-cuttlefish": PaperModel(
        model="ResNet-18",
        ranks=QUARTER + "all but the stem, the first block and the shortcuts, a BatchNorm in each pair",
        source=f"{CUTTLEFISH} 1",
        build=resnet18,
        example=_images(32),
        layers=r"layer(1\.1|[2-4]\.[01])\.conv[12]",
        ratio=0.25,
        extra_bn=True,
        parameters=("11.2 M", "3.3 M"),
        reference=("cifar_resnet18_full", "pufferfish_resnet18_in_cuttlefish_repo"),
        training="python -m benchmarks.cifar10 --model resnet18 --paper --seeds 0 1 2",
    ),
    "vgg19-cuttlefish": PaperModel(
        model="VGG-19",
        ranks=QUARTER + "from the tenth convolution on",
        source=f"{CUTTLEFISH} 1",
        build=vgg19_bn,
        example=_images(32),
        layers=r"conv1\d",
        ratio=0.25,
        parameters=("20.0 M", "8.1 M"),
        reference=("cifar_vgg19_full_cuttlefish", "pufferfish_vgg19_in_cuttlefish_repo"),
        training="python -m benchmarks.cifar10 --model vgg19_bn --paper --seeds 0 1 2",
    ),
    "resnet50": PaperModel(
        model="ResNet-50",
        ranks=QUARTER + "the last stage",
        source=f"{PUFFERFISH} 5",
        build=lambda: build("torchvision:resnet50", 1000),
        example=_images(224),
        layers=r"layer4\..*",
        ratio=0.25,
        parameters=("25,557,032", "15,202,344"),
        macs=("4.12 G", "3.6 G"),
        reference=("resnet50", "pufferfish_resnet50"),
        more_macs=(0, 256 * 1024 * (14**2 - 7**2)),
        remark=f"{COUNTED}: 4,121,924,096. {STRIDE} The 25,610,205 parameters in Pufferfish's Table 7 have BatchNorm's 53,173 buffers among them.",
        timed=True,
    ),
    "wide-resnet50-2": PaperModel(
        model="WideResNet-50-2",
        ranks=QUARTER + "the last stage",
        source=f"{PUFFERFISH} 5",
        build=lambda: build("torchvision:wide_resnet50_2", 1000),
        example=_images(224),
        layers=r"layer4\..*",
        ratio=0.25,
        parameters=("68,883,240", "40,047,400"),
        macs=("11.44 G", "9.99 G"),
        reference=("wide_resnet50_2", "pufferfish_wide_resnet50_2"),
        more_macs=(0, 256 * 1024 * (14**2 - 7**2)),
        remark=f"{COUNTED}: 11,440,620,544. {STRIDE}",
        timed=True,
    ),
    "deit-base": PaperModel(
        **_DEIT,
        ranks=HALF + "all but the attention's output",
        layers=r"blocks\.\d+\.(attn\.qkv|mlp\.fc[12])",
        ratio=0.5,
        reference=("deit_base_patch16_224", "cuttlefish_deit_base_half"),
        more_parameters=(0, 36 * 384),
        remark=BIASES + "The paper counts the products of attention too.",
        timed=True,
    ),
    "deit-base-pufferfish": PaperModel(
        **_DEIT,
        ranks=QUARTER + "the last six blocks",
        layers=r"blocks\.([6-9]|1\d)\..*",
        ratio=0.25,
        reference=("deit_base_patch16_224", None),
        remark="The paper counts the products of attention too.",
    ),
    "resmlp-s36": PaperModel(
        **_RESMLP,
        ranks=HALF + "the products over channels",
        layers=r"blocks\.\d+\.mlp_channels\.fc[12]",
        ratio=0.5,
        parameters=("44.7 M", "29.4 M"),
        macs=("8.9 G", "5.8 G"),
        reference=("resmlp_36_224", "cuttlefish_resmlp_36_half"),
        more_parameters=(0, 72 * 192),
        remark=BIASES
        + "At exactly a half the reference has 28,779,064 parameters. The 29.4 M that the paper prints need ranks above it, and these 5.9 G; its 5.8 G are those of a half.",
        timed=True,
    ),
    "resmlp-s36-pufferfish": PaperModel(
        **_RESMLP,
        ranks=QUARTER + "the products over channels of the last 19 blocks",
        layers=r"blocks\.(1[7-9]|[23]\d)\.mlp_channels\.fc[12]",
        ratio=0.25,
        parameters=("44.7 M", "29.3 M"),
        macs=("8.9 G", "5.9 G"),
        reference=("resmlp_36_224", None),
    ),
    "bert-base": PaperModel(
        model="BERT-base, cased",
        ranks="Cuttlefish: 0.45, the attention; feed-forward layers no longer train",
        source=f"{CUTTLEFISH} 4",
        build=bert_base_cased,
        example=lambda: {"input_ids": _words(1, 128)},
        of="128 words",
        layers=r"bert\.encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)",
        ratio=0.45,
        frozen=(
            "*.intermediate.dense.*",
            "bert.encoder.layer.?.output.dense.*",
            "bert.encoder.layer.??.output.dense.*",
        ),
        parameters=("108.3 M", "48.8 M"),
        trainable_only=True,
        reference=("bert_base_cased", "cuttlefish_bert_base_cased_0.45"),
        remark="The paper's 48.8 M are the parameters that train; there are 105,436,418.",
    ),
    "lstm-wikitext2": PaperModel(
        model="LSTM, WikiText-2",
        ranks=QUARTER + "both layers, a pair for each gate",
        source=f"{PUFFERFISH} 2",
        build=Lstm,
        example=lambda: _words(1, 1),
        of="word",
        layers=r"rnn\..*",
        ratio=0.25,
        part="rnn",
        parameters=("85,962,278", "67,962,278"),
        macs=("18 M", "9 M"),
        reference=("pufferfish_lstm_wikitext2_full", "pufferfish_lstm_wikitext2"),
        more_parameters=(-2 * 4 * 1500, -2 * 4 * 1500),
        remark="torch's LSTM has two biases for each gate, the reference's one. The paper's multiply-adds are one layer's, here both are counted. "
        "A pair's are those of its two factors; torch's kernel reads whole weights, so that each call, however long its text, multiplies the factors out first.",
    ),
    "transformer-multi30k": PaperModel(
        model="Transformer, 6 + 6 layers, Multi30k",
        ranks=QUARTER + "all but the first layer of encoder and decoder",
        source=f"{PUFFERFISH} 3",
        build=Translator,
        example=lambda: (_words(1, 20), _words(1, 20)),
        of="20 words to 20",
        layers=r".*\.layer_stack\.[1-5]\..*",
        ratio=0.25,
        parameters=("48,978,432", "26,696,192"),
        reference=("pufferfish_transformer_multi30k_full", "pufferfish_transformer_multi30k"),
    ),
}
"""By the name that `--models` takes."""
