"""Parameter counts of the papers' BERT at other ratios, LSTM and Transformer, to the digit, on the meta device; the papers' own rows are in
test_paper_sizes.
"""

import json
from dataclasses import replace

import pytest
import torch
from places import DATA

import fxrank
from benchmarks.paper_sizes import on_meta
from benchmarks.subjects.paper_models import ROWS, Lstm, Translator
from fxrank.switch.freeze import frozen_names
from fxrank.training.measure import parameter_count

GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))["models"]


def test_bert_base_at_the_papers_ratio_with_frozen_feed_forward_layers():
    pytest.importorskip("transformers")
    for ratio in ("0.25", "0.45", "0.5"):
        row = replace(ROWS["bert-base"], ratio=float(ratio))
        if ratio == "0.5":  # break-even, which the library says
            with pytest.warns(UserWarning, match="break-even"):
                model, small, _ = on_meta(row)
        else:
            model, small, _ = on_meta(row)
        golden = GOLDEN[f"cuttlefish_bert_base_cased_{ratio}"]
        assert parameter_count(model) == GOLDEN["bert_base_cased"]["parameters"]
        assert len(fxrank.plan_of(small).R) == 48
        assert parameter_count(small) == golden["parameters"]
        frozen = set(frozen_names(small, row.frozen))
        assert sum(p.numel() for n, p in small.named_parameters() if n not in frozen) == golden["trainable"]


def test_the_lstm_language_model():
    with torch.device("meta"):
        model, x = Lstm(), torch.zeros(5, 2, dtype=torch.long)
    second_bias = 2 * 4 * 1500  # torch's LSTM has two biases a gate, the reference one
    assert parameter_count(model) - second_bias == GOLDEN["pufferfish_lstm_wikitext2_full"]["parameters"]
    small = fxrank.factorize(model, x, rank=0.25)
    assert parameter_count(small) - second_bias == GOLDEN["pufferfish_lstm_wikitext2"]["parameters"]
    assert tuple(small.rnn.weight_hh_l1.u.weight.shape) == (4, 375, 1500)


def test_the_translation_transformer():
    with torch.device("meta"):
        model, x = Translator(), (torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long))
    assert parameter_count(model) == GOLDEN["pufferfish_transformer_multi30k_full"]["parameters"]
    small = fxrank.factorize(model, x, rank=0.25, exclude="*.layer_stack.0.*", include="*.layer_stack.5.*")
    assert parameter_count(small) == GOLDEN["pufferfish_transformer_multi30k"]["parameters"]
