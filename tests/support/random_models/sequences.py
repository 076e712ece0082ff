"""What looks at several tokens: attention, torch's own and written out, transformer layers, recurrent layers and cells."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from random_models.drawn import part


@part("tokens")
class Attention(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            width,
            2,
            batch_first=True,
            bias=draw.flip(0.7),
            dropout=draw.choice([0, 0, 0.1]),
            add_bias_kv=draw.flip(0.2),
            add_zero_attn=draw.flip(0.2),
        )
        self.looks = draw.flip()

    def forward(self, x):
        y, weights = self.attention(x, x, x, need_weights=self.looks)
        return x + (y * weights.mean() if self.looks else y)


@part("tokens")
class CrossAttention(nn.Module):
    """Keys and values of other widths, heads behind the tokens, a mask."""

    def __init__(self, draw, width):
        super().__init__()
        self.key, self.value = nn.Linear(width, width + 1), nn.Linear(width, width + 2)
        self.attention = nn.MultiheadAttention(width, 2, kdim=width + 1, vdim=width + 2)
        self.causal = draw.flip()

    def forward(self, x):
        x = x.transpose(0, 1)
        mask = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        y, _ = self.attention(x, self.key(x), value=self.value(x), attn_mask=mask)
        return y.transpose(0, 1)


@part("tokens")
class OwnAttention(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.fused, self.kernel = draw.flip(), draw.flip()
        self.dropout = draw.choice([0.0, 0.1])
        if self.fused:
            self.qkv = nn.Linear(width, 3 * width, bias=draw.flip())
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        n, tokens, width = x.shape
        qkv = self.qkv(x).chunk(3, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        q, k, v = (y.view(n, tokens, 2, width // 2).transpose(1, 2) for y in qkv)
        if self.kernel:
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0, is_causal=True)
        else:
            scores = (q @ k.transpose(-1, -2) / (width // 2) ** 0.5).softmax(-1)
            y = F.dropout(scores, self.dropout, self.training) @ v
        return x + self.out(y.transpose(1, 2).reshape(n, tokens, width))


@part("tokens")
class Encoder(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width,
            2,
            2 * width,
            dropout=draw.choice([0, 0.1]),
            activation=draw.choice(["relu", "gelu"]),
            norm_first=draw.flip(),
            batch_first=True,
        )
        self.layer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) if draw.flip() else layer

    def forward(self, x):
        return self.layer(x)


@part("tokens")
class Decoder(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(width, 2, width, dropout=0, batch_first=True)

    def forward(self, x):
        return self.layer(x, memory=torch.tanh(x))


@part("tokens")
class Recurrent(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        kind, both, deep = draw.choice([nn.LSTM, nn.GRU, nn.RNN]), draw.flip(), draw.flip(0.3)
        options = {"bidirectional": both, "num_layers": 1 + deep, "dropout": 0.1 * (deep and draw.flip())}
        if kind is nn.LSTM and draw.flip(0.2):
            options["proj_size"] = width // (1 + both)
            self.layer = kind(width, width + 1, batch_first=True, **options)
        else:
            self.layer = kind(width, width // (1 + both), batch_first=True, bias=draw.flip(), **options)
        self.packed = draw.flip(0.2)
        self.last = draw.flip(0.3)

    def forward(self, x):
        if self.packed:
            lengths = torch.full((len(x),), x.shape[1])
            packed, _ = self.layer(pack_padded_sequence(x, lengths, batch_first=True))
            return pad_packed_sequence(packed, batch_first=True)[0]
        y, state = self.layer(x)
        if self.last and isinstance(state, torch.Tensor):
            y = y + state.mean()
        return y


@part("tokens")
class Cells(nn.Module):
    def __init__(self, draw, width):
        super().__init__()
        self.cell = draw.choice([nn.LSTMCell, nn.GRUCell, nn.RNNCell])(width, width)

    def forward(self, x):
        state, out = None, []
        for token in x.unbind(1):
            state = self.cell(token, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out, 1)
