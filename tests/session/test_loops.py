"""`LowRankSession` in plain loops: with accumulation, a gradient scaler, frozen layers, an optimizer of some parameters."""

import copy
import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as F
from nets import BERT, HALFWAY, ConvNet, Net, attach, clusters, images, mlp, train, vectors
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fxrank


def plain_loop(session_options=None, steps=12, accumulate=1, scaler=False, model=None, optimizer=None):
    torch.manual_seed(0)
    model = Net() if model is None else model
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        if optimizer is None
        else optimizer(model)
    )
    x, y = clusters()
    options = {"example_inputs": (x[:8], y[:8]), "total_steps": steps, "policy": HALFWAY} | (session_options or {})
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
    assert torch.equal(session.graph_module.eval()(clusters()[0]), model.eval()(clusters()[0]))
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
        model, optimizer, example_inputs=clusters()[0][:4], total_steps=8, steps_per_epoch=4, policy=policy
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
    x, y = clusters()
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=x[:8], total_steps=6, policy=HALFWAY)
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


def test_attach_refuses_before_it_touches_anything():
    x = clusters()[0][:4]

    def refused(error, text, *, model=None, optimizer=None, **options):
        model = Net() if model is None else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(error, match=re.escape(text)):
            fxrank.LowRankSession.attach(
                model, optimizer, **({"example_inputs": x, "total_steps": 10, "policy": HALFWAY} | options)
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


class Checkpointed(nn.Module):
    """Blocks that keep no activations in training: `none`, as they are; `again`, computed a second time."""

    def __init__(self, how):
        super().__init__()
        self.inlet, self.head, self.how = nn.Linear(12, 24), nn.Linear(24, 4), how
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Dropout(0.1), nn.Linear(48, 24)) for _ in range(3)
        )

    def forward(self, x):
        x = self.inlet(x)
        for block in self.blocks:
            if self.how == "sequential":
                x = x + checkpoint_sequential(block, 2, x, use_reentrant=False)
            elif self.how == "none":
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return self.head(x)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "sequential"])
def test_gradient_checkpointing_changes_nothing(how):
    (x, y), runs = vectors(16), []
    for kind in ("none", how):
        torch.manual_seed(0)
        model = Checkpointed(kind)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        policy = fxrank.Pufferfish(E=4, K=0, ratio=0.25)
        session = attach(model, optimizer, policy, x, steps_per_epoch=1)
        torch.manual_seed(1)
        runs.append(train(model, optimizer, 10, (x, y)))
        assert len(session.finish().R) == 6 and session.graph_module.leaves == {}
    assert runs[0] == runs[1]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_of_transformers():
    transformers = pytest.importorskip("transformers")
    tokens, runs = torch.arange(32).view(4, 8) % 50, []
    for again in (False, True):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, num_labels=3)).train()
        if again:
            model.gradient_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        session = attach(
            model,
            optimizer,
            fxrank.Pufferfish(E=3, K=0, ratio=0.25),
            {"input_ids": tokens},
            total_steps=6,
            steps_per_epoch=1,
        )
        torch.manual_seed(1)
        losses = []
        for _ in range(6):
            loss = model(input_ids=tokens, labels=torch.tensor([0, 1, 2, 0])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append((losses, session.finish().R))
    assert runs[0] == runs[1] and runs[0][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_scaler_and_channels_last(dtype):
    torch.manual_seed(0)
    model, (x, y) = ConvNet().to(memory_format=torch.channels_last), images()
    x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=dtype is torch.float16)
    session = attach(
        model, optimizer, fxrank.Pufferfish(E=3, ratio=0.25), x, total_steps=8, steps_per_epoch=1, amp=dtype
    )
    losses = []
    for _ in range(8):
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert session.finish().R == {"conv2": 2, "conv3": 4} and session.plan.switch_step == 3
    assert model.conv3.u.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype):
    (x, y), runs = vectors(), []
    for default in (torch.float32, dtype):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        torch.set_default_dtype(default)
        try:
            session = attach(model, optimizer, HALFWAY)
            losses = train(model, optimizer, 10, (x, y))
        finally:
            torch.set_default_dtype(torch.float32)
        runs.append((losses, session.finish(), session.scene.monitor.curves))
    assert runs[0] == runs[1] and runs[0][1].switch_step == 5


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_inside_autocast_is_the_step_outside_of_it(closure):
    (x, y), runs = images(), []
    for inside in (False, True):
        torch.manual_seed(0)
        model = ConvNet()
        average = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        session = attach(model, optimizer, dataclasses.replace(HALFWAY, extra_bn=True), x, followers=[average])

        def loss_of(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            with torch.autocast("cpu", enabled=False):
                loss.backward()
            return loss

        for _ in range(8):
            if not closure:
                loss_of()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step(*[loss_of] * closure)
        assert session.finish().switch_step == 5
        state = [*model.state_dict().values(), *average.state_dict().values()]
        runs.append([*state, *(moment for state in optimizer.state.values() for moment in state.values())])
    assert all(map(torch.equal, *runs))


def test_weights_keep_their_precision_inside_autocast():
    model, x = mlp(), vectors()[0]
    small = fxrank.factorize(model, x, rank=0.25)
    with torch.autocast("cpu", torch.bfloat16):
        again, dense = fxrank.factorize(model, x, rank=0.25), fxrank.merge(small)
    assert torch.equal(dense[2].weight, fxrank.merge(small)[2].weight)
    assert all(map(torch.equal, again.parameters(), small.parameters()))
