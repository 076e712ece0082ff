"""`auto_lowrank` with every shape of batch, optimizer and loader, and what it refuses."""

import json
import logging
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from nets import SOON, ConvNet, batches, images, mlp, settings_of, snapshot, vectors
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxrank


def run(model, loader=None, **options):
    loader = batches() if loader is None else loader
    defaults = {"epochs": 4, "policy": SOON, "device": "cpu", "seed": 0, "progress": False}
    return fxrank.auto_lowrank(model, loader, **(defaults | options))


# -- batches and losses


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


# -- what comes back


def test_history_curves_and_report(capsys):
    result = run(ConvNet(), batches(make=images), val_loader=[images(16, 9)])
    assert capsys.readouterr() == ("", "")
    keys = {"epoch", "phase", "loss", "accuracy", "val_loss", "val_accuracy", "lr", "step_ms", "stable_ranks"}
    assert all(set(row) == keys for row in result.history)
    assert [row["phase"] for row in result.history] == ["full-rank"] + ["low-rank"] * 3
    assert set(result.history[0]["stable_ranks"]) == {"conv1", "conv2", "conv3", "head"}
    assert result.history[-1]["stable_ranks"] == {}
    assert result.curves["steps"] == list(range(9))
    assert all(len(curve) == 9 for curve in result.curves.values())
    report = result.report
    assert (report.loss, report.val_loss) == (result.history[-1]["loss"], result.history[-1]["val_loss"])
    assert report.settings["seed"] == 0
    assert report.settings["device"] == "cpu"
    assert set(report.seconds) == {"total", "evaluation", "monitor", "profile", "switch"}
    assert report.parameters_after == sum(p.numel() for p in result.model.parameters())


def test_the_loss_of_an_epoch_is_the_mean_over_examples():
    model = mlp()
    loader = [vectors(8, 0), vectors(2, 1)]
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    result = run(model, loader, epochs=1, optimizer=frozen, policy="full-rank", val_loader=loader)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        expected = float(F.cross_entropy(model(x), y))
    # float32 sums in another order
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert result.history[0]["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert result.history[0]["accuracy"] == float((model(x).argmax(1) == y).sum()) / 10


def test_files(tmp_path):
    folder = tmp_path / "deep" / "run"
    result = run(mlp(), output_dir=folder, val_loader=[vectors(16, 9)])
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "plan.json", "report.json", "report.txt"}
    assert torch.equal(fxrank.load(mlp(1), folder)(X), result.model(X))
    assert (folder / "report.txt").read_text() == f"{result.report}\n"
    assert json.loads((folder / "report.json").read_text())["plan"]["policy"] == "Cuttlefish"
    assert fxrank.Plan.load(folder / "plan.json") == result.plan


def test_an_output_path_that_cannot_be_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = mlp()
    before = snapshot(model)
    with pytest.raises(FileExistsError):
        run(model, output_dir=tmp_path / "file")
    assert snapshot(model) == before


def test_full_rank_trains_the_twin():
    model = mlp()
    result = run(model, policy=fxrank.FullRank())
    assert result.plan.R == {}
    assert type(model[2]) is nn.Linear
    assert result.curves == {}
    assert result.report.memory_bytes["low-rank"] is None
    assert fxrank.plan_of(model) is result.plan


def test_progress_is_shown_on_request(capsys):
    run(mlp(), progress=True, epochs=5)
    captured = capsys.readouterr()
    assert captured.out == ""  # epochs were given: nothing to announce
    assert "20/20" in captured.err
    assert "low-rank" in captured.err


def test_a_loss_that_is_not_finite_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "fxrank"):
        run(mlp(), epochs=1, policy="full-rank", loss_fn=lambda o, t: F.cross_entropy(o, t) * torch.nan, optimizer=None)
    assert "the training loss of epoch 0 is nan" in caplog.text


def test_weights_that_break_are_named():
    with pytest.raises(
        fxrank.NonFiniteWeightError, match=re.escape("layer '0' holds NaN or infinity. Lower the learning rate")
    ):
        run(mlp(), loss_fn=lambda o, t: F.cross_entropy(o, t) * torch.nan)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_on_a_cpu(amp):
    result = run(mlp(), amp=amp)
    assert result.plan.R == {"2": 4, "4": 4}
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.report.settings["amp"] == f"torch.{amp}"


# -- refused before anything was touched


class Empty:
    def __iter__(self):
        return iter(())


