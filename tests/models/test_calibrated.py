"""One-shot factorization with data and under budgets, as a user calls it."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxrank
from fxrank.passes.errors import BudgetError, CalibrationError


class Net(nn.Module):
    """Convolutions before BatchNorm and before nothing, grouped and pointwise ones, an embedding, a wide and a fused projection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.grouped, self.bare = nn.Conv2d(24, 24, 3, groups=2), nn.Conv2d(24, 16, 1, bias=False)
        self.wide, self.fused, self.head = nn.Linear(16, 64), nn.Linear(64, 192, bias=False), nn.Linear(192, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.conv(x)))
        x = self.bare(torch.relu(self.grouped(x) + 1))
        x = torch.relu(self.wide(x.mean((2, 3))))
        return self.head(torch.relu(self.fused(x)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = Net().train()
    for _ in range(3):
        net(images(16))
    return net.eval()


def images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 3, 3, generator=generator)
    return nn.functional.interpolate(coarse, size=(9, 9), mode="bilinear") + 0.3


@pytest.fixture(scope="module")
def loader():
    data = TensorDataset(images(32, 1), torch.zeros(32, dtype=torch.long))
    return DataLoader(data, 16, shuffle=True)


def off(small, model, x):
    with torch.no_grad():
        return float((small(x) - model(x)).norm() / model(x).norm())


@pytest.mark.parametrize("form", ["channel", "spatial", "qkv", "gauge", "auto"])
def test_outputs_differ_less_than_with_factors_of_the_weights(model, loader, form):
    x = images(64, 2)
    plain = fxrank.factorize(model, x[:2], form=form)
    known = fxrank.factorize(model, x[:2], form=form, calibration=loader, recalibrate=False)
    assert off(known, model, x) < 0.8 * off(plain, model, x)
    plan = fxrank.plan_of(known)
    assert plan.calibration_batches == 2
    assert all(0 < d.output_error < 1 for d in plan.layers if d.factorized)
    assert "output error" in str(plan)
    assert "output error" not in str(fxrank.plan_of(plain))


@pytest.mark.filterwarnings("ignore:ranks at or above break-even")
@pytest.mark.parametrize("form", ["channel", "spatial", "qkv", "gauge"])
def test_full_rank_is_exact_and_what_was_gained_is_saved_merged_and_exported(model, loader, form, tmp_path):
    x = images(4, 3)
    full = fxrank.factorize(model, x, rank=1.0, include="*", form=form, calibration=loader, recalibrate=False)
    assert off(full, model, x) < 1e-5
    small = fxrank.factorize(model, x, rank=0.2, form=form, calibration=loader)
    with torch.no_grad():
        expected = small(x)
    fxrank.save(small, tmp_path)
    assert torch.equal(fxrank.load(copy.deepcopy(model), tmp_path).eval()(x), expected)
    torch.testing.assert_close(fxrank.merge(small)(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.export.export(small, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_bias_is_gained_where_the_mean_would_be_lost_and_no_batchnorm_takes_it_out(model, loader):
    x = images(2)
    small = fxrank.factorize(model, x, rank=2, calibration=loader)
    gains = {d.name for d in fxrank.plan_of(small).layers if d.gains_bias}
    assert "bare" in gains
    assert "conv" not in gains  # a BatchNorm follows
    assert small.bare.bias is not None
    assert small.conv.bias is None
    kept = fxrank.factorize(model, x, rank=2, calibration=loader, recalibrate=False)
    assert kept.conv.bias is not None
    assert torch.equal(kept.norm.running_mean, model.norm.running_mean)
    assert not torch.equal(small.norm.running_mean, model.norm.running_mean)


@pytest.mark.parametrize("asked", [{"target_params": 0.5}, {"keep": 0.5}, {"rank": 0.5}], ids=str)
def test_the_original_is_untouched_and_nothing_is_drawn(model, loader, asked):
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fxrank.factorize(model, images(2), **asked, calibration=loader, form="auto")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("form", ["channel", "auto"])
@pytest.mark.parametrize("data", [False, True])
def test_targets_are_met_as_nearly_as_whole_ranks_allow(model, loader, form, data):
    options = {"form": form, "include": "*", "calibration": loader if data else None}
    total = sum(p.numel() for p in model.parameters())
    for target in (0.3, 0.5, 0.8):
        small = fxrank.factorize(model, images(2), target_params=target, **options)
        share = sum(p.numel() for p in small.parameters()) / total
        budget = fxrank.plan_of(small).budget
        assert (
            0.99 * target <= share <= target
            or "no ranks that are worth their cost come nearer" in fxrank.plan_of(small).note
        )
        assert budget.reached == pytest.approx(share)
        small = fxrank.factorize(model, images(2), target_macs=target, **options)
        layers = fxrank.plan_of(small).layers
        macs = sum(d.macs if d.pair_macs is None else d.pair_macs for d in layers) / sum(d.macs for d in layers)
        assert target - 0.02 <= macs <= target
        assert fxrank.plan_of(small).budget == fxrank.Budget("macs", target, macs)
    with pytest.raises(BudgetError, match=r"target_params must be at least 0\.\d+ here"):
        fxrank.factorize(model, images(2), target_params=0.01, **options)


def test_a_plan_repeats_a_call(model, loader, tmp_path):
    x = images(4)
    small = fxrank.factorize(model, x, target_params=0.5, calibration=loader, form="auto")
    fxrank.plan_of(small).save(tmp_path / "plan.json")
    plan = fxrank.Plan.load(tmp_path / "plan.json")
    assert plan == fxrank.plan_of(small)
    again = fxrank.factorize(model, x, rank=plan, calibration=loader)
    assert fxrank.plan_of(again) == plan
    torch.testing.assert_close(again(x), small(x), rtol=1e-4, atol=1e-5)
    without = fxrank.factorize(model, x, rank=plan)
    assert {n: t.shape for n, t in without.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}


class Odd(nn.Module):
    """Layers of many kinds, and one that calibration cannot look into."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.attention, self.up = (
            nn.MultiheadAttention(16, 2, batch_first=True),
            nn.ConvTranspose1d(16, 16, 3, padding=1),
        )
        self.halves = nn.Parameter(torch.randn(2, 16, 16) / 4)
        self.raw, self.head = nn.Parameter(torch.randn(16, 16) / 4), nn.Linear(16, 50)
        self.first = nn.Linear(16, 16)

    def forward(self, tokens):
        x = self.first(self.table(tokens))
        x = x + self.attention(x, x, x)[0]
        x = x @ self.halves[1] + torch.cat([x @ half for half in self.halves[0].chunk(2, 1)], -1)
        return self.head(self.up((x @ self.raw).transpose(1, 2)).transpose(1, 2))


def test_the_reason_says_whose_factors_are_of_the_weight_alone():
    torch.manual_seed(0)
    model, tokens = Odd().eval(), torch.randint(50, (4, 6))
    small = fxrank.factorize(model, tokens, rank=4, include="*", calibration=[tokens, tokens])
    plan = {d.name: d for d in fxrank.plan_of(small).layers if d.factorized}
    blind = {name: d.reason.partition("alone: ")[2] for name, d in plan.items() if "weight alone" in d.reason}
    assert blind == {
        "halves": "a part of it is multiplied that is no block of rows and columns",
    }
    assert {name for name, d in plan.items() if d.output_error is not None} == plan.keys() - blind.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    x = torch.randn(64, 8, dtype=dtype)
    small = fxrank.factorize(model, x, rank=4, calibration=[x])
    plain = fxrank.factorize(model, x, rank=4)
    assert off(small, model, x) < off(plain, model, x)
    assert {p.dtype for p in small.parameters()} == {dtype}


def test_batches_of_every_form_are_taken(model):
    x = images(8)
    expected = fxrank.factorize(model, x, rank=3, calibration=[x])
    for batch in ((x, torch.zeros(8)), [x], {"x": x}):
        small = fxrank.factorize(model, x, rank=3, calibration=[batch])
        assert all(torch.equal(t, expected.state_dict()[n]) for n, t in small.state_dict().items())
    one = fxrank.factorize(model, x, rank=3, calibration=[x, 5 * x], calibration_batches=1)
    assert fxrank.plan_of(one).calibration_batches == 1
    assert torch.equal(one.wide.u.weight, expected.wide.u.weight)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"calibration": []}, CalibrationError, "calibration must yield at least one batch; it is empty"),
        ({"calibration": iter([1])}, TypeError, "iterable again; got a one-pass list_iterator"),
        ({"calibration": torch.zeros(2, 3, 9, 9)}, TypeError, "A batch alone goes into a list: [batch]."),
        ({"calibration": [torch.zeros(2, 3, 9, 9)], "calibration_batches": 0}, ValueError, "above 0; got 0"),
        ({"calibration": [torch.full((2, 3, 9, 9), torch.nan)]}, CalibrationError, "the outputs of 'conv' hold"),
        ({"rank": 2, "target_params": 0.5}, ValueError, "got target_params=0.5 and rank=. Leave all but one out."),
        ({"target_macs": 0.5, "target_params": 0.5}, ValueError, "got target_params=0.5 and target_macs=0.5."),
        ({"target_params": True}, TypeError, "target_params is a number in (0, 1]; got bool."),
        ({"target_params": 0.0}, ValueError, "target_params is a share in (0, 1]; got 0.0."),
        ({"target_macs": float("nan")}, ValueError, "target_macs is a share in (0, 1]; got nan."),
        ({"form": "best"}, ValueError, "form must be one of"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(model, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fxrank.factorize(model, images(2), **options)


class Raw(nn.Module):
    """Nothing of it is a layer that calibration sees."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.tanh(x @ self.a) @ self.b


def test_raw_parameters_know_the_data_and_need_some():
    torch.manual_seed(0)
    model, x = Raw(), torch.randn(4, 8)
    small = fxrank.factorize(model, x, rank=2, include="*", calibration=[x])
    plan = fxrank.plan_of(small)
    assert plan.calibration_batches == 1
    assert {d.reason for d in plan.layers} == {"rank 2 as given"}
    assert all(d.output_error is not None for d in plan.layers)
    again = fxrank.factorize(model, x, rank=plan, calibration=[x])  # the reason does not grow
    assert fxrank.plan_of(again) == plan
    with pytest.raises(CalibrationError, match="it is empty"):
        fxrank.factorize(model, x, rank=2, include="*", calibration=[])


def test_a_plan_decides_which_biases_are_gained_whatever_other_data_say(model, loader):
    x = images(4)
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=2, calibration=loader))
    gains = {d.name for d in plan.layers if d.gains_bias}
    other = [images(16, 7) - 0.3, -images(16, 8)]
    for turned in (plan, plan.with_layers(replace(d, gains_bias=False) for d in plan.layers)):
        small = fxrank.factorize(model, x, rank=turned, calibration=other)
        assert {n for n in gains if small.get_submodule(n).bias is not None} == {
            n for n in gains if turned.layer(n).gains_bias
        }
        assert {d.name for d in fxrank.plan_of(small).layers if d.gains_bias} == {
            d.name for d in turned.layers if d.gains_bias
        }


def test_what_could_not_be_tried_is_in_the_plan(monkeypatch):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) * isinstance(self.layer, nn.Linear)

    def fails(model, instead=None):
        raise RuntimeError("odd")

    model, x = nn.Sequential(nn.Linear(8, 8), Asks(), nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    monkeypatch.setattr("fxrank.switch.trial._twin", fails)
    text = "not tried with pairs in it: a copy of the model fails with RuntimeError: odd"
    assert fxrank.plan_of(fxrank.factorize(model, x, rank={"2": 2})).note == text
    assert text in str(fxrank.profile(model, x))
