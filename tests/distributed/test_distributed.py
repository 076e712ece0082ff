"""Several processes on gloo, with torch's own DistributedDataParallel: real groups, not simulated ones."""

import hashlib
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import UNTIMED, ConvNet, mlp, vectors
from teams import team
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import fxrank
from fxrank.demo import DigitsNet
from fxrank.distributed.ddp import wrapper_around
from fxrank.distributed.team import Team, gradient_bytes
from fxrank.passes.profiling.clock import times_of
from fxrank.passes.profiling.timing import Profiler

PUFFERFISH = fxrank.Pufferfish(E=4, K=0, ratio=0.25)
STEPS = 10


class WithUnused(nn.Module):
    """A branch that no call takes."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = mlp(), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def digest(model, optimizer):
    """One number for all parameters and all optimizer state, to the last bit."""
    tensors = [p.detach() for p in model.parameters()]
    for p in model.parameters():
        tensors += [v for _, v in sorted(optimizer.state.get(p, {}).items()) if isinstance(v, torch.Tensor)]
    return hashlib.sha256(b"".join(t.double().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def part_of(rank, size, count=32):
    """This process's share of the data, and all of it."""
    x, y = vectors(count)
    return (x[rank::size], y[rank::size]), (x, y)


def run(rank, size, options):
    """Train in this process. Returns plain data about the end."""
    torch.manual_seed(0)
    build = {"mlp": mlp, "conv": ConvNet, "unused": WithUnused}[options.get("model", "mlp")]
    model = build().double() if options.get("double") else build()
    wrapper = DistributedDataParallel(model, **options.get("ddp", {}))
    hook = options.get("hook")
    if hook == "fp16":
        wrapper.register_comm_hook(None, default_hooks.fp16_compress_hook)
    state = None
    if hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        wrapper.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = (
        torch.optim.AdamW(wrapper.parameters(), lr=1e-2)
        if options.get("adamw")
        else torch.optim.SGD(wrapper.parameters(), lr=0.05, momentum=0.9)
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    (x, y), _ = part_of(rank, size)
    if options.get("model") == "conv":
        x = torch.randn(len(x), 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    if options.get("double"):
        x = x.double()
    given = model if options.get("inner") else wrapper
    session = fxrank.LowRankSession.attach(
        given,
        optimizer,
        example_inputs=x,
        total_steps=STEPS,
        steps_per_epoch=1,
        policy=options.get("policy", PUFFERFISH),
        keep_comm_hooks=options.get("keep", True),
    )
    calls, digests = [], []
    wrapper.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=options.get("set_to_none", True))
        if options.get("accumulate"):
            half = len(x) // 2
            with wrapper.no_sync():
                (F.cross_entropy(wrapper(x[:half]), y[:half]) / 2).backward()
            (F.cross_entropy(wrapper(x[half:]), y[half:]) / 2).backward()
        else:
            F.cross_entropy(wrapper(x), y).backward()
        optimizer.step()
        scheduler.step()
        digests.append(digest(model, optimizer)[:4])
    plan = session.finish()
    return {
        "digests": digests,
        "digest": digest(model, optimizer),
        "plan": plan.to_json(),
        "R": plan.R,
        "parameters": {n: p.detach().double().tolist() for n, p in model.named_parameters()},
        "keys": list(wrapper.state_dict()),
        "training": wrapper.training,
        "calls": len(calls),
        "hooks": [hook.__name__ for hook, _ in wrapper._comm_hooks],
        "compressed": state is not None and bool(state.q_memory_dict),
        "notes": session.notes,
        "curves": session.scene.monitor.curves if session.scene.monitor else None,
    }


def alone(options):
    """The same training in this process, on all of the data."""
    torch.manual_seed(0)
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    _, (x, y) = part_of(0, 1)
    x = x.double()
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=STEPS, steps_per_epoch=1, policy=options["policy"]
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return session.finish(), {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("size", [2, 4])
def test_processes_train_what_one_would_and_agree_to_the_last_bit(size):
    found = team(run, size, {"double": True, "policy": PUFFERFISH})
    assert len({f["digest"] for f in found}) == 1
    plan, parameters = alone({"policy": PUFFERFISH})
    assert found[0]["R"] == plan.R == {"2": 4, "4": 4}
    for name, value in parameters.items():
        mean = torch.tensor(found[0]["parameters"][name], dtype=torch.float64)
        torch.testing.assert_close(mean, value, rtol=0, atol=1e-10)  # float64, sums in another order
    assert found[0]["calls"] == STEPS and found[0]["training"]
    assert all(key.startswith("module.") for key in found[0]["keys"])


OPTIONS = {
    "static graph": {"ddp": {"static_graph": True}},
    "unused parameters": {"model": "unused", "ddp": {"find_unused_parameters": True}},
    "bucket views": {"ddp": {"gradient_as_bucket_view": True}, "set_to_none": False},
    "no_sync": {"accumulate": True},
    "buffers of their own": {"model": "conv", "ddp": {"bucket_cap_mb": 1}},
    "the model without its wrapper": {"inner": True},
    "AdamW": {"adamw": True},
    "fp16 hook": {"hook": "fp16"},
    "PowerSGD": {"hook": "powersgd"},
    "PowerSGD, then plain": {"hook": "powersgd", "keep": False},
    "ranks watched": {
        "policy": fxrank.Cuttlefish(
            speedup_threshold=None, window=2, epsilon=100.0, wait=False, rank_metric="ratio", ratio=0.25
        )
    },
    "extra BatchNorm": {"model": "conv", "policy": fxrank.Pufferfish(E=4, K=0, ratio=0.25, extra_bn=True)},
    "within a target": {"policy": fxrank.Pufferfish(E=4, K=0, target_params=0.7)},
    "stacks timed": {
        "policy": fxrank.Cuttlefish(
            rank_metric="scaled_stable_rank", window=2, epsilon=100.0, speedup_threshold=0.01, wait=False, xi=0.3
        )
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_outlive_the_switch(name):
    options = OPTIONS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = team(run, 2, options)
    assert found[0]["digest"] == found[1]["digest"]
    assert found[0]["plan"] == found[1]["plan"]
    assert found[0]["curves"] == found[1]["curves"]
    if name != "stacks timed":  # who knows what pays here
        assert found[0]["R"]
    hook = {"fp16": "fp16_compress_hook", "powersgd": "powerSGD_hook"}.get(options.get("hook"))
    assert found[0]["hooks"] == ([hook] if hook and options.get("keep", True) else [])
    assert found[0]["compressed"] == (options.get("hook") == "powersgd")
    whole = "the training step was not timed as a whole: several processes make it"
    assert found[0]["notes"] == found[1]["notes"] == ([whole] if name == "stacks timed" and found[0]["R"] else [])


class Averages(nn.Module):
    """Talks to the other processes in each forward in training, as SyncBatchNorm does."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        x = self.inner(x)
        if self.training:
            dist.all_reduce(x.detach().mean(0))
        return x


def timed(rank, size):
    Profiler.times = lambda self, layer, ranks: times_of([[1.0, *[0.5] * len(ranks)]] * 3, "clock")
    torch.manual_seed(0)
    wrapper, (mine, _) = DistributedDataParallel(Averages()), part_of(rank, size)
    optimizer = torch.optim.SGD(wrapper.parameters(), 0.1)
    policy = fxrank.Cuttlefish(rank_metric="ratio", ratio=0.25, latest=0.5, epsilon=1e-9, round_to=1)
    with fxrank.LowRankSession.attach(
        wrapper, optimizer, example_inputs=mine[0], total_steps=STEPS, policy=policy
    ) as session:
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(wrapper(mine[0]), mine[1]).backward()
            optimizer.step()
    return session.plan.R, session.share, session.notes


def test_no_process_waits_for_others_in_a_model_that_it_times_alone():
    for ranks, share, notes in team(timed, 2):
        assert ranks and share is None
        assert notes == ["the training step was not timed as a whole: several processes make it"]


def called_once(rank, size, folder):
    """`auto_lowrank` on a wrapped model, each process with its share of the data."""
    torch.manual_seed(0)
    (x, y), _ = part_of(rank, size, 64)
    wrapper = DistributedDataParallel(mlp())
    result = fxrank.auto_lowrank(
        wrapper,
        [(x[:16], y[:16]), (x[16:], y[16:])],
        epochs=3,
        val_loader=[(x, y)],
        policy=fxrank.Pufferfish(E=1, K=0, ratio=0.25),
        seed=0,
        progress=True,
        output_dir=folder,
    )
    assert result.model is wrapper
    last = result.history[-1]
    return {
        "digest": digest(wrapper.module, torch.optim.SGD(wrapper.parameters())),
        "R": fxrank.plan_of(wrapper).R,
        "means": [last[k] for k in ("loss", "accuracy", "val_loss", "val_accuracy")],
        "gradients": result.report.gradient_bytes,
    }


def test_the_one_call_takes_a_wrapped_model(tmp_path):
    first, second = team(called_once, 2, str(tmp_path))
    assert first == second
    assert first["R"] == {"2": 4, "4": 4}
    assert first["gradients"] == {"full-rank": 4 * 820, "low-rank": 4 * 564}
    loaded = fxrank.load(mlp(), tmp_path)
    assert digest(loaded, torch.optim.SGD(loaded.parameters())) == first["digest"]


@pytest.mark.slow
def test_the_command_runs_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fxrank", "train"]
    arguments = ["--model", "digits", "--data", "digits", "--epochs", "1", "--policy", "spectral-init", "--quiet"]
    done = subprocess.run(
        [*command, *arguments, "--output", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("policy SpectralInit: E = 0 of 1 epochs") == 1  # the first process speaks
    assert fxrank.plan_of(fxrank.load(DigitsNet(), tmp_path)).R


def fails_in_the_first(rank, size):
    model = mlp()
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    session = fxrank.LowRankSession.attach(
        wrapper, optimizer, example_inputs=torch.randn(4, 12), total_steps=9, steps_per_epoch=1, policy=UNTIMED
    )
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    try:
        session.step() if session.scene.monitor.steps[-1] != 0 else session._observe()
    except fxrank.NonFiniteWeightError as error:
        return str(error)
    return "nothing was raised"


def test_an_error_of_the_first_process_is_raised_in_all():
    texts = team(fails_in_the_first, 2)
    assert texts[0] == texts[1]
    assert "'2'" in texts[0]


def without_wrapper(rank, size):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = vectors()
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=3, steps_per_epoch=1, policy=fxrank.Pufferfish(E=1, K=0)
    )
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
        optimizer.step()
    return session.notes, digest(model, optimizer)


def test_who_averages_by_hand_is_told_to_go_on():
    (notes, first), (_, second) = team(without_wrapper, 2)
    assert notes == ["no DistributedDataParallel holds the model: average the gradients of its factors yourself"]
    assert first == second


def test_data_parallel_is_the_model_in_it():
    model = mlp()
    assert Team.of(nn.DataParallel(model)).model is model


def test_alone_nothing_is_sent():
    one = Team.of(mlp())
    assert (one.size, one.is_first, one.rewrap(one.model.parameters())) == (1, True, None)
    assert one.agree(lambda: 3) == 3
    assert wrapper_around(one.model) is None
    with pytest.raises(ZeroDivisionError):
        one.agree(lambda: 1 // 0)


def test_gradient_bytes():
    model = nn.Linear(3, 2).double()
    assert gradient_bytes(model) == 8 * 8
    model.bias.requires_grad_(False)
    assert gradient_bytes(model) == 6 * 8
