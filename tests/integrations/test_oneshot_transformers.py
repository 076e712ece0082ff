"""One-shot factorization of Transformers' models, with their batches, and back from a folder in another process."""

import inspect
import subprocess
import sys

import pytest
import torch

import fxrank

transformers = pytest.importorskip("transformers")

from fxrank.integrations.huggingface import from_pretrained, save_pretrained  # noqa: E402 (needs transformers)

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **TOKENS}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}


def llama(**options):
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **TOKENS, **options)
    return transformers.LlamaForCausalLM._from_config(config)


def classifier():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, pad_token_id=0))


MODELS = {
    "llama": (llama, ()),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), "*"),
    "gpt2, tied": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), "*"),
    "t5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=0)), ()),
}


def batch(seed, left=False, fill=0, labels=True):
    """Four sentences of up to twelve tokens, two of them padded."""
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 8:] = mask[2, 5:] = 0
    mask = mask.flip(1) if left else mask
    ids = torch.where(mask == 1, ids, fill)
    found = {"input_ids": ids, "attention_mask": mask}
    return found | ({"labels": torch.where(mask == 1, ids, -100)} if labels else {})


def made(build):
    torch.manual_seed(0)
    return build().eval()


def same(a, b):
    state = b.state_dict()
    return a.state_dict().keys() == state.keys() and all(torch.equal(t, state[n]) for n, t in a.state_dict().items())


PROGRAM = """
import sys, torch, transformers
from fxrank.integrations.huggingface import from_pretrained
folder, auto = sys.argv[1:]
model, call = from_pretrained(getattr(transformers, auto), folder), torch.load(folder + "/call.pt")
with torch.no_grad():
    logits, tokens = model(**call).logits, model.generate(call["input_ids"][:1], do_sample=False, max_new_tokens=6)
torch.save({"logits": logits, "tokens": tokens}, folder + "/back.pt")
"""


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_computes_and_generates_the_same(name, tmp_path):
    build, include = MODELS[name]
    model, batches = made(build), [batch(seed) for seed in range(4)]
    small = fxrank.factorize(model, batches[0], target_params=0.8, include=include, calibration=batches)
    assert len(fxrank.plan_of(small).R) > 1
    assert fxrank.plan_of(small).calibration_batches == 4
    save_pretrained(small, tmp_path)
    torch.save(batch(7), tmp_path / "call.pt")
    auto = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), auto], check=True, timeout=300)
    back = torch.load(tmp_path / "back.pt")
    with torch.no_grad():
        assert torch.equal(small(**batch(7)).logits, back["logits"])
    expected = small.generate(batch(7)["input_ids"][:1], do_sample=False, max_new_tokens=6)
    assert torch.equal(expected, back["tokens"])
    if include and "v" in dict(small.get_output_embeddings().named_children()):
        assert small.get_output_embeddings().v.weight is small.get_input_embeddings().v.weight


# An encoder's pooler looks at the first token, which must be none of the padding.
@pytest.mark.parametrize(("build", "left"), [(llama, False), (llama, True), (classifier, False)])
def test_padding_has_no_say(build, left):
    model = made(build)
    small = []
    for fill in (0, 17):
        batches = [batch(seed, left, fill, labels=False) for seed in range(4)]
        small.append(fxrank.factorize(model, batches[0], 0.3, calibration=batches))
    assert same(*small)
    without = [{"input_ids": batch(seed, left, 17)["input_ids"]} for seed in range(4)]
    assert not same(small[0], fxrank.factorize(model, without[0], 0.3, calibration=without))


def test_labels_and_the_class_of_the_batch_have_no_say():
    model = made(llama)
    expected = fxrank.factorize(model, batch(0), 0.3, calibration=[batch(seed) for seed in range(3)])
    plain = [batch(seed, labels=False) for seed in range(3)]
    assert same(expected, fxrank.factorize(model, plain[0], 0.3, calibration=plain))
    encoded = [transformers.BatchEncoding(b) for b in plain]
    assert same(expected, fxrank.factorize(model, encoded[0], 0.3, calibration=encoded))


def test_biases_that_are_gained_come_back_and_transformers_knows_nothing_of_them(tmp_path):
    model, batches = made(llama), [batch(seed) for seed in range(3)]
    small = fxrank.factorize(model, batches[0], rank=2, calibration=batches)
    gains = {d.name for d in fxrank.plan_of(small).layers if d.gains_bias}
    assert gains
    save_pretrained(small, tmp_path)
    back = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    assert same(small, back)
    assert {n for n in fxrank.plan_of(small).R if back.get_submodule(n).bias is not None} == gains
    assert not back.config.attention_bias
    assert not back.config.mlp_bias


def test_half_precision_stays_what_it_is(tmp_path):
    model = made(lambda: transformers.LlamaForCausalLM._from_config(llama().config, dtype=torch.bfloat16))
    small = fxrank.factorize(model, batch(0), target_params=0.8, calibration=[batch(0), batch(1)])
    save_pretrained(small, tmp_path)
    back = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(back(**batch(7)).logits, small(**batch(7)).logits)


def test_a_cache_serves_a_factorized_model():
    """Token by token with the keys and values of before, as `generate` does, against all at once."""
    small = fxrank.factorize(made(llama), batch(0), target_params=0.8, calibration=[batch(0), batch(1)])
    ids = batch(5)["input_ids"][1:2]
    known = inspect.signature(type(small).forward).parameters
    given = {"cache" if "cache" in known else "past_key_values": transformers.DynamicCache()}
    with torch.no_grad():
        whole = small(ids).logits
        steps = [small(ids[:, i : i + 1], use_cache=True, **given).logits for i in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)  # sums in another order


def test_tables_are_factorized_where_they_are_named_and_the_error_says_so():
    model = made(classifier)
    with pytest.raises(fxrank.BudgetError, match=r"include='\*'"):
        fxrank.factorize(model, batch(0, labels=False), target_params=0.2)
    small = fxrank.factorize(model, batch(0, labels=False), target_params=0.2, include="*")
    assert any(d.kind == "embedding" and d.factorized for d in fxrank.plan_of(small).layers)
