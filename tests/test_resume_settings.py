"""What a resumable run may consist of: optimizers, schedulers, policies, loaders; and what is refused, whole."""

import json
import pickle
import re
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nets import SOON, UNTIMED, ConvNet, Tied, batches, images, mlp, settings_of, snapshot
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import fxrank
from fxrank.monitor import ReferenceDetector, SlopeDetector
from fxrank.plainfile import read_plain, write_plain

EPOCHS, STEPS = 4, 5


class Killed(BaseException):
    pass


def points(make=None):
    generator = torch.Generator().manual_seed(3)
    shape = (40, 3, 8, 8) if make is ConvNet else (40, 12)
    return TensorDataset(torch.randn(shape, generator=generator), torch.randint(4, (40,), generator=generator))


def shuffled(make=None):
    return DataLoader(points(make), 8, shuffle=True)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def run(folder, seed=0, die=None, make=mlp, loader=shuffled, optimizer=sgd, scheduler=None, policy=SOON, **options):
    """One call; with `die`, it ends after as many losses."""
    torch.manual_seed(0)
    model = make(seed)
    optimizer = None if optimizer is None else optimizer(model)
    losses = 0

    def loss_fn(outputs, targets):
        nonlocal losses
        losses += 1
        if losses == die:
            raise Killed
        return F.cross_entropy(outputs, targets)

    defaults = {"epochs": EPOCHS, "val_loader": DataLoader(points(make), 20), "checkpoint_every": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        return fxrank.auto_lowrank(
            model,
            loader(make),
            optimizer=optimizer,
            scheduler=None if scheduler is None else scheduler(optimizer),
            loss_fn=loss_fn,
            policy=policy,
            device="cpu",
            progress=False,
            output_dir=folder,
            resume=True,
            **(defaults | options),
        )


def summary(result):
    history = [{k: v for k, v in row.items() if k != "step_ms"} for row in result.history]
    state = {n: (v.dtype, v.stride(), v.flatten().tolist()) for n, v in result.model.state_dict().items()}
    report = result.report
    counts = (report.parameters_before, report.accuracy_before_switch, report.accuracy_after_switch, report.notes)
    return state, result.plan, json.dumps(history), result.curves, counts


def same_when_resumed(tmp_path, deaths, **options):
    whole = run(tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    for number, die in enumerate(deaths):
        with pytest.raises(Killed):
            run(folder, seed=number, die=die, **options)  # every process may begin with other weights
    found, expected = summary(run(folder, seed=9, **options)), summary(whole)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == theirs
    return whole


@pytest.mark.parametrize("die", range(2, 27, 2))
def test_any_step(die, tmp_path):
    result = same_when_resumed(tmp_path, [die])
    assert result.plan.switch_step == 10
    assert result.plan.R == {"2": 4, "4": 4}


OPTIMIZERS = {
    "default": None,
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "groups": lambda m: torch.optim.Adam(
        [
            {"params": [p for p in m.parameters() if p.ndim > 1], "name": "weights"},
            {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=torch.tensor(0.01),
        weight_decay=0.1,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, tmp_path):
    same_when_resumed(tmp_path, [8, 7], optimizer=OPTIMIZERS[name])


def sequential(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS = {
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step), "batch"),
    "milestones": (lambda o: lr_scheduler.MultiStepLR(o, [4, 9, 13]), "batch"),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=EPOCHS * STEPS), "batch"),
    "restarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3), "batch"),
    "sequential": (sequential, "batch"),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5), "epoch"),
    "epochs": (lambda o: lr_scheduler.StepLR(o, 1, 0.5), "epoch"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tmp_path):
    scheduler, per = SCHEDULERS[name]
    same_when_resumed(tmp_path, [8, 7], scheduler=scheduler, scheduler_per=per)


def by_detector(test):
    return fxrank.Cuttlefish(
        speedup_threshold=None, rank_metric="ratio", ratio=0.25, latest=None, round_to=1, test=test
    )


POLICIES = {
    "slope": (mlp, by_detector(SlopeDetector(4.0, 8))),
    "reference": (mlp, by_detector(ReferenceDetector(1.0, 8, 4))),
    "default": (mlp, UNTIMED),
    "auto rounding": (Tied, fxrank.Cuttlefish(speedup_threshold=None, rank_metric="accumulative", share=0.3)),
    "ramp": (ConvNet, fxrank.Pufferfish(E=2, ratio=0.25, extra_bn=True, lr_scale=0.5, rewarmup=0.3)),
    "decay": (Tied, fxrank.Pufferfish(E=1.6, frobenius_decay=0.05)),
    "freeze": (mlp, fxrank.Pufferfish(E=1.6, freeze=("4.weight",))),
    "spectral": (mlp, fxrank.SpectralInit()),
    "at once": (mlp, fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", latest=0.0)),
    "full rank": (mlp, fxrank.FullRank()),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name, tmp_path):
    make, policy = POLICIES[name]
    result = same_when_resumed(tmp_path, [8, 7], make=make, policy=policy)
    if name in ("slope", "reference"):
        assert "have settled" in result.plan.note
        assert 8 <= result.plan.switch_step < 20


def test_what_was_timed_decides_after_the_resume_too(tmp_path):
    policy = fxrank.Cuttlefish(speedup_threshold=1.0, latest=0.5)
    with pytest.raises(Killed):
        run(tmp_path, die=8, policy=policy)
    saved = read_plain(tmp_path / "checkpoint.safetensors")
    (profile,) = saved["session"]["profiles"]
    result = run(tmp_path, policy=policy)
    speedup = profile["dense_ms"] / profile["pair_ms"]
    assert result.plan.layer("2").speedup == pytest.approx(speedup, abs=1e-4) or result.plan.layer("2").rank
    again = read_plain(tmp_path / "checkpoint.safetensors")
    assert again["session"]["profiles"] == saved["session"]["profiles"]
    assert again["session"]["seconds"]["profile"] >= saved["session"]["seconds"]["profile"]


class Augmented(torch.utils.data.Dataset):
    """Draws from generators of its own."""

    def __init__(self):
        self.rng = np.random.default_rng(5)
        self.points = points()

    def __len__(self):
        return len(self.points)

    def __getitem__(self, i):
        x, y = self.points[i]
        return x + float(self.rng.normal()) * 0.01, y


def sampler(make):
    return RandomSampler(points(), replacement=True, generator=torch.Generator().manual_seed(5))


LOADERS = {
    "list": lambda make: batches(STEPS),
    "in order": lambda make: DataLoader(points(), 8),
    "generator": lambda make: DataLoader(points(), 8, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "sampler": lambda make: DataLoader(points(), 8, sampler=sampler(make)),
    "workers": lambda make: DataLoader(points(), 8, shuffle=True, num_workers=2),
    "data set": lambda make: DataLoader(Augmented(), 8, shuffle=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(name, tmp_path):
    same_when_resumed(tmp_path, [9, 8], loader=LOADERS[name])


def test_an_epoch_shorter_than_the_loader(tmp_path):
    same_when_resumed(tmp_path, [5, 4], steps_per_epoch=3, checkpoint_every=1)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_and_loss_scale(amp, tmp_path):
    same_when_resumed(tmp_path, [9, 8], amp=amp)


FORMATS = {
    "bfloat16": (lambda seed: mlp(seed).bfloat16(), [(x.bfloat16(), y) for x, y in batches(STEPS)]),
    "channels_last": (lambda seed: ConvNet(seed).to(memory_format=torch.channels_last), batches(STEPS, images)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_dtypes_and_memory_formats(name, tmp_path):
    make, data = FORMATS[name]
    same_when_resumed(tmp_path, [9, 8], make=make, loader=lambda _: data, val_loader=data)


# -- what is refused


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The checkpoint after 4 steps, and the one after 12, 2 after the switch."""
    found = []
    for die in (6, 18):
        folder = tmp_path_factory.mktemp("files")
        with pytest.raises(Killed):
            run(folder, die=die)
        found.append((folder / "checkpoint.safetensors").read_bytes())
    return found


def refused(folder, error, message, model=None, **options):
    model = mlp(1) if model is None else model
    optimizer = options.pop("optimizer", sgd)(model)
    scheduler = options.pop("scheduler", lambda _: None)(optimizer)
    before, settings = snapshot(model), settings_of(optimizer)
    torch.manual_seed(7)
    defaults = {"loader": shuffled(), "epochs": EPOCHS, "policy": SOON, "output_dir": folder, "resume": True}
    content = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(error, match=re.escape(message)):
        fxrank.auto_lowrank(
            model,
            optimizer=optimizer,
            scheduler=scheduler,
            val_loader=DataLoader(points(), 20),
            device="cpu",
            progress=False,
            **(defaults | options),
        )
    assert (snapshot(model), settings_of(optimizer)) == (before, settings)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == content


STARTED = "a run goes on as it was started; in "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": mlp(width=32)},
            "its model was '0.weight' (16, 12) torch.float32, now it is (32, 12) torch.float32.",
        ),
        (
            {"model": mlp().double()},
            "its model was '0.weight' (16, 12) torch.float32, now it is (16, 12) torch.float64.",
        ),
        ({"model": mlp()[:6]}, "its model was '6.weight' (4, 16) torch.float32, now it is missing."),
        (
            {"optimizer": lambda m: torch.optim.Adam(m.parameters())},
            "its optimizer was SGD of [8] parameters, now it is Adam of [8]",
        ),
        (
            {"epochs": 5},
            "its number of epochs was 4, now it is 5. Pass the same, or start afresh: with another output_dir",
        ),
        ({"steps_per_epoch": 4}, "its number of steps an epoch was 5, now it is 4."),
        ({"policy": UNTIMED}, "its policy was Cuttlefish("),
        ({"amp": "bfloat16"}, "its amp was None, now it is torch.bfloat16."),
        (
            {"scheduler": lambda o: lr_scheduler.StepLR(o, 1)},
            "its scheduler was NoneType, stepped by epoch, now it is StepLR",
        ),
        (
            {"loader": DataLoader(points(), 8, generator=torch.Generator())},
            "its generators of the loaders was , now it is Generator",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("after", [0, 1])
def test_a_checkpoint_of_another_run(after, options, message, files, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(files[after])
    refused(tmp_path, fxrank.CheckpointError, STARTED, **options)
    refused(tmp_path, fxrank.CheckpointError, message, **options)


def test_a_model_that_is_tied_differently(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, die=14, make=Tied)
    message = "its model was 'b.weight' (16, 16) torch.float32, shared with a.weight, now it is (16, 16) torch.float32."
    refused(tmp_path, fxrank.CheckpointError, message, model=Tied(tied=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dir": None}, "checkpoints take both output_dir= and resume=True; got output_dir=None, resume=True"),
        (
            {"resume": False, "checkpoint_every": 3},
            "checkpoints take both output_dir= and resume=True; got output_dir=",
        ),
        (
            {"checkpoint_every": 0},
            "checkpoint_every counts optimizer steps, at least 1; got 0. None leaves it at every",
        ),
        ({"checkpoint_every": 2.5}, "checkpoint_every counts optimizer steps, at least 1; got 2.5."),
    ],
)
def test_options(options, message, tmp_path):
    refused(tmp_path, ValueError, message, **options)


def test_a_state_that_is_not_plain_data(tmp_path):
    class Strange(lr_scheduler.StepLR):
        def state_dict(self):
            return super().state_dict() | {"owner": object()}

    message = "a checkpoint holds numbers, strings, lists, dicts and dense tensors; its entry ['scheduler']['owner'] is or has as a key object."
    refused(tmp_path, TypeError, message, scheduler=lambda o: Strange(o, 1))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["pickle", "torch", "tensor", "empty", "text", "folder", "weights"])
def test_foreign_files(kind, tmp_path):
    path, fuse = tmp_path / "checkpoint.safetensors", str(tmp_path.parent / f"{tmp_path.name}-fuse")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(fuse)))
    elif kind == "torch":
        torch.save({"model": Bomb(fuse)}, path)
    elif kind == "tensor":
        torch.save({"model": torch.zeros(3)}, path)
    elif kind == "weights":
        safetensors.torch.save_file({"0.weight": torch.zeros(3)}, path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"" if kind == "empty" else b"epoch 3")
    model = mlp()
    before = snapshot(model)
    with pytest.raises(fxrank.CheckpointError, match="a checkpoint must be a "):
        fxrank.auto_lowrank(model, shuffled(), output_dir=tmp_path, resume=True, device="cpu", progress=False)
    assert snapshot(model) == before
    assert not list(tmp_path.parent.glob("*fuse"))


def test_a_newer_version(tmp_path, monkeypatch):
    monkeypatch.setattr("fxrank.plainfile.VERSION", 2)
    write_plain(tmp_path / "checkpoint.safetensors", {"everything": "is new"})
    monkeypatch.undo()
    message = "has version '2'. Install the fxrank that wrote it."
    refused(tmp_path, fxrank.CheckpointError, message)


@given(data=st.data())
def test_a_file_damaged_anywhere(files, tmp_path, data):
    whole = data.draw(st.sampled_from(files))
    # The header as often as the numbers.
    place = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(0, 200)))
    damage = data.draw(st.sampled_from(["flip", "cut", "drop", "insert", "zeros"]))
    bit = 1 << data.draw(st.integers(0, 7))
    damaged = {
        "flip": whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :],
        "cut": whole[:place],
        "drop": whole[:place] + whole[place + 1 :],
        "insert": whole[:place] + b"0" + whole[place:],
        "zeros": whole[:place] + bytes(len(whole) - place),
    }[damage]
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damaged)
    if damaged == whole:
        return
    refused(tmp_path, fxrank.CheckpointError, str(path))


def test_a_whole_file_with_parts_missing_or_of_another_kind(files, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    for content in files:
        path.write_bytes(content)
        tree = read_plain(path)
        for name in tree:
            write_plain(path, {k: v for k, v in tree.items() if k != name})
            refused(tmp_path, fxrank.CheckpointError, "a checkpoint must hold the whole run; ")
            write_plain(path, tree | {name: "text"})
            refused(tmp_path, fxrank.CheckpointError, "a checkpoint must hold the whole run; ")
        for name in tree["session"]:
            write_plain(path, tree | {"session": tree["session"] | {name: 1.5}})
            refused(tmp_path, fxrank.FxrankError, "session state must ")
        for name, value in tree["model"].items():
            write_plain(path, tree | {"model": {k: v for k, v in tree["model"].items() if k != name}})
            refused(tmp_path, fxrank.PlanMismatchError, f"every tensor of the model must be stored; {name!r} is not in")
            write_plain(path, tree | {"model": tree["model"] | {name: value[:1].clone()}})
            refused(tmp_path, fxrank.PlanMismatchError, f"stored shapes must fit the model; {name!r} is (1")
