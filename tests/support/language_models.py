"""Tiny language models of Transformers, without numbers and with, and token ids for them."""

import copy

import pytest
import torch

from fxrank.saving.unfilled import unfilled


def tokens(seed, rows=4, length=7, words=40):
    return torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(seed))


def empty(cls, *given):
    with unfilled():
        return cls(*given)


def of_transformers(name):
    """A tiny language model, and how it is built anew."""
    transformers = pytest.importorskip("transformers")
    if name == "llama":
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        build = transformers.LlamaForCausalLM
    else:
        special = {"bos_token_id": 1, "eos_token_id": 2}
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, **special)
        build = transformers.GPT2LMHeadModel
    torch.manual_seed(0)
    return build(config).eval(), lambda: empty(build, copy.deepcopy(config))


def padded(batches):
    """Batches of token ids, the ends of some sequences padding."""
    found = []
    for seed in range(batches):
        mask = torch.ones(4, 9, dtype=torch.long)
        mask[seed % 4, 9 - seed - 2 :] = 0
        found.append({"input_ids": tokens(seed, length=9, words=64), "attention_mask": mask})
    return found
