"""Averages of the weights, taken through the switch: what they are after it, and that averaging goes on."""

import copy
import dataclasses
import re

import pytest
import torch
from nets import ConvNet, Tied, images, mlp, snapshot, train, vectors
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import fxrank
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.rewriting.install import pairs_in
from fxrank.switch.averages import fitted

X, Y = vectors()
DECAY = 0.9
HALFWAY = fxrank.Pufferfish(E=5, ratio=0.25)


def timm_ema(**options):
    return lambda model: pytest.importorskip("timm").utils.ModelEmaV3(model, DECAY, **options)


AVERAGES = {
    "AveragedModel": AveragedModel,
    "AveragedModel with buffers": lambda m: AveragedModel(m, use_buffers=True),
    "AveragedModel multi": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(DECAY)),
    "AveragedModel single": lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(DECAY)),
    "ModelEmaV3": timm_ema(),
    "ModelEmaV3 without foreach": timm_ema(foreach=False),
    "ModelEmaV3 without buffers": timm_ema(exclude_buffers=True),
}


def update(average, model):
    (average.update_parameters if isinstance(average, AveragedModel) else average.update)(model)


def attach(model, optimizer, batch, steps, policy, followers=()):
    return fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=batch[0],
        total_steps=steps,
        steps_per_epoch=1,
        policy=policy,
        followers=followers,
    )


def run(model, average, steps=10, batch=None, policy=HALFWAY, told=True, optimizer=torch.optim.SGD):
    batch = vectors() if batch is None else batch
    optimizer = optimizer(model.parameters(), lr=0.05)
    session = attach(model, optimizer, batch, 10, policy, [average] if told else [])
    for _ in range(steps):
        train(model, optimizer, 1, batch)
        update(average, model)
    return session


@pytest.mark.parametrize("form", ["channel", "gauge"])
@pytest.mark.parametrize("make", [mlp, ConvNet, Tied])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_go_on_through_the_switch(name, make, form):
    model = make()
    batch = images() if make is ConvNet else vectors()
    average = AVERAGES[name](model)
    session = run(model, average, batch=batch, policy=dataclasses.replace(HALFWAY, form=form))
    session.finish()
    assert session.phase == "low-rank"
    inside = average.module
    assert [n for n, _ in inside.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert not {id(p) for p in inside.parameters()} & {id(p) for p in model.parameters()}
    assert fxrank.plan_of(inside) == session.plan
    if make is Tied:
        assert inside.a.u.weight is inside.b.u.weight
    assert all(torch.isfinite(p).all() for p in inside.parameters())
    assert torch.isfinite(average(batch[0])).all()
    for path, pair in pairs_in(model).items():  # an average of other rows would be of nothing
        for mine, theirs in zip(pairs_in(inside)[path].held[2:], pair.held[2:], strict=True):
            assert torch.equal(mine > 0.5, theirs > 0.5)


def dense_of(net):
    return {n: p.detach().clone() for n, p in fxrank.merge(net).named_parameters()}


@pytest.mark.parametrize("form", ["channel", "gauge"])
def test_the_average_of_factors_is_the_average_of_products(form):
    """Beside it, the average that a dense run would make: of the products, from the average's own weights on."""
    model = mlp(dtype=torch.float64)
    batch = vectors(dtype=torch.float64)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    session = attach(model, optimizer, batch, 40, fxrank.Pufferfish(E=20, ratio=0.25, form=form))
    session.follow(average)
    train(model, optimizer, 19, batch)
    for _ in range(3):  # the average lags behind
        update(average, model)
    before = dense_of(average.module)
    train(model, optimizer, 1, batch)
    after = dense_of(average.module)
    for name in ("2.weight", "4.weight"):
        _, sigma, _ = torch.linalg.svd(before[name])
        best = sigma[4:].norm()
        # Of all products of this rank the fitted one is nearly the nearest.
        assert best * (1 - 1e-9) <= (after[name] - before[name]).norm() <= 1.05 * best
    for name in before.keys() - {"2.weight", "4.weight"}:
        assert torch.equal(after[name], before[name])
    true = after
    for _ in range(20):
        train(model, optimizer, 1, batch)
        update(average, model)
        true = {n: DECAY * true[n] + (1 - DECAY) * p for n, p in dense_of(model).items()}
    for name, p in dense_of(average.module).items():
        # Factors of one basis: what is left is of second order in the steps of the run.
        assert (p - true[name]).norm() < 0.02 * true[name].norm(), name


@pytest.mark.parametrize("gap", [0.0, 1e-3, 1.0])
def test_factors_are_fitted_near_the_models(gap):
    layer = nn.Linear(20, 12).double()
    pair = make_pair(layer, 4)
    stack = layer.weight.detach()[None] + gap * torch.randn(1, 12, 20).double() / 20
    u, v = fitted(stack, pair.unfold_u(pair.u.weight), pair.unfold_v(pair.v.weight))
    _, sigma, _ = torch.linalg.svd(stack[0])
    mine, theirs = (stack - v @ u).norm(), (stack - pair.weight.dense()).norm()
    assert mine <= theirs + 1e-12
    assert mine <= sigma[4:].norm() * (1 + 2 * gap) + 1e-12  # rounding
    assert (u[0] - pair.u.weight).norm() <= 2 * gap + 1e-12
    assert (v[0] - pair.v.weight).norm() <= 2 * gap + 1e-12


def test_a_model_of_lower_rank_than_its_pair_does_not_throw_its_average_away():
    layer = nn.Linear(20, 12).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(12, 2).double() @ torch.randn(2, 20).double())
        layer.weight += 1e-9 * torch.randn(12, 20)
    pair = make_pair(layer, 6)
    stack = layer.weight.detach()[None] + 0.01 * torch.randn(1, 12, 20).double()
    u, v = fitted(stack, pair.unfold_u(pair.u.weight), pair.unfold_v(pair.v.weight))
    # The six directions that the average has and the model has not (yet): smaller than the model's by 50.
    assert (stack - v @ u).norm() < 0.05 * stack.norm()


