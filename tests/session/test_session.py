"""`LowRankSession`: what it leaves alone, what survives the switch, what it says at the end."""

import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from nets import SOON, UNTIMED, ConvNet, Tied, attach, images, mlp, settings_of, sgd, snapshot, train, vectors
from torch import nn

import fxrank

X, Y = vectors()


# -- watching changes nothing


@pytest.mark.parametrize("make", [mlp, ConvNet, Tied])
def test_a_watched_run_is_the_unwatched_run_until_the_switch(make):
    def run(watched):
        model = make()
        batch = images() if make is ConvNet else vectors()
        optimizer = sgd(model)
        torch.manual_seed(7)
        if watched:
            attach(model, optimizer, fxrank.Cuttlefish(speedup_threshold=1.5, latest=None), x=batch[0], total_steps=30)
        noise = torch.rand(1)
        return train(model, optimizer, 6, batch), model.state_dict(), noise

    losses, state, noise = run(True)
    plain_losses, plain_state, plain_noise = run(False)
    assert losses == plain_losses
    assert torch.equal(noise, plain_noise)  # no random number of the user's was used up
    assert all(torch.equal(state[k], v) for k, v in plain_state.items())


def test_attach_changes_nothing_but_the_step_hooks():
    model = ConvNet()
    model.bn2.eval()
    optimizer = sgd(model)
    before, settings = snapshot(model), settings_of(optimizer)
    session = attach(model, optimizer, x=images())
    assert snapshot(model) == before
    assert settings_of(optimizer) == settings | {"hooks": (1, 1)}
    assert session.phase == "full-rank"
    assert not optimizer.state


def test_gradients_and_optimizer_state_made_before_are_kept():
    model = mlp()
    optimizer = sgd(model)
    train(model, optimizer, 3)
    F.cross_entropy(model(X), Y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    attach(model, optimizer)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


# -- the switch


def test_only_the_factorized_modules_are_replaced():
    model = ConvNet()
    optimizer = sgd(model)
    calls = []
    for name in ("conv1", "bn2", "head"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    kept = {n: m for n, m in model.named_modules() if n not in ("conv2", "conv3")}
    bias = model.conv3.bias
    session = attach(model, optimizer, x=images()[0])
    train(model, optimizer, 10, images())
    assert session.finish().R == {"conv2": 2, "conv3": 4}
    assert all(model.get_submodule(n) is m for n, m in kept.items())
    assert model.conv3.bias is bias
    calls.clear()
    F.cross_entropy(model(images()[0]), images()[1]).backward()
    assert calls == ["conv1", "bn2", "head", "backward"]


@pytest.mark.parametrize("mode", [True, False])
def test_pairs_have_the_mode_of_the_layer_they_replace(mode):
    model = mlp()
    model[2].train(mode)
    optimizer = sgd(model)
    attach(model, optimizer, fxrank.SpectralInit())
    assert all(m.training is mode for m in model[2].modules())


def test_both_views_share_parameters():
    model = ConvNet()
    session = attach(model, sgd(model), fxrank.SpectralInit(), x=images()[0])
    graph = session.graph_module
    targets = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    assert [t for t in targets if t.startswith("conv")] == ["conv1", "conv2.u", "conv2.v", "conv3.u", "conv3.v"]
    assert {id(p) for p in graph.parameters()} == {id(p) for p in model.parameters()}
    model.eval()
    graph.eval()
    assert torch.equal(graph(images()[0]), model(images()[0]))


def test_tied_weights_stay_tied():
    model = Tied()
    optimizer = sgd(model)
    session = attach(model, optimizer)
    train(model, optimizer, 10)
    assert session.finish().R == {"a": 4, "twice": 4}
    assert model.a.u.weight is model.b.u.weight
    assert model.a.v.weight is model.b.v.weight
    assert model.a.bias is not model.b.bias
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))


def test_the_dense_weights_are_freed():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    old = weakref.ref(model[2].weight)
    attach(model, optimizer)
    train(model, optimizer, 10)
    gc.collect()
    # the parameter itself is gone; so is the optimizer's state for it
    assert len(optimizer.state) == len(list(model.parameters()))
    assert old() is None


def test_several_groups_keep_number_order_and_options():
    model = mlp()
    groups = [
        {"params": [model[0].weight, model[2].weight], "lr": 0.01, "name": "front"},
        {"params": [m.bias for m in model if isinstance(m, nn.Linear)], "weight_decay": 0.0},
        {"params": [model[4].weight, model[6].weight], "lr": 0.03},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)
    before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    objects = list(optimizer.param_groups)
    attach(model, optimizer)
    train(model, optimizer, 10)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == before
    assert all(a is b for a, b in zip(optimizer.param_groups, objects, strict=True))
    ids = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    assert ids[0] == [id(p) for p in (model[0].weight, model[2].u.weight, model[2].v.weight)]
    assert ids[2] == [id(p) for p in (model[4].u.weight, model[4].v.weight, model[6].weight)]


