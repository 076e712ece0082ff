"""`auto_lowrank` with every shape of batch, loader, optimizer and scheduler."""

import re
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from autos import Endless, run, run_net, shuffled_clusters
from nets import HALFWAY, Net, batches, mlp, settings_of, vectors
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxrank


def test_two_arguments_are_enough(capsys, monkeypatch):
    monkeypatch.setattr("fxrank.training.options.DEFAULT_EPOCHS", 2)
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        result = fxrank.auto_lowrank(model, shuffled_clusters())
    assert result.model is model
    assert "training for 2 epochs of 6 steps" in capsys.readouterr().out


# -- batches, losses and loaders


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, scale):
        return self.net(x) * scale


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


class Nested(nn.Module):
    """Inputs in a dict in a list, outputs in a dict with its loss."""

    def __init__(self, build=dict):
        super().__init__()
        self.net, self.build = mlp(), build

    def forward(self, parts, labels=None):
        logits = self.net(parts[0]["x"] + parts[1])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return self.build(loss=loss, logits=logits)


X, Y = vectors()


SHAPES = {
    "tuple": (mlp, lambda x, y: (x, y), None),
    "list": (mlp, lambda x, y: [x, y], None),
    "two inputs": (TwoInputs, lambda x, y: (x, torch.ones(()), y), None),
    "keywords and target": (TwoInputs, lambda x, y: ({"x": x, "scale": torch.ones(())}, y), None),
    "dict with loss": (Nested, lambda x, y: {"parts": [{"x": x}, x], "labels": y}, None),
    "object with loss": (lambda: Nested(Output), lambda x, y: {"parts": [{"x": x}, x], "labels": y}, None),
    "float targets": (mlp, lambda x, y: (x, F.one_hot(y, 4).float()), None),
    "own loss": (mlp, lambda x, y: (x, y), lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1)),
    "own loss of a dict": (
        lambda: Nested(),
        lambda x, y: {"parts": [{"x": x}, x], "labels": y},
        lambda o, b: F.cross_entropy(o["logits"], b["labels"]),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_batch(name):
    make, shape, loss_fn = SHAPES[name]
    model = make()
    loader = [shape(*batch) for batch in batches()]
    result = run(model, loader, loss_fn=loss_fn, val_loader=loader)
    assert result.model is model
    assert len(result.plan.R) == 2
    assert all(row["loss"] > 0 for row in result.history)
    assert (result.history[0]["accuracy"] is None) == (name == "float targets")
    assert result.history[0]["val_loss"] is not None


def test_data_loaders():
    data = TensorDataset(*vectors(32))
    assert run(mlp(), DataLoader(data, 8, shuffle=True)).plan.switch_step == 8
    with_workers = DataLoader(data, 8, num_workers=0, drop_last=True)
    assert len(run(mlp(), with_workers).history) == 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*vectors(32), strict=True))


def test_a_stream_takes_steps_per_epoch():
    loader = DataLoader(Stream(), 8)
    with pytest.raises(
        TypeError,
        match=re.escape(
            "the loader must have a length, so that schedule and switch can be placed; DataLoader has none. Pass steps_per_epoch=."
        ),
    ):
        run(mlp(), loader)
    result = run(mlp(), loader, steps_per_epoch=3)
    assert result.plan.switch_step == 6  # half of 4 epochs of 3 steps
    assert [row["epoch"] for row in result.history] == [0, 1, 2, 3]


def test_steps_per_epoch_cuts_a_longer_loader():
    seen = []

    class Counting(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                seen.append(1)
                yield batch

    run(mlp(), Counting(batches(6)), steps_per_epoch=2)
    assert len(seen) == 1 + 4 * 3  # the first look, and one batch an epoch to see that there is more


def test_one_long_epoch_from_a_stream():
    result = fxrank.auto_lowrank(Net(), Endless(), epochs=1, steps_per_epoch=10, policy=HALFWAY, progress=False, seed=0)
    assert result.plan.E == 0.5
    assert result.plan.switch_step == 5


# -- optimizer and scheduler


def test_the_users_optimizer_stays_the_users():
    model = mlp()
    optimizer = torch.optim.SGD(
        [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "lr": 0.02}], lr=0.1, momentum=0.9
    )
    run(model, optimizer=optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.02]
    assert settings_of(optimizer)["hooks"] == (0, 0)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert model[2].u.weight in optimizer.state


@pytest.mark.parametrize(("per", "steps"), [("epoch", 4), ("batch", 16)])
def test_the_users_scheduler_is_stepped(per, steps):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    result = run(model, optimizer=optimizer, scheduler=scheduler, scheduler_per=per)
    assert scheduler.last_epoch == steps
    assert optimizer.param_groups[0]["lr"] == 0.5**steps
    assert [row["lr"] for row in result.history] == [0.5 ** (i if per == "epoch" else 4 * i + 4) for i in range(4)]


@pytest.mark.parametrize("with_val", [True, False])
def test_a_plateau_scheduler_gets_the_loss(with_val):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    result = run(model, optimizer=optimizer, scheduler=scheduler, val_loader=[vectors(64, 9)] if with_val else None)
    assert scheduler.best == min(row["val_loss" if with_val else "loss"] for row in result.history)


def test_the_default_schedule_warms_up_and_ends_at_zero():
    result = run(mlp(), batches(10), epochs=10, policy="full-rank")
    rates = [row["lr"] for row in result.history]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] < 1e-3
    assert rates[-1] == pytest.approx(0, abs=1e-12)  # cos(π) is not exactly -1


def test_only_trainable_parameters_go_into_the_default_optimizer():
    model = mlp()
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    result = run(model)
    assert torch.equal(model[0].weight, frozen)
    assert len(result.plan.R) == 2


def test_my_optimizer_scheduler_and_loss():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []

    def loss_fn(outputs, targets):
        seen.append(outputs.shape)
        return F.cross_entropy(outputs, targets, label_smoothing=0.1)

    result = run_net(model, optimizer=optimizer, scheduler=scheduler, loss_fn=loss_fn)
    assert len(seen) == 24
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)
    assert model.body.u.weight in optimizer.state
    assert result.plan.R == {"body": 4}
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(Net().parameters(), lr=0.1))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    run_net(model, optimizer=optimizer, scheduler=plateau)
    assert plateau.last_epoch == 4
