"""Networks whose outputs need few ranks, and runs of them that are up to the switch in a few steps."""

import re

import torch
from live import attached
from nets import train, vectors
from torch import nn

import fxrank

KEEP = fxrank.Cuttlefish(
    keep=0.9,
    floor=0.0,
    speedup_threshold=None,
    window=2,
    epsilon=100.0,
    wait=False,
    latest=None,
    earliest=0.0,
    round_to=1,
    form="channel",
)


class Narrow(nn.Module):
    """Two wide layers between the first and the last, behind three directions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], 1)
        return self.head(torch.tanh(self.third(0.1 * self.second(self.first(x)))))


class Muted(nn.Module):
    """Two equal branches, of which one is hardly heard."""

    def __init__(self, loud=1.0, muted=0.01):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.loud, self.muted = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 4)
        self.scales = loud, muted

    def forward(self, x):
        x = self.first(x)
        return self.last(self.scales[0] * self.loud(x) + self.scales[1] * self.muted(x))


class Normed(Narrow):
    """With BatchNorms, the first of which does not train."""

    def __init__(self):
        super().__init__()
        self.frozen, self.norm = nn.BatchNorm1d(32).eval(), nn.BatchNorm1d(32)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def hidden(self, x):
        x = torch.cat([x[:, :3], torch.zeros_like(x[:, 3:])], 1)
        return self.second(self.frozen(self.first(x)))

    def forward(self, x):
        return self.head(torch.tanh(self.third(0.1 * self.norm(self.hidden(x)))))


def to_the_switch(model, policy=KEEP, total_steps=400, batch=lambda step: vectors(40, step)):
    optimizer, session = attached(model, policy, x=batch(0)[0], total_steps=total_steps)
    for step in range(4):
        if session.plan is None:
            train(model, optimizer, 1, batch(step))
    assert session.plan is not None
    return session


def told(session):
    """What the session says to have kept."""
    note = next(note for note in session.notes if "the model kept" in note)
    return float(re.search(r"kept ([\d.]+) of its outputs", note)[1])
