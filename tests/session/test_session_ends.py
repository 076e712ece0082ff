"""`LowRankSession` where something else has happened in between: another dtype, another session, too many steps, no pair,
pruning.
"""

import pkgutil
import re

import pytest
import torch
from nets import SOON, ConvNet, attach, images, mlp, settings_of, sgd, snapshot, train
from torch import nn
from torch.nn.utils import prune

import fxrank


def test_a_model_that_changes_its_dtype_after_attaching_is_calibrated_in_it():
    model, (x, y) = ConvNet(), images()
    optimizer = sgd(model)
    policy = fxrank.Pufferfish(E=2, ratio=0.25, extra_bn=True)
    session = attach(model, optimizer, policy, x, steps_per_epoch=1)
    model.double()
    losses = train(model, optimizer, 6, (x.double(), y))
    assert session.finish().R == {"conv2": 2, "conv3": 4}
    assert model.conv2.norm.weight.dtype == torch.float64 and losses[-1] < losses[0]


def test_a_layer_that_another_session_has_switched_is_named():
    model, batch = ConvNet(), images()
    policy = fxrank.Pufferfish(E=2, ratio=0.25)
    optimizers = [sgd(model), sgd(model)]
    for optimizer in optimizers:
        attach(model, optimizer, policy, batch[0], steps_per_epoch=1)
    with pytest.warns(UserWarning, match="another one, SGD, with parameters of it does"):
        train(model, optimizers[0], 2, batch)
    with pytest.raises(
        fxrank.PlanMismatchError, match="a layer must be dense until its own session switches it; 'conv2' is"
    ):
        train(model, optimizers[1], 2, batch)


def test_a_run_without_any_pair_is_saved_like_any_other(tmp_path):
    model, batch = ConvNet(), images()
    optimizer = sgd(model)
    session = attach(model, optimizer, fxrank.FullRank(), batch[0])
    train(model, optimizer, 3, batch)
    assert session.finish() is fxrank.plan_of(model)
    fxrank.save(model, tmp_path)
    again = fxrank.load(ConvNet(1), tmp_path)
    assert torch.equal(again.eval()(batch[0]), model.eval()(batch[0]))


def test_more_steps_than_announced_are_saved_and_gone_on_with():
    model, batch = ConvNet(), images()
    optimizer = sgd(model)
    policy = fxrank.Pufferfish(E=2, ratio=0.25)
    session = attach(model, optimizer, policy, batch[0], total_steps=4, steps_per_epoch=1)
    with pytest.warns(UserWarning, match="this one goes on after 5, and was to have 4"):
        train(model, optimizer, 6, batch)
    state = session.state_dict()
    fresh = ConvNet(1)
    again = attach(fresh, sgd(fresh), policy, batch[0], total_steps=4, steps_per_epoch=1, state=state)
    assert again.clock.step == 6 and again.plan == session.plan


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_pruned_layers_stay_dense_until_their_parts_are_parameters(part):
    model, policy = mlp(), fxrank.Pufferfish(E=2, ratio=0.25)
    prune.l1_unstructured(model[4], part, 0.3)
    optimizer = sgd(model)
    session = attach(model, optimizer, policy, steps_per_epoch=1)
    train(model, optimizer, 3)
    plan = session.finish()
    assert plan.R == {"2": 4} and (getattr(model[4], part) == 0).any()
    assert "its layer's weight or bias is computed, as after" in next(d for d in plan.layers if d.name[0] == "4").reason
    prune.remove(model[4], part)
    optimizer = sgd(model)
    session = attach(model, optimizer, policy, steps_per_epoch=1)
    train(model, optimizer, 3)
    assert session.finish().R == {"4": 4}


