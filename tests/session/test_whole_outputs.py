"""Ranks by what the whole model gives: how much of its outputs is kept, with how few parameters, and what is done where that cannot be said."""

import re
from dataclasses import replace

import pytest
import torch
from live import attached
from nets import mlp, train, vectors
from teams import team
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxrank
from fxrank.session import attach as attaching
from fxrank.session import live_data, whole_outputs

KEEP = fxrank.Cuttlefish(
    keep=0.9, speedup_threshold=None, window=2, epsilon=100.0, wait=False, latest=None, round_to=1, form="channel"
)


class Narrow(nn.Module):
    """Two wide layers between the first and the last, behind three directions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], 1)
        return self.head(torch.tanh(self.third(0.1 * self.second(self.first(x)))))


class Normed(Narrow):
    """With BatchNorms, the first of which does not train."""

    def __init__(self):
        super().__init__()
        self.frozen, self.norm = nn.BatchNorm1d(32).eval(), nn.BatchNorm1d(32)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def hidden(self, x):
        x = torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], 1)
        return self.second(self.frozen(self.first(x)))

    def forward(self, x):
        return self.head(torch.tanh(self.third(0.1 * self.norm(self.hidden(x)))))


def to_the_switch(model, policy=KEEP, total_steps=400, batch=lambda step: vectors(40, step)):
    optimizer, session = attached(model, policy, x=batch(0)[0], total_steps=total_steps)
    for step in range(4):
        if session.plan is None:
            train(model, optimizer, 1, batch(step))
    assert session.plan is not None
    return session


def told(session):
    """What the session says to have kept."""
    note = next(note for note in session.notes if "the model kept" in note)
    return float(re.search(r"kept ([\d.]+) of its outputs", note)[1])


@pytest.mark.parametrize("keep", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("make", [Narrow, Normed, mlp])
def test_the_model_keeps_the_share_of_its_outputs_that_is_asked_for(make, keep):
    model, dense = make(), make()

    def listener(event, session):
        if event == "before_switch":
            dense.load_state_dict(session.model.state_dict())

    optimizer, session = attached(model, replace(KEEP, keep=keep), total_steps=400, listener=listener)
    step = 0
    while session.plan is None:
        train(model, optimizer, 1, vectors(40, step))
        step += 1
    assert told(session) >= keep
    assert session.plan.R or make is mlp  # whose weights have learned nothing
    with torch.no_grad():
        x = vectors(40, step - 1)[0]
        wanted, got = dense(x), model(x)
    about = (wanted - wanted.mean(0)).square().sum()
    assert float((got - wanted).square().sum() / about) == pytest.approx(1 - told(session), abs=1e-3)


def test_more_is_kept_with_more_parameters():
    sizes = []
    for keep in (0.5, 0.9, 0.99, 0.999):
        model = Narrow()
        to_the_switch(model, replace(KEEP, keep=keep))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_layers_behind_few_directions_get_few_ranks():
    session = to_the_switch(Narrow())
    assert "second" in session.plan.R
    for d in (session.plan.layer(name) for name in session.plan.R):
        assert d.rank <= 3
        assert d.reason == f"rank {d.rank} of 32: the model keeps 0.9 of its outputs"
        assert d.stable_rank > 3  # of the weight, which is far from what its data need
    assert any("know what these saw" in note for note in session.notes)


def test_layers_that_saw_too_little_are_judged_by_their_weight():
    session = to_the_switch(Narrow(), replace(KEEP, keep=0.01), 39, lambda step: vectors(20, step))
    decision = session.plan.layer("second")
    assert "by its weight alone: it saw 20 vectors of 32 numbers in these steps" in decision.reason
    assert decision.output_error is None


def test_a_layer_that_is_worth_its_parameters_stays():
    session = to_the_switch(mlp(), replace(KEEP, keep=0.9999))
    dense = [d for d in session.plan.layers if not d.factorized and d.name in ("2", "4")]
    assert dense and all(d.reason == "worth its parameters where the model keeps 0.9999 of its outputs" for d in dense)


def test_a_target_has_the_last_word():
    assert KEEP.keeps == 0.9 and KEEP.knows_data
    policy = replace(KEEP, target_params=0.5)
    assert policy.keeps is None and not policy.knows_data
    assert replace(policy, factors="data").knows_data


def test_a_run_whose_ranks_have_not_moved_waits():
    """Flat curves at the start say nothing: of warm-up, say."""
    model, policy = mlp(), replace(KEEP, wait=True)
    optimizer, session = attached(model, policy, total_steps=400)
    train(model, optimizer, 5, vectors(40))
    assert session.plan is None
    for name in ("2", "4"):
        with torch.no_grad():
            model.get_submodule(name).weight[4:] = 0.0
    train(model, optimizer, 3, vectors(40))
    assert session.plan is not None


# -- where the model cannot be tried


class Shy(Narrow):
    """Not to be copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("there is only one")


