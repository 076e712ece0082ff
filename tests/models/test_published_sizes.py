"""Parameter counts of the papers' Transformers, BERT and LSTM, to the digit, on the meta device."""

import json
import re

import pytest
import torch
from places import DATA
from torch import nn

import fxrank
from fxrank.switch.freeze import frozen_names
from fxrank.training.measure import parameter_count

GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))["transformers"]


def ranks(model, example, pattern, rank):
    """A rank for every layer whose name matches."""
    plan = fxrank.plan_of(fxrank.factorize(model, example, rank=1))
    return {layer.name: rank for layer in plan.layers if re.fullmatch(pattern, layer.name)}


@pytest.mark.parametrize(
    ("name", "pattern", "rank", "layers"),
    [
        ("deit_base_patch16_224", r"blocks\.\d+\.(attn\.qkv|mlp\.fc[12])", 384, 36),
        ("resmlp_36_224", r"blocks\.\d+\.mlp_channels\.fc[12]", 192, 72),
    ],
)
def test_vision_transformers_at_half_rank(name, pattern, rank, layers):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model, x = timm.create_model(name), torch.randn(2, 3, 224, 224)
    assert parameter_count(model) == GOLDEN[name]["full"]
    chosen = ranks(model, x, pattern, rank)
    assert len(chosen) == layers
    small = fxrank.factorize(model, x, rank=chosen)
    # The reference's first factors have a bias each, redundant beside the second's; ours have none.
    redundant = layers * rank
    assert parameter_count(small) + redundant == GOLDEN[name]["half"]


def test_bert_base_at_the_papers_ratio_with_frozen_feed_forward_layers():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.BertConfig(vocab_size=28996, num_labels=2)
        model = transformers.BertForSequenceClassification(config)
        x = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
    golden = GOLDEN["bert_base_cased"]
    assert parameter_count(model) == golden["full"]
    pattern = r"bert\.encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)"
    for ratio in ("0.25", "0.45", "0.5"):
        names = ranks(model, x, pattern, float(ratio))
        assert len(names) == 48
        if ratio == "0.5":  # break-even, which the library says
            with pytest.warns(UserWarning, match="break-even"):
                small = fxrank.factorize(model, x, rank=names)
        else:
            small = fxrank.factorize(model, x, rank=names)
        assert parameter_count(small) == golden[ratio]["total"]
        layer = "bert.encoder.layer."
        globs = ("*.intermediate.dense.*", f"{layer}?.output.dense.*", f"{layer}??.output.dense.*")
        frozen = set(frozen_names(small, globs))
        trainable = sum(p.numel() for n, p in small.named_parameters() if n not in frozen)
        assert trainable == golden[ratio]["trainable"]


class Lstm(nn.Module):
    """The language model of Pufferfish: two layers, tied."""

    def __init__(self):
        super().__init__()
        self.encoder, self.rnn = nn.Embedding(33278, 1500), nn.LSTM(1500, 1500, 2)
        self.decoder = nn.Linear(1500, 33278)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens):
        return self.decoder(self.rnn(self.encoder(tokens))[0])


def test_the_lstm_language_model():
    with torch.device("meta"):
        model, x = Lstm(), torch.zeros(5, 2, dtype=torch.long)
    second_bias = 2 * 4 * 1500  # torch's LSTM has two biases a gate, the reference one
    assert parameter_count(model) - second_bias == GOLDEN["lstm_wikitext2"]["full"]
    small = fxrank.factorize(model, x, rank=0.25)
    assert parameter_count(small) - second_bias == GOLDEN["lstm_wikitext2"]["quarter"]
    assert tuple(small.rnn.weight_hh_l1.u.weight.shape) == (4, 375, 1500)


class Attention(nn.Module):
    def __init__(self, d=512):
        super().__init__()
        self.w_qs, self.w_ks, self.w_vs, self.fc = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.layer_norm = nn.LayerNorm(d)

    def forward(self, q, kv):
        heads = [
            w(x).unflatten(-1, (8, -1)).transpose(1, 2) for w, x in ((self.w_qs, q), (self.w_ks, kv), (self.w_vs, kv))
        ]
        out = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.layer_norm(self.fc(out) + q)


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_1, self.w_2, self.layer_norm = nn.Linear(512, 2048), nn.Linear(2048, 512), nn.LayerNorm(512)

    def forward(self, x):
        return self.layer_norm(self.w_2(torch.relu(self.w_1(x))) + x)


class Layer(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.slf_attn, self.pos_ffn = Attention(), FeedForward()
        self.enc_attn = Attention() if decoder else None

    def forward(self, x, memory=None):
        x = self.slf_attn(x, x)
        return self.pos_ffn(x if self.enc_attn is None else self.enc_attn(x, memory))


class Stack(nn.Module):
    def __init__(self, embedding, decoder):
        super().__init__()
        self.embedding, self.layer_norm = embedding, nn.LayerNorm(512)
        self.layer_stack = nn.ModuleList([Layer(decoder) for _ in range(6)])

    def forward(self, tokens, memory=None):
        x = self.layer_norm(self.embedding(tokens))
        for layer in self.layer_stack:
            x = layer(x, memory)
        return x


class Translator(nn.Module):
    """The encoder-decoder Transformer of Pufferfish: one shared table of 9,521 words, 6 + 6 layers."""

    def __init__(self):
        super().__init__()
        table = nn.Embedding(9521, 512)
        self.encoder, self.decoder = Stack(table, False), Stack(table, True)
        self.projection = nn.Linear(512, 9521, bias=False)
        self.projection.weight = table.weight

    def forward(self, source, target):
        return self.projection(self.decoder(target, self.encoder(source)))


def test_the_translation_transformer():
    with torch.device("meta"):
        model, x = Translator(), (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long))
    assert parameter_count(model) == GOLDEN["transformer_multi30k"]["full"]
    small = fxrank.factorize(model, x, rank=0.25, exclude="*.layer_stack.0.*", include="*.layer_stack.5.*")
    assert parameter_count(small) == GOLDEN["transformer_multi30k"]["quarter"]
