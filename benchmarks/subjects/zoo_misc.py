"""Small models of the kinds that people write themselves: recurrent, tied, transposed, shared, functional, normalized."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.checkpoint import checkpoint


class LanguageModel(nn.Module):
    """Embedding → LSTM or GRU → decoder tied to the embedding."""

    def __init__(self, cell: type[nn.LSTM | nn.GRU], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.rnn = cell(24, 24, num_layers=2, batch_first=True, **options)
        width = self.rnn.proj_size or 24
        self.squeeze = nn.Linear(width * (2 if self.rnn.bidirectional else 1), 24)
        self.decoder = nn.Linear(24, 50)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor, state: Any = None) -> Tensor:
        hidden, _ = self.rnn(self.embed(tokens), state)
        out: Tensor = self.decoder(torch.tanh(self.squeeze(hidden)))
        return out


class UNet(nn.Module):
    """Convolutions down, transposed convolutions up, skips, a shape test, circular padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"), nn.Conv2d(16, 32, 3, padding=1)]
        )
        self.middle = nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 32, 3, stride=2), nn.ConvTranspose2d(48, 16, 2, stride=2)])
        self.head = nn.Conv2d(19, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [x]
        for conv in self.down:
            x = F.max_pool2d(F.relu(conv(x)), 2)
            skips.append(x)
        skips.pop()
        x = F.relu(self.middle(x))
        for up in self.up:
            x = up(x)
            skip = skips.pop()
            if x.shape[-2:] != skip.shape[-2:]:
                x = x[..., : skip.shape[-2], : skip.shape[-1]]
            x = torch.cat([x, skip], 1)
        out: Tensor = self.head(x)
        return out


class Generator(nn.Sequential):
    """A DCGAN generator: transposed convolutions only."""

    def __init__(self) -> None:
        super().__init__(
            nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 4, 2, 1),
        )


class Wave(nn.Module):
    """One-dimensional convolutions, down and up, with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv1d(2, 16, 5, 2, 2), nn.ReLU(), nn.Conv1d(16, 16, 3, padding="same", groups=2)
        )
        self.decode = nn.Sequential(nn.ConvTranspose1d(16, 16, 4, 2, 1), nn.ReLU(), nn.Conv1d(16, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decode(self.encode(x))
        return out


class Volume(nn.Module):
    """Three-dimensional convolutions and their transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 16, 3, 2, 1)
        self.c, self.d = nn.ConvTranspose3d(16, 8, 2, 2), nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.d(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))
        return out


class Normalized(nn.Module):
    """Weight norm, new and old."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 24)
        self.b = weight_norm(nn.Linear(24, 24))
        self.c = parametrizations.weight_norm(nn.Linear(24, 24))
        self.e = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.tanh(layer(x))
        out: Tensor = self.e(x)
        return out


class Functional(nn.Module):
    """Raw parameters in functional calls, a counter buffer, a layer called twice, dropout by function."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 24)
        self.w1 = nn.Parameter(torch.randn(24, 24) / 5)
        self.w2 = nn.Parameter(torch.randn(24, 24) / 5)
        self.bias = nn.Parameter(torch.zeros(24))
        self.kernel = nn.Parameter(torch.randn(24, 24, 3) / 9)
        self.twice = nn.Linear(24, 24)
        self.out = nn.Linear(24, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.relu(self.inp(x))
        x = F.relu(F.linear(x, self.w1, self.bias))
        x = F.dropout(x @ self.w2, 0.1, self.training)
        x = F.conv1d(x.unsqueeze(-1), self.kernel, padding=1).squeeze(-1)
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        out: Tensor = self.out(x)
        return out


@dataclass
class Answer:
    """What `Inputs` returns."""

    scores: Tensor
    hidden: tuple[Tensor, ...]


class Inputs(nn.Module):
    """`*args`, `**kwargs`, optional and nested inputs, dataclass output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor, *more: Tensor, mask: Tensor | None = None, **options: Any) -> Answer:
        h = self.a(x)
        for other in more:
            h = h + self.a(other)
        if mask is not None:
            h = h * mask
        h = F.gelu(self.b(h)) * options.get("scale", 1.0)
        return Answer(self.c(h), (h,))


class DataDependent(nn.Module):
    """A block that branches on data, between ordinary layers."""

    class Gate(nn.Module):
        """Doubles what is small."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(24, 48), nn.Linear(48, 24)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.up(x))
            if h.norm() < 1e3:
                h = h * 2
            out: Tensor = self.down(h)
            return out

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.out = nn.Linear(12, 24), self.Gate(), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.gate(self.inp(x)))
        return out


class Checkpointed(nn.Module):
    """Activation checkpointing, both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = F.relu(checkpoint(layer, x, use_reentrant=i % 2 == 0))
        return x


class Attention(nn.Module):
    """`nn.MultiheadAttention`: packed, and with its own widths of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(12, 24)
        self.own = nn.MultiheadAttention(24, 4, batch_first=True)
        self.other = nn.MultiheadAttention(24, 4, kdim=12, vdim=12, batch_first=True)
        self.out = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        h = h + self.own(h, h, h, need_weights=False)[0]
        h = h + self.other(h, x, x)[0]
        out: Tensor = self.out(h)
        return out


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a causal mask and a tied decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        out: Tensor = self.head(self.body(self.embed(tokens), mask=mask, is_causal=True))
        return out


class Experts(nn.Module):
    """A soft mixture: stacked expert matrices in one parameter, read by `einsum` and `bmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.out = nn.Linear(12, 24), nn.Linear(24, 4), nn.Linear(24, 3)
        self.up = nn.Parameter(torch.randn(4, 24, 48) / 5)
        self.down = nn.Parameter(torch.randn(4, 48, 24) / 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        weight = self.gate(h).softmax(-1)
        each = torch.bmm(F.relu(torch.bmm(h.expand(4, *h.shape), self.up)), self.down)
        out: Tensor = self.out((each * weight.t().unsqueeze(-1)).sum(0))
        return out


def _tokens() -> Tensor:
    return torch.randint(0, 50, (2, 7))


def _vector() -> Tensor:
    return torch.rand(2, 12)


def _seq2seq() -> nn.Module:
    return nn.Transformer(24, 4, 2, 2, 48, batch_first=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "lstm_lm": (lambda: LanguageModel(nn.LSTM), _tokens),
    "gru_lm": (lambda: LanguageModel(nn.GRU, dropout=0.1), _tokens),
    "bilstm_proj": (lambda: LanguageModel(nn.LSTM, bidirectional=True, proj_size=8), _tokens),
    "unet": (UNet, lambda: torch.rand(2, 3, 18, 20)),
    "generator": (Generator, lambda: torch.rand(2, 16, 1, 1)),
    "wave": (Wave, lambda: torch.rand(2, 2, 32)),
    "volume": (Volume, lambda: torch.rand(2, 1, 6, 8, 8)),
    "normalized": (Normalized, _vector),
    "functional": (Functional, _vector),
    "inputs": (Inputs, lambda: {"x": _vector(), "mask": torch.ones(2, 24), "scale": 2.0}),
    "data_dependent": (DataDependent, _vector),
    "checkpointed": (Checkpointed, _vector),
    "attention": (Attention, lambda: torch.rand(2, 5, 12)),
    "encoder": (Encoder, _tokens),
    "transformer": (_seq2seq, lambda: (torch.rand(2, 5, 24), torch.rand(2, 6, 24))),
    "experts": (Experts, _vector),
}
