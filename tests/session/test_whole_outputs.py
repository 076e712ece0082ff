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
    keep=0.9,
    floor=0.0,
    speedup_threshold=None,
    window=2,
    epsilon=100.0,
    wait=False,
    latest=None,
    round_to=1,
    form="channel",
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


def test_layers_that_saw_too_little_are_judged_by_their_weight():
    session = to_the_switch(Narrow(), replace(KEEP, keep=0.01), 39, lambda step: vectors(20, step))
    decision = session.plan.layer("second")
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


class Compiled(Narrow):
    """With a function that is not copied with it."""

    def __init__(self):
        super().__init__()
        original = super().forward
        self.forward = lambda x: original(x)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Compiled, "ValueError: a copy of it calls the layers of the model itself."),
        (Shy, "RuntimeError: there is only one"),
        (Fickle, "ValueError: outputs of shapes"),
        (Mute, "ValueError: it must give floating-point tensors of more than one number; it gave Tensor."),
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


def test_a_copy_that_loses_nothing_at_all_is_not_believed(monkeypatch):
    """As that of one whose function reads the weights of the model that it was made of."""
    monkeypatch.setattr(whole_outputs, "apply_plan", lambda *args, **options: [])
    notes = to_the_switch(Narrow()).notes
    assert any("ValueError: a copy of it computes without its own pairs." in note for note in notes)


class NotInEvaluation(Narrow):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("only in training\nand so on")
        return super().forward(x)


class WithForces(Narrow):
    """The gradient by its input is what it gives."""

    def forward(self, x):
        x = x.requires_grad_()
        return torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)[0][:, :4]


@pytest.mark.parametrize("make", [NotInEvaluation, WithForces])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_a_model_that_cannot_be_called_once_more_goes_on_with_what_its_weights_tell(make, batchnorm):
    class Model(make, Normed if batchnorm else Narrow):
        pass

    model = Model()
    optimizer, session = attached(model, replace(KEEP, keep=0.1), total_steps=400)
    step = 0
    while session.plan is None:
        x = vectors(40, step)[0]
        optimizer.zero_grad()
        model(x.clone()).square().mean().backward()
        optimizer.step()
        step += 1
    notes = " ".join(session.notes)
    assert "ranks were chosen by the weights alone: RuntimeError: " in notes
    assert "factors were made of the weights alone: RuntimeError: " in notes
    assert "and so on" not in notes
    assert session.plan.R and all(d.output_error is None for d in session.plan.layers)


def test_where_no_layer_pays_nothing_is_looked_at():
    model = NotInEvaluation()
    _, session = attached(model, replace(KEEP, speedup_threshold=1e9), total_steps=400)
    assert not session.plan.R and not session.notes


def test_hooks_that_look_on_see_none_of_it():
    model, seen = Narrow(), []
    model.head.register_forward_hook(lambda module, args, out: seen.append(module.training))
    optimizer, session = attached(model, KEEP, total_steps=400)
    seen.clear()
    step = 0
    while session.plan is None:
        train(model, optimizer, 1, vectors(40, step))
        step += 1
    assert told(session) >= 0.9
    # Its own calls, and those that find out whether a hook looks on.
    assert len(seen) <= step + 3


def test_a_model_may_write_into_what_it_is_given():
    class Writes(Narrow):
        def forward(self, x):
            return super().forward(x.mul_(0.5))

    model, (x, y) = Writes(), vectors(40)
    before = x.clone()
    optimizer, session = attached(model, KEEP, x, total_steps=400)
    while session.plan is None:
        train(model, optimizer, 1, (before.clone(), y))
    assert torch.equal(x, before)
    assert session.plan.R and any("of its outputs in the example" in note for note in session.notes)


def test_objects_of_which_nobody_knows_how_much_they_hold_are_kept_of_the_last_step_alone():
    class Graph:
        def __init__(self, x):
            self.x = x

    class OfGraphs(Narrow):
        def forward(self, graph):
            return super().forward(graph.x)

    calls, model = live_data.LastCalls(16), OfGraphs()
    calls.watch(model)
    for step in range(3):
        model(Graph(vectors(4, step)[0]))
        assert len(calls) == 1
        calls.step_made()


