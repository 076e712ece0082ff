"""`lightning.Trainer`: the switch inside it, and its checkpoints before and after."""

import re

import pytest
import torch
import torch.nn.functional as F
from nets import SOON, mlp, vectors
from torch.utils.data import DataLoader, TensorDataset

import fxrank

L = pytest.importorskip("lightning")

from lightning_runs import Classifier, loader, trainer_of  # noqa: E402 (needs lightning)

from fxrank.integrations.lightning import LowRankCallback  # noqa: E402 (needs lightning)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:DeprecationWarning"),
]


def test_the_switch_happens_inside_the_trainer(tmp_path):
    trainer, callback = trainer_of(tmp_path)
    module = Classifier()
    trainer.fit(module, loader())
    assert callback.plan is fxrank.plan_of(module)
    assert (callback.plan.switch_step, callback.plan.E) == (6, 2.0)  # an epoch is 3 steps of 2 batches
    assert callback.plan.R == {"net.2": 4, "net.4": 4}
    assert callback.session.clock.step == trainer.global_step == 12
    assert callback.session.optimizers == tuple(trainer.optimizers)
    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0  # the schedule ran to its end
    assert "on_load_checkpoint" not in vars(module)


def test_until_the_switch_the_run_is_the_run_without_the_callback(tmp_path):
    losses = []
    for callback in (LowRankCallback(SOON), L.Callback()):
        module = Classifier()
        torch.manual_seed(5)
        trainer_of(tmp_path, callback)[0].fit(module, loader())
        losses.append(module.losses)
    watched, plain = losses
    assert watched[:12] == plain[:12]  # no batch and no random number of the trainer's was used up
    assert watched[12:] != plain[12:]


@pytest.mark.parametrize("stop", [3, 6, 9], ids=["before", "at", "after"])
def test_a_checkpoint_goes_on_to_the_same_end(tmp_path, stop):
    ordered = loader(shuffle=False)
    trainer, callback = trainer_of(tmp_path / "run")
    module = Classifier()
    trainer.fit(module, ordered)
    again, resumed = trainer_of(tmp_path / "other")
    other = Classifier(seed=1)
    again.fit(other, ordered, ckpt_path=tmp_path / "run" / f"step={stop}.ckpt")
    assert resumed.plan == callback.plan
    assert resumed.session.clock == callback.session.clock
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("stop", [3, 9], ids=["before", "after"])
def test_a_fresh_module_is_validated_from_a_checkpoint(tmp_path, stop):
    trainer, _ = trainer_of(tmp_path)
    trainer.fit(Classifier(), loader())
    path = tmp_path / f"step={stop}.ckpt"
    fresh = Classifier(seed=1)
    again, _ = trainer_of(tmp_path)
    [[*losses]] = [r.values() for r in again.validate(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)]
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in fresh.state_dict().items())
    assert isinstance(fresh.net[2], fxrank.LowRankLinear) is (stop == 9)
    assert len(losses) == 1


def test_nothing_factorized_is_said_at_the_end(tmp_path):
    trainer, _ = trainer_of(
        tmp_path, LowRankCallback(fxrank.Cuttlefish(speedup_threshold=None, latest=None, epsilon=1e-9))
    )
    with pytest.warns(fxrank.NothingFactorizedWarning, match="did not switch within 12 of 12 steps"):
        trainer.fit(Classifier(), loader())


def test_a_submodule_is_watched(tmp_path):
    class Bare(Classifier):
        def forward(self):
            raise AssertionError("not a model of one batch")

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

    trainer, callback = trainer_of(tmp_path, LowRankCallback(SOON, module="net"))
    trainer.fit(Bare(), loader())
    assert callback.plan.R == {"2": 4, "4": 4}
    again, resumed = trainer_of(tmp_path, LowRankCallback(SOON, module="net"))
    again.fit(Bare(seed=1), loader(), ckpt_path=tmp_path / "step=9.ckpt")
    assert resumed.plan == callback.plan


