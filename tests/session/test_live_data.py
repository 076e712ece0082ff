"""Factors that know the data, at a switch in training: from which calls, how well, and to the same bits whatever the run went through."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from live import DATA, X, Y, attached, run
from nets import SOON, ConvNet, images, mlp, sgd, train, vectors
from teams import team
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxrank
from fxrank.session import attach as attaching
from fxrank.session import live_data

# -- how well


@pytest.mark.parametrize(
    ("make", "batch", "options"),
    [
        (mlp, (X, Y), {}),
        (ConvNet, images(16), {}),
        (ConvNet, images(16), {"form": "spatial"}),
        (ConvNet, images(16), {"extra_bn": True}),
    ],
    ids=["linear", "convolutions", "spatial", "extra_bn"],
)
def test_outputs_differ_less_than_with_factors_of_the_weights(make, batch, options):
    plain, dense = replace(DATA, factors="weight", **options), make()
    train(dense, sgd(dense), 3, batch)
    off = {}
    for policy in (plain, replace(plain, factors="data")):
        model, session, _ = run(policy, make, batch)
        assert set(session.plan.R) == set(run(plain, make, batch)[1].plan.R)
        with torch.no_grad():
            off[policy.factors] = float((model(batch[0]) - dense(batch[0])).norm())
    assert off["data"] < off["weight"]
    plan = session.plan
    assert plan.calibration_batches == 1
    assert all(0 < d.output_error < 1 and not d.gains_bias for d in plan.layers if d.factorized)
    known = len(plan.R)
    assert session.notes == [
        f"factors of {known} of {known} layers know what these saw in 1 call of the model, of the last steps before the switch"
    ]


def test_a_fused_projection_in_thirds():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.fused, self.head = nn.Linear(12, 16), nn.Linear(16, 48), nn.Linear(16, 4)

        def forward(self, x):
            q, k, v = self.fused(torch.relu(self.first(x))).chunk(3, -1)
            return self.head(torch.tanh(q) * k + v)

    _, session, _ = run(replace(DATA, form="qkv"), Fused)
    decision = session.plan.layer("fused")
    assert (decision.form, session.plan.calibration_batches) == ("qkv", 1)
    assert 0 < decision.output_error < 1


def test_until_the_switch_nothing_is_another():
    _, _, losses = run()
    assert losses == run(replace(DATA, factors="weight"))[2]


def test_a_bias_takes_the_lost_mean_and_stays_the_optimizers():
    model = mlp()
    bias, optimizer = model[2].bias, sgd(model)
    attached(model, optimizer=optimizer)
    train(model, optimizer, 2, (X, Y))
    twin = copy.deepcopy(model)
    train(model, optimizer, 1, (X, Y))
    assert model[2].bias is bias
    assert any(p is bias for group in optimizer.param_groups for p in group["params"])
    other = sgd(twin)
    other.load_state_dict(optimizer_state_after(2))
    train(twin, other, 1, (X, Y))
    seen = model[:2](X)
    assert torch.equal(seen, twin[:2](X))
    lost = (model[2](seen) - twin[2](seen)).mean(0)
    assert lost.abs().max() < 1e-6  # rounding of float32
    assert not torch.equal(bias, twin[2].bias)


def optimizer_state_after(steps):
    model = mlp()
    optimizer = sgd(model)
    train(model, optimizer, steps, (X, Y))
    return optimizer.state_dict()


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 4)
        self.mixing = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)) @ self.mixing)


def test_raw_parameters_know_the_data_too():
    decision = run(make=Mixing)[1].plan.layer("mixing")
    assert decision.rank == 4 and decision.output_error > 0
    assert "weight alone" not in decision.reason


class Decoder(nn.Module):
    """A weight that is called and read, and a transposed convolution whose outputs overlap."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.both, self.up = nn.Linear(12, 16), nn.Linear(16, 16), nn.ConvTranspose1d(8, 8, 4, 2, 1)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.tanh(self.both(x)) + (x + 1) @ self.both.weight
        return self.head(self.up(x.unflatten(1, (8, 2))).flatten(1))


