"""Training runs that end in the middle, and begin anew from their folder."""

import warnings

import torch
import torch.nn.functional as F
from nets import SOON, ConvNet, mlp, sgd
from torch.utils.data import DataLoader, TensorDataset

import fxrank

EPOCHS, STEPS = 4, 5


class Killed(BaseException):
    pass


def points(make=None):
    generator = torch.Generator().manual_seed(3)
    shape = (40, 3, 8, 8) if make is ConvNet else (40, 12)
    return TensorDataset(torch.randn(shape, generator=generator), torch.randint(4, (40,), generator=generator))


def shuffled(make=None):
    return DataLoader(points(make), 8, shuffle=True)


def run(folder, seed=0, die=None, make=mlp, loader=shuffled, optimizer=sgd, scheduler=None, policy=SOON, **options):
    """One call; with `die`, it ends after as many losses."""
    torch.manual_seed(0)
    model = make(seed)
    optimizer = None if optimizer is None else optimizer(model)
    losses = 0

    def loss_fn(outputs, targets):
        nonlocal losses
        losses += 1
        if losses == die:
            raise Killed
        return F.cross_entropy(outputs, targets)

    defaults = {"epochs": EPOCHS, "val_loader": DataLoader(points(make), 20), "checkpoint_every": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        return fxrank.auto_lowrank(
            model,
            loader(make),
            optimizer=optimizer,
            scheduler=None if scheduler is None else scheduler(optimizer),
            loss_fn=loss_fn,
            policy=policy,
            device="cpu",
            progress=False,
            output_dir=folder,
            resume=True,
            **(defaults | options),
        )
