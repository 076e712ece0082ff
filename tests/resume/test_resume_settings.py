"""What a resumable run may consist of: optimizers, schedulers, policies, loaders."""

import json
import random

import numpy as np
import pytest
import torch
from interrupted import EPOCHS, STEPS, Killed, points, run
from nets import SOON, UNTIMED, ConvNet, Tied, batches, images, mlp
from torch.optim import lr_scheduler
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset

import fxrank
from fxrank.policies.monitor import ReferenceDetector, SlopeDetector
from fxrank.resume.grown import read_whole


def summary(result):
    history = [{k: v for k, v in row.items() if k != "step_ms"} for row in result.history]
    state = {
        n: (v.dtype, v.stride(), v.flatten().tolist()) if isinstance(v, torch.Tensor) else v
        for n, v in result.model.state_dict().items()
    }
    report = result.report
    counts = (report.parameters_before, report.accuracy_before_switch, report.accuracy_after_switch, report.notes)
    return state, result.plan, json.dumps(history), result.curves, counts


def same_when_resumed(tmp_path, deaths, **options):
    whole = run(tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    for number, die in enumerate(deaths):
        with pytest.raises(Killed):
            run(folder, seed=number, die=die, **options)  # every process may begin with other weights
    found, expected = summary(run(folder, seed=9, **options)), summary(whole)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == theirs
    return whole


@pytest.mark.parametrize("die", range(2, 27, 2))
def test_any_step(die, tmp_path):
    result = same_when_resumed(tmp_path, [die])
    assert result.plan.switch_step == 10
    assert result.plan.R == {"2": 4, "4": 4}


OPTIMIZERS = {
    "default": None,
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "groups": lambda m: torch.optim.Adam(
        [
            {"params": [p for p in m.parameters() if p.ndim > 1], "name": "weights"},
            {"params": [p for p in m.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=torch.tensor(0.01),
        weight_decay=0.1,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, tmp_path):
    same_when_resumed(tmp_path, [8, 7], optimizer=OPTIMIZERS[name])


def sequential(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS = {
    "lambda": (lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step), "batch"),
    "milestones": (lambda o: lr_scheduler.MultiStepLR(o, [4, 9, 13]), "batch"),
    "one cycle": (lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=EPOCHS * STEPS), "batch"),
    "restarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3), "batch"),
    "sequential": (sequential, "batch"),
    "plateau": (lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5), "epoch"),
    "epochs": (lambda o: lr_scheduler.StepLR(o, 1, 0.5), "epoch"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tmp_path):
    scheduler, per = SCHEDULERS[name]
    same_when_resumed(tmp_path, [8, 7], scheduler=scheduler, scheduler_per=per)


def by_detector(test):
    return fxrank.Cuttlefish(
        speedup_threshold=None, rank_metric="ratio", ratio=0.25, latest=None, round_to=1, test=test
    )


POLICIES = {
    "slope": (mlp, by_detector(SlopeDetector(4.0, 8))),
    "reference": (mlp, by_detector(ReferenceDetector(1.0, 8, 4))),
    "default": (mlp, UNTIMED),
    "auto rounding": (Tied, fxrank.Cuttlefish(speedup_threshold=None, rank_metric="accumulative", share=0.3)),
    "ramp": (ConvNet, fxrank.Pufferfish(E=2, ratio=0.25, extra_bn=True, lr_scale=0.5, rewarmup=0.3)),
    "decay": (Tied, fxrank.Pufferfish(E=1.6, frobenius_decay=0.05)),
    "freeze": (mlp, fxrank.Pufferfish(E=1.6, freeze=("4.weight",))),
    "spectral": (mlp, fxrank.SpectralInit()),
    "at once": (mlp, fxrank.Cuttlefish(speedup_threshold=None, rank_metric="ratio", latest=0.0)),
    "full rank": (mlp, fxrank.FullRank()),
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name, tmp_path):
    make, policy = POLICIES[name]
    result = same_when_resumed(tmp_path, [8, 7], make=make, policy=policy)
    if name in ("slope", "reference"):
        assert "have settled" in result.plan.note
        assert 8 <= result.plan.switch_step < 20


def test_what_was_timed_decides_after_the_resume_too(tmp_path):
    policy = fxrank.Cuttlefish(speedup_threshold=1.0, latest=0.5)
    with pytest.raises(Killed):
        run(tmp_path, die=8, policy=policy)
    saved = read_whole(tmp_path / "checkpoint.safetensors")
    (profile,) = saved["session"]["profiles"]
    result = run(tmp_path, policy=policy)
    speedup = profile["dense_ms"] / profile["pair_ms"]
    assert result.plan.layer("2").speedup == pytest.approx(speedup, abs=1e-4) or result.plan.layer("2").rank
    again = read_whole(tmp_path / "checkpoint.safetensors")
    assert again["session"]["profiles"] == saved["session"]["profiles"]
    assert again["session"]["seconds"]["profile"] >= saved["session"]["seconds"]["profile"]


class Jitter:
    """Draws from generators of its own, one of which it makes when it is first called."""

    def __init__(self):
        self.rngs = [np.random.default_rng(5), random.Random(6), np.random.RandomState(7)]
        self.late = None

    def __call__(self, x):
        self.late = self.late or torch.Generator().manual_seed(8)
        numpys, pythons, older = self.rngs
        return (
            x + (numpys.normal() + pythons.random() + older.rand()) * 0.01 + torch.rand(12, generator=self.late) * 0.01
        )


class Augmented(torch.utils.data.Dataset):
    def __init__(self):
        self.jitter, self.points = Jitter(), points()

    def __len__(self):
        return len(self.points)

    def __getitem__(self, i):
        x, y = self.points[i]
        return self.jitter(x), y


class Noised(torch.nn.Module):
    """Draws noise from a generator of its own, in training mode."""

    def __init__(self, seed=0):
        super().__init__()
        self.net, self.noise = mlp(seed), torch.Generator().manual_seed(3)

    def forward(self, x):
        return self.net(x + 0.1 * torch.randn(x.shape, generator=self.noise) if self.training else x)


def sampler(make):
    return RandomSampler(points(), replacement=True, generator=torch.Generator().manual_seed(5))


LOADERS = {
    "list": lambda make: batches(STEPS),
    "in order": lambda make: DataLoader(points(), 8),
    "generator": lambda make: DataLoader(points(), 8, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "sampler": lambda make: DataLoader(points(), 8, sampler=sampler(make)),
    "workers": lambda make: DataLoader(points(), 8, shuffle=True, num_workers=2),
    "data set": lambda make: DataLoader(Augmented(), 8, shuffle=True),
    "part of it": lambda make: DataLoader(Subset(ConcatDataset([Augmented()]), range(40)), 8, shuffle=True),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "workers" else []) for n in LOADERS])
def test_loaders(name, tmp_path):
    same_when_resumed(tmp_path, [9, 8], loader=LOADERS[name])


@pytest.mark.slow
def test_workers_that_persist(tmp_path):
    def loader(make):
        return DataLoader(points(), 8, shuffle=True, num_workers=1, persistent_workers=True)

    whole = run(tmp_path / "whole", loader=loader)
    with pytest.raises(Killed):
        run(tmp_path / "killed", die=9, loader=loader)
    result = run(tmp_path / "killed", loader=loader)
    assert result.report.notes == [
        "at step 6 the loader's persistent workers began anew: random numbers drawn in them, for augmentation say, are others than in an uninterrupted run; "
        "with persistent_workers=False they are the same"
    ]
    assert all(map(torch.equal, result.model.state_dict().values(), whole.model.state_dict().values()))


def test_a_model_with_a_generator(tmp_path):
    same_when_resumed(tmp_path, [9, 8], make=Noised)


class Counted(torch.nn.Module):
    """Has a state that is no tensor, and a bias that is another one in memory but not the same parameter."""

    def __init__(self, seed=0):
        super().__init__()
        self.net, self.calls = mlp(seed), 0
        self.net[4].bias = torch.nn.Parameter(self.net[2].bias.data)

    def forward(self, x):
        self.calls += self.training
        return self.net(x) * (1 + 0.01 * self.calls)

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_a_model_with_a_state_that_is_no_tensor(tmp_path):
    found = same_when_resumed(tmp_path, [9, 8], make=Counted)
    assert found.model.calls >= EPOCHS * STEPS


class Learned(torch.nn.Module):
    """A loss with a parameter, a running mean and a generator, which ends the run after as many calls."""

    def __init__(self, die=None):
        super().__init__()
        self.scale, self.die = torch.nn.Parameter(torch.ones(4)), die
        self.register_buffer("mean", torch.zeros(4))
        self.noise, self.calls = torch.Generator().manual_seed(3), 0

    def forward(self, outputs, targets):
        self.calls += 1
        if self.calls == self.die:
            raise Killed
        self.mean.lerp_(outputs.detach().mean(0), 0.1)
        noise = 0.1 * torch.randn(4, generator=self.noise)
        return torch.nn.functional.cross_entropy(outputs * self.scale - self.mean + noise, targets)


def test_a_loss_that_learns(tmp_path):
    def learned(folder, die=None, seed=0):
        torch.manual_seed(0)
        model, loss = mlp(seed), Learned(die)
        optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1, momentum=0.9)
        options = {"optimizer": optimizer, "loss_fn": loss, "policy": SOON, "epochs": EPOCHS, "checkpoint_every": 2}
        options |= {"device": "cpu", "progress": False, "output_dir": folder, "resume": True}
        result = fxrank.auto_lowrank(model, DataLoader(points(), 8, shuffle=True), **options)
        return [v.tolist() for module in (model, loss) for v in module.state_dict().values()], result.plan.R

    whole = learned(tmp_path / "whole")
    for seed, die in enumerate((9, 5)):
        with pytest.raises(Killed):
            learned(tmp_path / "killed", die, seed)
    assert learned(tmp_path / "killed", seed=9) == whole


def test_an_epoch_shorter_than_the_loader(tmp_path):
    same_when_resumed(tmp_path, [5, 4], steps_per_epoch=3, checkpoint_every=1)


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_and_loss_scale(amp, tmp_path):
    same_when_resumed(tmp_path, [9, 8], amp=amp)


FORMATS = {
    "bfloat16": (lambda seed: mlp(seed).bfloat16(), [(x.bfloat16(), y) for x, y in batches(STEPS)]),
    "channels_last": (lambda seed: ConvNet(seed).to(memory_format=torch.channels_last), batches(STEPS, images)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_dtypes_and_memory_formats(name, tmp_path):
    make, data = FORMATS[name]
    same_when_resumed(tmp_path, [9, 8], make=make, loader=lambda _: data, val_loader=data)