def test_the_other_package_name(tmp_path):
    pl = pytest.importorskip("pytorch_lightning")

    class Same(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.losses = []

        forward, training_step = Classifier.forward, Classifier.training_step
        configure_optimizers = Classifier.configure_optimizers

    callback = LowRankCallback(SOON)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    pl.Trainer(max_epochs=2, callbacks=[callback], default_root_dir=tmp_path, **options).fit(Same(), loader())
    assert callback.plan.R == {"net.2": 4, "net.4": 4}


def test_a_fit_that_breaks_off_leaves_no_hooks_behind(tmp_path):
    class Broken(Classifier):
        def training_step(self, batch, index):
            if len(self.losses) == 4:
                raise RuntimeError("out of data")
            return super().training_step(batch, index)

    trainer, callback = trainer_of(tmp_path)
    with pytest.raises(RuntimeError, match="out of data"):
        trainer.fit(Broken(), loader())
    assert callback.session.clock.step == 2
    hooks = callback.session.optimizers[0]._optimizer_step_post_hooks
    assert not hooks


def test_mixed_precision(tmp_path):
    trainer, callback = trainer_of(tmp_path, precision="bf16-mixed")
    trainer.fit(Classifier(), loader())
    assert callback.plan.switch_step == 6


def test_a_checkpoint_without_a_session_is_refused(tmp_path):
    trainer_of(tmp_path, L.Callback())[0].fit(Classifier(), loader())
    again, _ = trainer_of(tmp_path)
    with pytest.raises(fxrank.CheckpointError, match=re.escape("step=3.ckpt holds none. Start afresh.")):
        again.fit(Classifier(), loader(), ckpt_path=tmp_path / "step=3.ckpt")


def test_a_resume_that_failed_can_be_tried_again(tmp_path):
    class Unready(Classifier):
        ready = False

        def configure_optimizers(self):
            if not self.ready:
                raise RuntimeError("not ready")
            return super().configure_optimizers()

    ordered, module = loader(shuffle=False), Classifier()
    trainer_of(tmp_path)[0].fit(module, ordered)
    other = Unready(seed=1)
    again, callback = trainer_of(tmp_path)
    with pytest.raises(RuntimeError, match="not ready"):
        again.fit(other, ordered, ckpt_path=tmp_path / "step=9.ckpt")
    assert "on_load_checkpoint" not in vars(other)
    other.ready = True
    again.fit(other, ordered, ckpt_path=tmp_path / "step=9.ckpt")
    assert callback.session.clock.step == 12
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def test_a_run_without_an_end_is_refused(tmp_path):
    trainer, _ = trainer_of(tmp_path, max_epochs=-1)
    with pytest.raises(ValueError, match="a low-rank run must know its length; the trainer's is inf steps"):
        trainer.fit(Classifier(), loader())


class ByHand(Classifier):
    """Two optimizers that the module steps itself, one of them for something that is not watched."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.scale = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, index):
        loss = F.cross_entropy(self(batch[0]) * self.scale, batch[1])
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        parts = [
            [p for p in self.net.parameters() if p.ndim > 1],
            [p for p in self.net.parameters() if p.ndim == 1],
            [self.scale],
        ]
        return [torch.optim.SGD(part, lr=0.05) for part in parts]


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
def test_several_optimizers_by_hand(tmp_path):
    module = ByHand()
    trainer, callback = trainer_of(
        tmp_path, LowRankCallback(SOON, module="net"), accumulate_grad_batches=1, gradient_clip_val=None
    )
    trainer.fit(module, loader())
    assert callback.session.optimizers == tuple(trainer.optimizers[:2])
    assert callback.session.clock.step == 24 and callback.plan.switch_step == 12 and callback.plan.R


def test_a_factorized_module_takes_no_checkpoint_of_a_dense_one(tmp_path):
    """As `test(ckpt_path="best")` does after a run whose best epoch was before the switch."""
    trainer, _ = trainer_of(tmp_path)
    module = Classifier()
    trainer.fit(module, loader())
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(fxrank.CheckpointError, match=r"'net.2.u.weight' has no place in it. Build the module anew"):
        trainer.validate(module, loader(shuffle=False), ckpt_path=tmp_path / "step=3.ckpt", verbose=False)
    for stop in (3, 9):  # without its session the run would go on as another one
        with pytest.raises(
            fxrank.CheckpointError, match=r"this Classifier is factorized already\. Build the module anew"
        ):
            trainer_of(tmp_path)[0].fit(module, loader(), ckpt_path=tmp_path / f"step={stop}.ckpt")
    assert all(torch.equal(kept[name], value) for name, value in module.state_dict().items())
    assert trainer.validate(module, loader(shuffle=False), ckpt_path=tmp_path / "step=9.ckpt", verbose=False)


def test_bare_weights_from_after_the_switch_are_refused(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    trainer.fit(Classifier(), loader())
    trainer.save_checkpoint(tmp_path / "bare.ckpt", weights_only=True)
    with pytest.raises(
        fxrank.CheckpointError, match=r"'net.2.u.weight' has no place in Classifier.*\(no save_weights_only\)"
    ):
        trainer_of(tmp_path)[0].validate(
            Classifier(), loader(shuffle=False), ckpt_path=tmp_path / "bare.ckpt", verbose=False
        )


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_averages_of_the_weights_go_through_the_switch(tmp_path, kind):
    if not hasattr(L.pytorch.callbacks, kind):
        pytest.skip(f"this Lightning has no {kind}")
    if kind[0] == "S" and torch.__version__.startswith("2.8."):
        pytest.skip("the schedule of torch 2.8 in it saves a function, which weights_only does not load")
    options = {"decay": 0.5} if kind.startswith("EMA") else {"swa_lrs": 0.01, "swa_epoch_start": 1}

    class Seen(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.average = {name: value.clone() for name, value in averaging._average_model.state_dict().items()}

    def run(folder, seed=0, path=None):
        nonlocal averaging
        trainer, callback = trainer_of(folder)
        averaging = getattr(L.pytorch.callbacks, kind)(**options)
        trainer.callbacks += [averaging, Seen()]
        module = Classifier(seed)
        trainer.fit(module, loader(shuffle=False), ckpt_path=path)
        return module, callback, trainer.callbacks[-1].average

    averaging = None
    module, callback, _ = run(tmp_path / "run")
    assert callback.plan.R == {"net.2": 4, "net.4": 4}
    for stop in (3, 9):
        path = tmp_path / "run" / f"step={stop}.ckpt"
        other, resumed, average = run(tmp_path / "other", seed=1, path=path)
        assert resumed.plan == callback.plan
        saved = torch.load(path, weights_only=True)
        if kind.startswith("EMA"):
            expected = {f"module.{name}": value for name, value in saved["state_dict"].items()}
            state = other.state_dict()
            assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())
        else:  # Lightning's own schedule of rates goes on otherwise after a checkpoint in the middle of an epoch
            expected = saved["callbacks"][kind]["average_model_state"]
        assert all(torch.equal(average[name], value) for name, value in expected.items())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_the_batch_is_of_the_trainers_precision(tmp_path, precision):
    trainer, callback = trainer_of(tmp_path, precision=precision)
    module = Classifier()
    trainer.fit(module, loader())
    assert callback.plan.switch_step == 6
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float64}


def test_the_batch_goes_through_the_modules_hooks(tmp_path):
    class Named(Classifier):
        def on_before_batch_transfer(self, batch, index):
            return batch["x"], batch["y"]

    x, y = vectors()
    rows = [{"x": a, "y": b} for a, b in zip(x.repeat(3, 1), y.repeat(3), strict=True)]
    trainer, callback = trainer_of(tmp_path)
    trainer.fit(Named(), DataLoader(rows, batch_size=4))
    assert callback.plan.switch_step == 6


def test_steps_without_a_number_of_epochs(tmp_path):
    trainer, callback = trainer_of(tmp_path, max_epochs=-1, max_steps=8)
    trainer.fit(Classifier(), loader())
    assert callback.session.clock == fxrank.session.session.Clock(8, 8, 3)
    assert callback.plan.switch_step == 4


def test_several_loaders_need_an_example(tmp_path):
    trainer, _ = trainer_of(tmp_path)
    with pytest.raises(TypeError, match=r"the trainer has a dict of 2\. Pass example_inputs="):
        trainer.fit(Classifier(), {"a": loader(), "b": loader()})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_hand_back_what_fits_are_refused(tmp_path):
    trainer, _ = trainer_of(tmp_path, strategy="ddp_fork", devices=1)
    with pytest.raises(Exception, match=r"this DDPStrategy trains in processes of its own \(fork\)"):
        trainer.fit(Classifier(), loader())


@pytest.mark.parametrize("kind", ["LearningRateFinder", "BatchSizeFinder"])
def test_lightnings_finders_come_before(tmp_path, kind):
    class Found(Classifier):
        lr, batch_size = 0.01, 4

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), self.lr)

        def train_dataloader(self):
            return DataLoader(TensorDataset(*vectors(24)), batch_size=self.batch_size)

        val_dataloader = train_dataloader

    steps = {"num_training_steps": 5} if kind == "LearningRateFinder" else {"max_trials": 1, "steps_per_trial": 2}
    trainer, callback = trainer_of(tmp_path, default_root_dir=tmp_path)
    trainer.callbacks.insert(0, getattr(L.pytorch.callbacks, kind)(**steps))
    trainer.fit(Found())
    assert callback.session.clock.step == callback.session.clock.total_steps == trainer.global_step
    assert callback.plan.R == {"net.2": 4, "net.4": 4}
