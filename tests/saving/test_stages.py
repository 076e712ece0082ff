"""Models that were factorized in several stages: one plan for all pairs, and a file that can be read; else none."""

import dataclasses
import re

import pytest
import torch
from nets import SOON, ConvNet, batches, images, mlp, sgd, train, vectors
from torch import nn

import fxrank
from fxrank.passes.pairs.registry import make_pair
from fxrank.saving.dense_twin import dense_twin
from fxrank.session.session import LowRankSession

X = torch.arange(24).reshape(4, 6) % 10


class Words(nn.Module):
    """A table tied to the head, an attention with a packed projection, experts, a recurrent and an ordinary layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.experts = nn.Parameter(torch.randn(3, 16, 16) / 4)
        self.gru = nn.GRU(16, 16)
        self.mid, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + (x[None].flatten(1, 2) @ self.experts).mean(0).view_as(x)
        return self.head(self.last(torch.relu(self.mid(self.gru(x)[0]))))


def same_after_loading(small, make, x, folder):
    fxrank.save(small, folder)
    fresh = fxrank.load(make(), folder)
    assert fxrank.plan_of(fresh) == fxrank.plan_of(small)
    assert torch.equal(fresh.eval()(x), small.eval()(x))
    return fresh


WORDS = {
    "packed": ({"attention.in_proj_weight": 4}, {"form": "qkv"}),
    "raw and recurrent": ({"gru.weight_ih_l0": 4, "attention.in_proj_weight": 6}, {}),
    "experts": ({"experts": 4}, {}),
    "a tied table": ({"table": 4}, {}),
}


@pytest.mark.parametrize("name", WORDS)
def test_every_kind_of_pair_is_in_the_plan_of_a_later_stage(name, tmp_path):
    ranks, options = WORDS[name]
    first = fxrank.factorize(Words(), X, rank=ranks, **options)
    second = fxrank.factorize(first, X, rank={"mid": 4})
    third = fxrank.factorize(second, X, rank={"last": 0.25})
    plan, earlier = fxrank.plan_of(third), fxrank.plan_of(first)
    assert ranks | {"mid": 4, "last": 4} == plan.R
    assert [plan.layer(n) for n in ranks] == [earlier.layer(n) for n in ranks]
    assert len({d.name for d in plan.layers}) == len(plan.layers)
    same_after_loading(third, Words, X, tmp_path)
    # The plan is whole: applied to a dense model it makes all pairs.
    assert fxrank.plan_of(fxrank.factorize(Words(), X, rank=plan)).R == plan.R


@pytest.mark.parametrize("options", [{"extra_bn": True}, {"form": "spatial"}, {"form": "gauge"}, {}], ids=str)
def test_convolutions_keep_form_and_norm(options, tmp_path):
    x, _ = images()
    first = fxrank.factorize(ConvNet(), x, rank={"conv3": 4}, **options)
    second = fxrank.factorize(first, x, rank={"conv2": 3})
    assert fxrank.plan_of(second).layer("conv3") == fxrank.plan_of(first).layer("conv3")
    assert [d.name for d in fxrank.plan_of(second).layers] == ["conv1", "conv2", "conv3", "head"]
    same_after_loading(second, ConvNet, x, tmp_path)


@pytest.mark.parametrize("policy", [SOON, fxrank.FullRank()], ids=["switches", "does not"])
def test_a_session_after_a_first_stage(policy, tmp_path):
    x, _ = vectors()
    small = fxrank.factorize(mlp(), x, rank={"4": 5})
    optimizer = sgd(small)
    session = LowRankSession.attach(small, optimizer, example_inputs=x, total_steps=6, policy=policy)
    train(small, optimizer, 6)
    session.finish()
    assert {"4": 5} | ({"2": 4} if policy is SOON else {}) == fxrank.plan_of(small).R
    same_after_loading(small, mlp, x, tmp_path)


def test_a_run_after_a_first_stage(tmp_path):
    x, _ = vectors()
    small = fxrank.factorize(mlp(), x, rank={"4": 5})
    fxrank.auto_lowrank(
        small, batches(), epochs=2, policy=SOON, device="cpu", progress=False, output_dir=tmp_path / "run"
    )
    assert fxrank.plan_of(fxrank.load(mlp(), tmp_path / "run")).R == {"2": 4, "4": 5}


def test_a_plan_after_a_first_stage(tmp_path):
    x, _ = vectors()
    plan = fxrank.plan_of(fxrank.factorize(mlp(), x, rank={"2": 3}))
    small = fxrank.factorize(fxrank.factorize(mlp(), x, rank={"4": 5}), x, rank=plan)
    assert fxrank.plan_of(small).R == {"2": 3, "4": 5}
    same_after_loading(small, mlp, x, tmp_path)


def test_a_pair_put_in_by_hand_is_read_off(tmp_path):
    x, _ = vectors()
    model = mlp()
    model[2] = make_pair(model[2], 3)
    small = fxrank.factorize(model, x, rank={"4": 5})
    assert fxrank.plan_of(small).R == {"2": 3, "4": 5}
    assert fxrank.plan_of(small).layer("2").full_rank == 16
    same_after_loading(small, mlp, x, tmp_path)


def put_in(small):
    small[4] = make_pair(small[4], 3)


def taken_out(small):
    small[2] = nn.Linear(16, 16)


def of_another_rank(small):
    small[2] = make_pair(nn.Linear(16, 16), 7)


def of_another_plan(small):
    plan = fxrank.plan_of(small)
    changed = dataclasses.replace(plan.layer("2"), weight_shape=(16, 17))
    small._fxrank_plan = plan.with_layers([changed])


@pytest.mark.parametrize("change", [put_in, taken_out, of_another_rank, of_another_plan])
def test_what_could_not_be_read_is_not_written(change, tmp_path):
    small = fxrank.factorize(mlp(), vectors()[0], rank={"2": 3})
    fxrank.save(small, tmp_path)
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    change(small)
    with pytest.raises(fxrank.PlanMismatchError, match=re.escape("what is saved must be what load makes")):
        fxrank.save(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content


def test_the_dense_twin_has_the_names_and_ties_of_the_model_and_no_numbers():
    small = fxrank.factorize(Words(), X, rank={"table": 4, "attention.in_proj_weight": 4, "gru.weight_hh_l0": 4})
    before = {name: id(value) for name, value in small.state_dict(keep_vars=True).items()}
    twin, dense = dense_twin(small), Words()
    names = {name: tuple(value.shape) for name, value in dense.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in twin.state_dict().items()} == names
    assert all(value.is_meta for value in twin.state_dict().values())
    assert twin.head.weight is twin.table.weight and type(twin.gru) is nn.GRU
    assert {name: id(value) for name, value in small.state_dict(keep_vars=True).items()} == before
