"""Checkpoints: what comes back, and what is refused before the model is touched."""

import os
import re

import pytest
import safetensors.torch
import torch
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


class Counting(nn.Module):
    """Has a state that is no tensor, and buffers that are one in memory, in part and as a whole."""

    def __init__(self, seed=0, **buffers):
        super().__init__()
        self.net, self.extra = mlp(seed), {"calls": seed, "names": ["a"]}
        table = torch.arange(6.0) + seed
        buffers = buffers or {"table": table, "head": table[:2], "again": table.detach()}
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.net(x)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


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


def test_a_state_that_is_no_tensor_and_views_come_back(tmp_path):
    small = fxrank.factorize(Counting(3), X, rank=0.25)
    fxrank.save(small, tmp_path)
    back = fxrank.load(Counting(1), tmp_path)
    assert back.extra == {"calls": 3, "names": ["a"]}
    assert [b.tolist() for b in back.buffers()] == [[3, 4, 5, 6, 7, 8], [3, 4], [3, 4, 5, 6, 7, 8]]
    assert torch.equal(back(X), small(X))
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(weights), weights)
    model = Counting(1)
    with pytest.raises(fxrank.PlanMismatchError, match=re.escape("'_extra_state' is not in the file. Build the")):
        fxrank.load(model, tmp_path)
    assert (model.extra["calls"], type(model.net[2])) == (1, nn.Linear)
    fxrank.save(fxrank.factorize(mlp(), X, rank=0.25), tmp_path)
    tensors = safetensors.torch.load_file(weights)
    for text in ("[", "5", '{"dict": 3}', '{"tensor": 0}', '{"dict": [["net", 1]]}'):
        safetensors.torch.save_file(tensors, weights, {"extra_state": text})
        with pytest.raises(fxrank.FxrankError, match=r"must be a whole safetensors file|'net' has none"):
            fxrank.load(mlp(), tmp_path)


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        (torch.ones(2, dtype=torch.complex128), "'strange' is a torch.complex128 tensor."),
        (torch.eye(2).to_sparse(), "'strange' is a torch.sparse_coo tensor."),
        (torch.ones(2, device="meta"), "'strange' is a tensor on the meta device."),
        (None, "beside tensors a checkpoint holds plain data; the state '_extra_state' has tensors inside."),
    ],
    ids=["complex128", "sparse", "meta", "tensors inside"],
)
def test_what_can_not_be_stored_is_refused_before_the_training(strange, message, tmp_path):
    def made():
        model = Counting(strange=strange)
        model.extra = {"a": torch.zeros(2)} if strange is None else None
        return model

    with pytest.raises(TypeError, match=re.escape(message)):
        fxrank.save(fxrank.factorize(made(), X, fxrank.plan_of(fxrank.factorize(Counting(), X))), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model = made()
    before = [p.tolist() for p in model.parameters()]
    with pytest.raises(TypeError, match=re.escape(message)):
        fxrank.auto_lowrank(model, [vectors()], epochs=1, output_dir=tmp_path, device="cpu", progress=False)
    assert [p.tolist() for p in model.parameters()] == before


def test_a_model_on_the_meta_device_is_not_loaded_into(saved):
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match=re.escape("a model to load into must have memory; '0.weight' is on the meta")):
        fxrank.load(model, saved)
    assert type(model[2]) is nn.Linear


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
            "a plan must have each weight once; 'a' and 'b' are one in this Tied. Use the plan of this very architecture.",
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


def test_missing_files_and_folders(saved, tmp_path):
    text = "a checkpoint is a folder with plan.json and model.safetensors; "
    refused(mlp(), tmp_path / "nowhere", fxrank.CheckpointError, text + "plan.json is missing in")
    (saved / "model.safetensors").unlink()
    refused(mlp(), saved, fxrank.CheckpointError, text + "model.safetensors is missing in")


def test_weights_are_stored_as_they_are(saved):
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    assert set(tensors) == {f"{n}.{k}" for n in "06" for k in ("weight", "bias")} | {
        f"{n}.{k}" for n in "24" for k in ("u.weight", "v.weight", "v.bias")
    }


@pytest.mark.skipif(os.name != "posix", reason="files have other rights elsewhere")
def test_whoever_may_read_the_plan_may_read_the_weights(saved):
    assert (saved / "model.safetensors").stat().st_mode == (saved / "plan.json").stat().st_mode
