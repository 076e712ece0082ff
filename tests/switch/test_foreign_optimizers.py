"""Optimizers as people write and wrap them: subclasses, several sessions on one, steps that raise, timm's."""

import contextlib
import copy
import re

import pytest
import torch
import torch.nn.functional as F
from nets import mlp, train, vectors
from torch import nn

import fxrank
from fxrank.switch.decays import put_on_parameters, way_of_decay


class Outer(torch.optim.AdamW):
    """An ordinary subclass. Its `step` is hooked, and so is its parent's, once one of those was built."""

    def step(self, closure=None):
        return super().step(closure)


class Failing(torch.optim.SGD):
    """Raises within its step if told so."""

    fail = False

    def step(self, closure=None):
        if self.fail:
            raise RuntimeError("out of memory")
        return super().step(closure)


class Catching(torch.optim.SGD):
    """Goes on after a parent's step that raised."""

    def step(self, closure=None):
        with contextlib.suppress(ZeroDivisionError):
            super().step(closure)


def attach(model, optimizer, total=8, **policy):
    """A session that makes the switch after two steps."""
    policy = {"E": 2, "ratio": 0.25, "frobenius_decay": "auto"} | policy
    return fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=vectors()[0],
        total_steps=total,
        steps_per_epoch=1,
        policy=fxrank.Pufferfish(**policy),
    )


# -- steps inside steps


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_subclass_that_calls_its_parents_step_counts_once_and_decays_once(with_closure):
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    assert torch.optim.AdamW.step.hooked

    def run(cls):
        model, (x, y) = mlp(), vectors()
        optimizer = cls(model.parameters(), lr=0.01, weight_decay=0.5)
        session, clocks = attach(model, optimizer, lr_scale=0.5), []

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(6):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            clocks.append(session.clock.step)
        assert clocks == [1, 2, 3, 4, 5, 6] and session.phase == "low-rank"
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(Outer), run(torch.optim.AdamW), strict=True))


@pytest.mark.parametrize("caught", ["inside", "outside"])
def test_a_step_that_raised_does_not_confuse_the_count(caught):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    model = mlp()
    optimizer = (Catching if caught == "inside" else Outer)(model.parameters(), lr=0.1)
    session = attach(model, optimizer)

    def closure():
        raise ZeroDivisionError

    if caught == "inside":
        optimizer.step(closure)
    else:
        with pytest.raises(ZeroDivisionError):
            optimizer.step(closure)
    before = session.clock.step
    assert before == (1 if caught == "inside" else 0)
    train(model, optimizer, 3)
    assert session.clock.step == before + 3


# -- the learning rate


def test_two_sessions_on_one_optimizer_leave_the_learning_rate_as_scheduled():
    torch.manual_seed(0)
    first, second = mlp(seed=1), mlp(seed=2)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    sessions = [attach(m, optimizer, lr_scale=0.5, rewarmup=0.3) for m in (first, second)]
    x, y = vectors()
    inside = []
    # registered last, so that it sees what the step itself will see
    optimizer.register_step_pre_hook(lambda o, *_: inside.append(o.param_groups[0]["lr"]))
    for step in range(8):
        optimizer.zero_grad()
        (F.cross_entropy(first(x), y) + F.cross_entropy(second(x), y)).backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5 ** (step // 2)
        scheduler.step()
    assert all(s.phase == "low-rank" for s in sessions)
    # both scale it: half by each, in a ramp of 0.3 · 8 ≈ 2 steps
    assert inside == pytest.approx([0.1, 0.1, 0.05 / 16, 0.05 / 4, 0.025 / 4, 0.025 / 4, 0.0125 / 4, 0.0125 / 4])


def test_a_closure_that_raises_leaves_the_learning_rate_as_scheduled():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, optimizer, E=0, lr_scale=0.5)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("sessions", [1, 2])
def test_after_a_step_that_raises_the_state_dict_and_the_next_step_have_the_scheduled_learning_rate(sessions):
    models, (x, y) = [mlp(seed=i) for i in range(sessions)], vectors()
    optimizer = Failing([p for m in models for p in m.parameters()], lr=0.1)
    attached = [attach(m, optimizer, E=0, lr_scale=0.5) for m in models]
    loaded = copy.deepcopy(optimizer.state_dict())

    def fail():
        sum(F.cross_entropy(m(x), y) for m in models).backward()
        optimizer.fail = True
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        optimizer.fail = False

    def step():
        optimizer.zero_grad()
        sum(F.cross_entropy(m(x), y) for m in models).backward()
        optimizer.step()

    fail()
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.1
    fail()
    step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert [s.clock.step for s in attached] == [1] * sessions
    fail()
    loaded["param_groups"][0]["lr"] = 0.3
    optimizer.load_state_dict(loaded)
    step()
    assert optimizer.param_groups[0]["lr"] == 0.3
    fail()
    for session in attached:
        session.finish()
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert not optimizer._optimizer_state_dict_pre_hooks


# -- the way to decay


class Outside(torch.optim.SGD):
    """Not torch's, so it is tried out; with momentum the two ways differ."""


