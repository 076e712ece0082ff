"""What only shows on a GPU: events, spectra on the device, autocast, channels_last, fused optimizers. Skipped without one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.profiling.clock import Stopwatch
from fxrank.passes.profiling.timing import Profiler
from fxrank.passes.spectra.exact import decompose, singular_values, stable
from fxrank.passes.spectra.tracked import StableRankTracker

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def _tf32():
    """TF32 on, as users have it: nothing that fxrank writes into weights may suffer from it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("shape", [(1, 64, 576), (1, 300, 100), (4, 32, 72)])
def test_spectra_and_factors_on_the_device(shape):
    weight = torch.randn(shape)
    here, there = singular_values(weight), singular_values(weight.cuda())
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-9)  # float64 on both
    found = decompose(weight.cuda())
    torch.testing.assert_close(found.sigma[:, 0], here[:, 0], rtol=1e-6, atol=0)
    u, v = found.factors(min(shape[1:]))
    assert u.is_cuda
    torch.testing.assert_close((v.double() @ u.double()).cpu(), weight.double(), rtol=0, atol=2e-5)  # float32 factors


def test_tracker_on_the_device():
    stacks = [torch.randn(1, 64, 300), torch.randn(2, 96, 40), torch.zeros(1, 5, 5)]
    exact = [sum(stable(s) for s in singular_values(x)) / len(x) for x in stacks]
    tracker = StableRankTracker()
    for _ in range(3):
        assert tracker([x.cuda() for x in stacks], list("abc")) == pytest.approx(exact, rel=1e-3)


def test_stopwatch_counts_device_time():
    watch = Stopwatch(torch.device("cuda"))
    x = torch.randn(2048, 2048, device="cuda")
    watch.mark()
    for _ in range(20):
        x @ x
    watch.mark()
    (lap,) = (lap.ms for lap in watch.laps())
    assert lap > 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.body, self.head = nn.Conv2d(64, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def test_pairs_in_channels_last_and_autocast():
    conv = nn.Conv2d(64, 64, 3, padding=1).cuda().to(memory_format=torch.channels_last)
    pair = make_pair(conv, 64)
    assert pair.u.weight.is_contiguous(memory_format=torch.channels_last)
    assert pair_error(conv, pair).relative <= 1e-5
    x = torch.randn(4, 64, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        out = pair(x)
    assert out.dtype is torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_profiler_under_autocast():
    model = Net().cuda()
    x = torch.randn(32, 3, 16, 16, device="cuda")
    from fxrank.passes.discovery.discover import discover
    from fxrank.passes.discovery.selection import candidates

    layers = candidates(discover(fxrank.trace(model, x), model), model, include="*")
    times = Profiler(model, torch.device("cuda"), amp=torch.bfloat16).times_ms(layers[1], [16, 32])
    assert len(times) == 3
    assert min(times) > 0


@pytest.mark.parametrize("amp", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_whole_run_on_the_device(amp, fused):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (128,), generator=generator)
    x = torch.randn(10, 3, 16, 16, generator=generator)[y]
    loader = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 128, 32)]
    model = Net().cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=fused)
    policy = fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", latest=0.5)
    result = fxrank.auto_lowrank(
        model, loader, epochs=6, val_loader=loader, optimizer=optimizer, amp=amp, policy=policy, seed=0, progress=False
    )
    assert result.plan.R == {"body": 16}
    assert next(result.model.parameters()).is_cuda
    assert result.model.body.u.weight.dtype is torch.float32
    assert all(torch.isfinite(p).all() for p in result.model.parameters())
    assert result.report.memory_bytes["low-rank"] > 0
    assert result.report.step_ms["full-rank"] > 0
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_default_policy_and_checkpoint_on_the_device(tmp_path):
    model = Net().cuda()
    x = torch.randn(64, 3, 16, 16, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    policy = fxrank.Cuttlefish(speedup_threshold=1e-6, latest=0.1, rank_metric="ratio")
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=20, policy=policy, amp=torch.bfloat16
    )
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.mse_loss(model(x), torch.zeros(64, 10, device="cuda"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert session.plan is not None
    if session.plan.R:
        fxrank.save(model, tmp_path)
        fresh = fxrank.load(Net().cuda(), tmp_path)
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x), rtol=0, atol=0)
