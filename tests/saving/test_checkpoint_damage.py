"""Checkpoints damaged, mixed or edited: refused whole, with the model as it was. The digest that tells."""

import hashlib
import json
import os
import pickle
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import mlp, snapshot, train, vectors
from test_checkpoint import refused

import fxrank

X, _ = vectors()


def loaded_whole_or_not_at_all(folder):
    """The model that takes the checkpoint in `folder`; None for a refusal, which leaves it as it was."""
    model = mlp(1)
    before = snapshot(model)
    try:
        fxrank.load(model, folder)
    except fxrank.FxrankError:
        assert snapshot(model) == before
        return None
    assert model(X).shape == (8, 4)
    return model


def unsigned(folder):
    """The weights as an fxrank without digests wrote them."""
    path = folder / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"format": "pt", "writer": "fxrank"})


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of `mlp()` at a quarter of the full rank."""
    fxrank.save(fxrank.factorize(mlp(), X, rank=0.25), tmp_path)
    return tmp_path


def test_files_of_an_earlier_fxrank_and_of_other_tools(saved):
    expected = fxrank.load(mlp(1), saved)(X)
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    for metadata in ({"format": "pt", "writer": "fxrank"}, {"format": "pt"}, {"format": "pt", "note": "mine"}, None):
        safetensors.torch.save_file(tensors, saved / "model.safetensors", metadata)
        assert torch.equal(fxrank.load(mlp(1), saved)(X), expected)


def test_the_digest_is_what_the_module_says(saved):
    weights, plan = (saved / "model.safetensors").read_bytes(), json.loads((saved / "plan.json").read_text())
    with safetensors.safe_open(saved / "model.safetensors", "pt") as file:
        claimed = file.metadata()["digest"]
    assert weights.count(claimed.encode()) == 1
    text = json.dumps(plan, sort_keys=True, separators=(",", ":")).encode()
    zeros = weights.replace(claimed.encode(), b"sha256:" + b"0" * 64)
    assert claimed == "sha256:" + hashlib.sha256(text + zeros).hexdigest()


def test_a_plan_may_be_laid_out_anew(saved):
    expected = fxrank.load(mlp(1), saved)(X)
    plan = json.loads((saved / "plan.json").read_text())
    (saved / "plan.json").write_bytes(json.dumps(plan, indent=4, sort_keys=True).replace("\n", "\r\n").encode())
    assert torch.equal(fxrank.load(mlp(1), saved)(X), expected)


DAMAGED = re.escape("model.safetensors and plan.json must be as they were saved together; in ")


def test_a_flipped_bit_in_any_number_is_noticed(saved):
    whole = (saved / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header, len(whole), 97):
        changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        (saved / "model.safetensors").write_bytes(changed)
        model = mlp(1)
        before = snapshot(model)
        with pytest.raises(fxrank.CheckpointError, match=DAMAGED) as caught:
            fxrank.load(model, saved)
        assert snapshot(model) == before
    assert "put a good copy of both in their place, or save the model again." in str(caught.value)


def test_a_digest_of_another_kind(saved):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    safetensors.torch.save_file(tensors, saved / "model.safetensors", {"writer": "fxrank", "digest": "blake9:00"})
    message = f"the digest of model.safetensors must be one of sha256; {saved} has 'blake9:00'. Install the fxrank that"
    refused(mlp(1), saved, fxrank.CheckpointError, message)


@given(data=st.data())
def test_files_damaged_anywhere(saved, data):
    """Refused whole, unless a plan says the same in other letters."""
    name = data.draw(st.sampled_from(["model.safetensors", "plan.json"]))
    whole = (saved / name).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.sampled_from(["byte", "cut", "drop", "double", "zeros"]))
    damaged = {
        "byte": whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :],
        "cut": whole[:place],
        "drop": whole[:place] + whole[place + 1 :],
        "double": whole[:place] + whole[place : place + 1] + whole[place:],
        "zeros": whole[:place] + bytes(len(whole) - place),
    }[damage]
    (saved / name).write_bytes(damaged)
    model = loaded_whole_or_not_at_all(saved)
    same = damaged == whole or (name == "plan.json" and model and repr(json.loads(damaged)) == repr(json.loads(whole)))
    assert (model is not None) == bool(same)
    (saved / name).write_bytes(whole)


def test_every_byte_of_the_header_counts(saved):
    whole = (saved / "model.safetensors").read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        (saved / "model.safetensors").write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(mlp(1), saved, fxrank.FxrankError, "must be ")


@settings(max_examples=30)
@given(
    ratios=st.tuples(*[st.sampled_from([0.125, 0.25, 0.375])] * 2),
    seeds=st.tuples(*[st.integers(0, 2)] * 2),
    name=st.sampled_from(["model.safetensors", "plan.json"]),
)
def test_files_of_two_saves_do_not_mix(tmp_path, ratios, seeds, name):
    saves = [fxrank.factorize(mlp(seed), X, rank=ratio) for ratio, seed in zip(ratios, seeds, strict=True)]
    for folder, small in zip("ab", saves, strict=True):
        fxrank.save(small, tmp_path / folder)
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    if ratios[0] != ratios[1]:
        refused(mlp(5), tmp_path / "a", fxrank.CheckpointError, "must be as they were saved together; in ")
    else:  # the plan is that of both: whichever weights there are, they are one save's
        whole = saves[name == "model.safetensors"]
        assert torch.equal(fxrank.load(mlp(5), tmp_path / "a")(X), whole(X))


def test_a_save_broken_off_between_its_files(saved, monkeypatch):
    """Saved again with the same plan: the folder is good at every moment."""
    model = fxrank.load(mlp(1), saved)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    replace = os.replace

    def killed(source, target):
        if target.name == "plan.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        fxrank.save(model, saved)
    assert torch.equal(fxrank.load(mlp(2), saved)(X), model(X))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
def test_a_plan_with_any_entry_replaced(saved, data):
    text = (saved / "plan.json").read_text()
    plan = json.loads(text)
    inside = data.draw(st.sampled_from([plan, *plan["layers"]]))
    inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(JSON)
    (saved / "plan.json").write_text(json.dumps(plan))
    signed = data.draw(st.booleans())
    weights = (saved / "model.safetensors").read_bytes()
    if not signed:
        unsigned(saved)
    model = loaded_whole_or_not_at_all(saved)
    assert model is None or not signed or repr(plan) == repr(json.loads(text))
    (saved / "plan.json").write_text(text)
    (saved / "model.safetensors").write_bytes(weights)


def test_a_file_cut_anywhere_is_refused(saved):
    whole = (saved / "model.safetensors").read_bytes()
    for length in [0, 1, 7, 8, 9, 50, len(whole) // 2, len(whole) - 1]:
        (saved / "model.safetensors").write_bytes(whole[:length])
        refused(mlp(1), saved, fxrank.CheckpointError, "must be a whole safetensors file")
    (saved / "model.safetensors").write_bytes(whole + b"\0")
    refused(mlp(1), saved, fxrank.CheckpointError, "must be a whole safetensors file")
    plan = (saved / "plan.json").read_text()
    (saved / "model.safetensors").write_bytes(whole)
    for length in [0, 1, len(plan) // 3, len(plan) - 3]:
        (saved / "plan.json").write_text(plan[:length])
        refused(mlp(1), saved, fxrank.PlanMismatchError, "a plan must be JSON; ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 99}, "layer 1 of the plan (2): rank must be in 1 … 16; got 99."),
        ({"full_rank": 99, "rank": 99}, "the rank of '2' must be in 1 … 16, its full rank; got 99."),
        (
            {"rank": 5},
            "stored shapes must fit the model; '2.u.weight' is (4, 16) in the file and (5, 16) in the model.",
        ),
        ({"rank": None}, "every stored tensor must have a place in the model; '2."),
        (
            {"kind": "conv2d"},
            "layers must match the plan; '2' is Linear with weight (16, 16), the plan has conv2d with (16, 16).",
        ),
        (
            {"form": "tucker"},
            "a plan's forms must be among channel, gauge, qkv, spatial, stack; '2' has 'tucker'. Install the fxrank that wrote the plan.",
        ),
        ({"extra_bn": True}, "every tensor of the model must be stored"),
    ],
)
def test_a_plan_that_was_changed_by_hand(change, message, saved):
    unsigned(saved)
    data = json.loads((saved / "plan.json").read_text())
    data["layers"][1] |= change
    (saved / "plan.json").write_text(json.dumps(data))
    if change == {"extra_bn": True}:  # a Linear never has one: the same model
        fxrank.load(mlp(1), saved)
        return
    refused(mlp(1), saved, ValueError, message)


class Bomb:
    def __reduce__(self):
        return exec, ("raise KeyboardInterrupt('it ran')",)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_nothing_in_a_file_is_run(name, saved):
    for write in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        write(Bomb(), saved / name)
        refused(mlp(1), saved, fxrank.FxrankError, " must be ")
