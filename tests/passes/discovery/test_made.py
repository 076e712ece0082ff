"""What a plan counts is what torch counts while the model runs, dense and with pairs, and what is timed is the model's own product."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.profiling.timing import Profiler
from fxrank.passes.tracing.compare import largest_difference
from fxrank.passes.tracing.trace import trace

pytestmark = pytest.mark.filterwarnings("ignore:ranks at or above break-even")


class Uses(nn.Module):
    """A raw parameter, and nothing else that multiplies."""

    def __init__(self, shape, use):
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(shape)), use

    def forward(self, x):
        return self.use(x.tanh(), self.w)


SAVING = {
    "linear": ((3, 5, 8), (12, 8), lambda x, w: F.linear(x, w)),
    "matmul": ((3, 5, 8), (8, 12), lambda x, w: x @ w),
    "left": ((8, 5), (12, 8), lambda x, w: torch.matmul(w, x)),
    "transposed view": ((5, 8), (12, 8), lambda x, w: x @ w.t()),
    "addmm": ((5, 8), (8, 12), lambda x, w: torch.addmm(x.sum(), x, w)),
    "einsum": ((3, 5, 8), (12, 8), lambda x, w: torch.einsum("bti,oi->bto", x, w)),
    "einsum, transposed output": ((3, 5, 8), (8, 12), lambda x, w: torch.einsum("bti,io->obt", x, w)),
    "einsum, sum of the other": ((3, 5, 8), (8, 12), lambda x, w: torch.einsum("bti,io->bo", x, w)),
    "einsum, experts": ((4, 5, 8), (4, 8, 12), lambda x, w: torch.einsum("eti,eio->eto", x, w)),
    "einsum, all experts": ((5, 8), (4, 12, 8), lambda x, w: torch.einsum("ti,eoi->teo", x, w)),
    "einsum, sum of experts": ((5, 8), (4, 12, 8), lambda x, w: torch.einsum("ti,eoi->to", x, w)),
    "einsum, weight first": ((3, 5, 8), (12, 8), lambda x, w: torch.einsum("oi,bti->bto", w, x)),
    "einsum, heads": ((3, 5, 8), (2, 8, 6), lambda x, w: torch.einsum("btd,hdk->bthk", x, w)),
    "einsum, out of heads": ((3, 2, 5, 6), (2, 6, 8), lambda x, w: torch.einsum("bhtk,hkd->btd", x, w)),
    "einsum of a list": ((5, 8), (12, 8), lambda x, w: torch.einsum("ti, oi -> to", [x, w])),
    "bmm": ((4, 5, 8), (4, 8, 12), lambda x, w: torch.bmm(x, w)),
    "broadcast stack": ((2, 1, 5, 8), (4, 8, 12), lambda x, w: x @ w),
    "stack, transposed": ((4, 5, 8), (4, 12, 8), lambda x, w: x @ w.mT),
    "one of a stack": ((5, 8), (4, 8, 12), lambda x, w: x @ w[1]),
    "chosen from a stack": ((3, 5, 8), (4, 8, 12), lambda x, w: x @ w[torch.tensor([0, 2, 2])]),
    "halves": ((5, 8), (24, 8), lambda x, w: sum(F.linear(x, half) for half in w.chunk(2))),
    "columns": ((5, 4), (12, 8), lambda x, w: F.linear(x, w[:, :4]) if w.ndim == 3 else F.linear(x, w.t()[:4].t())),
    "twice": ((5, 8), (8, 8), lambda x, w: (x @ w).tanh() @ w),
    "there and back": ((5, 8), (12, 8), lambda x, w: (x @ w.t()) @ w),
    "conv1d": ((2, 4, 9), (12, 4, 3), lambda x, w: F.conv1d(x, w, stride=2)),
    "conv2d": ((2, 4, 9, 9), (12, 4, 3, 3), lambda x, w: F.conv2d(x, w, padding=1)),
    "to its device": ((5, 8), (12, 8), lambda x, w: F.linear(x, w.to(x.device))),
    "table": ((5, 8), (20, 6), lambda x, w: F.embedding(torch.arange(7), w) * x.sum()),
}
WHOLE = {
    "mixed": ((5, 4), (4, 8, 12), lambda x, w: torch.einsum("bn,nij->bij", x, w)),
    "mixed, other order": ((5, 4), (4, 8, 12), lambda x, w: torch.einsum("nij,bn->bji", w, x)),
    "mixed, in a list": ((5, 4), (4, 8, 12), lambda x, w: torch.einsum("bn,nij->bij", [x, w])),
    "heads in the middle": ((5, 4), (4, 8, 12), lambda x, w: torch.einsum("td,dhk->thk", x, w)),
    "all of it": ((5, 8, 12), (8, 12), lambda x, w: torch.einsum("bio,io->b", x, w)),
    "other stacks": ((8, 5, 4), (4, 8, 12), lambda x, w: torch.bmm(x, w.transpose(0, 1))),
    "of rank four": ((5, 8), (4, 8, 12), lambda x, w: torch.matmul(x, w.permute(2, 1, 0))),
}
READ = {
    "scaled by einsum": ((5, 8), (8, 12), lambda x, w: torch.einsum("bi,io->bio", x, w)),
    "three operands": ((5, 8), (8, 12), lambda x, w: torch.einsum("bi,io,b->bo", x, w, x[:, 0])),
    "an ellipsis": ((3, 5, 8), (8, 12), lambda x, w: torch.einsum("...i,io->...o", x, w)),
    "mixed as rows": ((5, 4), (4, 8, 12), lambda x, w: (x.softmax(-1) @ w.view(4, -1)).view(5, 8, 12)),
    "heads in one": ((5, 4), (4, 8, 12), lambda x, w: x @ w.reshape(4, -1)),
    "tensordot": ((5, 8), (8, 12), lambda x, w: torch.tensordot(x, w, 1)),
    "scaled first": ((5, 8), (8, 12), lambda x, w: x @ (w * 2)),
}


class Summed(nn.Module):
    """A last layer for a tensor of any shape."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(x.sum().expand(4))


