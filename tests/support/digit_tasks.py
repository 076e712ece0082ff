"""Tasks of seconds for the benchmarks' baselines: scikit-learn's digits and tiny networks."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from benchmarks.subjects import tasks
from benchmarks.subjects.models import VGG, ResNet
from benchmarks.subjects.tasks import Task
from benchmarks.subjects.texts import Batches


class ResDigits(ResNet):
    """Two stages, a shortcut of each kind: `(N, 1, 8, 8)` to `(N, 10)`."""

    def __init__(self, width=8):
        super().__init__([width, 2 * width], 2, 10)
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)


class VggDigits(VGG):
    """Three convolutions in a chain: `(N, 1, 8, 8)` to `(N, 10)`."""

    def __init__(self, width=8):
        super().__init__((width, 0, 2 * width, 0, 2 * width, 0), 10)
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.classifier = nn.Linear(2 * width, 10)


def perceptron(width=16, norm=False):
    """`(N, 1, 8, 8)` to `(N, 10)`."""
    inner = [nn.Linear(64, width), *[nn.BatchNorm1d(width)] * norm, nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *inner, nn.Linear(width, 10))


def digits(
    make=ResDigits, *, images=256, batch=32, decay=5e-4, optimizer=None, schedule=tasks.cosine, loss_fn=F.cross_entropy
):
    """A task of `images / batch` steps an epoch, by SGD with momentum and decay."""
    loaded = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(loaded.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(loaded.target)
    test = x[-300:], y[-300:]

    def build(seed):
        torch.manual_seed(seed)
        return make()

    def loaders(seed):
        return Batches((x[:images], y[:images]), batch, shuffle=True, seed=seed), Batches(test, 300, shuffle=False)

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)

    return Task(
        "digits",
        "digits",
        "accuracy",
        2,
        build,
        loaders,
        loss_fn,
        optimizer or sgd,
        schedule,
        lambda epochs: fxrank.FullRank(),
    )


def needs_torch_pruning():
    """Skip where the library that thins networks is not installed."""
    if importlib.util.find_spec("torch_pruning") is None:
        pytest.skip("needs torch-pruning (pip install 'fxrank[runs]')")