def test_weights_of_several_uses_and_outputs_that_overlap_know_the_data_too():
    plan = run(make=Decoder)[1].plan
    assert {"both", "up"} <= set(plan.R)
    for name in ("both", "up"):
        assert plan.layer(name).output_error > 0 and "weight alone" not in plan.layer(name).reason


def test_layers_that_cannot_be_watched_keep_the_factors_of_their_weight():
    class Halves(Mixing):
        def __init__(self):
            super().__init__()
            self.mixing = nn.Parameter(torch.randn(2, 16, 16) / 4)

        def forward(self, x):
            x = torch.relu(self.first(x))
            return self.head(torch.cat([x @ half for half in self.mixing[0].chunk(2, 1)], -1) + x @ self.mixing[1])

    model, session, _ = run(make=Halves)
    plain, _, _ = run(replace(DATA, factors="weight"), Halves)
    decision = session.plan.layer("mixing")
    assert decision.rank == 4 and decision.output_error is None
    assert decision.reason.endswith(
        "factors of the weight alone: a part of it is multiplied that is no block of rows and columns"
    )
    assert torch.equal(model.mixing.u.weight, plain.mixing.u.weight)


def test_a_few_vectors_do_not_count():
    model, session, _ = run(batch=(X[:15], Y[:15]))
    plain, _, _ = run(replace(DATA, factors="weight"), batch=(X[:15], Y[:15]))
    said = (
        "factors of the weight alone: it saw 15 vectors of 16 numbers in these steps, and as many as numbers are needed"
    )
    assert all(d.reason.endswith(said) for d in session.plan.layers if d.factorized)
    assert session.notes[0].startswith("factors of 0 of 2 layers know")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert run(batch=(X[:16], Y[:16]))[1].notes[0].startswith("factors of 2 of 2 layers know")


