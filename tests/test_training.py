"""`LowRankSession` in plain loops, and `auto_lowrank`."""

import copy
import json
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxrank
from fxrank.batches import run_batch, split_batch, to_device


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.body, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, classes)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def data(count=48, classes=3):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, classes, (count,), generator=generator)
    x = torch.randn(classes, 2, 6, 6, generator=generator)[y] + 0.3 * torch.randn(count, 2, 6, 6, generator=generator)
    return x, y


def loader(batch=8, **options):
    return DataLoader(
        TensorDataset(*data()), batch, shuffle=True, generator=torch.Generator().manual_seed(0), **options
    )


# No clock in these tests: the same plan every time.
POLICY = fxrank.Cuttlefish(speedup_threshold=None, round_to=1, rank_metric="ratio", ratio=0.25, latest=0.5)


def plain_loop(session_options=None, steps=12, accumulate=1, scaler=False, model=None, optimizer=None):
    torch.manual_seed(0)
    model = Net() if model is None else model
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        if optimizer is None
        else optimizer(model)
    )
    x, y = data()
    options = {"example_inputs": (x[:8], y[:8]), "total_steps": steps, "policy": POLICY} | (session_options or {})
    session = fxrank.LowRankSession.attach(model, optimizer, **options)
    losses = []
    for i in range(steps * accumulate):
        part = slice(8 * (i % 6), 8 * (i % 6) + 8)
        loss = F.cross_entropy(model(x[part]), y[part]) / accumulate
        loss.backward()
        losses.append(float(loss.detach()))
        if (i + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model, optimizer, session, losses


def test_the_switch_happens_in_a_loop_that_knows_nothing_of_it():
    events = []
    model, optimizer, session, losses = plain_loop({"listener": lambda event, s: events.append((event, s.phase))})
    assert events == [("before_switch", "full-rank"), ("after_switch", "low-rank")]
    assert session.phase == "low-rank"
    assert session.clock.step == 12
    assert session.plan.switch_step == 6
    assert session.plan.R == {"body": 4}
    assert isinstance(model.body, fxrank.LowRankConv2d)
    assert model.body.u.weight in optimizer.state
    assert torch.equal(session.graph_module.eval()(data()[0]), model.eval()(data()[0]))
    assert session.finish() is session.plan
    assert all(math.isfinite(loss) for loss in losses)
    assert len(session.step_ms["full-rank"]) + len(session.step_ms["low-rank"]) == 12
    before = session.clock.step
    optimizer.step()
    assert session.clock.step == before  # the hooks are off


def test_accumulation_counts_optimizer_steps():
    _, _, session, _ = plain_loop(accumulate=3)
    assert session.clock.step == 12
    assert session.plan.switch_step == 6


def test_explicit_steps_per_epoch():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    policy = fxrank.Pufferfish(E=0.5, K=1)
    with fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=data()[0][:4], total_steps=8, steps_per_epoch=4, policy=policy
    ) as session:
        assert not session.step()
        for _ in range(2):
            optimizer.step()
        assert session.step()
    assert session.plan.E == 0.5


def test_partial_optimizers_and_frozen_layers():
    model = Net()
    model.body.requires_grad_(False)
    model, optimizer, session, _ = plain_loop(model=model, optimizer=lambda m: torch.optim.Adam(m.head.parameters()))
    assert isinstance(model.body, fxrank.LowRankConv2d)
    assert not any(p.requires_grad for p in model.body.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 2
    assert session.plan.R == {"body": 4}


def test_a_gradient_scaler_does_not_mind():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    x, y = data()
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=x[:8], total_steps=6, policy=POLICY)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(6):
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert session.phase == "low-rank"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_frobenius_decay_shrinks_the_product_not_the_factors():
    norms = {}
    for strength in (None, 5.0):
        policy = fxrank.SpectralInit(ratio=0.25, frobenius_decay=strength)
        model, _, session, _ = plain_loop(
            {"policy": policy}, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.02)
        )
        assert session.plan.switch_step == 0
        norms[strength] = float(model.body.weight.detach().norm())
    assert norms[5.0] < 0.7 * norms[None]


