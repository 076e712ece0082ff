"""The optimizer after the switch: same object, projected state, Frobenius decay, learning rate."""

import re
import warnings

import pytest
import torch
from nets import ConvNet, Tied, attach, images, mlp, train, vectors
from torch import nn

import fxrank
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.later_steps import FactorRegime
from fxrank.switch.optimizer import optimizers_of, swap_parameters


def trained(optimizer_class, steps=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 2)).double()
    optimizer = optimizer_class(
        [
            {"params": [model[0].weight, model[1].weight]},
            {"params": [model[0].bias, model[1].bias, *model[2].parameters()]},
        ],
        **options,
    )
    x = torch.randn(5, 6, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model, optimizer, x


def switched(optimizer_class, rank=3, **options):
    model, optimizer, x = trained(optimizer_class, **options)
    weight = model[1].weight
    state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[weight].items()}
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank={"1": rank}))
    replaced = apply_plan(model, plan)
    groups = [len(g["params"]) for g in optimizer.param_groups]
    notes = swap_parameters(optimizer, replaced)
    assert [len(g["params"]) for g in optimizer.param_groups] == [groups[0] + 1, groups[1]]
    assert weight not in optimizer.state
    return model, optimizer, x, state, replaced, notes


# -- state


@pytest.mark.parametrize(
    ("cls", "options", "linear", "squared"),
    [
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, ["momentum_buffer"], []),
        (torch.optim.Adam, {"amsgrad": True}, ["exp_avg"], ["exp_avg_sq", "max_exp_avg_sq"]),
        (torch.optim.AdamW, {}, ["exp_avg"], ["exp_avg_sq"]),
        (torch.optim.NAdam, {}, ["exp_avg"], ["exp_avg_sq"]),
        (torch.optim.RMSprop, {"momentum": 0.5}, ["momentum_buffer"], ["square_avg"]),
        (torch.optim.Adagrad, {}, [], ["sum"]),
    ],
)
def test_state_is_projected(cls, options, linear, squared):
    model, optimizer, x, state, replaced, notes = switched(cls, **options)
    assert notes == []
    pair = replaced[0].pair
    u, v = pair.u.weight.detach(), pair.v.weight.detach()
    for keys, left, right in ((linear, v.T, u.T), (squared, v.square().T, u.square().T)):
        for key in keys:
            torch.testing.assert_close(optimizer.state[pair.u.weight][key], left @ state[key], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(optimizer.state[pair.v.weight][key], state[key] @ right, rtol=1e-12, atol=1e-14)
    for key, value in state.items():
        if not isinstance(value, torch.Tensor) or value.numel() == 1:
            assert optimizer.state[pair.u.weight][key] == value
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    again = cls(model.parameters(), **options)
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    again.load_state_dict({**again.state_dict(), "state": {}})


def test_unknown_state_starts_fresh_and_says_so():
    _, optimizer, _, _, replaced, notes = switched(torch.optim.Rprop)
    assert notes == ["1: optimizer state 'step_size' of Rprop has no known projection; its factors start fresh"]
    assert replaced[0].pair.u.weight not in optimizer.state


@pytest.mark.parametrize("model", [ConvNet(), Tied(), mlp()], ids=["conv", "tied", "mlp"])
def test_linear_state_becomes_the_factors_own_gradient(model):
    """With the dense gradient as momentum, the factors' momentum is what autograd gives for the factors."""
    model = model.double()
    x = images()[0].double() if isinstance(model, ConvNet) else vectors(dtype=torch.float64)[0]
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=0.25))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = [list(g["params"]) for g in optimizer.param_groups]
    momenta = {}
    for name in plan.R:
        weight = model.get_submodule(name).weight
        momenta[name] = torch.randn_like(weight)
        optimizer.state[weight]["momentum_buffer"] = momenta[name].clone()
    replacements = apply_plan(model, plan)
    assert swap_parameters(optimizer, replacements) == []
    assert {r.name for r in replacements} == set(plan.R)
    for r in replacements:
        gradients = torch.autograd.grad((r.pair.weight * momenta[r.name]).sum(), [r.pair.u.weight, r.pair.v.weight])
        for p, gradient in zip((r.pair.u.weight, r.pair.v.weight), gradients, strict=True):
            # float64 rounding
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], gradient, rtol=1e-12, atol=1e-12)
        assert r.weight not in optimizer.state
    # each weight's place is taken by its two factors, the others stay where they were
    expected = []
    factors = {id(r.weight): [r.pair.u.weight, r.pair.v.weight] for r in replacements}
    for p in before[0]:
        expected += factors.get(id(p), [p])
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in expected]
    assert {id(p) for p in expected} == {id(p) for p in model.parameters()}


