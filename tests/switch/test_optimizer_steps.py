"""Whole optimizer steps after the switch, against the same optimizer without decay and autograd's own gradient of the penalty."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import ConvNet, images, train

import fxrank
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.later_steps import FactorRegime

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
