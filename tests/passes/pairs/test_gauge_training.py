"""Form "gauge" through training: the switch, optimizers, averages, several processes, kills."""

import copy

import pytest
import torch
from exact import matrices, randn
from nets import ConvNet, images, train, vectors
from shards import STEPS, Net, attach, loop, optimizer_of, shard, wholes
from teams import team
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fxrank
from fxrank.passes.pairs.gauge import FreeRows, LowRankGaugeConv2d
from fxrank.passes.rewriting.install import pairs_in
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.averages import fitted, switch_average
from fxrank.switch.later_steps import FactorRegime
from fxrank.switch.optimizer import swap_parameters

ROUNDING = 1e-10  # float64, sums of a few hundred terms of order 1
PUFFERFISH = fxrank.Pufferfish(E=2, K=0, ratio=0.25, form="gauge")


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_and_gradients_are_projected(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.Flatten()).double()
    x = randn(2, 4, 6, 6)
    for kind, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})):
        net = copy.deepcopy(model)
        optimizer = kind(net.parameters(), lr=0.01, **options)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        old = {k: v.clone() for k, v in optimizer.state[net[0].weight].items() if torch.is_tensor(v) and v.ndim}
        old["gradient"] = net[0].weight.grad.clone()
        plan = fxrank.plan_of(fxrank.factorize(net, x, rank={"0": 2}, form="gauge"))
        assert swap_parameters(optimizer, apply_plan(net, plan)) == []
        pair = net[0]
        u, v = matrices(pair)
        for key, moment in old.items():
            m, (a, b) = pair.unroll(pair, moment), (u.square(), v.square()) if key == "exp_avg_sq" else (u, v)
            for weight, part in (
                (pair.u.weight, pair.fold_u(b.mT @ m)),
                (pair.v.weight, pair.fold_v(m @ a.mT)),
            ):
                found = weight.grad if key == "gradient" else optimizer.state[weight][key]
                torch.testing.assert_close(found, part, rtol=1e-12, atol=1e-12)
        assert len(old) >= 2


def test_an_average_in_an_optimizers_state_is_one_of_these_rows():
    """ASGD's, of the weight itself: its factors have the identity where the pair has it, however far they are from the pair's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Flatten()).double(), randn(5, 8)
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.01, t0=0)
    model(x).square().sum().backward()
    optimizer.step()
    average = optimizer.state[model[0].weight]["ax"].normal_().clone()
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank={"0": 4}, form="gauge"))
    assert swap_parameters(optimizer, apply_plan(model, plan)) == []
    pair = model[0]
    u, v = fitted(average[None], *matrices(pair))
    ax = [optimizer.state[w]["ax"] for w in (pair.u.weight, pair.v.weight)]
    torch.testing.assert_close(pair.unfold_v(ax[1]) @ pair.unfold_u(ax[0]), v @ u, rtol=0, atol=ROUNDING)
    assert (v @ u - average).norm() < average.norm()


def test_an_average_takes_the_rows_of_its_model():
    """Also where it would have chosen others."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 16), nn.Flatten()).double(), randn(5, 12)
    average = copy.deepcopy(model)
    nn.init.normal_(average[0].weight)
    far = average[0].weight.detach()[None].clone()
    own = fxrank.factorize(average, x, rank={"0": 3}, form="gauge")[0].v.is_free
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank={"0": 3}, form="gauge"))
    apply_plan(model, plan)
    switch_average(average, model, plan)
    assert torch.equal(average[0].v.is_free, model[0].v.is_free) and not torch.equal(own, model[0].v.is_free)
    u, v = fitted(far, *matrices(model[0]))
    torch.testing.assert_close(average[0].weight.dense()[None], v @ u, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rank", [0.25, 1.0])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.filterwarnings("ignore:ranks at or above break-even")
def test_frobenius_decay_is_the_gradient_of_the_penalty(kind, rank):
    """At full rank too, where nothing of the second factor may be left to decay."""
    model, x = ConvNet().double(), images()[0].double()
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=rank, form="gauge"))
    replaced = apply_plan(model, plan)
    pairs = [r.pair for r in replaced]
    assert all(type(p) is LowRankGaugeConv2d for p in pairs)
    assert any(p.v.weight.numel() == 0 for p in pairs) == (rank == 1.0)
    lr, strength, own = 0.1, 0.3, 0.05
    optimizer = kind(model.parameters(), lr=lr, weight_decay=own)
    factors = [w for p in pairs for w in (p.u.weight, p.v.weight) if w.requires_grad]
    expected = torch.autograd.grad(sum(p.weight.square().sum() for p in pairs) / 2 * strength, factors)
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    regime, before = FactorRegime(optimizer, replaced, strength), [w.detach().clone() for w in factors]
    regime.before_step()
    for factor, old, gradient in zip(factors, before, expected, strict=True):
        if kind is torch.optim.SGD:  # which adds its own
            torch.testing.assert_close(factor.grad + own * factor, gradient, rtol=0, atol=ROUNDING)
        else:  # which multiplies with 1 - lr · own
            torch.testing.assert_close(factor * (1 - lr * own), old - lr * gradient, rtol=0, atol=ROUNDING)
    optimizer.step()