def counted(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


def layer_of(model, x):
    (layer,) = [one for one in discover(trace(model, x), model) if one.name == "w"]
    return layer


@pytest.mark.parametrize("name", SAVING)
def test_the_products_of_a_raw_weight_are_counted_as_they_are_made(name):
    shape, size, use = SAVING[name]
    model, x = Uses(size, use), torch.randn(shape)
    layer = layer_of(model, x)
    assert layer.reason is layer.unsaving is None
    assert layer.macs == counted(model, x)
    for rank in (2, 3):  # torch makes no product of rank 1, in an einsum
        small = fxrank.factorize(model, x, rank={"w": rank})
        assert isinstance(small.w, FactorPair)
        decision = fxrank.plan_of(small).layer("w")
        assert (decision.macs, decision.pair_macs) == (counted(model, x), counted(small, x))
    assert layer.pair_macs(1) < layer.macs or name == "table"


@pytest.mark.parametrize("name", WHOLE)
def test_a_weight_that_is_used_as_a_whole_stays_dense_unless_it_is_included(name):
    shape, size, use = WHOLE[name]
    model, x = Uses(size, use), torch.randn(shape)
    layer = layer_of(model, x)
    why = (
        "its matrices are mixed before they multiply"
        if name.startswith(("mixed", "heads"))
        else "it is used as a whole"
    )
    assert layer.reason is None and re.match(rf"{why}, by \w+: the product of its factors", layer.unsaving)
    with pytest.raises(fxrank.NothingToFactorizeError, match=why):
        fxrank.factorize(nn.Sequential(nn.Linear(shape[-1], shape[-1]), model, Summed()), x, rank=0.5)
    with pytest.warns(UserWarning, match=rf"'w' stays dense: {why}"):
        still = fxrank.factorize(model, x, rank={"w": 2})
    assert fxrank.plan_of(still).layer("w").rank is None and why in fxrank.plan_of(still).layer("w").reason
    named = fxrank.factorize(model, x, rank=2, include="w")
    decision = fxrank.plan_of(named).layer("w")
    assert (decision.macs, decision.pair_macs) == (counted(model, x), counted(named, x)) and why in decision.reason
    assert decision.pair_macs >= decision.macs
    full = fxrank.factorize(model, x, rank=1.0, include="w")
    assert largest_difference(model(x), full(x)) < 1e-5  # float32, sums of 96


@pytest.mark.parametrize("name", READ)
def test_a_weight_whose_numbers_are_read_stays_dense(name):
    shape, size, use = READ[name]
    model, x = Uses(size, use), torch.randn(shape)
    layer = layer_of(model, x)
    assert re.match("its numbers are read by|no layer multiplies with it", layer.reason)
    with pytest.raises(ValueError, match="layer 'w' cannot be factorized"):
        fxrank.factorize(model, x, rank={"w": 2})


class Packed(nn.Module):
    """A layer whose weight is read by code of the model's own, as in Swin."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (3, 5, 8), "channel"),
    "fused linear": (lambda: nn.Linear(8, 24), (3, 5, 8), "qkv"),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2), (2, 8, 9), "channel"),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, dilation=2), (2, 8, 9, 9), "channel"),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 9, 9), "channel"),
    "spatial": (lambda: nn.Conv2d(8, 12, (3, 5), stride=(2, 1)), (2, 8, 9, 9), "spatial"),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), (1, 4, 5, 5, 5), "channel"),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2), (2, 8, 5, 5), "channel"),
    "embedding": (lambda: nn.Sequential(nn.Embedding(20, 8)), None, "channel"),
    "packed": (Packed, (3, 5, 8), "channel"),
    "packed in three": (Packed, (3, 5, 8), "qkv"),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0), (3, 5, 8), "channel"),
    "attention in three": (lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0), (3, 5, 8), "qkv"),
}


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_what_a_plan_says_of_layers_of_all_kinds_is_what_torch_counts(name, rank):
    make, shape, form = LAYERS[name]
    model = nn.Sequential(make())
    x = torch.arange(7) if shape is None else torch.randn(shape)
    small = fxrank.factorize(model, x, rank=rank, include="*", form=form)
    decisions = [d for d in fxrank.plan_of(small).layers if d.rank]
    assert decisions
    saved = sum(d.macs - d.pair_macs for d in decisions)
    assert saved == counted(model, x) - counted(small, x)


class Bank(nn.Module):
    """Dynamic weights: a bank of matrices, mixed for each example."""

    def __init__(self):
        super().__init__()
        self.stem, self.route, self.head = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 4)
        self.wide = nn.Linear(32, 32)
        self.bank = nn.Parameter(torch.randn(8, 32, 32) / 6)

    def forward(self, x):
        h = self.wide(torch.relu(self.stem(x)))
        weights = torch.einsum("bn,nij->bij", self.route(h).softmax(-1), self.bank)
        return self.head(torch.relu(torch.bmm(weights, h[:, :, None])[:, :, 0]))


def test_nobody_takes_a_bank_by_himself():
    model, x = Bank(), torch.randn(6, 16)
    profile = fxrank.profile(model, x)
    assert "bank" not in [name for stack in profile.stacks for name in stack.names]
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=4))
    assert plan.layer("bank").rank is None and "mixed before they multiply, by einsum" in plan.layer("bank").reason
    policy = fxrank.Pufferfish(E=0, K=0, ratio=0.1)
    session = fxrank.LowRankSession.attach(
        model, torch.optim.SGD(model.parameters(), 0.1), example_inputs=x, total_steps=4, policy=policy
    )
    assert "wide" in session.plan.R and "bank" not in session.plan.R


def test_what_is_timed_is_the_models_own_product(monkeypatch):
    model, x = Uses((2, 8, 6), lambda x, w: torch.einsum("btd,hdk->bthk", x, w)), torch.randn(3, 5, 8)
    layer = layer_of(model, x)
    asked = []
    einsum = torch.einsum

    def noted(equation, *operands):
        asked.append((equation, tuple(operands[0].shape)))
        return einsum(equation, *operands)

    monkeypatch.setattr(torch, "einsum", noted)
    dense, pair = Profiler(model, torch.device("cpu"), rounds=1).times_ms(layer, [2])
    assert dense > 0 and pair > 0
    # of the pair: two products, the middle is of rank 2
    assert {shape for equation, shape in asked} == {(3, 5, 8), (3, 5, 2, 2)}


def test_layers_that_multiply_alike_are_one_stack():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

        def forward(self, x):
            return torch.einsum("bi,io->bo", torch.einsum("bi,io->bo", x, self.a).tanh(), self.b).tanh() @ self.c

    found = fxrank.profile(Two(), torch.randn(5, 8), include="*")
    assert [stack.names for stack in found.stacks] == [("a", "b"), ("c",)]


def test_the_weights_and_the_random_numbers_are_left_alone():
    model, x = Bank(), torch.randn(6, 16)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    discover(trace(model, x), model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
