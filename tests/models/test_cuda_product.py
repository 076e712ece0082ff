"""The switch on a GPU, beyond `test_cuda.py`: loss scaling inside fused steps, closures, spread models. Skipped without one."""

import pytest
import torch
import torch.distributed.fsdp
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


def test_a_graphed_model_is_refused_and_may_be_graphed_after_the_switch():
    (x, y), (model, optimizer) = batch(), model_and(torch.optim.SGD)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=4, policy=fxrank.SpectralInit(ratio=0.25)
    )
    session.finish()
    graphed = torch.cuda.make_graphed_callables(model, (x,))
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(graphed(x), y)
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    with pytest.raises(TypeError, match="the whole ConvNet is a graphed callable"):
        fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=4)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_a_capturable_optimizer_goes_through_the_switch_and_its_step_must_not_be_captured(optimizer):
    (x, y), (model, optimizer) = batch(), model_and(optimizer, capturable=True)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=8, steps_per_epoch=1, policy=fxrank.Pufferfish(E=3, ratio=0.25)
    )
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert session.plan.R == {"conv2": 2, "conv3": 4}
    assert all(state["step"].is_cuda for state in optimizer.state.values())
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="this step is being captured"), torch.cuda.graph(graph):
        optimizer.step()
    session.finish()


@pytest.mark.parametrize("engine", ["DistributedDataParallel", "fully_shard"])
def test_engines_on_nccl_with_synchronized_norms(engine, tmp_path):
    """One process: the options and the streams, not the arithmetic of several."""
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        (x, y), model = batch(), torch.nn.SyncBatchNorm.convert_sync_batchnorm(ConvNet().cuda())
        x = x.contiguous()  # shards know no memory format
        if engine == "fully_shard":
            wrapped = torch.distributed.fsdp.fully_shard(model)
        else:
            wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
        policy = fxrank.Pufferfish(E=3, ratio=0.25, extra_bn=True)
        session = fxrank.LowRankSession.attach(
            wrapped, optimizer, example_inputs=x, total_steps=8, steps_per_epoch=1, policy=policy
        )
        losses = []
        for _ in range(8):
            loss = F.cross_entropy(wrapped(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert session.finish().R == {"conv2": 2, "conv3": 4}
        assert losses[-1] < losses[0]
    finally:
        torch.distributed.destroy_process_group()