def test_a_session_that_factorized_nothing_says_so_loudly():
    _, _, session, _ = plain_loop({"policy": fxrank.Cuttlefish(speedup_threshold=None, epsilon=1e-9, latest=None)})
    with pytest.warns(
        fxrank.NothingFactorizedWarning,
        match=re.escape("nothing was factorized (the policy did not switch within 12 of 12 steps)"),
    ) as caught:
        plan = session.finish()
    assert "body (conv2d): no switch within 12 steps; its rank had not settled" in str(caught[0].message)
    assert plan.R == {}
    assert plan.E is None
    _, _, session, _ = plain_loop({"policy": fxrank.FullRank()})
    assert session.finish().note == "full rank as asked"


@pytest.mark.parametrize("stop", [3, 9])
def test_state_dict_brings_a_fresh_session_to_the_same_point(stop, tmp_path):
    x, y = data()

    def steps(model, optimizer, first, last):
        for i in range(first, last):
            part = slice(8 * (i % 6), 8 * (i % 6) + 8)
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return (
            model,
            optimizer,
            fxrank.LowRankSession.attach(model, optimizer, example_inputs=x[:8], total_steps=12, policy=POLICY),
        )

    model, optimizer, session = fresh()
    steps(model, optimizer, 0, stop)
    torch.save(session.state_dict(), tmp_path / "session.pt")
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, stop, 12)
    again, again_optimizer, again_session = fresh()
    with torch.no_grad():
        for p in again.parameters():
            p.add_(1)  # whatever it was: the checkpoint counts
    again_session.load_state_dict(torch.load(tmp_path / "session.pt", weights_only=True))
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    steps(again, again_optimizer, stop, 12)
    assert again_session.plan.R == session.plan.R
    assert again_session.clock == session.clock
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(fxrank.FxrankError, match="session state must have version 1 or 2; got 7"):
        again_session.load_state_dict({"version": 7})


def test_attach_refuses_before_it_touches_anything():
    x = data()[0][:4]

    def refused(error, text, *, model=None, optimizer=None, **options):
        model = Net() if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=re.escape(text)):
            fxrank.LowRankSession.attach(
                model, optimizer, **({"example_inputs": x, "total_steps": 10, "policy": POLICY} | options)
            )
        assert all(torch.equal(v.nan_to_num(), state[k].nan_to_num()) for k, v in model.state_dict().items())
        assert not optimizer._optimizer_step_post_hooks

    bad = Net()
    with torch.no_grad():
        bad.body.weight[0] = torch.nan
    refused(fxrank.NonFiniteWeightError, "'body' holds 144 NaN or infinite values of 2304", model=bad)
    refused(ValueError, "none of them of Net", optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    refused(ValueError, "total_steps and steps_per_epoch must be at least 1; got 0 and 0", total_steps=0)
    refused(fxrank.TraceError, "Net failed in 'stem' (Conv2d)", example_inputs=torch.randn(4, 5, 6, 6))
    refused(fxrank.NothingToFactorizeError, "0 of 3 are:", exclude="body")
    refused(ValueError, "policy must be one of", policy="cuttle")


# -- batches


def test_losses_are_inferred():
    x, y = data()
    net = Net()
    outcome = run_batch(net, (x, y), None)
    assert torch.equal(outcome.loss, F.cross_entropy(net(x), y))
    assert outcome.examples == outcome.predictions == 48
    assert outcome.correct == (net(x).argmax(1) == y).sum()
    target = torch.randn(48, 3)
    assert torch.equal(run_batch(net, [x, target], None).loss, F.mse_loss(net(x), target))
    assert run_batch(net, [x, target], None).correct is None
    tokens = torch.randint(0, 5, (2, 7))
    model = nn.Embedding(5, 5)
    found = run_batch(model, (tokens, tokens), None)
    assert torch.equal(found.loss, F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))
    assert found.predictions == 14
    assert torch.equal(run_batch(net, (x, y), lambda out, t: out.sum() * 0 + t.sum()).loss, y.sum().float())


class OwnLoss(nn.Module):
    def __init__(self, attribute):
        super().__init__()
        self.net, self.attribute = Net(), attribute

    def forward(self, pixels, labels=None):
        logits = self.net(pixels["image"])
        out = {"loss": F.cross_entropy(logits, labels), "logits": logits}
        return SimpleNamespace(**out) if self.attribute else out


@pytest.mark.parametrize("attribute", [False, True])
def test_models_with_their_own_loss(attribute):
    x, y = data()
    outcome = run_batch(OwnLoss(attribute), {"pixels": {"image": x}, "labels": y}, None)
    assert outcome.loss.requires_grad
    assert outcome.predictions == 48