class OncePerLoader(list):
    """Spent after two passes: the first look and the first epoch."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return list.__iter__(self) if self.passes <= 2 else iter(())


REFUSED = {
    "empty list": (
        [],
        {},
        ValueError,
        "the loader must yield at least one batch; it is empty (length 0). Check the data set,",
    ),
    "empty iterable": (
        Empty(),
        {"steps_per_epoch": 3},
        ValueError,
        "the loader must yield at least one batch; it is empty. Check",
    ),
    "generator": (
        (b for b in batches()),
        {"steps_per_epoch": 4},
        TypeError,
        "the loader must be iterable again for every epoch; got a one-pass generator. Pass a DataLoader or a list of batches.",
    ),
    "generator without length": (
        (b for b in batches()),
        {},
        TypeError,
        "the loader must have a length, so that schedule and switch can be placed; generator has none. Pass steps_per_epoch=.",
    ),
    "batch of another width": (
        [(torch.randn(8, 13), Y)],
        {},
        fxrank.TraceError,
        "every operation of a traced model must be a graph node; Sequential failed in '0' (Linear)",
    ),
    "batch with a strange key": ([{"pixels": X, "n": Y}], {}, fxrank.TraceError, "Sequential failed in '0' (Linear)"),
    "nothing to factorize": (
        None,
        {"exclude": ["2", "4"]},
        fxrank.NothingToFactorizeError,
        "at least one layer must be factorizable; 0 of 4 are:\n  0 (linear): first layer of the graph, left dense by default",
    ),
    "unknown layer": (
        None,
        {"include": "layer9"},
        ValueError,
        "each selector in include must match at least one layer; 'layer9' matches none of 4.",
    ),
    "epochs": (None, {"epochs": 0}, ValueError, "epochs must be at least 1; got 0."),
    "steps per epoch": (
        None,
        {"steps_per_epoch": 0},
        ValueError,
        "total_steps and steps_per_epoch must be at least 1; got 0 and 0.",
    ),
    "amp": (None, {"amp": "fp16"}, ValueError, "amp must be one of 'bfloat16', 'float16'; got 'fp16'."),
    "amp of another type": (
        None,
        {"amp": torch.float64},
        ValueError,
        "amp must be one of 'bfloat16', 'float16'; got torch.float64.",
    ),
    "scheduler_per": (
        None,
        {"scheduler_per": "step"},
        ValueError,
        "scheduler_per must be one of 'batch', 'epoch'; got 'step'.",
    ),
    "policy": (None, {"policy": "auto"}, ValueError, "policy must be one of 'cuttlefish', 'cuttlefish-paper'"),
    "policy type": (None, {"policy": 0.25}, TypeError, "policy must be a fxrank policy, a Plan or a name; got float."),
    "plan of another model": (
        None,
        {"policy": fxrank.plan_of(fxrank.factorize(ConvNet(), images()[0], rank=0.25))},
        fxrank.PlanMismatchError,
        "every layer of a plan must exist in the model; Sequential has no 'conv2'. Use the plan of this very architecture.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    loader, options, error, message = REFUSED[name]
    model = mlp()
    model[3].eval()  # a mode of its own
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, settings, random = snapshot(model), settings_of(optimizer), torch.get_rng_state()
    with pytest.raises(error, match=re.escape(message)):
        run(model, loader, **({"optimizer": optimizer, "seed": None} | options))
    assert snapshot(model) == before
    assert settings_of(optimizer) == settings
    assert torch.equal(torch.get_rng_state(), random)


def test_refused_optimizers():
    model = mlp()
    other = torch.optim.SGD(mlp().parameters(), lr=0.1)
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "the optimizer must hold the model's parameters; SGD holds 8, none of them of Sequential. Build it from model.parameters()"
        ),
    ):
        run(model, optimizer=other)
    with pytest.raises(
        TypeError, match=re.escape("LBFGS evaluates the model several times inside one step, so its parameters")
    ):
        run(model, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(
        ValueError, match=re.escape("got a scheduler without optimizer=. Pass the optimizer it was built with.")
    ):
        run(model, scheduler=torch.optim.lr_scheduler.ExponentialLR(other, 0.5))
    with pytest.raises(ValueError, match=re.escape("the model must have parameters to train; ReLU has none.")):
        run(nn.ReLU())
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (
            [(X, torch.zeros(8, 3))],
            {},
            ValueError,
            "got outputs (8, 4) and targets (8, 3). Pass loss_fn(outputs, targets).",
        ),
        ([X], {}, TypeError, "the loss can be inferred for batches (inputs, targets) with tensor outputs"),
        (
            None,
            {"loss_fn": lambda o, t: o},
            TypeError,
            "loss_fn must return a scalar tensor; got Tensor(8, 4) float32.",
        ),
        (
            OncePerLoader(batches()),
            {},
            ValueError,
            "the loader must yield batches in every epoch; epoch 1 had none. A generator is spent after one pass: pass a DataLoader or list.",
        ),
    ],
)
def test_an_error_on_the_way_leaves_no_hooks(loader, options, error, message):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = settings_of(optimizer)
    with pytest.raises(error, match=re.escape(message)):
        run(model, loader, optimizer=optimizer, **options)
    assert settings_of(optimizer)["hooks"] == settings["hooks"] == (0, 0)
    assert settings_of(optimizer)["groups"] == settings["groups"]
