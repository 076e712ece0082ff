"""Whole optimizer steps after the switch, against the same optimizer without decay and autograd's own gradient of the penalty."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import ConvNet, Tied, images, mlp, train, vectors
from torch import nn

import fxrank
from fxrank.optim import FactorRegime, swap_parameters
from fxrank.surgery import apply_plan

LR, DECAY = 0.05, 0.3


def lowrank(dtype=torch.float64):
    """A model with two pairs (one convolution with groups), its replacements, and a batch."""
    model, (x, y) = ConvNet().to(dtype), images()
    plan = fxrank.plan_of(fxrank.factorize(model, x.to(dtype), rank=0.25))
    assert plan.R == {"conv2": 2, "conv3": 4}
    return model, apply_plan(model, plan), (x.to(dtype), y)


def penalty(pairs):
    """`½ Σ ‖VU‖_F²`, through the dense product."""
    return sum(pair.weight.square().sum() for pair in pairs) / 2


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {}),
    "SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD maximize": (torch.optim.SGD, {"momentum": 0.9, "maximize": True}),
    "SGD foreach": (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "Adam": (torch.optim.Adam, {}),
    "Adam maximize": (torch.optim.Adam, {"maximize": True}),
    "Adam foreach": (torch.optim.Adam, {"foreach": True, "amsgrad": True}),
    "Adam fused": (torch.optim.Adam, {"fused": True}),
    "Adam decoupled": (torch.optim.Adam, {"decoupled_weight_decay": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW maximize": (torch.optim.AdamW, {"maximize": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "NAdam decoupled": (torch.optim.NAdam, {"decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {}),
    "RAdam decoupled": (torch.optim.RAdam, {"decoupled_weight_decay": True}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
}


def is_decoupled(cls, options):
    return cls in (torch.optim.AdamW, torch.optim.Adafactor) or options.get("decoupled_weight_decay", False)


def groups_of(model, decay):
    """Weights of the pairs in one group with decay, everything else in one without."""
    inside = [p for m in model.modules() if isinstance(m, fxrank.FactorPair) for p in (m.u.weight, m.v.weight)]
    ids = {id(p) for p in inside}
    return [
        {"params": inside, "weight_decay": decay},
        {"params": [p for p in model.parameters() if id(p) not in ids], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("strength", ["auto", 0.7, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_step_on_the_penalized_loss(name, strength):
    cls, options = OPTIMIZERS[name]
    lam = DECAY if strength == "auto" else strength
    model, replacements, (x, y) = lowrank()
    optimizer = cls(groups_of(model, DECAY), lr=LR, **options)
    regime = FactorRegime(optimizer, replacements, strength)

    twin = copy.deepcopy(model)
    pairs = [m for m in twin.modules() if isinstance(m, fxrank.FactorPair)]
    reference = cls(groups_of(twin, 0.0), lr=LR, **options)
    sign = -1.0 if options.get("maximize") else 1.0

    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        regime.before_step()
        optimizer.step()
        regime.after_step()

        reference.zero_grad()
        loss = F.cross_entropy(twin(x), y)
        factors = [p for pair in pairs for p in (pair.u.weight, pair.v.weight)]
        pulls = torch.autograd.grad(lam * penalty(pairs), factors)
        if is_decoupled(cls, options):
            loss.backward()
            old = [p.detach().clone() for p in factors]
            reference.step()
            if cls is torch.optim.Adafactor:  # its step size is relative to the weights: start from the same ones
                for p, mine in zip(
                    factors, (q for r in replacements for q in (r.pair.u.weight, r.pair.v.weight)), strict=True
                ):
                    assert not torch.equal(p, mine) or lam == 0
                return
            with torch.no_grad():
                for p, pull, before in zip(factors, pulls, old, strict=True):
                    assert not torch.equal(p, before)
                    p.sub_(LR * pull)
        else:
            (loss + sign * lam * penalty(pairs)).backward()
            reference.step()
        for (key, value), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
            # float64; the optimizer's own decay is added and taken away again, and √ in Adam magnifies rounding near 0
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_without_it_the_factors_keep_their_ordinary_decay(name):
    cls, options = OPTIMIZERS[name]
    model, replacements, (x, y) = lowrank()
    twin = copy.deepcopy(model)
    optimizer, reference = (cls(groups_of(m, DECAY), lr=LR, **options) for m in (model, twin))
    regime = FactorRegime(optimizer, replacements, None)
    for net, opt in ((model, optimizer), (twin, reference)):
        F.cross_entropy(net(x), y).backward()
        if opt is optimizer:
            regime.before_step()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("style", ["positional", "keyword"])
@pytest.mark.parametrize("name", ["SGD", "SGD nesterov", "Adam", "AdamW"])
def test_steps_with_a_closure_are_the_same_steps(name, style):
    """Lightning always steps with a closure, which makes the gradients inside the step."""
    cls, options = OPTIMIZERS[name]

    def run(with_closure):
        model, (x, y) = ConvNet().double(), images()
        optimizer = cls(model.parameters(), lr=LR, weight_decay=DECAY, **options)
        policy = fxrank.Pufferfish(E=2, ratio=0.25, lr_scale=0.5)
        session = fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=x.double(), total_steps=5, steps_per_epoch=1, policy=policy
        )

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.double()), y)
            loss.backward()
            return loss

        losses = []
        for _ in range(5):
            if not with_closure:
                losses.append(closure())
                optimizer.step()
            elif style == "keyword":
                losses.append(optimizer.step(closure=closure))
            else:
                losses.append(optimizer.step(closure))
        assert session.finish().R == {"conv2": 2, "conv3": 4}
        return [float(loss.detach()) for loss in losses], [p.detach() for p in model.parameters()]

    losses, weights = run(True)
    plain_losses, plain_weights = run(False)
    assert losses == plain_losses
    assert all(torch.equal(a, b) for a, b in zip(weights, plain_weights, strict=True))


def scaled_steps(name, scale, overflow_at=()):
    """Four float32 steps through a GradScaler; `scale=None` steps without one."""
    cls, options = OPTIMIZERS[name]
    model, replacements, (x, y) = lowrank(torch.float32)
    optimizer = cls(groups_of(model, DECAY), lr=LR, **options)
    regime = FactorRegime(optimizer, replacements, "auto")
    optimizer.register_step_pre_hook(lambda *_: regime.before_step() and None)
    optimizer.register_step_post_hook(lambda *_: regime.after_step())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        if step in overflow_at:
            if scale is None:
                continue
            model.head.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    return list(model.parameters())


@pytest.mark.parametrize("name", ["SGD", "SGD fused", "Adam", "Adam fused", "Adam decoupled", "AdamW", "AdamW fused"])
@pytest.mark.parametrize(
    "overflow_at", [(), (1,), (1, 2)]
)  # a skipped first step leaves torch's fused SGD with an unfilled buffer
def test_loss_scaling_changes_nothing(name, overflow_at):
    for mine, plain in zip(scaled_steps(name, 1024.0, overflow_at), scaled_steps(name, None, overflow_at), strict=True):
        # float32: a power of two scales exactly, the sums after it round differently
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Adam fused", "AdamW fused", "SGD fused"])
def test_an_overflown_fused_step_leaves_the_factors_alone(name):
    cls, options = OPTIMIZERS[name]
    model, replacements, (x, y) = lowrank(torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = cls(groups_of(model, DECAY), lr=LR, **options)
    regime = FactorRegime(optimizer, replacements, "auto")
    optimizer.register_step_pre_hook(lambda *_: regime.before_step() and None)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    model.head.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- the swap


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_after_the_switch(name):
    cls, options = OPTIMIZERS[name]
    model, (x, y) = ConvNet(), images()
    optimizer = cls(model.parameters(), lr=0.01, **options)
    policy = fxrank.Pufferfish(E=3, ratio=0.25, extra_bn=name in ("SGD", "AdamW", "Adagrad"))
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=8, steps_per_epoch=1, policy=policy
    )
    losses = train(model, optimizer, 8, (x, y))
    assert session.finish().R == {"conv2": 2, "conv3": 4}
    assert all(torch.isfinite(torch.tensor(losses)))
    assert session.notes == []
    saved = copy.deepcopy(optimizer.state_dict())
    again = cls(model.parameters(), lr=0.01, **options)
    if "extra" not in name and not policy.extra_bn:
        again.load_state_dict(saved)


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


# -- the learning rate


def rates(lr_scale=1.0, rewarmup=0.0, tensor_lr=False):
    """Learning rates inside and outside of each of 10 steps; the switch is after step 4."""
    model, (x, y) = mlp(), vectors()
    lr = torch.tensor(0.5) if tensor_lr else 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    inside, outside = [], []
    policy = fxrank.Pufferfish(E=4, ratio=0.25, lr_scale=lr_scale, rewarmup=rewarmup)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=10, steps_per_epoch=1, policy=policy
    )
    optimizer.register_step_pre_hook(lambda *_: inside.append(float(optimizer.param_groups[0]["lr"])))
    held = optimizer.param_groups[0]["lr"]
    for _ in range(10):
        train(model, optimizer, 1, (x, y))
        outside.append(float(optimizer.param_groups[0]["lr"]))
        assert optimizer.param_groups[0]["lr"] is held
    session.finish()
    return inside, outside


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lr_scale(tensor_lr):
    assert rates(lr_scale=0.5, tensor_lr=tensor_lr) == ([0.5] * 4 + [0.25] * 6, [0.5] * 10)


def test_rewarmup_ramps_up_to_the_schedule():
    assert rates(rewarmup=0.4) == ([0.5] * 4 + [0.125, 0.25, 0.375, 0.5, 0.5, 0.5], [0.5] * 10)
    assert rates(rewarmup=0.4, lr_scale=0.5) == ([0.5] * 4 + [0.0625, 0.125, 0.1875, 0.25, 0.25, 0.25], [0.5] * 10)


def test_a_step_that_fails_does_not_leave_the_learning_rate_scaled_for_good():
    model, (x, _) = mlp(), vectors()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=10, policy=fxrank.SpectralInit(ratio=0.25, lr_scale=0.1)
    )

    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(broken)
    train(model, optimizer, 1)
    session.finish()
    assert optimizer.param_groups[0]["lr"] == 0.5


# -- schedulers


def every_scheduler():
    """Each scheduler class of torch, with arguments for 10 steps."""
    s = torch.optim.lr_scheduler
    return {
        "LambdaLR": lambda o: s.LambdaLR(o, lambda e: 0.9**e),
        "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, lambda e: 0.9),
        "StepLR": lambda o: s.StepLR(o, 2),
        "MultiStepLR": lambda o: s.MultiStepLR(o, [3, 5]),
        "ConstantLR": lambda o: s.ConstantLR(o),
        "LinearLR": lambda o: s.LinearLR(o),
        "ExponentialLR": lambda o: s.ExponentialLR(o, 0.9),
        "PolynomialLR": lambda o: s.PolynomialLR(o, 8, 2.0),
        "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 10),
        "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 4),
        "CyclicLR": lambda o: s.CyclicLR(o, 0.01, 0.1, step_size_up=3),
        "OneCycleLR": lambda o: s.OneCycleLR(o, 0.1, total_steps=12),
        "ReduceLROnPlateau": lambda o: s.ReduceLROnPlateau(o, patience=1),
        "SequentialLR": lambda o: s.SequentialLR(o, [s.ConstantLR(o), s.ExponentialLR(o, 0.9)], [4]),
        "ChainedScheduler": lambda o: s.ChainedScheduler([s.ConstantLR(o), s.ExponentialLR(o, 0.9)]),
        "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=6),
    }


def test_no_scheduler_of_torch_is_missing_here():
    names = {n for n in torch.optim.lr_scheduler.__all__ if n != "LRScheduler"} | {"SWALR"}
    assert names == set(every_scheduler())


@pytest.mark.parametrize("name", every_scheduler())
def test_a_scheduler_sees_only_its_own_values(name):
    def run(policy):
        model, (x, y) = mlp(), vectors()
        groups = [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "lr": 0.02}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        scheduler = every_scheduler()[name](optimizer)
        session = fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=x, total_steps=10, steps_per_epoch=1, policy=policy
        )
        seen = []
        for i in range(10):
            train(model, optimizer, 1, (x, y))
            scheduler.step(*([1.0 + (i > 3)] if name == "ReduceLROnPlateau" else []))
            seen.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
        return seen, session.finish()

    dense, _ = run(fxrank.FullRank())
    low, plan = run(fxrank.Pufferfish(E=4, ratio=0.25, lr_scale=0.5, rewarmup=0.2))
    assert plan.R == {"2": 4, "4": 4}
    assert low == dense