def test_a_switch_before_the_first_step():
    model = mlp()
    optimizer = sgd(model)
    session = attach(model, optimizer, fxrank.Pufferfish(E=0, ratio=0.25))
    assert session.phase == "low-rank"
    assert not optimizer.state
    losses = train(model, optimizer, 10)
    assert losses[-1] < losses[0]
    assert session.clock.step == 10


def test_at_full_rank_the_switch_is_invisible():
    """A pair at (almost) the rank of its weight: the run goes on as if nothing had happened."""

    def run(policy):
        model = mlp(dtype=torch.float64)
        with torch.no_grad():  # rank 3 weights, so that rank 4 loses nothing
            for layer in (model[2], model[4]):
                layer.weight.copy_(torch.randn(16, 3).double() @ torch.randn(3, 16).double() / 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
        attach(model, optimizer, policy, x=X.double())
        return train(model, optimizer, 10, (X.double(), Y))

    torch.manual_seed(0)
    dense = run(fxrank.FullRank())
    torch.manual_seed(0)
    low = run(fxrank.Pufferfish(E=0.5, ratio=0.25))
    # float64: the product of the factors is the weight up to rounding
    assert low == pytest.approx(dense, rel=1e-10)


def test_epochs_are_steps_over_steps_per_epoch():
    model = mlp()
    optimizer = sgd(model)
    session = attach(model, optimizer, total_steps=12, steps_per_epoch=4)
    train(model, optimizer, 12)
    assert session.plan.switch_step == 6
    assert session.plan.E == 1.5
    assert session.clock.epoch == 3.0


def test_include_and_exclude():
    model = mlp()
    session = attach(
        model, sgd(model), fxrank.SpectralInit(K=0, ratio=0.1), include=["0", nn.Linear], exclude="re:^[46]$"
    )
    assert session.plan.R == {"0": 1, "2": 1}
    assert session.plan.layer("4").reason == "excluded by the user"
    model = mlp()
    with pytest.raises(
        ValueError, match=re.escape("each selector in exclude must match at least one layer; 'fc' matches none of 4.")
    ):
        attach(model, sgd(model), exclude="fc")


def test_the_listener_is_told_before_and_after():
    model = mlp()
    optimizer = sgd(model)
    seen = []
    attach(
        model,
        optimizer,
        listener=lambda event, s: seen.append((event, s.clock.step, s.plan is None, type(model[2]).__name__)),
    )
    train(model, optimizer, 10)
    assert seen == [("before_switch", 5, True, "Linear"), ("after_switch", 5, False, "LowRankLinear")]


def test_a_model_that_is_itself_a_layer():
    model = nn.Linear(12, 4)
    with pytest.raises(
        fxrank.NothingToFactorizeError, match=re.escape("at least one layer must be factorizable; 0 of 1 are:")
    ):
        attach(model, sgd(model))


# -- trouble in the middle of a run


@pytest.mark.parametrize("name", ["2", "6"])
def test_a_weight_that_breaks_during_training_is_named_and_nothing_is_changed(name):
    model = mlp()
    optimizer = sgd(model)
    session = attach(model, optimizer)
    train(model, optimizer, 2)
    with torch.no_grad():
        model.get_submodule(name).weight[3, 3] = torch.nan
    types = snapshot(model)["types"]
    with pytest.raises(
        fxrank.NonFiniteWeightError, match=re.escape(f"layer {name!r} holds NaN or infinity. Lower the learning rate")
    ):
        optimizer.step()
    assert snapshot(model)["types"] == types
    assert session.phase == "full-rank"


def test_a_weight_that_is_broken_at_the_switch():
    model = mlp()
    optimizer = sgd(model)
    session = attach(model, optimizer, fxrank.Pufferfish(E=3, ratio=0.25), steps_per_epoch=1)
    train(model, optimizer, 2)
    with torch.no_grad():
        model[4].weight[3, 3] = torch.inf
    with pytest.raises(fxrank.NonFiniteWeightError, match=re.escape("'4' holds")):
        optimizer.step()
    assert [type(m) for m in model] == [type(m) for m in mlp()]
    assert session.plan is None


@pytest.mark.parametrize("name", ["0", "2", "6"])
@pytest.mark.parametrize("policy", [SOON, UNTIMED], ids=["ratio", "default"])
def test_a_weight_that_is_broken_at_the_start(name, policy):
    model = mlp()
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] = torch.nan
    optimizer = sgd(model)
    settings = settings_of(optimizer)
    with pytest.raises(fxrank.NonFiniteWeightError, match=re.escape(f"{name!r} holds 1 NaN or infinite value of")):
        attach(model, optimizer, policy)
    assert settings_of(optimizer) == settings


