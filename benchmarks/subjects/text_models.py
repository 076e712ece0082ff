"""The language models of the real runs: characters, words, and from one language to another."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PAD = 0
"""The token that fills sentences up, in every vocabulary here and in BERT's."""


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
        out: Tensor = x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return out


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
    """Pufferfish's word model, smaller (Wang et al. 2021, §4.1): a two-layer LSTM whose embedding is its decoder too.

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
    """An encoder-decoder Transformer; both embeddings and the projection are one matrix (Vaswani et al. 2017, §3.4).

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

    def embedded(self, tokens: Tensor) -> Tensor:
        """Words `(N, T)` with their places, `(N, T, width)`."""
        out: Tensor = self.drop(self.embedding(tokens) * self.scale + self.positions[: tokens.shape[1]])
        return out

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the next word of the target at every place."""
        padding, steps = source == PAD, target.shape[1]
        decoded = self.transformer(
            self.embedded(source),
            self.embedded(target),
            tgt_mask=self.future[:steps, :steps],
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,  # said, not found out from the mask's numbers: the model is to be traced
        )
        out: Tensor = self.head(decoded)
        return out

    def decoded(self, target: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """What the decoder makes of the target so far and the encoded source, `(N, T, width)`; `padding` is that of the source."""
        steps = target.shape[1]
        out: Tensor = self.transformer.decoder(
            self.embedded(target),
            memory,
            tgt_mask=self.future[:steps, :steps],
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return out
