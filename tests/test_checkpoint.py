"""Checkpoints: what comes back, and what is refused before the model is touched."""

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
from nets import ConvNet, Tied, images, mlp, snapshot, train, vectors
from torch import nn

import fxrank

X, _ = vectors()
IMAGES, _ = images()


def refused(model, folder, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(message)):
        fxrank.load(model, folder)
    assert snapshot(model) == before


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of `mlp()` at a quarter of the full rank."""
    fxrank.save(fxrank.factorize(mlp(), X, rank=0.25), tmp_path)
    return tmp_path


class Biases(nn.Module):
    """One weight in two layers, of which only the second has a bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(torch.tanh(self.a(self.stem(x)))))


class Alias(nn.Module):
    """One module under two names, one weight in an embedding and a Linear, a buffer that is shared too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.stem = nn.Embedding(10, 12), nn.Linear(12, 12)
        self.body, self.head = nn.Linear(12, 12), nn.Linear(12, 10, bias=False)
        self.other_name = self.body
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("same_scale", self.scale)

    def forward(self, x):
        return self.head(self.other_name(self.stem(self.embedding(x))) * self.scale)


CASES = {
    "mlp": (mlp, X),
    "conv": (lambda: ConvNet().eval(), IMAGES),
    "channels_last": (lambda: ConvNet().eval().to(memory_format=torch.channels_last), IMAGES),
    "tied": (Tied, X),
    "biases": (Biases, X),
    "alias": (Alias, torch.arange(10)[None]),
    "float64": (lambda: mlp().double(), X.double()),
    "bfloat16": (lambda: mlp().bfloat16(), X.bfloat16()),
}


@pytest.mark.parametrize("extra_bn", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, extra_bn, tmp_path):
    make, x = CASES[name]
    small = fxrank.factorize(make(), x, rank=0.25, extra_bn=extra_bn)
    assert fxrank.plan_of(small).R
    fxrank.save(small, tmp_path)
    fresh = make()
    assert fxrank.load(fresh, tmp_path) is fresh
    assert fxrank.plan_of(fresh) == fxrank.plan_of(small)
    state, expected = fresh.state_dict(), small.state_dict()
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value)
        assert (state[key].dtype, state[key].stride()) == (value.dtype, value.stride())
    assert torch.equal(fresh(x), small(x))
    # what was one tensor is one tensor
    groups = [
        [sorted(n for n, p in m.named_parameters(remove_duplicate=False) if p is q) for q in m.parameters()]
        for m in (small, fresh)
    ]
    assert groups[0] == groups[1]


def test_shared_tensors_are_stored_once(tmp_path):
    small = fxrank.factorize(Alias(), torch.arange(10)[None], rank=0.25)
    fxrank.save(small, tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in small.parameters()) + 1


def test_a_loaded_model_trains_on_and_is_saved_again(saved, tmp_path):
    model = fxrank.load(mlp(1), saved)
    before = model(X)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    fxrank.save(model, saved)  # over the old one
    again = fxrank.load(mlp(2), saved)
    assert torch.equal(again(X), model(X))
    assert not torch.equal(again(X), before)
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "plan.json"]


def test_a_trained_model_without_any_pair_is_a_checkpoint_too(tmp_path):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(fxrank.NothingFactorizedWarning):
        result = fxrank.auto_lowrank(
            model,
            [vectors()],
            epochs=2,
            optimizer=optimizer,
            policy=fxrank.Cuttlefish(speedup_threshold=None, latest=None),
            device="cpu",
            progress=False,
        )
    fxrank.save(result.model, tmp_path)
    assert torch.equal(fxrank.load(mlp(1), tmp_path)(X), model(X))


def test_a_merged_model_has_no_plan_to_save(tmp_path):
    merged = fxrank.merge(fxrank.factorize(mlp(), X, rank=0.25))
    with pytest.raises(
        ValueError, match=re.escape("only a model that fxrank has rewritten has a plan; this Sequential has none.")
    ):
        fxrank.save(merged, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("tied", "into", "message"),
    [
        (True, False, "every stored tensor must have a place in the model; 'b.v.bias' has none."),
        (
            False,
            True,
            "a tensor that the model shares must be stored once; the file holds 'a.u.weight' and 'b.u.weight' apart.",
        ),
    ],
)
def test_tied_and_untied_are_two_architectures(tied, into, message, tmp_path):
    fxrank.save(fxrank.factorize(Tied(tied=tied), X, rank=0.25), tmp_path)
    refused(Tied(tied=into), tmp_path, fxrank.PlanMismatchError, message)


def test_dense_layers_tied_differently(tmp_path):
    def net(tied):
        model = mlp(width=12)
        if tied:
            model[0].weight = model[4].weight
        return model

    for tied in (True, False):
        small = fxrank.factorize(net(tied), X, rank={"2": 3})
        fxrank.save(small, tmp_path / str(tied))
    refused(
        net(False),
        tmp_path / "True",
        fxrank.PlanMismatchError,
        "every tensor of the model must be stored; '4.weight' is not in the file. Build the architecture that was saved.",
    )
    refused(
        net(True),
        tmp_path / "False",
        fxrank.PlanMismatchError,
        "a tensor that the model shares must be stored once; the file holds '0.weight' and '4.weight' apart. Build the",
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(12, 16)),
            "every layer of a plan must exist in the model; Sequential has no '2'. Use the plan of",
        ),
        (
            lambda: mlp(width=32),
            "layers must match the plan; '2' is Linear with weight (32, 32), the plan has linear with (16, 16). Use the plan of this",
        ),
        (
            lambda: fxrank.factorize(mlp(), X, rank=0.25),
            "a plan applies to a dense model; '2' is already a factor pair. Pass a freshly built model.",
        ),
        (
            lambda: mlp().append(nn.Linear(4, 4)),
            "every tensor of the model must be stored; '7.weight' is not in the file. Build the architecture that was saved.",
        ),
        (
            lambda: mlp()[:6],
            "every stored tensor must have a place in the model; '6.bias' has none. Build the architecture that was saved.",
        ),
    ],
)
def test_another_model_is_refused(make, message, saved):
    refused(make(), saved, fxrank.PlanMismatchError, message)


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


def test_missing_files_and_folders(saved, tmp_path):
    text = "a checkpoint is a folder with plan.json and model.safetensors; "
    refused(mlp(), tmp_path / "nowhere", fxrank.CheckpointError, text + "plan.json is missing in")
    (saved / "model.safetensors").unlink()
    refused(mlp(), saved, fxrank.CheckpointError, text + "model.safetensors is missing in")


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
            "a plan's forms must be among channel, qkv, stack; '2' has 'tucker'. Install the fxrank that wrote the plan.",
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


class Bomb:
    def __reduce__(self):
        return exec, ("raise KeyboardInterrupt('it ran')",)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_nothing_in_a_file_is_run(name, saved):
    for write in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        write(Bomb(), saved / name)
        refused(mlp(1), saved, fxrank.FxrankError, " must be ")


def test_weights_are_stored_as_they_are(saved):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    assert set(tensors) == {f"{n}.{k}" for n in "06" for k in ("weight", "bias")} | {
        f"{n}.{k}" for n in "24" for k in ("u.weight", "v.weight", "v.bias")
    }