def test_the_floor_makes_no_layer_larger():
    session = to_the_switch(Narrow(), replace(KEEP, min_ratio=0.7))
    assert session.plan.layer("second").reason == "rank 23 of 32 would not save anything: break-even is 16.0"


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

    with pytest.raises(ValueError, match="must give floating-point tensors of more than one number; it gave Tensor"):
        whole_outputs._numbers(torch.tensor(2.0))  # of a loss so small a share may be much
    found = whole_outputs._numbers(WithLoss()(vectors(40)[0]))
    assert [t.shape for t in found] == [(40, 4)]


@pytest.mark.parametrize("shape", [(7,), (7, 3), (5, 4, 3), (6, 3, 4, 4), (6, 3, 2, 4, 4)])
def test_outputs_vary_about_the_mean_of_each_feature_over_all_calls(shape):
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    over = {1: 0, 2: 0, 3: (0, 1), 4: (0, 2, 3), 5: (0, 2, 3, 4)}[len(shape)]
    expected = float((outputs - outputs.mean(over, keepdim=True)).square().sum())
    for parts in ([outputs], outputs.split(1), outputs.split(2)):  # batches of one image too
        moments = [whole_outputs._Output.of(part).moments() for part in parts]
        assert whole_outputs._about_the_mean(moments) == pytest.approx(expected, rel=1e-5)


def test_outputs_that_never_vary_cannot_be_compared():
    moments = [whole_outputs._Output.of(torch.full((4, 3), 2.0)).moments()]
    with pytest.raises(ValueError, match="the same whatever it is called with"):
        whole_outputs._about_the_mean(moments)
    (only,) = [whole_outputs._Output.of(torch.tensor([[3.0, 4.0]])).moments()]  # of one position the mean is not known
    assert whole_outputs._about_the_mean([only]) == pytest.approx(25)


@pytest.mark.parametrize("mask", [-torch.inf, torch.inf, torch.nan, -1e9, torch.finfo(torch.float32).min])
def test_what_is_masked_is_not_compared(mask):
    class Masked(Narrow):
        def forward(self, x):
            out = super().forward(x)
            return out.masked_fill(torch.arange(4) == 1, mask)

    def masked_loss(model, optimizer, step):
        x = vectors(40, step)[0]
        optimizer.zero_grad()
        model(x)[:, [0, 2, 3]].square().mean().backward()
        optimizer.step()

    found = {}
    for make in (Narrow, Masked):
        model = make()
        optimizer, session = attached(model, replace(KEEP, keep=0.95), total_steps=400)
        step = 0
        while session.plan is None:
            masked_loss(model, optimizer, step)
            step += 1
        found[make] = session.plan.R, told(session)
    assert found[Masked][0] and found[Masked][1] >= 0.95
    assert max(found[Masked][0].values()) > 1  # as the others need


def test_what_is_not_a_number_any_more_is_lost_altogether():
    wanted = whole_outputs._Output.of(torch.ones(3, 2))
    assert wanted.off(torch.full((3, 2), torch.nan)) == torch.inf
    assert wanted.off(torch.full((3, 2), torch.inf)) == torch.inf
    some = whole_outputs._Output.of(torch.tensor([[1.0, -torch.inf]]))
    assert some.off(torch.tensor([[3.0, 7.0]])) == 4.0


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
        if where == "draft" and rank == 1:
            patch.setattr(live_data.Evidence, "draft", lambda *args: 1 / 0)
        for step in range(5):
            train(wrapped, optimizer, 1, vectors(32, 10 * step + rank))
    return session.plan.to_json(), [p.detach().tolist() for p in model.parameters()], session.notes


@pytest.mark.parametrize(("where", "said"), [("forward", "by the weights alone"), ("draft", "could not be tried")])
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
    with pytest.raises(TypeError, match=re.escape('factors="data" needs a model that is whole in each process')):
        attached(mlp(), replace(policy, factors="data"), total_steps=400)
