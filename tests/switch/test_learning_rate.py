"""The learning rate after the switch: scaled and warmed up inside the steps only, so that no scheduler sees it."""

import pytest
import torch
from nets import attach, mlp, train, vectors
from torch import nn
from torch.optim import lr_scheduler

import fxrank


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


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 6]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_across_the_switch(name):
    rates = []
    for policy in (fxrank.FullRank(), fxrank.Pufferfish(E=1, K=1, ratio=0.25, lr_scale=0.5)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 2))
        optimizer = torch.optim.SGD(
            [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "lr": 0.3}], lr=0.1, momentum=0.9
        )
        scheduler = SCHEDULERS[name](optimizer)
        x = torch.randn(5, 6)
        session = fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=x, total_steps=10, steps_per_epoch=5, policy=policy
        )
        seen = []
        for _ in range(10):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
            seen.append([g["lr"] for g in optimizer.param_groups])
        rates.append(seen)
        plan = session.finish()
    assert plan.R == {"1": 2}
    assert rates[0] == rates[1]


@pytest.mark.parametrize("name", ["ExponentialLR", "LambdaLR", "OneCycleLR"])
def test_a_scheduler_that_steps_in_a_hook_of_the_optimizer_is_heard(name):
    rates = []
    for policy in (fxrank.FullRank(), fxrank.Pufferfish(E=3, ratio=0.25, lr_scale=0.5, rewarmup=0.2)):
        model, inside = mlp(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        optimizer.register_step_post_hook(lambda *_, scheduler=scheduler: scheduler.step())
        session = attach(model, optimizer, policy, steps_per_epoch=1)
        for _ in range(10):
            train(model, optimizer, 1)
            inside.append(optimizer.param_groups[0]["lr"])
        session.finish()
        rates.append(inside)
    assert rates[0] == rates[1] and len(set(rates[0])) == 10