class Parts(nn.Module):
    """`(N, 5, 8)` to `(N, 3)`, through attention and an LSTM."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.attention, self.lstm = nn.MultiheadAttention(16, 2, batch_first=True), nn.LSTM(16, 16, batch_first=True)

    def forward(self, x):
        x = self.first(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.last(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("name", ["attention.in_proj_weight", "attention.out_proj.weight", "lstm.weight_hh_l0"])
def test_pruned_weights_of_attention_and_recurrent_layers_stay_dense(name):
    model, x = Parts(), torch.randn(4, 5, 8)
    owner, _, attribute = name.rpartition(".")
    prune.l1_unstructured(model.get_submodule(owner), attribute, 0.3)
    optimizer = sgd(model)
    session = attach(model, optimizer, fxrank.Pufferfish(E=2, K=0, ratio=0.25), x, steps_per_epoch=1)
    if (
        "out_proj" not in name
    ):  # attention does not call that layer, and so not the hook that prunes: torch cannot train it
        train(model, optimizer, 2, (x, torch.arange(4) % 3))
    else:
        optimizer.step()
        optimizer.step()
    plan = session.finish()
    names = {"attention.in_proj_weight", "attention.out_proj", "lstm.weight_ih_l0", "lstm.weight_hh_l0"}
    assert {*plan.R} == names - {name.removesuffix(".weight")}
    assert "its layer's weight or bias is computed" in plan.layer(f"{name}_orig").reason


@pytest.mark.parametrize("policy", [SOON, fxrank.Pufferfish(E=2, ratio=0.25)], ids=["watched", "unwatched"])
def test_a_layer_that_is_pruned_before_the_switch_is_named_and_nothing_is_changed(policy):
    model = mlp()
    optimizer = sgd(model)
    attach(model, optimizer, policy, total_steps=4, steps_per_epoch=1)
    train(model, optimizer, 1)
    prune.l1_unstructured(model[4], "weight", 0.3)
    before = snapshot(model)["types"]
    text = "a layer must hold the parameters that its pair replaces; the weight of '4' is none, as after pruning."
    with pytest.raises(fxrank.PlanMismatchError, match=re.escape(text)):
        train(model, optimizer, 3)
    assert snapshot(model)["types"] == before and type(model[2]) is nn.Linear


@pytest.mark.parametrize(
    "where", ["fxrank.session.switch.swap_parameters", "fxrank.passes.rewriting.install.follow_change"]
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_switch_that_breaks_off_half_way_is_not_trained_on_with(where, error, monkeypatch):
    model, policy = mlp(), fxrank.Pufferfish(E=2, ratio=0.25)
    optimizer = sgd(model)
    session = attach(model, optimizer, policy, steps_per_epoch=1)
    train(model, optimizer, 1)
    real, calls = pkgutil.resolve_name(where), []

    def breaks(*args):
        calls.append(args)
        if len(calls) == (1 if "swap" in where else 2):
            raise error
        return real(*args)

    monkeypatch.setattr(where, breaks)
    with pytest.raises(error):
        train(model, optimizer, 1)
    text = f"a switch must be made whole; the one after step 2 broke off with {error.__name__}, and some of the optimizer's parameters"
    before = [p.detach().clone() for p in model.parameters()]
    for go_on in (lambda: train(model, optimizer, 1), session.state_dict, session.finish):
        with pytest.raises(RuntimeError, match=text):
            go_on()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_switch_that_breaks_off_before_anything_is_changed_is_tried_again(monkeypatch):
    model, policy = mlp(), fxrank.Pufferfish(E=2, ratio=0.25)
    optimizer = sgd(model)
    session = attach(model, optimizer, policy, steps_per_epoch=1)
    with monkeypatch.context() as patched:
        patched.setattr("fxrank.switch.apply_plan.install_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, 2)
    train(model, optimizer, 2)
    assert session.finish().R == {"2": 4, "4": 4} and session.plan.switch_step == 3
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}


def test_an_attach_that_fails_leaves_no_hooks():
    def interrupted(event, session):
        raise KeyboardInterrupt

    model = mlp()
    optimizer = sgd(model)
    settings = settings_of(optimizer)
    with pytest.raises(KeyboardInterrupt):
        attach(model, optimizer, fxrank.SpectralInit(ratio=0.25), listener=interrupted)
    assert settings_of(optimizer) == settings and type(model[2]) is nn.Linear