@pytest.mark.parametrize(("total_steps", "calls"), [(3, 1), (160, 3)])
def test_all_calls_together_draw_eight_vectors_for_each_number(monkeypatch, total_steps, calls):
    drawn = []
    inner = live_data.gather
    monkeypatch.setattr(live_data, "gather", lambda *a, **k: drawn.append(k["drawn"]) or inner(*a, **k))
    _, session, _ = run(total_steps=total_steps)
    assert session.plan.calibration_batches == calls
    assert {one.at_most(16) for one in drawn} == {-(-2048 // calls)}
    assert {one.at_most(900) for one in drawn} == {7200 // calls}


# -- averages


def test_an_average_follows_the_models_factors():
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer, _ = attached(model, followers=[average])
    for _ in range(3):
        train(model, optimizer, 1, (X, Y))
        if isinstance(model[2], nn.Linear):
            average.update_parameters(model)
    dense, mean = dense_twins()
    with torch.no_grad():
        lost, theirs = model(X) - dense(X), average(X) - mean(X)
    # What the pairs of both leave out is about the same: the average is not fitted to its own weights instead.
    assert (theirs - lost).norm() < 0.25 * lost.norm()
    assert not torch.equal(average.module[2].bias, mean.module[2].bias)


def dense_twins():
    model = mlp()
    mean = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = sgd(model)
    for step in range(3):
        train(model, optimizer, 1, (X, Y))
        if step < 2:
            mean.update_parameters(model)
    return model, mean


# -- the same again


@pytest.mark.parametrize("stop", range(4))
def test_a_stopped_run_goes_on_to_the_same_bits(stop):
    def fresh(seed):
        model = mlp(seed)
        return model, *attached(model)

    def steps(model, optimizer, first, last):
        for step in range(first, last):
            train(model, optimizer, 1, vectors(32, step))

    whole, optimizer, session = fresh(0)
    steps(whole, optimizer, 0, 6)
    model, optimizer, session_before = fresh(0)
    steps(model, optimizer, 0, stop)
    saved = copy.deepcopy([thing.state_dict() for thing in (session_before, model, optimizer)])
    again, *others = fresh(1)
    for thing, state in zip((others[1], again, others[0]), saved, strict=True):
        thing.load_state_dict(state)
    steps(again, others[0], stop, 6)
    assert session.finish() == others[1].finish()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("stop", [2, 4])
def test_a_stopped_run_of_several_last_steps_knows_those_since_its_checkpoint(stop):
    def steps(model, optimizer, first, last):
        for step in range(first, last):
            train(model, optimizer, 1, vectors(6, step))

    def fresh(seed):
        model = mlp(seed)
        return model, *attached(model, replace(DATA, E=5), total_steps=200)

    whole, optimizer, session = fresh(0)
    steps(whole, optimizer, 0, stop)
    saved = copy.deepcopy([thing.state_dict() for thing in (session, whole, optimizer)])
    steps(whole, optimizer, stop, 6)
    again, *others = fresh(1)
    for thing, state in zip((others[1], again, others[0]), saved, strict=True):
        thing.load_state_dict(state)
    steps(again, others[0], stop, 6)
    assert session.plan == others[1].plan and session.plan.switch_step == 5
    assert session.plan.calibration_batches == 5 - stop
    assert session.notes[-1 if len(session.notes) == 1 else 0] == others[1].notes[0]
    known = sum(d.output_error is not None for d in session.plan.layers)
    assert known == (2 if stop == 2 else 0)  # 18 vectors of 16 numbers, and 6
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    session.detach()
    others[1].detach()


def test_a_plan_repeats_the_run_and_gains_no_bias(tmp_path):
    model, session, _ = run(replace(DATA, ratio=0.2), steps=5)
    session.plan.save(tmp_path / "plan.json")
    again, other, _ = run(fxrank.Plan.load(tmp_path / "plan.json"), steps=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert other.plan.layers == session.plan.layers and other.plan.calibration_batches == 1
    bare = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 4))
    with torch.no_grad():
        bare[0].bias += 10
    shown = fxrank.plan_of(fxrank.factorize(bare, X, 0.25, calibration=[(X, Y)]))
    assert shown.layer("1").gains_bias
    optimizer, session = attached(bare, shown)
    train(bare, optimizer, 1, (X, Y))
    assert bare[1].bias is None and not session.plan.layer("1").gains_bias


def test_the_option_is_told_from_its_default_and_leaves_earlier_runs_as_they_are():
    assert "factors" not in repr(SOON) and "factors" not in repr(fxrank.FullRank())
    assert repr(fxrank.SpectralInit()) == (
        "SpectralInit(frobenius_decay='auto', extra_bn=False, form='channel', lr_scale=1.0, rewarmup=0.0, freeze=(), E=0.0, K=1, ratio=0.25)"
    )
    assert "freeze=(), factors='data', E=3" in repr(DATA)
    with pytest.raises(ValueError, match=re.escape("factors must be one of")):
        fxrank.Cuttlefish(factors="dat")


# -- several processes


def in_a_team(rank, size):
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer, session = attached(wrapped, DATA, total_steps=10)
    for step in range(5):
        train(wrapped, optimizer, 1, vectors(32, 10 * step + rank))
    return session.plan.to_json(), [p.detach().tolist() for p in model.parameters()]


def test_all_processes_of_a_team_have_the_same_factors():
    first, second = team(in_a_team, 2)
    assert first == second
    assert fxrank.Plan.from_json(first[0]).calibration_batches


def test_shards_are_refused(monkeypatch):
    monkeypatch.setattr(attaching, "is_sharded", lambda model: True)
    message = 'factors="data" needs a model that is whole in each process, whose layers are run by themselves; this one is in shards.'
    with pytest.raises(TypeError, match=re.escape(message)):
        attached(mlp())