def test_an_average_on_other_terms_keeps_them():
    model = mlp()
    average = AveragedModel(model).to(torch.float64)
    average.requires_grad_(False)
    average.eval()
    run(model, average)
    assert {p.dtype for p in average.module.parameters()} == {torch.float64}
    assert not any(m.training for m in average.modules())
    assert not any(p.requires_grad for p in average.parameters())
    assert average.n_averaged == 10


def test_batchnorm_statistics_can_be_made_for_the_average():
    model, batch = ConvNet(), images(8)
    average = AveragedModel(model)
    session = run(model, average, batch=batch, policy=fxrank.Pufferfish(E=5, ratio=0.25, extra_bn=True))
    assert session.finish().R == {"conv2": 2, "conv3": 4}
    assert average.module.conv2.norm is not model.conv2.norm
    update_bn([batch], average)
    seen = []
    hook = average.module.conv2.norm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    average.train()
    average(batch[0])
    hook.remove()
    # float32 sums
    torch.testing.assert_close(average.module.conv2.norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile, nn.DataParallel])
def test_any_copy_of_the_model_can_follow(wrap):
    teacher = mlp(1)
    session = run(mlp(), wrap(teacher), steps=0)
    session.install(fxrank.plan_of(fxrank.factorize(mlp(), X, rank=0.25)))
    assert teacher[2].rank == 4


def test_a_resumed_run_takes_its_average_with_it():
    model = mlp()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    session = run(model, average, steps=7)
    saved = copy.deepcopy([session.state_dict(), model.state_dict(), average.state_dict()])
    again = mlp(1)
    average_again = AveragedModel(again, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    session_again = run(again, average_again, steps=0)
    for target, state in zip((session_again, again, average_again), saved, strict=True):
        target.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), average_again.parameters(), strict=True))
    assert average_again.n_averaged == 7


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_that_nobody_told_of_fails_loudly(name):
    model = mlp()
    average = AVERAGES[name](model)
    session = run(model, average, steps=4, told=False)
    before = {n: p.clone() for n, p in average.module.named_parameters()}
    session.install(fxrank.plan_of(fxrank.factorize(mlp(), X, rank=0.25)))
    with pytest.raises(RuntimeError, match="size"):
        update(average, model)
    # What the failed update may have reached is what has not changed its shape.
    for n in ("2.weight", "4.weight", "6.weight"):
        assert torch.equal(average.module.get_parameter(n), before[n])


def test_refusals():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)

    def followed_by(follower):
        return attach(model, optimizer, (X, Y), 4, fxrank.SpectralInit(ratio=0.25), [follower])

    with pytest.raises(ValueError, match=re.escape("a follower must be a copy of the model; got a list of its own")):
        followed_by(list(model.parameters()))
    message = (
        "a follower must have the model's parameters, by name and shape; '0.weight' is (32, 12) in AveragedModel and "
        "(16, 12) in Sequential. Pass a copy of this very model, before the switch."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        followed_by(AveragedModel(mlp(width=32)))
    with pytest.raises(ValueError, match=re.escape("a follower must be a copy of the model; got the model itself.")):
        followed_by(model)
    broken = AveragedModel(model)
    with torch.no_grad():
        broken.module[2].weight[0, 0] = torch.nan
    with pytest.raises(fxrank.NonFiniteWeightError, match=re.escape("'2 of an average' holds 1 NaN")):
        followed_by(broken)
    assert snapshot(model) == before
    session = followed_by(copy.deepcopy(model))
    assert session.phase == "low-rank"
    session.follow(AveragedModel(model))  # made of the low-rank model: nothing left to do
    with pytest.raises(ValueError, match=re.escape("'2.u.weight' is missing in Sequential")):
        session.follow(mlp())
