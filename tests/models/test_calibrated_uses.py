"""One-shot factorization with data of weights that are used in more than one way, or in a library's own way."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rolled import LowRankRolledLinear, RolledLinear, RolledNet
from torch import nn

import fxrank
from fxrank.passes.pairs.registry import PAIRS

pytestmark = pytest.mark.filterwarnings("ignore:ranks at or above break-even")


class Tied(nn.Module):
    """A table that is the head too, in each of the ways that models do it."""

    def __init__(self, way, vocabulary=40, width=12):
        super().__init__()
        self.way = way
        self.table, self.inner = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        if way == "layer":
            self.head = nn.Linear(width, vocabulary, bias=False)
            self.head.weight = self.table.weight
        if way == "biased":
            self.head = nn.Linear(width, vocabulary)
            self.head.weight = self.table.weight

    def forward(self, tokens, attention_mask=None):
        x = torch.tanh(self.inner(self.table(tokens)))
        if self.way in ("layer", "biased"):
            return self.head(x)
        if self.way == "read":
            return F.linear(x, self.table.weight)
        if self.way == "cast":
            return F.linear(x.double(), self.table.weight.double()).float()
        return x @ self.table.weight.t()


WAYS = ["layer", "biased", "read", "cast", "transposed"]


def tied(way, seed=0):
    torch.manual_seed(seed)
    model = Tied(way).eval()
    with torch.no_grad():
        model.table.weight.mul_(2.0 ** (-torch.arange(12) / 3))
    often = (torch.rand(16, 10) ** 3 * 40).long()
    return model, often


def outputs(model, tokens, weight):
    """What the table gives, and the head without its bias, with another weight in the place of it."""
    rows = model.table.weight[tokens]
    hidden = torch.tanh(model.inner(rows))
    return weight[tokens], hidden @ weight.mT


def summed(model, tokens, weight):
    """The root of the mean squared relative error of both."""
    with torch.no_grad():
        pairs = list(zip(outputs(model, tokens, model.table.weight), outputs(model, tokens, weight), strict=True))
        return float(sum((off - whole).square().sum() / whole.square().sum() for whole, off in pairs) / 2) ** 0.5


@pytest.mark.parametrize("way", WAYS)
def test_one_pair_serves_a_table_and_the_head_that_it_is(way):
    for seed in range(3):
        model, tokens = tied(way, seed)
        small = fxrank.factorize(model, tokens, rank=3, include="*", calibration=[tokens[:9], tokens[9:]])
        plain = fxrank.factorize(model, tokens, rank=3, include="*")
        decision = fxrank.plan_of(small).layer("table")
        assert decision.reason == "rank 3 as given"
        known, own = (fxrank.merge(m).table.weight for m in (small, plain))
        error = summed(model, tokens, known)
        assert decision.output_error == pytest.approx(error, abs=1e-4)  # float32
        assert error < 0.97 * summed(model, tokens, own)
        full = fxrank.factorize(model, tokens, rank=12, include="*", calibration=[tokens])
        with torch.no_grad():
            torch.testing.assert_close(full(tokens), model(tokens), rtol=1e-4, atol=1e-5)
        if way in ("layer", "biased"):
            assert small.table.v.weight is small.head.v.weight and small.table.u.weight is small.head.u.weight


def test_a_table_that_is_called_and_looked_up_elsewhere_knows_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)

        def forward(self, tokens):
            return self.inner(self.table(tokens % 5)) + F.embedding(19 - tokens % 3, self.table.weight)

    torch.manual_seed(0)
    model, tokens = Twice().double(), torch.arange(30).reshape(3, 10)
    small = fxrank.factorize(model, tokens, 4, include="*", calibration=[tokens])
    decision, table = fxrank.plan_of(small).layer("table"), model.table.weight.detach()
    looked_up = torch.cat([tokens.flatten() % 5, 19 - tokens.flatten() % 3])
    sigma = torch.linalg.svdvals(table[looked_up])
    assert decision.reason == "rank 4 as given"
    assert decision.output_error == pytest.approx(float(sigma[4:].norm() / sigma.norm()), abs=2e-6)


def test_rows_that_are_padding_count_neither_in_the_table_nor_in_the_head():
    model, tokens = tied("layer")
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    other = torch.where(mask == 1, tokens, 39 - tokens)

    def weight(batch):
        small = fxrank.factorize(model, {"tokens": tokens}, rank=3, include="*", calibration=[batch])
        return fxrank.merge(small).table.weight

    known = weight({"tokens": tokens, "attention_mask": mask})
    torch.testing.assert_close(known, weight({"tokens": other, "attention_mask": mask}))
    assert not torch.allclose(known, weight({"tokens": tokens}), atol=1e-3)


def test_a_tied_table_keeps_within_a_budget_and_its_plan_repeats_the_call():
    model, tokens = tied("layer")
    small = fxrank.factorize(model, tokens, target_params=0.6, include="*", calibration=[tokens])
    plan = fxrank.plan_of(small)
    assert plan.layer("table").factorized and plan.budget.reached <= 0.6
    again = fxrank.factorize(model, tokens, rank=plan, calibration=[tokens])
    assert fxrank.plan_of(again) == plan
    earlier = replace(plan.layer("table"), output_error=None, reason="given; factors of the weight alone: no formula")
    known = fxrank.factorize(model, tokens, rank=plan.with_layers([earlier]), calibration=[tokens])
    assert fxrank.plan_of(known).layer("table") == replace(plan.layer("table"), reason="given")
    assert torch.equal(again.table.v.weight, small.table.v.weight)


class CalledAndRead(nn.Module):
    def __init__(self, narrow):
        super().__init__()
        self.first, self.layer = nn.Linear(6, 12), nn.Linear(12, 5) if narrow else nn.Linear(12, 20)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.layer(x), F.linear(x.flip(-1) * 3 + 1, self.layer.weight[:4]), F.linear(x + 2, self.layer.weight)


@pytest.mark.parametrize("narrow", [True, False])
def test_a_layer_that_is_called_and_read_knows_all_its_products(narrow):
    torch.manual_seed(0)
    model, x = CalledAndRead(narrow).double(), torch.randn(40, 6).double()
    small = fxrank.factorize(model, x, 2, include="*", calibration=[x[:30], x[30:]])
    plain = fxrank.factorize(model, x, 2, include="*")
    decision = fxrank.plan_of(small).layer("layer")
    assert decision.reason == "rank 2 as given" and not decision.gains_bias
    assert torch.equal(small.layer.bias, model.layer.bias)  # it could serve one product only
    hidden = torch.tanh(model.first(x)).detach()

    def squared(w):
        products = (hidden @ w.mT, (hidden.flip(-1) * 3 + 1) @ w[:4].mT, (hidden + 2) @ w.mT)
        return sum(float(out.square().sum()) for out in products)

    weight = model.layer.weight.detach()
    off, own = (squared(weight - fxrank.merge(m).layer.weight.detach()) for m in (small, plain))
    assert decision.output_error == pytest.approx((off / squared(weight)) ** 0.5, abs=2e-6)
    assert off < 0.9 * own


def test_what_no_formula_serves_says_so():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(6, 8, 3)
            self.kernel = self.conv.weight

        def forward(self, x):
            return self.conv(x) + F.conv1d(x, self.kernel)

    model, x = Shared(), torch.randn(2, 6, 9)
    small = fxrank.factorize(model, x, 2, include="*", calibration=[x])
    said = "rank 2 as given; factors of the weight alone: its weight is shared with a layer of another kind, and no formula has the least error of both"
    assert fxrank.plan_of(small).layer("conv").reason == said


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, y):
        return self.m(x, y, y, need_weights=False)[0]


def test_queries_of_one_tensor_and_keys_of_another_have_one_joint_pair_all_the_same():
    torch.manual_seed(0)
    model = Cross().double().eval()
    x, y = (torch.randn(6, n, 8).double() @ torch.randn(8, 8).double() for n in (5, 7))
    small = fxrank.factorize(model, (x, y), 3, include="*", calibration=[((x, y), None)])
    plain = fxrank.factorize(model, (x, y), 3, include="*")
    decision = fxrank.plan_of(small).layer("m.in_proj_weight")
    assert "weight alone" not in decision.reason

    def squared(w):
        return float((x @ w[:8].mT).square().sum() + (y @ w[8:].mT).square().sum())

    weight = model.m.in_proj_weight.detach()
    off, own = (squared(weight - fxrank.merge(m).m.in_proj_weight.detach()) for m in (small, plain))
    assert decision.output_error == pytest.approx((off / squared(weight)) ** 0.5, abs=2e-6)
    assert off < 0.6 * own


def gpt2(seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval(), torch.randint(60, (6, 12))


def test_the_layers_of_gpt2_lose_the_least_that_a_pair_can():
    model, tokens = gpt2()
    options = {"include": "*", "calibration": [{"input_ids": tokens[:3]}, {"input_ids": tokens[3:]}]}
    small = fxrank.factorize(model, {"input_ids": tokens}, 4, **options)
    for decision in fxrank.plan_of(small).layers:
        assert decision.reason == "rank 4 as given" and decision.output_error is not None, decision.name
    dense, seen = dict(fxrank.merge(small).named_parameters()), {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
        for name, x in seen.items():
            w = model.get_submodule(name).weight
            least = torch.linalg.svdvals((x @ w).flatten(0, -2).double())
            off = float((x @ (w - dense[f"{name}.weight"])).norm())
            assert off == pytest.approx(float(least[4:].norm()), rel=1e-3), name  # no pair of this rank loses less
            error = fxrank.plan_of(small).layer(f"{name}.weight").output_error
            assert error == pytest.approx(off / float(least.norm()), abs=1e-4)


def test_a_pair_of_ones_own_watches_nothing_unless_it_says_what_and_the_plan_says_so():
    fxrank.register_pair(RolledLinear, LowRankRolledLinear)
    try:
        small = fxrank.factorize(RolledNet(), x := torch.randn(3, 12), 2, include="*", calibration=[x])
    finally:
        del PAIRS[RolledLinear]
    said = "rank 2 as given; factors of the weight alone: channel pairs of rolled_linear have none that know data"
    assert {d.reason for d in fxrank.plan_of(small).layers} == {said}