@pytest.mark.parametrize(
    ("batch", "loss_fn", "error", "text"),
    [
        (data()[0], None, TypeError, "the loss can be inferred for batches (inputs, targets)"),
        (
            (data()[0], torch.zeros(48, 2)),
            None,
            ValueError,
            "got outputs (48, 3) and targets (48, 2). Pass loss_fn(outputs, targets).",
        ),
        (
            (data()[0], torch.zeros(48, 2, dtype=torch.long)),
            None,
            ValueError,
            "one more output dimension (classes); got outputs (48, 3)",
        ),
        (data(), lambda out, t: out, TypeError, "loss_fn must return a scalar tensor; got Tensor(48, 3) float32."),
        ((data()[0], data()[0], data()[1]), None, TypeError, "the batch must fit Net.forward(x); got"),
    ],
)
def test_batch_errors(batch, loss_fn, error, text):
    if error is TypeError and "must fit" in text:
        batch = ((batch[0], batch[1]), batch[2])

        class Three(Net):
            def forward(self, a, b, c):
                return a

        with pytest.raises(error, match=re.escape("the batch must fit Three.forward(a, b, c)")):
            run_batch(Three(), batch, loss_fn)
        return
    with pytest.raises(error, match=re.escape(text)):
        run_batch(Net(), batch, loss_fn)


def test_splitting_and_moving():
    assert split_batch((1, 2)) == (1, 2)
    assert split_batch((1, 2, 3)) == ((1, 2), 3)
    assert split_batch([1]) == (1, 1)
    moved = to_device({"a": [torch.ones(1), "text"]}, torch.device("cpu"))
    assert moved["a"][1] == "text"


# -- auto_lowrank


def test_two_arguments_are_enough(capsys, monkeypatch):
    monkeypatch.setattr("fxrank.trainer.DEFAULT_EPOCHS", 2)
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        result = fxrank.auto_lowrank(model, loader())
    assert result.model is model
    assert "training for 2 epochs of 6 steps" in capsys.readouterr().out


def run(model=None, policy=POLICY, **options):
    torch.manual_seed(0)
    model = Net() if model is None else model
    return fxrank.auto_lowrank(
        model, loader(), **({"epochs": 4, "seed": 0, "progress": False, "policy": policy, "device": "cpu"} | options)
    )


def test_a_whole_run(tmp_path, capsys):
    result = run(val_loader=[data()], output_dir=tmp_path)
    assert capsys.readouterr() == ("", "")
    assert result.plan.E == 2
    assert result.plan.R == {"body": 4}
    calls = [str(n.target) for n in result.graph_module.graph.nodes if n.op == "call_module"]
    assert calls == ["stem", "norm", "body.u", "body.v", "head"]
    assert [row["phase"] for row in result.history] == ["full-rank", "low-rank", "low-rank", "low-rank"]
    assert set(result.history[0]) == {
        "epoch",
        "phase",
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "lr",
        "step_ms",
        "stable_ranks",
    }
    assert set(result.history[0]["stable_ranks"]) == {"stem", "body", "head"}
    report = result.report
    assert report.parameters_before - report.parameters_after == 16 * 144 - 4 * (16 + 144)
    assert report.macs_before > report.macs_after
    assert report.memory_bytes["full-rank"] > report.memory_bytes["low-rank"] > 0
    assert report.accuracy_before_switch is not None
    assert report.accuracy_after_switch is not None
    assert report.measured_speedup > 0
    assert 0 < report.overhead < 1
    text = str(report)
    for part in (
        "E = 2 of 4 epochs",
        "K = 1",
        "1 of 3 layers factorized",
        "first layer of the graph",
        "parameters",
        "training memory",
    ):
        assert part in text
    expected = {"model.safetensors", "plan.json", "report.json", "report.txt", "ranks.png"}
    assert {p.name for p in tmp_path.iterdir()} == expected
    assert json.loads((tmp_path / "report.json").read_text())["R"] == {"body": 4}
    fresh = fxrank.load(Net(), tmp_path).eval()
    assert torch.equal(fresh(data()[0]), result.model.eval()(data()[0]))
    assert fxrank.plan_of(result.model) == result.plan == fxrank.Plan.load(tmp_path / "plan.json")


def test_the_same_seed_gives_the_same_run_and_a_plan_repeats_it():
    first, second = run(), run()
    repeated = run(policy=first.plan)
    for other in (second, repeated):
        assert other.plan.R == first.plan.R
        assert [r["loss"] for r in other.history] == [r["loss"] for r in first.history]
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    )