def test_an_average_of_buffers_keeps_the_rows():
    """Any average computes with the buffers too: torch's, and older ones that read the whole state dict."""
    x, _ = images()
    model = fxrank.factorize(ConvNet(), x, rank=0.5, form="gauge")
    averages = [
        AveragedModel(model, use_buffers=True),
        AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.999)),
        AveragedModel(model, use_buffers=True, avg_fn=lambda old, new, n: 0.999 * old + (1 - 0.999) * new),
    ]
    by_state = copy.deepcopy(model)
    for _ in range(200):
        for average in averages:
            average.update_parameters(model)
        for mine, theirs in zip(by_state.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(0.9998 * mine + (1 - 0.9998) * theirs)
    for average in (*(a.module for a in averages), by_state):
        for path, pair in pairs_in(model).items():
            assert torch.equal(average.get_submodule(path).v.is_free, pair.v.is_free)
        assert (average.eval()(x) - model.eval()(x)).abs().max() < 1e-4  # float32, two hundred roundings


def member(rank, size):
    model = ConvNet().double()
    wrapper = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.05, momentum=0.9)
    x, y = images(8)
    x = x.double()
    model.eval()  # batches of BatchNorm are each process's own
    part = (x[rank::size], y[rank::size])
    session = fxrank.LowRankSession.attach(
        wrapper, optimizer, example_inputs=part[0], total_steps=6, steps_per_epoch=1, policy=PUFFERFISH
    )
    train(wrapper, optimizer, 6, part)
    session.finish()
    return {n: p.detach().numpy() for n, p in model.state_dict().items()}, session.plan.layer("conv3").form


def test_two_processes_end_where_one_does():
    (first, form), (second, _) = team(member, 2)
    alone, _ = member(0, 1)
    assert form == "gauge" and "conv3.v.free" in first
    assert all((first[n] == second[n]).all() for n in first)
    for name, value in alone.items():
        torch.testing.assert_close(torch.from_numpy(first[name]), torch.from_numpy(value), rtol=0, atol=1e-9)


def other_rows(rank, size):
    """The second process chooses others, as another library of linear algebra may."""
    if rank:
        choose = LowRankGaugeConv2d.choose_basis
        LowRankGaugeConv2d.choose_basis = lambda self, v: choose(self, v.flip(1))
    return member(rank, size)[0]


def test_all_processes_have_the_rows_of_the_first():
    first, second = team(other_rows, 2)
    assert all((first[n] == second[n]).all() for n in first)


def sharded(rank, size):
    torch.manual_seed(0)
    twin = Net().double()
    model = shard(copy.deepcopy(twin))
    x, y = vectors(32)
    ends = []
    for net, part in ((model, (x.double()[rank::size], y[rank::size])), (twin, (x.double(), y))):
        optimizer = optimizer_of(net, "AdamW")
        with attach(net, optimizer, part[0], PUFFERFISH) as session:
            loop(net, optimizer, STEPS, part)
        ends.append((wholes(net), session.plan))
    (mine, plan), (theirs, _) = ends
    forms = {d.form for d in plan.layers if d.factorized}
    rows = [torch.equal(a.is_free, b.is_free) for a, b in zip(free_rows(model), free_rows(twin), strict=True)]
    return max(float((mine[k] - theirs[k]).abs().max()) for k in mine), forms, rows


def free_rows(model):
    return [m for m in model.modules() if isinstance(m, FreeRows)]


def test_shards_train_what_the_whole_model_would():
    for worst, forms, rows in team(sharded, 2):
        assert worst < 1e-9  # float64; gradients are averaged in another order
        assert "gauge" in forms and rows and all(rows)
