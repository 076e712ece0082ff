"""Ranks by what the whole model gives: how much of its outputs is kept, and with how few parameters."""

import re
from dataclasses import replace

import pytest
import torch
from live import attached
from nets import ConvNet, images, mlp, train, vectors
from outputs import KEEP, Muted, Narrow, Normed, to_the_switch, told
from teams import team
from torch.nn.parallel import DistributedDataParallel

import fxrank
from fxrank.policies import outputs
from fxrank.policies.fixed import as_policy
from fxrank.session import attach as attaching
from fxrank.session import live_data, whole_outputs


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


def test_the_pairs_have_at_least_their_share_of_the_parameters():
    shares = []
    for floor in (0.0, 0.3, 0.6, 0.8):
        session = to_the_switch(Narrow(), replace(KEEP, floor=floor))
        layers = [session.plan.layer(name) for name in ("second", "third")]
        share = sum(d.pair_parameters or d.parameters for d in layers) / sum(d.parameters for d in layers)
        assert share >= floor and told(session) >= 0.9
        shares.append(share)
    assert shares[0] <= shares[1] < 0.6 <= shares[2] < 0.68 and 0.8 <= shares[3] < 0.88


def test_layers_behind_few_directions_get_few_ranks():
    session = to_the_switch(Narrow())
    assert "second" in session.plan.R
    for d in (session.plan.layer(name) for name in session.plan.R):
        assert d.rank <= 3
        assert d.reason == f"rank {d.rank} of 32: the model keeps 0.9 of its outputs"
        assert d.stable_rank > 3  # of the weight, which is far from what its data need
    assert any("know what these saw" in note for note in session.notes)


def test_ranks_go_where_the_model_hears_them(monkeypatch):
    def ranks():
        plan = to_the_switch(Muted(), replace(KEEP, keep=0.99)).plan
        return [layer.rank or layer.full_rank for layer in (plan.layer("loud"), plan.layer("muted"))]

    loud, muted = ranks()
    assert loud > 2 * muted
    monkeypatch.setattr(outputs.Outputs, "weights", lambda self, alone: {})
    loud, muted = ranks()
    assert loud <= 2 * muted


def test_where_the_floor_decides_the_reason_says_so():
    session = to_the_switch(Narrow(), replace(KEEP, floor=0.6))
    reasons = [d.reason for d in session.plan.layers if d.factorized]
    assert reasons and all(": pairs keep 0.6 of their layers' size" in reason for reason in reasons)


@pytest.mark.parametrize(("most", "forms"), [(2**25, {"channel", "spatial"}), (0, {"channel"})])
def test_other_forms_are_tried_where_that_takes_little(monkeypatch, most, forms):
    monkeypatch.setattr(whole_outputs, "FORM_BYTES", most)
    tried = []
    inner = whole_outputs.look
    monkeypatch.setattr(whole_outputs, "look", lambda layers, *rest: tried.extend(layers) or inner(layers, *rest))
    to_the_switch(ConvNet(), replace(KEEP, form="auto"), batch=lambda step: images(16, step))
    assert {layer.form for layer in tried} == forms


def test_a_form_that_reads_its_layers_matrices_is_chosen_by_what_is_known_of_them():
    session = to_the_switch(Narrow(), replace(KEEP, form="gauge"))
    assert {session.plan.layer(name).form for name in session.plan.R} == {"gauge"}
    assert told(session) >= KEEP.keep


def test_layers_that_saw_too_little_are_judged_by_their_weight():
    session = to_the_switch(Narrow(), replace(KEEP, keep=0.01), 39, lambda step: vectors(20, step))
    decision = session.plan.layer(next(iter(session.plan.R)))
    assert "factors of the weight alone: it saw 20 vectors of 32 numbers in these steps" in decision.reason
    assert decision.output_error is None


def test_a_layer_that_is_worth_its_parameters_stays():
    session = to_the_switch(mlp(), replace(KEEP, keep=0.9999))
    dense = [d for d in session.plan.layers if not d.factorized and d.name in ("2", "4")]
    assert dense and all(d.reason == "worth its parameters where the model keeps 0.9999 of its outputs" for d in dense)


def test_under_a_target_flat_curves_wait_too():
    model = mlp()
    optimizer, session = attached(model, replace(KEEP, wait=True, target_params=0.6), total_steps=400)
    train(model, optimizer, 5, vectors(40))
    assert session.plan is None


