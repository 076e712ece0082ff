"""`auto_lowrank` on small networks and data."""

import torch
from nets import HALFWAY, SOON, Net, batches, clusters
from torch.utils.data import DataLoader, TensorDataset

import fxrank


def run(model, loader=None, **options):
    """Four epochs of four steps; switches half-way."""
    loader = batches() if loader is None else loader
    defaults = {"epochs": 4, "policy": SOON, "device": "cpu", "seed": 0, "progress": False}
    return fxrank.auto_lowrank(model, loader, **(defaults | options))


def shuffled_clusters():
    """Six batches of 8."""
    return DataLoader(TensorDataset(*clusters()), 8, shuffle=True, generator=torch.Generator().manual_seed(0))


def run_net(model=None, policy=HALFWAY, **options):
    """Four epochs of six steps, of `Net`."""
    torch.manual_seed(0)
    model = Net() if model is None else model
    return run(model, shuffled_clusters(), policy=policy, **options)


class Endless:
    """A loader that knows no length."""

    def __iter__(self):
        while True:
            yield clusters()[0][:8], clusters()[1][:8]
