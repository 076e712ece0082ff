"""Files that fxrank 0.1 wrote when its code lay in other places: each kind is read as it was.

They were written by `mixed.factorized` and `fxrank.save` (`model/`), by `interrupted.run` broken off after 7 and 18 losses
(`run_…/`, the second with a checkpoint after each epoch), by `nets.attach` and `nets.train` after 3 and 7 of 10 steps (`session_….pt`), and at step 9 of 12 by the trainers
of the tests of Transformers and Lightning.
"""

import json
import shutil

import pytest
import safetensors.torch
import torch
from interrupted import run
from mixed import Mixed, factorized, mixed_inputs
from nets import attach, mlp, sgd, train
from places import DATA

import fxrank
from fxrank.plan import Plan

FILES = DATA / "earlier"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""Another processor, or another torch, rounds sums otherwise, and a few steps of training carry that on."""


def assert_close(state, file):
    """Factors are compared by their products: a singular vector and its negative are equally good, and which one an
    eigendecomposition returns depends on the processor.
    """
    expected = safetensors.torch.load_file(FILES / file)
    assert state.keys() == expected.keys()
    found, wanted = products(state), products(expected)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **CLOSE)


def products(state):
    pairs = {name.removesuffix("u.weight") for name in state if name.endswith(".u.weight")}
    found = {
        name: value
        for name, value in state.items()
        if name.removesuffix("u.weight").removesuffix("v.weight") not in pairs
    }
    return found | {name: state[f"{name}v.weight"] @ state[f"{name}u.weight"] for name in pairs}


def test_a_saved_model_of_many_kinds_of_pairs_loads():
    model = fxrank.load(Mixed(seed=1), FILES / "model").eval()
    expected = safetensors.torch.load_file(FILES / "output.safetensors")["output"]
    with torch.no_grad():
        torch.testing.assert_close(model(*mixed_inputs()), expected, **CLOSE)
    assert fxrank.plan_of(model) == Plan.load(FILES / "model" / "plan.json")


def test_the_same_model_is_saved_under_the_same_names(tmp_path):
    fxrank.save(factorized(), tmp_path)
    old, new = (safetensors.torch.load_file(f / "model.safetensors") for f in (FILES / "model", tmp_path))
    assert {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    old, new = (json.loads((f / "plan.json").read_text()) for f in (FILES / "model", tmp_path))
    assert old == new


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_goes_on_from_its_checkpoint(tmp_path, when):
    shutil.copy(FILES / f"run_{when}_the_switch" / "checkpoint.safetensors", tmp_path)
    result = run(tmp_path, checkpoint_every={"before": 2, "after": 1}[when])
    assert result.plan.R == Plan.load(FILES / "trained_plan.json").R
    assert len(result.history) == 4
    assert_close(result.model.state_dict(), "trained.safetensors")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_session_goes_on_from_its_state(when):
    saved = torch.load(FILES / f"session_{when}_the_switch.pt", weights_only=True)
    model = mlp(seed=1)
    optimizer = sgd(model)
    with attach(model, optimizer, state=saved["session"]) as session:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = train(model, optimizer, 10 - session.clock.step)
    torch.testing.assert_close(losses[-3:], json.loads((FILES / "session_losses_after.json").read_text()), **CLOSE)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_transformers_trainer_resumes(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from transformer_runs import trainer_of

    checkpoint = shutil.copytree(FILES / "transformers", tmp_path / "checkpoint-9")
    trainer, callback = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert callback.plan == Plan.load(FILES / "transformers" / "plan.json")
    assert_close(trainer.model.state_dict(), "transformers_trained.safetensors")


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*")
def test_a_lightning_trainer_resumes(tmp_path):
    pytest.importorskip("lightning")
    from lightning_runs import Classifier, loader, trainer_of

    module = Classifier(seed=1)
    trainer, callback = trainer_of(tmp_path)
    trainer.fit(module, loader(shuffle=False), ckpt_path=FILES / "lightning.ckpt", weights_only=True)
    assert callback.session.clock.step == 12
    assert_close(module.state_dict(), "lightning_trained.safetensors")
