"""PEFT and loralib beside fxrank: adapters on a model that is factorized before or after."""

import copy

import pytest
import torch
from nets import SOON
from torch import nn

import fxrank

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own remarks on what it loads
NAMES = ["query", "value"]
TUNERS = {
    "lora": lambda: peft.LoraConfig(r=8, target_modules=NAMES, modules_to_save=["classifier"]),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=NAMES, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=NAMES),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=NAMES),
    "ia3": lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=[]),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=NAMES),
    "embeddings": lambda: peft.LoraConfig(r=4, target_modules=["word_embeddings"]),
    "prompts": lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=4, encoder_hidden_size=32),
}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=99
    )
    return transformers.BertForSequenceClassification(config).eval()


def batch():
    return {"input_ids": torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))}


def adapted(model, config):
    model = peft.get_peft_model(model, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("tuner", TUNERS)
def test_adapters_are_saved_and_loaded_as_before(tmp_path, tuner):
    model, x = adapted(bert(), TUNERS[tuner]()), batch()
    before = {n: p.clone() for n, p in peft.get_peft_model_state_dict(model).items()}
    small = fxrank.factorize(model, x, rank=0.25)
    assert fxrank.plan_of(small).R
    after = peft.get_peft_model_state_dict(small)
    assert before.keys() == after.keys() and all(torch.equal(before[n], p) for n, p in after.items())
    small.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    assert torch.equal(back(**x).logits, model(**x).logits)


def test_adapters_on_factors(tmp_path):
    """A base that is factorized first: its layers are the factors."""
    x, small = batch(), fxrank.factorize(bert(), batch(), rank=0.25)
    with pytest.raises(ValueError, match="not supported"):  # PEFT's own words, with the pair in them
        peft.get_peft_model(copy.deepcopy(small), peft.LoraConfig(target_modules=NAMES))
    for names in (["u", "v"], "all-linear"):
        model = adapted(copy.deepcopy(small), peft.LoraConfig(r=4, target_modules=names))
        wanted = model(**x).logits
        model.save_pretrained(tmp_path)
        back = peft.PeftModel.from_pretrained(copy.deepcopy(small), tmp_path).eval()
        assert torch.equal(back(**x).logits, wanted)
        assert torch.allclose(model.merge_and_unload()(**x).logits, wanted, atol=1e-4)


def test_an_adapter_does_not_go_into_fewer_ranks_in_silence():
    model = adapted(bert(), peft.LoraConfig(r=4, target_modules=NAMES))
    small = fxrank.factorize(model, batch(), rank=0.25)
    for safely, error in ((True, fxrank.RankError), (False, RuntimeError)):
        with pytest.raises(error, match="erge the pair first"):
            copy.deepcopy(small).merge_and_unload(safe_merge=safely)
    merged = fxrank.merge(small)
    wanted = merged(**batch()).logits
    assert torch.allclose(merged.merge_and_unload()(**batch()).logits, wanted, atol=1e-5)


def test_a_run_with_a_frozen_base_trains_the_adapters_alone(tmp_path):
    model, x = adapted(bert(), peft.LoraConfig(r=4, target_modules=NAMES)), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=4, policy=SOON)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(4):
        model(**x).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert session.finish().R
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    fxrank.save(model, tmp_path)
    again = peft.get_peft_model(bert(), peft.LoraConfig(r=4, target_modules=NAMES))
    fxrank.load(again, tmp_path)
    assert torch.equal(again.eval()(**x).logits, model.eval()(**x).logits)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layers_of_loralib(training):
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 32),
        loralib.Linear(32, 32, r=4),
        loralib.MergedLinear(32, 96, r=4, enable_lora=[True, False, True]),
        nn.Linear(96, 32),
        nn.Linear(32, 4),
    ).train(training)
    small = fxrank.factorize(model, torch.randn(5, 12), rank=0.25)
    assert set(fxrank.plan_of(small).R) == {"3"}
    assert loralib.lora_state_dict(small).keys() == loralib.lora_state_dict(model).keys()