class Sign(torch.optim.Optimizer):
    """Someone's own, without a name or an option that says how it decays."""

    def __init__(self, params, lr, weight_decay=0.0, maximize=False, on_weights=True, share=1.0):
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "on_weights": on_weights, "share": share},
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"] * group["share"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = -p.grad if group["maximize"] else p.grad
                if not group["on_weights"]:
                    g = g.add(p, alpha=decay)
                else:
                    p.mul_(1 - lr * decay)
                p.sub_(g / (1 + g.abs()), alpha=lr)


class Narrow(torch.optim.AdamW):
    """Cannot be built from groups."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.01, weight_decay=0.1)


class Bare(torch.optim.Optimizer):
    """Knows no decay at all."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


def way(optimizer):
    return way_of_decay(optimizer, optimizer.param_groups[0], torch.device("cpu"))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda ps: Outside(ps, lr=0.1, momentum=0.9, weight_decay=0.1), "gradient"),
        (lambda ps: Outside(ps, lr=0.1, momentum=0.9, nesterov=True, maximize=True), "gradient"),
        (lambda ps: Outer(ps, lr=0.1), "weights"),
        (lambda ps: Sign(ps, lr=0.1), "weights"),
        (lambda ps: Sign(ps, lr=0.1, maximize=True), "weights"),
        (lambda ps: Sign(ps, lr=0.1, on_weights=False), "gradient"),
        (lambda ps: Sign(ps, lr=0.1, on_weights=False, maximize=True), "gradient"),
        (lambda ps: Sign(ps, lr=0.1, share=0.5), None),
        (lambda ps: Sign(ps, lr=0.1, on_weights=False, share=0.5), None),
        (lambda ps: Narrow(nn.ParameterList(ps)), "weights"),
        (lambda ps: Bare(ps, lr=0.1), "gradient"),
    ],
)
def test_how_an_optimizer_decays_is_tried_out(make, expected):
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer, state = make([parameter]), torch.random.get_rng_state()
    assert way(optimizer) == expected
    assert not optimizer.state and torch.equal(parameter, torch.ones(3, 2))
    assert torch.equal(torch.random.get_rng_state(), state)


TIMM = {
    "weights": "adan mars laprop adabelief adoptw adamwlegacy adafactorbv adafactor novogradw madgradw lion lambw sgdw",
    "gradient": "adopt madgrad rmsproptf nadamlegacy",
    "": "lamb lars adamp sgdp adamc lionc novograd lambc adahessian",  # trust ratios, angles, lr² / max_lr
}


@pytest.mark.parametrize(("expected", "name"), [(w, n) for w, names in TIMM.items() for n in names.split()])
def test_how_timms_optimizers_decay(expected, name):
    create = pytest.importorskip("timm.optim").create_optimizer_v2
    assert (way(create(mlp(), opt=name, lr=0.02, weight_decay=0.05)) or "") == expected


def test_memory_on_the_parameters_themselves_is_refused_before_anything_is_changed():
    create = pytest.importorskip("timm.optim").create_optimizer_v2
    model, (x, _) = mlp(), vectors()
    optimizer = create(model, opt="adahessian", lr=0.01)
    policy = fxrank.Pufferfish(E=0, ratio=0.25)
    text = "Adahessian keeps 'hess' on the parameters themselves. Use another optimizer, or factorize first"
    with pytest.raises(TypeError, match=re.escape(text)):
        fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=4, policy=policy)
    assert type(model[2]) is nn.Linear and not optimizer._optimizer_step_post_hooks
    for built in (Outer(model.parameters()), torch.optim.SGD(model.parameters())):
        assert put_on_parameters(built) == []


@pytest.mark.parametrize("name", ["adan", "laprop", "adabelief", "adamwlegacy", "novogradw", "adafactorbv"])
def test_frobenius_decay_with_timms_optimizers_has_its_strength(name):
    create, lr, decay = pytest.importorskip("timm.optim").create_optimizer_v2, 0.01, 0.1

    def stepped(frobenius_decay, own):
        model, (x, y) = mlp(dtype=torch.float64), vectors(dtype=torch.float64)
        optimizer = create(model, opt=name, lr=lr, weight_decay=own, filter_bias_and_bn=False)
        session = fxrank.LowRankSession.attach(
            model,
            optimizer,
            example_inputs=x,
            total_steps=4,
            policy=fxrank.Pufferfish(E=0, ratio=0.25, frobenius_decay=frobenius_decay),
        )
        u, v = model[2].u.weight.detach().clone(), model[2].v.weight.detach().clone()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert session.notes == []
        return u, v, model[2].u.weight.detach() - u

    u, v, change = stepped("auto", decay)
    _, _, without = stepped(None, 0.0)
    pull = -lr * decay * v.T @ v @ u
    # the two differ by lr · decay in relation to the update, no more
    torch.testing.assert_close(change - without, pull, rtol=0, atol=0.02 * float(pull.norm()))


def test_an_optimizer_with_its_own_way_keeps_its_decay_and_a_note_says_so():
    def trained(frobenius_decay):
        model = mlp()
        optimizer = Sign(model.parameters(), lr=0.01, weight_decay=0.1, share=0.5)
        session = attach(model, optimizer, frobenius_decay=frobenius_decay)
        train(model, optimizer, 6)
        return session, list(model.parameters())

    session, weights = trained("auto")
    _, expected = trained(None)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    (note,) = session.notes
    assert note == "2, 4: Sign decays weights in a way of its own; its decay stays, without Frobenius decay"
