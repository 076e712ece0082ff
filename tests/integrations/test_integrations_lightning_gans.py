"""Lightning with several optimizers by hand, which it toggles, and several callbacks in one trainer."""

import pytest
import torch
from nets import SOON
from torch import nn

import fxrank

L = pytest.importorskip("lightning")

from fxrank.integrations.lightning import LowRankCallback  # noqa: E402 (needs lightning)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:DeprecationWarning"),
]


class GAN(L.LightningModule):
    def __init__(self, seed=0, form="toggle_optimizer"):
        super().__init__()
        torch.manual_seed(seed)
        self.automatic_optimization, self.form = False, form
        self.g = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 12))
        self.d = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, z):
        return self.d(self.g(z))

    def training_step(self, batch):
        fakes = (lambda: -self(batch[0]).mean(), lambda: self.d(self.g(batch[0]).detach()).mean())
        for optimizer, loss in zip(self.optimizers(), fakes, strict=True):
            if self.form == "toggle_optimizer":
                self.toggle_optimizer(optimizer)
                self._step(optimizer, loss)
                self.untoggle_optimizer(optimizer)
            else:
                with optimizer.toggle_model():
                    self._step(optimizer, loss)

    def _step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss())
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.g, self.d)]


def fit(folder, module, callbacks, path=None):
    """8 steps of both, 4 epochs of 2; Lightning counts those of both."""
    saver = L.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=4,
        callbacks=[saver, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.TensorDataset(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))
    trainer.fit(module, torch.utils.data.DataLoader(data, 8), ckpt_path=path)
    return trainer


@pytest.mark.parametrize("form", ["toggle_optimizer", "toggle_model"])
def test_toggled_optimizers_go_on_training_what_they_trained(tmp_path, form):
    module, callback = GAN(form=form), LowRankCallback(SOON)
    fit(tmp_path, module, [callback])
    assert set(callback.plan.R) == {"g.2", "g.4", "d.0", "d.2"} and callback.plan.switch_step == 4
    assert all(p.requires_grad for p in module.parameters())
    at_switch = torch.load(tmp_path / "step=8.ckpt", weights_only=True)["state_dict"]
    assert all(not torch.equal(at_switch[name], p) for name, p in module.named_parameters())


def parts():
    return [
        LowRankCallback(SOON, module="g", optimizer=0),
        LowRankCallback(
            fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", latest=0.9, epsilon=1e-9),
            module="d",
            example_inputs=torch.randn(8, 12),
        ),
    ]


@pytest.mark.parametrize("stop", [4, 8, 12], ids=["none-switched", "one-switched", "one-long-since"])
def test_each_of_two_callbacks_has_its_part(tmp_path, stop):
    module, callbacks = GAN(), parts()
    fit(tmp_path / "run", module, callbacks)
    assert [set(c.plan.R) for c in callbacks] == [{"2"}, {"2"}]
    assert [c.plan.switch_step for c in callbacks] == [4, 8]
    assert all(p.requires_grad for p in module.parameters())
    other, resumed = GAN(seed=1), parts()
    fit(tmp_path / "other", other, resumed, tmp_path / "run" / f"step={stop}.ckpt")
    assert [c.plan for c in resumed] == [c.plan for c in callbacks]
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def test_callbacks_that_overlap_are_refused(tmp_path):
    module = GAN()
    for pair in [
        (LowRankCallback(), LowRankCallback(module="g")),
        (LowRankCallback(optimizer=0), LowRankCallback(optimizer=1)),
    ]:
        with pytest.raises(ValueError, match=r"must watch different parts of a module; those of .* overlap\. Name"):
            fit(tmp_path, module, pair)


def test_a_state_under_the_name_that_all_callbacks_had(tmp_path):
    module = GAN()
    fit(tmp_path, module, [LowRankCallback(SOON, module="g", optimizer=0)])
    path = tmp_path / "step=12.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    states = checkpoint["callbacks"]
    (key,) = [key for key in states if key.startswith("LowRankCallback{")]
    states["LowRankCallback"] = states.pop(key)
    torch.save(checkpoint, path)
    other, callback = GAN(seed=1), LowRankCallback(SOON, module="g", optimizer=0)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        fit(tmp_path / "other", other, [callback], path)
    assert callback.plan.R == {"2": 8}
    assert all(torch.equal(other.state_dict()[name], value) for name, value in module.state_dict().items())
