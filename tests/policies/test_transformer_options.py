"""What the papers do with Transformers: their rank rule, forms of fused projections, layers frozen at the switch."""

import re

import pytest
import torch
import torch.nn.functional as F
from nets import mlp, vectors
from torch import nn

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.spectra.exact import truncation_error
from fxrank.passes.tracing.trace import trace
from fxrank.policies.forms import in_best_form
from fxrank.switch.freeze import frozen_names


class Block(nn.Module):
    """`(N, T, 12)` to `(N, T, 4)`: attention with a fused projection, then a feed-forward layer."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(12, 24)
        self.qkv = nn.Linear(24, 72)
        self.intermediate = nn.Linear(24, 48)
        self.output = nn.Linear(48, 24)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 12).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.output(F.gelu(self.intermediate(x))))


X = torch.randn(4, 5, 12, generator=torch.Generator().manual_seed(0))


def run(policy, model=None, steps=6):
    model = model or Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=steps, steps_per_epoch=1, policy=policy
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model, optimizer, session


def test_the_rule_for_transformers():
    policy = fxrank.Cuttlefish.transformer(xi="random", lr_scale=0.5)
    assert (policy.rank_metric, policy.share, policy.xi) == ("max_scaled_accumulative", 0.8, "random")
    assert policy.lr_scale == 0.5
    assert fxrank.Cuttlefish.transformer().lr_scale == pytest.approx(1 / 3)


# -- forms


def layer_of(model, name):
    return next(a for a in discover(trace(model, X), model) if a.name == name)


def test_a_fused_projection_takes_the_form_that_loses_less_at_the_same_size():
    model = Block()
    layer = layer_of(model, "qkv")
    assert (layer.form, layer.other_forms) == ("channel", ("qkv", "gauge"))
    found = {}
    for form in ("channel", "qkv", "gauge", "auto"):
        chosen, rank, spectrum = in_best_form(layer, 9, form, model)
        assert chosen.pair_parameters(rank) <= layer.pair_parameters(9)
        found[form] = truncation_error(spectrum.sigma, rank)
        assert chosen.form == (form if form != "auto" else chosen.form)
    assert found["auto"] == min(found["channel"], found["qkv"])  # gauge pairs are for who asks for them
    assert found["gauge"] < found["channel"]
    with torch.no_grad():  # three matrices of rank 2 in directions of their own: three pairs are exact
        model.qkv.weight.copy_(torch.cat([torch.randn(24, 2) @ torch.randn(2, 24) for _ in range(3)]))
    chosen, rank, spectrum = in_best_form(layer, 3, fxrank.Cuttlefish().form, model)
    assert (chosen.form, rank) == ("qkv", 2)
    assert truncation_error(spectrum.sigma, rank) < 1e-3  # a spectrum's tail is known to the root of float32's rounding
    with torch.no_grad():  # one space for all: one pair is exact, and three are wasteful
        model.qkv.weight.copy_(torch.randn(72, 3) @ torch.randn(3, 24))
    chosen, rank, spectrum = in_best_form(layer, 3, fxrank.Cuttlefish().form, model)
    assert (chosen.form, rank) == ("channel", 3)


@pytest.mark.parametrize("form", ["channel", "qkv"])
def test_a_form_asked_for_is_installed_and_trains(form):
    model, _, session = run(fxrank.Pufferfish(E=2, K=0, ratio=0.25, form=form))
    assert session.plan.layer("qkv").form == form
    assert session.plan.layer("intermediate").form == "channel"
    again = fxrank.merge(model)
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=1e-5)  # float32


def test_unknown_forms_are_refused():
    with pytest.raises(
        ValueError,
        match=re.escape("form must be one of 'auto', 'channel', 'gauge', 'qkv', 'spatial', 'stack'; got 'head'."),
    ):
        fxrank.Cuttlefish(form="head")


# -- freezing


@pytest.mark.parametrize("globs", [("intermediate.*", "output.*"), ("intermediate.weight", "output.weight")])
@pytest.mark.parametrize("factorized", [True, False])
def test_named_layers_stop_training_at_the_switch(globs, factorized):
    exclude = () if factorized else ("intermediate", "output")
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    policy = fxrank.Pufferfish(E=3, K=0, ratio=0.25, freeze=globs)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=6, steps_per_epoch=1, policy=policy, exclude=exclude
    )
    history = []
    for _ in range(6):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        history.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert session.plan.R.keys() == ({"qkv", "intermediate", "output"} if factorized else {"qkv"})
    still = {n for n in history[3] if torch.equal(history[3][n], history[5][n])}
    expected = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert still == expected == set(frozen_names(model, globs))
    assert not torch.equal(history[0]["intermediate.weight"], history[1]["intermediate.weight"])
    names = ["u.weight", "v.weight"] if factorized else ["weight"]
    names += ["v.bias" if factorized else "bias"] if globs[0].endswith("*") else []
    assert still == {f"{layer}.{n}" for layer in ("intermediate", "output") for n in names}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert f"frozen after the switch: {len(still)} parameters ({', '.join(globs)})" in session.notes


def test_what_freeze_refuses():
    with pytest.raises(
        ValueError, match=re.escape("each glob in freeze must match a parameter; 'ffn.*' matches none of 10.")
    ):
        run(fxrank.Pufferfish(E=1, freeze=("ffn.*",)))
    text = "freeze takes a tuple of globs of parameter names; got the string 'ffn.*'. Write ('ffn.*',)."
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        fxrank.Pufferfish(E=1, freeze="ffn.*")


def test_a_raw_parameter_is_frozen_by_its_own_name():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
            self.w = nn.Parameter(torch.randn(16, 16) / 4)

        def forward(self, x):
            return self.head(torch.tanh(self.stem(x) @ self.w))

    model, _, session = run(fxrank.Pufferfish(E=0, K=0, ratio=0.25, freeze=("w",)), Raw())
    assert session.plan.R == {"w": 4}
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"w.u.weight", "w.v.weight"}


# -- waiting


def test_a_run_that_never_saves_waits_for_its_deadline():
    """Ranks that hardly move are flat from the start: E comes from the deadline, and the plan says why nothing is done."""
    model, data = mlp(), vectors()
    policy = fxrank.Cuttlefish(speedup_threshold=None, window=2, epsilon=50.0, min_ratio=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=data[0], total_steps=20, policy=policy)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    with pytest.warns(fxrank.NothingFactorizedWarning, match=re.escape("deadline at 0.75 of the run")):
        session.finish()
    assert session.plan.switch_step == 15