def test_a_centered_second_moment_stays_above_the_square_of_the_mean():
    model, x = mlp(dtype=torch.float64), vectors(dtype=torch.float64)[0]
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, centered=True)
    train(model, optimizer, 5, vectors(dtype=torch.float64))
    dense = {n: dict(optimizer.state[model.get_submodule(n).weight]) for n in ("2", "4")}
    replacements = apply_plan(model, fxrank.plan_of(fxrank.factorize(model, x, rank=0.25)))
    assert swap_parameters(optimizer, replacements) == []
    for r in replacements:
        u, v = r.pair.u.weight.detach(), r.pair.v.weight.detach()
        mean = dense[r.name]["grad_avg"]
        variance = dense[r.name]["square_avg"] - mean.square()
        for p, expected_mean, expected_variance in (
            (r.pair.u.weight, v.T @ mean, v.square().T @ variance),
            (r.pair.v.weight, mean @ u.T, variance @ u.square().T),
        ):
            state = optimizer.state[p]
            # float64 rounding
            torch.testing.assert_close(state["grad_avg"], expected_mean, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(
                state["square_avg"] - state["grad_avg"].square(), expected_variance, rtol=1e-9, atol=1e-14
            )
            assert bool((state["square_avg"] >= state["grad_avg"].square()).all())


def test_state_is_not_shared_between_the_factors():
    model, x = mlp(), vectors()[0]
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 3)
    replacements = apply_plan(model, fxrank.plan_of(fxrank.factorize(model, x, rank=0.25)))
    swap_parameters(optimizer, replacements)
    u, v = replacements[0].pair.u.weight, replacements[0].pair.v.weight
    assert optimizer.state[u]["step"] == optimizer.state[v]["step"] == 3
    assert optimizer.state[u]["step"] is not optimizer.state[v]["step"]
    train(model, optimizer, 1)
    assert optimizer.state[u]["step"] == optimizer.state[v]["step"] == 4


def test_state_of_channels_last_weights_keeps_the_strides_of_its_parameter():
    model, (x, y) = ConvNet().to(memory_format=torch.channels_last), images()
    x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 2, (x, y))
    replacements = apply_plan(model, fxrank.plan_of(fxrank.factorize(model, x, rank=0.25)))
    swap_parameters(optimizer, replacements)
    for r in replacements:
        for p in (r.pair.u.weight, r.pair.v.weight):
            assert optimizer.state[p]["exp_avg"].stride() == p.stride()
    train(model, optimizer, 2, (x, y))


def test_a_weight_with_one_number():
    model = nn.Sequential(
        nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weight = model[1].weight
    optimizer.state[weight]["momentum_buffer"] = torch.full_like(weight, 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of course it is above break-even
        plan = fxrank.plan_of(fxrank.factorize(model, torch.ones(2, 1).double(), rank={"1": 1}))
    (r,) = apply_plan(model, plan)
    swap_parameters(optimizer, [r])
    assert optimizer.state[r.pair.u.weight]["momentum_buffer"] == 3.0 * r.pair.v.weight
    assert optimizer.state[r.pair.v.weight]["momentum_buffer"] == 3.0 * r.pair.u.weight


# -- decay, learning rate, groups


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("cls", "own"), [(torch.optim.SGD, 0.0), (torch.optim.SGD, 0.03), (torch.optim.Adam, 0.03)])
def test_coupled_frobenius_decay_is_the_gradient_of_the_product_norm(rank, maximize, cls, own):
    model, optimizer, x, _, replaced, _ = switched(cls, rank=rank, lr=0.01, weight_decay=own, maximize=maximize)
    pair = replaced[0].pair
    strength = 0.07
    optimizer.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    plain = {p: p.grad.clone() for p in pair.parameters()}
    penalty = strength / 2 * (pair.v.weight @ pair.u.weight).square().sum()
    gradients = torch.autograd.grad(penalty, [pair.u.weight, pair.v.weight])
    FactorRegime(optimizer, replaced, strength).decay()
    for weight, expected in zip((pair.u.weight, pair.v.weight), gradients, strict=True):
        # What the optimizer will use: its own decay comes on top (with the sign of maximize).
        used = (-weight.grad if maximize else weight.grad) + own * weight
        data = -plain[weight] if maximize else plain[weight]
        torch.testing.assert_close(used, data + expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(pair.bias.grad, plain[pair.bias])


def test_decoupled_frobenius_decay_replaces_the_groups_own():
    model, optimizer, x, _, replaced, _ = switched(torch.optim.AdamW, lr=0.02, weight_decay=0.3)
    pair = replaced[0].pair
    u, v = pair.u.weight.detach().clone(), pair.v.weight.detach().clone()
    optimizer.zero_grad()
    model(x).square().sum().backward()
    for weight in (pair.u.weight, pair.v.weight):
        weight.grad.zero_()
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].zero_()
    regime = FactorRegime(optimizer, replaced, "auto")
    regime.before_step()
    optimizer.step()
    regime.after_step()
    torch.testing.assert_close(pair.u.weight, u - 0.02 * 0.3 * v.T @ v @ u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pair.v.weight, v - 0.02 * 0.3 * v @ u @ u.T, rtol=1e-12, atol=1e-12)


def test_decay_follows_a_gradient_scaler():
    model, optimizer, x, _, replaced, _ = switched(torch.optim.SGD, lr=0.01, weight_decay=0.0)
    pair = replaced[0].pair
    optimizer.zero_grad()
    model(x).square().sum().backward()
    before = pair.u.weight.grad.clone()
    optimizer.grad_scale = torch.tensor(8.0, dtype=torch.float64)
    FactorRegime(optimizer, replaced, 0.5).decay()
    u, v = pair.u.weight.detach(), pair.v.weight.detach()
    torch.testing.assert_close(pair.u.weight.grad, before + 8 * 0.5 * v.T @ v @ u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("change", ["removed before", "joins later"])
def test_decay_is_that_of_the_group_that_holds_the_factors_now(cls, change):
    finals = []
    for changed in (False, True):
        model = mlp()
        inside, rest = list(model[2].parameters()), [*model[0].parameters(), *model[4:].parameters()]
        for p in rest:
            p.requires_grad_(False)
        optimizer = cls(inside if not changed or change != "joins later" else rest, lr=0.1, weight_decay=0.5)
        if changed and change == "removed before":
            optimizer = cls([{"params": rest, "weight_decay": 0.0}, {"params": inside}], lr=0.1, weight_decay=0.5)
        attach(model, optimizer, fxrank.SpectralInit(ratio=0.25))
        if changed and change == "removed before":
            del optimizer.param_groups[0]
        elif changed:
            optimizer.add_param_group({"params": model[2].parameters()})
        train(model, optimizer, 3)
        finals.append(model[2].weight.detach() + 0)
    assert torch.equal(*finals)


def test_no_frobenius_decay_leaves_the_gradient():
    model, optimizer, x, _, replaced, _ = switched(torch.optim.SGD, lr=0.01, weight_decay=0.1)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    before = replaced[0].pair.u.weight.grad.clone()
    FactorRegime(optimizer, replaced, None).decay()
    assert torch.equal(replaced[0].pair.u.weight.grad, before)


def test_learning_rate_factor_is_invisible_to_schedulers():
    model, optimizer, x, _, replaced, _ = switched(torch.optim.SGD, lr=0.5)
    model(x).sum().backward()
    regime = FactorRegime(optimizer, replaced, None)
    regime.scale_lr(lambda: 0.1)
    regime.before_step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.05]
    regime.after_step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]


