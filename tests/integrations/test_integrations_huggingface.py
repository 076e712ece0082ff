"""`transformers.Trainer`: the switch inside it, its checkpoints, and folders of factorized models."""

import json
import re
from dataclasses import replace

import pytest
import torch
from nets import SOON, UNTIMED

import fxrank

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from transformer_runs import DATA, TOKENS, bert, trainer_of  # noqa: E402 (needs both)

from fxrank.integrations.huggingface import (  # noqa: E402 (needs transformers)
    LowRankCallback,
    LowRankTrainerMixin,
    from_pretrained,
    save_pretrained,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning"),
]


def test_the_switch_happens_inside_the_trainer(tmp_path):
    trainer, callback = trainer_of(tmp_path, cls=transformers.Trainer)
    model = trainer.model
    trainer.train()
    assert trainer.model is model
    assert callback.plan is fxrank.plan_of(model) is callback.session.plan
    assert (callback.plan.switch_step, callback.plan.E) == (6, 2.0)  # an epoch is 3 steps of 2 batches
    assert callback.plan.R["bert.encoder.layer.0.attention.self.query"] == 8
    assert callback.session.clock.step == trainer.state.global_step == 12
    assert callback.session.optimizers[0] is trainer.optimizer.optimizer
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    # the schedule ran to its end: the optimizer that it drives is the one that was switched
    assert trainer.optimizer.param_groups[0]["lr"] == 0
    entry = next(e for e in trainer.state.log_history if "lowrank_switch_epoch" in e)
    assert entry == {"step": 6, "lowrank_switch_epoch": 2.0, "lowrank_layers": len(callback.plan.R)}


def test_until_the_switch_the_run_is_the_run_without_the_callback(tmp_path):
    losses = []
    for policy in (SOON, None):
        trainer, callback = trainer_of(tmp_path, policy=policy, logging_steps=1)
        if policy is None:
            trainer.remove_callback(callback)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    watched, plain = losses
    assert watched[:6] == plain[:6]  # no batch and no random number of the trainer's was used up
    assert watched[6:] != plain[6:]


def test_nothing_factorized_is_said_at_the_end(tmp_path):
    trainer, callback = trainer_of(
        tmp_path, policy=fxrank.Cuttlefish(speedup_threshold=None, latest=None, epsilon=1e-9)
    )
    with pytest.warns(fxrank.NothingFactorizedWarning, match="did not switch within 12 of 12 steps"):
        trainer.train()
    assert callback.plan.R == {}


@pytest.mark.parametrize("stop", [3, 6, 9], ids=["before", "at", "after"])
def test_a_checkpoint_goes_on_to_the_same_end(tmp_path, stop):
    trainer, callback = trainer_of(tmp_path / "run", save_strategy="steps", save_steps=3)
    trainer.train()
    checkpoint = tmp_path / "run" / f"checkpoint-{stop}"
    assert (checkpoint / "plan.json").exists() is (stop >= 6)
    again, resumed = trainer_of(tmp_path / "other", model=bert(seed=1))
    again.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.plan == callback.plan
    assert resumed.session.clock == callback.session.clock
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())
    entries = [e for e in again.state.log_history if "lowrank_switch_epoch" in e]
    assert len(entries) == 1


def test_the_callback_alone_resumes_before_the_switch(tmp_path):
    trainer, _ = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    again, callback = trainer_of(tmp_path, model=bert(seed=1), cls=transformers.Trainer)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())
    assert callback.plan.switch_step == 6