@pytest.mark.parametrize("options", [{"xi": "random"}, {"share": 0.9}, {"ratio": 0.5}])
def test_options_of_other_ranks_are_refused(options):
    ((name, value),) = options.items()
    message = f"{name} is an option of other ranks than rank_metric='outputs' chooses; got {value}. Leave it out, or name the rank_metric"
    with pytest.raises(ValueError, match=re.escape(message)):
        fxrank.Cuttlefish(**options)
    fxrank.Cuttlefish(rank_metric="max_scaled_accumulative", **options)
    fxrank.Cuttlefish(target_params=0.5, **options)


def test_earlier_runs_that_named_the_factors_go_on():
    scaled = replace(KEEP, rank_metric="scaled_stable_rank", keep=0.98)
    assert repr(replace(scaled, factors="weight")) == repr(scaled)
    assert "factors='data'" in repr(replace(KEEP, factors="data"))


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


def test_the_floor_makes_no_layer_larger():
    session = to_the_switch(Narrow(), replace(KEEP, min_ratio=0.7))
    assert session.plan.layer("second").reason == "rank 23 of 32 would not save anything: break-even is 16.0"


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


# -- BatchNorm


def test_statistics_that_lag_behind_are_measured_again():
    model = Normed()
    policy = replace(KEEP, samples=30)
    optimizer, session = attached(model, policy, total_steps=400)
    while session.plan is None:
        train(model, optimizer, 1, vectors(40, session.clock.step))
    assert session.plan.switch_step >= live_data.ENOUGH > session.plan.calibration_batches
    assert "statistics of 1 BatchNorms were measured again with the pairs" in session.notes
    assert torch.equal(model.frozen.running_mean, torch.zeros(32))
    steps = range(session.plan.switch_step)[-10:]  # a fortieth of the run
    with torch.no_grad():
        hidden = model.hidden(torch.cat([vectors(40, step)[0] for step in steps]))
    torch.testing.assert_close(model.norm.running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.norm.running_var, hidden.var(0), rtol=1e-4, atol=1e-5)


def test_few_calls_leave_them_as_they_are():
    session = to_the_switch(Normed())
    assert session.plan.switch_step < live_data.ENOUGH
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


def where_one_fails(rank, size, where):
    class Fails(type(mlp())):
        def forward(self, x):
            if where == "forward" and rank == 1 and not self.training:
                raise RuntimeError("not here")
            return super().forward(x)

    model = mlp()
    model.__class__ = Fails
    wrapped = DistributedDataParallel(model)
    optimizer, session = attached(wrapped, KEEP, total_steps=400)
    with pytest.MonkeyPatch.context() as patch:
        if where == "fit" and rank == 1:
            patch.setattr(live_data.Evidence, "fit", lambda *args, **options: 1 / 0)
        for step in range(5):
            train(wrapped, optimizer, 1, vectors(32, 10 * step + rank))
    return session.plan.to_json(), [p.detach().tolist() for p in model.parameters()], session.notes


@pytest.mark.parametrize(("where", "said"), [("forward", "by the weights alone"), ("fit", "could not be tried")])
def test_where_one_process_fails_all_go_on_alike(where, said):
    first, second = team(where_one_fails, 2, where)
    assert first[:2] == second[:2]
    assert any(said in note for note in first[2]) and any(said in note for note in second[2])


def test_shards_get_ranks_and_factors_of_the_weights_alone(monkeypatch):
    monkeypatch.setattr(attaching, "is_sharded", lambda model: True)
    policy = replace(KEEP, rank_metric="outputs")
    _, session = attached(mlp(), policy, total_steps=400)
    assert session.policy == replace(policy, rank_metric="scaled_stable_rank")
    timed = replace(policy, speedup_threshold=1.0)
    assert timed.by_weights == replace(timed, rank_metric="scaled_stable_rank", speedup_threshold=1.5)
    assert session.notes[0].startswith("the model is in shards, whose layers cannot be run by themselves")
    plain, fitted = (as_policy(fxrank.Plan("", (), calibration_batches=n)) for n in (None, 4))
    assert plain.by_weights is plain and fitted.knows_data and not fitted.by_weights.knows_data
    with pytest.raises(TypeError, match=re.escape('factors="data" needs a model that is whole in each process')):
        attached(mlp(), replace(policy, factors="data"), total_steps=400)
