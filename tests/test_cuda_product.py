"""The switch on a GPU, beyond `test_cuda.py`: loss scaling inside fused steps, closures, spread models. Skipped without one."""

import pytest
import torch
import torch.nn.functional as F
from nets import ConvNet, images

import fxrank

pytestmark = pytest.mark.cuda


def batch():
    x, y = images(32)
    return x.cuda().contiguous(memory_format=torch.channels_last), y.cuda()


def model_and(optimizer, **options):
    model = ConvNet().cuda().to(memory_format=torch.channels_last)
    return model, optimizer(model.parameters(), lr=1e-2, weight_decay=0.1, **options)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_an_overflown_step_leaves_the_factors_alone(optimizer, fused):
    (x, y), (model, optimizer) = batch(), model_and(optimizer, fused=fused)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=4, policy=fxrank.SpectralInit(ratio=0.25)
    )
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", torch.float16):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    model.head.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert session.plan.R == {"conv2": 2, "conv3": 4}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_auto_lowrank_measures_time_and_memory(amp):
    loader = [tuple(t.cpu() for t in batch())] * 8
    model, optimizer = model_and(torch.optim.AdamW, fused=True)
    policy = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", latest=0.5)
    result = fxrank.auto_lowrank(
        model, loader, epochs=4, optimizer=optimizer, amp=amp, policy=policy, seed=0, progress=False
    )
    assert set(result.plan.R) == {"conv2", "conv3"}
    assert model.conv3.u.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(value > 0 for value in (*result.report.memory_bytes.values(), *result.report.step_ms.values()))
    assert all(torch.isfinite(p).all() for p in model.parameters())
