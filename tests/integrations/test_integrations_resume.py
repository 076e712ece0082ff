"""`transformers.Trainer` resuming from checkpoints that do not fit, and runs that were broken off."""

import pytest
import safetensors.torch
import torch
from nets import SOON

import fxrank

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformer_runs import DATA, TOKENS, bert, trainer_of  # noqa: E402 (needs both)

from fxrank.integrations.huggingface import LowRankCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning"),
]


def test_a_callback_added_later_refuses_a_checkpoint_after_the_switch(tmp_path):
    """Weights alone: with an optimizer's state in the checkpoint torch would refuse its groups before."""
    first, _ = trainer_of(tmp_path, save_strategy="steps", save_steps=9, save_only_model=True)
    first.train()
    again = transformers.Trainer(bert(seed=1), first.args, train_dataset=DATA)
    again.add_callback(LowRankCallback(SOON))
    with pytest.raises(
        fxrank.CheckpointError, match=r"from after the switch is for a factorized model; this .* is dense"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_a_checkpoint_before_the_switch_is_refused_by_a_factorized_model(tmp_path):
    trainer, _ = trainer_of(
        tmp_path, cls=transformers.Trainer, save_strategy="steps", save_steps=3, save_only_model=True
    )
    trainer.train()
    with pytest.raises(
        fxrank.CheckpointError, match=r"from before the switch is for a dense model; this .* is factorized"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("stop", [4, 8], ids=["before", "after"])
def test_a_run_that_was_broken_off_resumes_in_the_same_process(tmp_path, stop):
    """Before the switch it goes on; after it the trainer's model is no longer the one that the run was started with."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop:
                raise KeyboardInterrupt

    whole, _ = trainer_of(tmp_path / "whole")
    whole.train()
    trainer, callback = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    trainer.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    if stop > 6:
        with pytest.raises(
            fxrank.CheckpointError, match=r"is factorized already. Build the model and the trainer anew"
        ):
            trainer.train(resume_from_checkpoint=True)
        return
    trainer.train(resume_from_checkpoint=True)
    assert callback.session.clock.step == 12
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in whole.model.state_dict().items())


def test_a_model_that_arrived_factorized_resumes_as_it_is(tmp_path):
    def small(seed):
        return fxrank.factorize(bert(seed), {"input_ids": TOKENS}, rank=0.25)

    trainer, _ = trainer_of(tmp_path, model=small(0), save_strategy="steps", save_steps=9)
    trainer.train()
    again, callback = trainer_of(tmp_path, model=small(1))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert callback.session is None
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in trainer.model.state_dict().items())


def test_a_low_rank_run_is_not_resumed_without_its_callback(tmp_path):
    trainer, callback = trainer_of(tmp_path, save_strategy="steps", save_steps=9)
    trainer.train()
    again, callback = trainer_of(tmp_path)
    again.remove_callback(callback)
    with pytest.raises(fxrank.CheckpointError, match=r"there is none, and .*checkpoint-9 holds a low-rank run"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_factors_that_a_checkpoint_does_not_hold_are_named(tmp_path):
    """Adapters' checkpoints, and those of models that Transformers stores under other names, are read in part in silence."""
    trainer, _ = trainer_of(tmp_path, save_strategy="steps", save_steps=9)
    trainer.train()
    path = tmp_path / "checkpoint-9" / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights["bert.pooler.dense.v.weight"]
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    again, _ = trainer_of(tmp_path)
    with pytest.raises(fxrank.CheckpointError, match=r"found nothing for 'bert\.pooler\.dense\.v\.weight' in"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