class Fickle(Narrow):
    """As many outputs as it likes."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)[: None if self.training else 40 - type(self).calls % 7]


class Mute(Narrow):
    def forward(self, x):
        out = super().forward(x)
        return out if self.training else out.argmax(1)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Shy, "RuntimeError: there is only one"),
        (Fickle, "ValueError: outputs of shapes"),
        (Mute, "ValueError: a model that is tried must give floating-point tensors; got Tensor."),
    ],
)
def test_else_the_losses_of_the_layers_may_add_up_to_it(make, why):
    session = to_the_switch(make())
    note = next(note for note in session.notes if "could not be tried" in note)
    assert note.startswith(
        "the losses of all layers add up to 0.1 at most, as the model could not be tried with its pairs: "
    )
    assert why in note
    lost = sum(d.output_error**2 for d in session.plan.layers if d.factorized)
    assert session.plan.R and lost <= 0.1 + 1e-6


def test_numbers_that_are_not_finite_leave_the_weights():
    model = Narrow()
    optimizer, session = attached(model, KEEP, total_steps=400)
    for step in range(3):
        x, y = vectors(40, step)
        train(model, optimizer, 1, (x, y))
        if session.plan is None:
            model(torch.full_like(x, torch.nan))
    assert any("ranks were chosen by the weights alone" in note for note in session.notes)


@pytest.mark.parametrize("keep", [2**28, 1])
def test_what_was_seen_for_the_ranks_serves_the_factors(monkeypatch, keep):
    """In one round it is kept; in several each layer is looked at once more in each try."""
    monkeypatch.setattr(live_data, "ROUND_BYTES", keep)
    looks = []
    inner = live_data.gather
    monkeypatch.setattr(live_data, "gather", lambda *a, **k: looks.append(len(a[1])) or inner(*a, **k))
    session = to_the_switch(Narrow())
    assert looks == [2] if keep > 1 else set(looks) == {1} and len(looks) > 2
    assert all(d.output_error is not None for d in session.plan.layers if d.factorized)


def test_the_same_pairs_whether_what_was_seen_is_kept_or_not(monkeypatch):
    plan = to_the_switch(Narrow()).plan
    monkeypatch.setattr(live_data, "ROUND_BYTES", 1)
    assert to_the_switch(Narrow()).plan.R == plan.R


def test_of_large_outputs_one_call_is_enough(monkeypatch):
    often = replace(KEEP, samples=1600)
    session = to_the_switch(Narrow(), often, total_steps=1600)
    assert any(f"in {session.plan.switch_step} of its last calls" in note for note in session.notes)
    monkeypatch.setattr(whole_outputs, "KEPT_BYTES", 1)
    session = to_the_switch(Narrow(), often, total_steps=1600)
    assert any("in 1 of its last calls" in note for note in session.notes)


def test_losses_among_the_outputs_do_not_count_beside_others():
    class WithLoss(Narrow):
        def forward(self, x):
            out = super().forward(x)
            return {"loss": out.square().mean(), "logits": out}

    found = whole_outputs._numbers(WithLoss()(vectors(40)[0]))
    assert [t.shape for t in found] == [(40, 4)]
    assert [t.shape for t in whole_outputs._numbers(torch.tensor(2.0))] == [()]


@pytest.mark.parametrize(
    ("shape", "over"), [((7,), 0), ((7, 3), 0), ((5, 4, 3), (0, 1)), ((2, 3, 4, 4), (0, 2, 3)), ((), None)]
)
def test_the_mean_is_that_of_a_feature(shape, over):
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(()) if over is None else outputs.mean(over, keepdim=True)
    torch.testing.assert_close(whole_outputs._mean(outputs), expected, rtol=1e-6, atol=1e-6)


# -- BatchNorm


def test_statistics_that_lag_behind_are_measured_again():
    model = Normed()
    policy = replace(KEEP, samples=30)
    optimizer, session = attached(model, policy, total_steps=400)
    while session.plan is None:
        train(model, optimizer, 1, vectors(40, session.clock.step))
    assert session.plan.calibration_batches >= live_data.ENOUGH
    assert "statistics of 1 BatchNorms were measured again with the pairs" in session.notes
    assert torch.equal(model.frozen.running_mean, torch.zeros(32))
    steps = range(session.plan.switch_step)[-session.plan.calibration_batches :]
    with torch.no_grad():
        hidden = model.hidden(torch.cat([vectors(40, step)[0] for step in steps]))
    torch.testing.assert_close(model.norm.running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.norm.running_var, hidden.var(0), rtol=1e-4, atol=1e-5)


def test_few_calls_leave_them_as_they_are():
    session = to_the_switch(Normed())
    assert session.plan.calibration_batches < live_data.ENOUGH
    assert not any("measured again" in note for note in session.notes)


# -- several processes


def in_a_team(rank, size):
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer, session = attached(wrapped, KEEP, total_steps=400)
    for step in range(5):
        train(wrapped, optimizer, 1, vectors(32, 10 * step + rank))
    return session.plan.to_json(), [p.detach().tolist() for p in model.parameters()], told(session)


def test_all_processes_of_a_team_choose_the_same():
    first, second = team(in_a_team, 2)
    assert first == second
    plan = fxrank.Plan.from_json(first[0])
    assert plan.switch_step is not None and plan.R and first[2] >= 0.9


def test_shards_get_ranks_and_factors_of_the_weights_alone(monkeypatch):
    monkeypatch.setattr(attaching, "is_sharded", lambda model: True)
    policy = replace(KEEP, rank_metric="outputs")
    _, session = attached(mlp(), policy, total_steps=400)
    assert session.policy == replace(policy, rank_metric="scaled_stable_rank", speedup_threshold=1.5)
    assert session.notes[0].startswith("the model is in shards, whose layers cannot be run by themselves")
    with pytest.raises(TypeError, match=re.escape('factors="data" needs a model that is whole in each process')):
        attached(mlp(), replace(policy, factors="data"), total_steps=400)
