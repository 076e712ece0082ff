"""What is not resumed: checkpoints of another run, and files that are damaged or foreign; refused whole."""

import pickle
import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from interrupted import EPOCHS, Killed, points, run, shuffled
from nets import SOON, UNTIMED, Tied, mlp, settings_of, sgd, snapshot
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import fxrank
from fxrank.resume.grown import read_whole
from fxrank.saving.plainfile import write_plain


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The checkpoint after 4 steps, and the one after 12, 2 after the switch."""
    found = []
    for die in (6, 18):
        folder = tmp_path_factory.mktemp("files")
        with pytest.raises(Killed):
            run(folder, die=die)
        path = folder / "checkpoint.safetensors"
        write_plain(path, read_whole(path))  # all in one file, as an earlier fxrank wrote; see test_grown for the other
        found.append(path.read_bytes())
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
            {"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-3)},
            "its optimizer's option was 'lr' 0.1, now it is 0.3.",
        ),
        ({"seed": 1}, "its seed was None, now it is 1."),
        ({"exclude": ["2"]}, "its exclude was (), now it is '2'."),
        ({"include": re.compile("head|0")}, "its include was (), now it is re.compile('head|0')."),
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


def test_the_same_objects_after_the_switch(tmp_path):
    """Broken off in a notebook, and the cell is run again."""
    model = mlp()
    optimizer = sgd(model)
    losses = iter([F.cross_entropy] * 17)
    options = {"device": "cpu", "progress": False, "epochs": EPOCHS, "policy": SOON, "checkpoint_every": 2}
    options |= {"output_dir": tmp_path, "resume": True, "optimizer": optimizer}
    with pytest.raises(StopIteration):
        fxrank.auto_lowrank(
            model, shuffled(), loss_fn=lambda outputs, targets: next(losses)(outputs, targets), **options
        )
    assert isinstance(model[2], fxrank.passes.pairs.base.FactorPair)
    before = snapshot(model)
    message = "This one has been made low-rank already, by the run that was broken off maybe: build it anew, and its optimizer and scheduler."
    with pytest.raises(fxrank.CheckpointError, match=re.escape(message)):
        fxrank.auto_lowrank(model, shuffled(), **options)
    assert snapshot(model) == before
    model = mlp(1)
    assert fxrank.auto_lowrank(model, shuffled(), **(options | {"optimizer": sgd(model)})).plan.R == {"2": 4, "4": 4}


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


def test_a_parameter_that_is_in_no_checkpoint(tmp_path):
    def optimizer(model):
        return torch.optim.SGD([*model.parameters(), torch.nn.Parameter(torch.zeros(3))], lr=0.1)

    message = (
        "and of loss_fn if it is a module; the optimizer steps 1 other, of shape (3,) for one. Register it in either,"
    )
    refused(tmp_path, TypeError, message, optimizer=optimizer)


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
    monkeypatch.setattr("fxrank.saving.plainfile.VERSION", 2)
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
        tree = read_whole(path)
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