def test_an_error_in_the_loop_takes_the_hooks_off():
    model = mlp()
    optimizer = sgd(model)

    def run():
        with attach(model, optimizer):
            train(model, optimizer, 2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert settings_of(optimizer)["hooks"] == (0, 0)
    train(model, optimizer, 10)
    assert type(model[2]) is nn.Linear


# -- the end


def test_finish_takes_the_hooks_off_and_can_be_called_again():
    model = mlp()
    optimizer = sgd(model)
    mine = []
    optimizer.register_step_post_hook(lambda *_: mine.append(1))
    with attach(model, optimizer) as session:
        train(model, optimizer, 10)
    assert settings_of(optimizer)["hooks"] == (0, 1)
    assert session.finish() is session.plan
    train(model, optimizer, 1)
    assert len(mine) == 11
    assert session.clock.step == 10


def test_the_warning_gives_every_layer_with_its_reason():
    model = mlp()
    optimizer = sgd(model)
    session = attach(
        model, optimizer, fxrank.Cuttlefish(speedup_threshold=None, latest=None, epsilon=1e-9), exclude="4"
    )
    train(model, optimizer, 10)
    message = (
        "nothing was factorized (the policy did not switch within 10 of 10 steps); the model is full-rank. Layer by layer:\n"
        "  0 (linear): first layer of the graph, left dense by default\n"
        "  2 (linear): no switch within 10 steps; its rank had not settled\n"
        "  4 (linear): excluded by the user\n"
        "  6 (linear): last layer of the graph, left dense by default"
    )
    with pytest.warns(fxrank.NothingFactorizedWarning, match=re.escape(message) + "$"):
        plan = session.finish()
    assert plan.layer("2").reason == "no switch within 10 steps; its rank had not settled"


def test_a_switch_that_keeps_every_layer_warns_too():
    model = mlp()
    optimizer = sgd(model)
    policy = fxrank.Cuttlefish(rank_metric="scaled_stable_rank", speedup_threshold=None, latest=0.5, epsilon=1e-9)
    session = attach(model, optimizer, policy)
    train(model, optimizer, 10)
    assert session.phase == "full-rank"
    message = (
        "nothing was factorized (deadline at 0.5 of the run; 2 of 2 layers had not settled); the model is full-rank."
    )
    with pytest.warns(fxrank.NothingFactorizedWarning, match=re.escape(message)) as caught:
        session.finish()
    assert "2 (linear): rank 16 of 16 would not save anything: break-even is 8.0" in str(caught[0].message)


def test_reasons_of_waiting_layers():
    class OneSettles(fxrank.policies.monitor.Detector):
        def settled(self, curves, full_ranks, before):
            return frozenset({"2"})

    model = mlp()
    session = attach(model, sgd(model), fxrank.Cuttlefish(speedup_threshold=None, latest=None, test=OneSettles()))
    assert session.settled_count == (1, 2)
    with pytest.warns(fxrank.NothingFactorizedWarning):
        plan = session.finish()
    assert plan.layer("2").reason == "no switch within 0 steps; its rank had settled, others had not"
    assert plan.layer("4").reason == "no switch within 0 steps; its rank had not settled"


def test_nothing_is_said_of_ranks_that_nobody_watched():
    model = mlp()
    session = attach(model, sgd(model), fxrank.Pufferfish(E=20, ratio=0.25), steps_per_epoch=1)
    with pytest.warns(fxrank.NothingFactorizedWarning, match=r"4 \(linear\): no switch within 0 steps\n"):
        session.finish()


# -- time


def test_step_times_are_kept_by_phase():
    model = mlp()
    optimizer = sgd(model)
    session = attach(model, optimizer)
    train(model, optimizer, 10)
    session.finish()
    assert (len(session.step_ms["full-rank"]), len(session.step_ms["low-rank"])) == (5, 5)
    assert all(ms > 0 for part in session.step_ms.values() for ms in part)
    assert set(session.seconds) == {"monitor", "profile", "switch"}
    assert session.seconds["monitor"] > 0
    assert session.seconds["switch"] > 0
    assert session.seconds["profile"] == 0.0


def test_where_no_layer_is_eligible_nothing_is_watched_for_it():
    """It is known before the first step, and every layer has its reason."""
    policy = fxrank.Cuttlefish(speedup_threshold=1e9)
    model = mlp()
    session = attach(model, optimizer := sgd(model), policy)
    assert session.plan.note == "no layer is eligible" and session.plan.R == {}
    assert "the threshold is 1e+09x" in session.plan.layer("2").reason
    train(model, optimizer, 10)
    assert session.scene.monitor.steps == [0]
    with pytest.warns(fxrank.NothingFactorizedWarning, match="no layer is eligible"):
        session.finish()
    assert session.clock.step == 10