def test_my_optimizer_scheduler_and_loss():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen = []

    def loss_fn(outputs, targets):
        seen.append(outputs.shape)
        return F.cross_entropy(outputs, targets, label_smoothing=0.1)

    result = run(model, optimizer=optimizer, scheduler=scheduler, loss_fn=loss_fn)
    assert len(seen) == 24
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**4)
    assert model.body.u.weight in optimizer.state
    assert result.plan.R == {"body": 4}
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(Net().parameters(), lr=0.1))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    run(model, optimizer=optimizer, scheduler=plateau)
    assert plateau.last_epoch == 4


@pytest.mark.parametrize("amp", ["bfloat16", torch.bfloat16, "float16"])
def test_autocast(amp):
    result = run(amp=amp)
    assert result.plan.R == {"body": 4}
    assert result.model.body.u.weight.dtype is torch.float32
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_profiling_runs_in_the_default_policy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        result = run(policy=fxrank.Cuttlefish(speedup_threshold=1e-6, latest=0.5, rank_metric="ratio", ratio=0.25))
    body = result.plan.layer("body")
    assert body.speedup is not None
    assert result.report.seconds["profile"] > 0
    if body.factorized:
        assert body.speedup > 1
        assert body.rank in (4, 8, 16)
    else:
        assert "a pair measured" in body.reason


def test_nothing_factorized_returns_the_trained_model_and_says_so():
    with pytest.warns(fxrank.NothingFactorizedWarning, match="did not switch"):
        result = run(policy=fxrank.Cuttlefish(speedup_threshold=None, epsilon=1e-9, latest=None))
    assert result.plan.R == {}
    assert "NOTHING WAS FACTORIZED" in str(result.report)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert fxrank.plan_of(result.model) == result.plan
    full = run(policy="full-rank")
    assert "NOTHING WAS FACTORIZED" not in str(full.report)


class Endless:
    def __iter__(self):
        while True:
            yield data()[0][:8], data()[1][:8]


def test_one_long_epoch_from_a_stream():
    result = fxrank.auto_lowrank(Net(), Endless(), epochs=1, steps_per_epoch=10, policy=POLICY, progress=False, seed=0)
    assert result.plan.E == 0.5
    assert result.plan.switch_step == 5


def test_refusals_leave_model_and_optimizer_alone():
    def refused(error, text, batches=None, model=None, **options):
        model = Net().eval() if model is None else model
        state = copy.deepcopy(model.state_dict())
        batches = loader() if batches is None else batches
        with pytest.raises(error, match=re.escape(text)):
            fxrank.auto_lowrank(
                model, batches, **({"epochs": 2, "progress": False, "policy": POLICY, "device": "cpu"} | options)
            )
        assert not model.training
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    x, y = data()
    mismatched = [(x, torch.zeros(48, 2))]
    refused(ValueError, "Pass loss_fn(outputs, targets).", batches=mismatched, policy="spectral-init")
    refused(ValueError, "the loader must yield at least one batch; it is empty (length 0)", batches=[])
    refused(
        TypeError,
        "the loader must have a length, so that schedule and switch can be placed; Endless has none. Pass steps_per_epoch=.",
        batches=Endless(),
    )
    refused(TypeError, "got a one-pass generator", batches=(b for b in [(x, y)]), steps_per_epoch=1)
    refused(fxrank.TraceError, "Net failed in 'stem' (Conv2d)", batches=[(x[:, :1], y)])
    refused(
        fxrank.TraceError, "Net failed in 'stem' (Conv2d) with TypeError: conv2d() received", batches=[{"y": x, "z": y}]
    )
    refused(ValueError, "amp must be one of 'bfloat16', 'float16'; got 'half'", amp="half")
    refused(ValueError, "epochs must be at least 1; got 0", epochs=0)
    refused(ValueError, "scheduler_per must be one of 'batch', 'epoch'", scheduler_per="day")
    refused(ValueError, "a scheduler drives one optimizer; got a scheduler without optimizer=", scheduler=object())
    refused(ValueError, "none of them of Net", optimizer=torch.optim.SGD(Net().parameters(), lr=0.1))
    refused(ValueError, "the model must have parameters to train; ReLU has none", model=nn.ReLU().eval())
    refused(fxrank.NothingToFactorizeError, "at least one layer must be factorizable", exclude="body")