def test_optimizer_errors():
    model = nn.Linear(3, 3)
    with pytest.raises(
        ValueError,
        match=re.escape("the optimizer must hold the model's parameters; SGD holds 2, none of them of Linear."),
    ):
        optimizers_of(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), model)
    with pytest.raises(TypeError, match="LBFGS evaluates the model several times inside one step"):
        optimizers_of(torch.optim.LBFGS(model.parameters()), model)


def test_extra_norm_parameters_join_a_group_without_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    weights, biases = [m.weight for m in model], [m.bias for m in model]
    optimizer = torch.optim.SGD(
        [{"params": weights}, {"params": biases, "weight_decay": 0.0}], lr=0.1, weight_decay=1e-4
    )
    session = fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=torch.randn(2, 3, 8, 8),
        total_steps=4,
        policy=fxrank.SpectralInit(K=0, ratio=0.5, extra_bn=True),
    )
    pair = model[1]
    assert session.phase == "low-rank"
    assert {id(p) for p in pair.norm.parameters()} <= {id(p) for p in optimizer.param_groups[1]["params"]}
    assert {id(pair.u.weight), id(pair.v.weight)} <= {id(p) for p in optimizer.param_groups[0]["params"]}


@pytest.mark.parametrize("decay", [0.0, 1e-4])
def test_extra_norm_parameters_train_at_the_rate_of_their_weight(decay):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    groups = [
        {"params": model[2].parameters(), "lr": 1.0, "weight_decay": 0.0},
        {"params": model[:2].parameters(), "weight_decay": decay},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    attach(model, optimizer, fxrank.SpectralInit(K=0, ratio=0.5, extra_bn=True), torch.randn(2, 3, 8, 8))
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert {id(p) for p in model[1].parameters()} <= held[1] and held[0] == {id(p) for p in model[2].parameters()}


def test_weights_that_are_gone_leave_no_gradient_to_clip():
    """A list of parameters made before the switch holds the old weights; their last gradients do not count for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mine, x = list(model.parameters()), torch.randn(5, 6)
    policy = fxrank.Pufferfish(E=1, K=1, ratio=0.25)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=4, steps_per_epoch=1, policy=policy
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(mine, 1e9)
        kept = [p.grad for p in model.parameters() if any(p is m for m in mine)]
        torch.testing.assert_close(norm, nn.utils.get_total_norm(kept))
        optimizer.step()
    assert session.finish().R == {"1": 2}