def test_the_callback_alone_refuses_a_checkpoint_after_the_switch(tmp_path):
    trainer, _ = trainer_of(tmp_path, save_strategy="steps", save_steps=9)
    trainer.train()
    again, _ = trainer_of(tmp_path, cls=transformers.Trainer)
    before = {name: value.clone() for name, value in again.model.state_dict().items()}
    with pytest.raises(
        fxrank.CheckpointError, match=re.escape("has no place in BertForSequenceClassification. Resume with")
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert all(torch.equal(before[name], value) for name, value in again.model.state_dict().items())


def test_a_checkpoint_without_a_session_is_refused(tmp_path):
    trainer, callback = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    trainer.remove_callback(callback)
    trainer.train()
    again, _ = trainer_of(tmp_path)
    with pytest.raises(fxrank.CheckpointError, match=re.escape("lowrank_session.safetensors is missing")):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_run_of_another_length_is_refused(tmp_path):
    trainer, _ = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    again, _ = trainer_of(tmp_path, num_train_epochs=5)
    with pytest.raises(fxrank.CheckpointError, match="this one has 15, the saved one 12"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_the_best_checkpoint_is_one_that_the_model_can_load(tmp_path):
    trainer, _ = trainer_of(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_global_step in (6, 9, 12)
    stored = from_pretrained(transformers.AutoModelForSequenceClassification, trainer.state.best_model_checkpoint)
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.state_dict().items())


def test_curves_and_the_switch_reach_a_logger(tmp_path):
    class Kept:
        def __init__(self):
            self.rows, self.events = {}, []

        def log(self, step, values):
            self.rows.setdefault(step, {}).update(values)

        def event(self, step, text):
            self.events.append((step, text))

    kept = Kept()
    trainer, callback = trainer_of(tmp_path, callback=LowRankCallback(SOON, logger=kept))
    trainer.train()
    assert next(iter(kept.rows)) == 0
    assert kept.rows[6]["rank/bert.pooler.dense"] == callback.plan.R["bert.pooler.dense"]
    assert kept.events == [
        (6, f"{len(callback.plan.R)} of {len(callback.plan.layers)} layers factorized ({callback.plan.note})")
    ]


@pytest.mark.parametrize("options", [{"bf16": True}, {"max_steps": 8}], ids=["bf16", "iterable"])
def test_mixed_precision_and_a_stream(tmp_path, options):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(DATA)

    trainer, callback = trainer_of(tmp_path, **options)
    trainer.train_dataset = trainer.train_dataset if "bf16" in options else Stream()
    trainer.train()
    assert callback.plan.switch_step == trainer.state.max_steps // 2
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # its precision is the process's


class Broken(transformers.TrainerCallback):
    """Breaks a run off after two steps, once."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_run_that_was_broken_off_leaves_no_hooks_behind(tmp_path):
    trainer, callback = trainer_of(tmp_path)
    trainer.add_callback(Broken)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    first = callback.session
    trainer.remove_callback(Broken)
    trainer.train()
    assert first.clock.step == 2
    assert callback.session.clock.step == 12
    plan = callback.plan
    trainer.train()  # the model is low-rank by now, and stays it
    assert callback.plan is plan is fxrank.plan_of(trainer.model)


@pytest.mark.parametrize("first", [True, False])
def test_at_a_checkpoint_each_process_forgets_the_calls_before(tmp_path, first):
    known = []

    class Sees(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            known.append(len(callback.session._calls))
            state.is_world_process_zero = first

        def on_save(self, args, state, control, **_):
            known.append(len(callback.session._calls))
            state.is_world_process_zero = True

    policy = replace(SOON, factors="data")
    trainer, callback = trainer_of(tmp_path, policy=policy, save_strategy="steps", save_steps=3)
    trainer.add_callback(Sees)
    trainer.train()
    assert known[:6] == [2, 2, 2, 0, 2, 2]


def test_the_mix_in_and_the_last_checkpoint(tmp_path):
    class MyTrainer(LowRankTrainerMixin, transformers.Trainer):
        pass

    trainer, _ = trainer_of(tmp_path, cls=MyTrainer, save_strategy="steps", save_steps=5, max_steps=11)
    trainer.train()
    assert trainer.state.global_step == 11
    again, callback = trainer_of(tmp_path, cls=MyTrainer, model=bert(seed=1), max_steps=11)
    again.train(resume_from_checkpoint=True)  # checkpoint-11: nothing is left to do but to load
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())
    assert callback.plan == fxrank.plan_of(trainer.model)


@pytest.mark.parametrize("auto", [True, False])
def test_a_folder_round_trip(tmp_path, auto):
    model = bert().eval()
    batch = {"input_ids": TOKENS}
    small = fxrank.factorize(model, batch, rank=0.25)
    save_pretrained(small, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "plan.json"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    noise = torch.get_rng_state()
    cls = transformers.AutoModelForSequenceClassification if auto else transformers.BertForSequenceClassification
    back = from_pretrained(cls, tmp_path)
    assert torch.equal(noise, torch.get_rng_state())
    assert type(back) is type(model)
    assert fxrank.plan_of(back) == fxrank.plan_of(small)
    assert torch.equal(back(**batch).logits, small(**batch).logits)


def test_a_generating_model_round_trip_with_tied_weights(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.max_new_tokens, model.generation_config.repetition_penalty = 5, 1.5
    small = fxrank.factorize(model, {"input_ids": TOKENS}, rank=0.25)
    save_pretrained(small, tmp_path)
    back = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    assert (back.generation_config.max_new_tokens, back.generation_config.repetition_penalty) == (5, 1.5)
    assert back.lm_head.weight is back.transformer.wte.weight
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones(2, 4)}
    assert torch.equal(back.generate(TOKENS[:2, :4], **options), small.generate(TOKENS[:2, :4], **options))


@pytest.mark.parametrize("named", [True, False])
def test_what_the_trainer_saves_at_the_end_is_read(tmp_path, named):
    trainer, _ = trainer_of(tmp_path, max_steps=8)
    trainer.train()
    folder = tmp_path / "final" if named else tmp_path
    trainer.save_model(*([str(folder)] if named else []))
    back = from_pretrained(transformers.AutoModelForSequenceClassification, folder)
    assert torch.equal(back(input_ids=TOKENS).logits, trainer.model.eval()(input_ids=TOKENS).logits)


def test_the_round_trip_is_strict(tmp_path):
    with pytest.raises(ValueError, match="only a model that fxrank has rewritten has a plan"):
        save_pretrained(bert(), tmp_path)
    assert not any(tmp_path.iterdir())
    bert().save_pretrained(tmp_path)
    with pytest.raises(fxrank.CheckpointError, match=re.escape("plan.json is missing")):
        from_pretrained(transformers.BertForSequenceClassification, tmp_path)


def test_a_model_that_arrives_factorized_is_trained_as_it_is(tmp_path):
    small = fxrank.factorize(bert(), {"input_ids": TOKENS}, rank=0.25)
    trainer, callback = trainer_of(tmp_path, model=small, policy=UNTIMED)
    trainer.train()
    assert callback.session is None
    assert trainer.state.global_step == 12


def test_tied_factors_are_in_the_trainers_checkpoints(tmp_path):
    """Once, as Transformers stores tied weights: a decoder that shares its factors with the embedding."""

    def gpt2(seed):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def run(seed, **options):
        callback = LowRankCallback(SOON, include="*")
        trainer, _ = trainer_of(tmp_path, model=gpt2(seed), callback=callback, **options)
        trainer.train_dataset = [{"input_ids": row, "labels": row} for row in TOKENS]
        return trainer

    trainer = run(0, save_strategy="steps", save_steps=9)
    trainer.train()
    assert trainer.model.lm_head.u.weight is trainer.model.transformer.wte.u.weight
    again = run(1, save_strategy="steps", save_steps=12)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert again.model.lm_head.u.weight is again.model.transformer.wte.u.weight
    stored = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "checkpoint-12")
    for state in (again.model.state_dict(), stored.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())


def test_a_final_save_and_the_checkpoints_of_a_model_that_arrived_factorized_have_the_plan(tmp_path):
    trainer, _ = trainer_of(tmp_path / "first")
    trainer.train()
    trainer.save_model(tmp_path / "final")
    stored = from_pretrained(transformers.AutoModelForSequenceClassification, tmp_path / "final")
    state = stored.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())
    again, _ = trainer_of(tmp_path / "second", model=stored, cls=transformers.Trainer, save_strategy="epoch")
    again.train()
    state = from_pretrained(
        transformers.BertForSequenceClassification, tmp_path / "second" / "checkpoint-12"
    ).state_dict()
    assert all(torch.equal(state[name], value) for name, value in again.model.state_dict().items())
