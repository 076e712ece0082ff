"""Checkpoints with a good digest and values that no run has written: refused whole, before the model is changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from interrupted import Killed, points, run, shuffled
from nets import SOON, mlp, settings_of, sgd, snapshot
from torch.utils.data import DataLoader

import fxrank
from fxrank.resume.grown import read_whole
from fxrank.resume.sound import check_sound
from fxrank.saving.plainfile import write_plain
from fxrank.training.options import RunOptions


@pytest.fixture(scope="module", params=[6, 18], ids=["before the switch", "after it"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crafted")
    with pytest.raises(Killed):
        run(folder, die=request.param)
    return read_whole(folder / "checkpoint.safetensors")


def refused(tree, part, folder):
    write_plain(folder / "checkpoint.safetensors", tree)
    content = (folder / "checkpoint.safetensors").read_bytes()
    model = mlp(1)
    optimizer = sgd(model)
    before, settings = snapshot(model), settings_of(optimizer)
    torch.manual_seed(7)
    random = torch.get_rng_state()
    with pytest.raises(fxrank.CheckpointError, match=f"its part '{part}' is not of one like this"):
        fxrank.auto_lowrank(
            model,
            shuffled(),
            optimizer=optimizer,
            loss_fn=F.cross_entropy,
            val_loader=DataLoader(points(), 20),
            epochs=4,
            policy=SOON,
            device="cpu",
            progress=False,
            output_dir=folder,
            resume=True,
        )
    assert (snapshot(model), settings_of(optimizer)) == (before, settings)
    assert (folder / "checkpoint.safetensors").read_bytes() == content
    return random


def entry(tree):
    return tree["optimizer"]["state"][min(tree["optimizer"]["state"])]


CRAFTED = {
    "moment of another size": ("optimizer", lambda t: entry(t).update(momentum_buffer=torch.zeros(3, 5))),
    "moment that is text": ("optimizer", lambda t: entry(t).update(momentum_buffer="zeros")),
    "state of no parameter": ("optimizer", lambda t: t["optimizer"]["state"].update({99: {}})),
    "state that is a list": ("optimizer", lambda t: t["optimizer"].update(state=[])),
    "a group too many": ("optimizer", lambda t: t["optimizer"]["param_groups"].append({"params": []})),
    "rate": ("optimizer", lambda t: t["optimizer"]["param_groups"][0].update(lr="fast")),
    "totals without an entry": ("totals", lambda t: t["totals"].pop("examples")),
    "totals of a model's shape": ("totals", lambda t: t["totals"].update(loss=torch.zeros(4))),
    "totals that are text": ("totals", lambda t: t["totals"].update(examples="8")),
    "torch's numbers": ("random", lambda t: t["random"].update(torch=torch.zeros(3, dtype=torch.uint8))),
    "numpy's numbers": ("random", lambda t: t["random"].update(numpy={"bit_generator": "MT19937", "state": {}})),
    "Python's numbers": ("epoch_random", lambda t: t["epoch_random"].update(python=(3, (1, 2), None))),
    "numbers swapped": ("first_random", lambda t: t["first_random"].update(torch=t["random"]["numpy"])),
    "epoch beyond the end": ("epoch", lambda t: t.update(epoch=5)),
    "epoch below 0": ("epoch", lambda t: t.update(epoch=-1)),
    "batches": ("taken", lambda t: t.update(taken=-3)),
    "rows too many": ("history", lambda t: t["history"].append(dict.fromkeys(("epoch", "loss")))),
    "phases": ("memory", lambda t: t["memory"].update(other=1)),
    "seconds": ("seconds", lambda t: t.update(seconds=[1.0, "2"])),
    "accuracy": ("at_switch", lambda t: t["at_switch"].update(before_switch="high")),
    "a loss with weights": ("loss", lambda t: t["loss"].update(weight=torch.ones(4))),
    "scaler": ("scaler", lambda t: t["scaler"].update(scale="large")),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_refused_whole(name, saved, tmp_path):
    part, craft = CRAFTED[name]
    tree = copy.deepcopy(saved)
    craft(tree)
    refused(tree, part, tmp_path)


def test_what_a_run_wrote_is_sound_and_random_numbers_stay(saved):
    model = mlp(1)
    options = RunOptions.of(model, shuffled(), epochs=4, optimizer=sgd(model), loss_fn=F.cross_entropy)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    check_sound(saved, options, dealt_alike=True)
    assert torch.equal(torch.get_rng_state(), before)
