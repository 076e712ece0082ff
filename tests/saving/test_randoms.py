"""Generators in the user's objects: which are found, and that nothing of the user's runs on the way."""

import random

import numpy as np
import torch
from torch import nn

from fxrank.saving.random_state import generators_of, random_state, restore_random


class Holder:
    def __init__(self, **attributes):
        vars(self).update(attributes)


class Proxy:
    """Answers for any attribute."""

    __slots__ = ("rng",)

    def __getattr__(self, name):
        raise RuntimeError(name)


def test_each_is_found_once_by_its_shortest_way():
    rng, noise = random.Random(1), torch.Generator()
    inner = Holder(rng=rng, late=np.random.RandomState(2), module=random, cls=Holder, system=random.SystemRandom())
    inner.myself = inner
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].noise = noise
    found = generators_of([Holder(parts=[{"a": (inner,)}], again=inner), model, [Proxy()], None, [*range(5000), rng]])
    assert found == {"0.again.rng": rng, "0.again.late": inner.late, "1._modules.1.noise": noise}


def test_all_states_come_back_but_those_of_late_ones():
    holder = Holder(rngs=[np.random.default_rng(1), random.Random(2), np.random.RandomState(3), torch.Generator()])
    numpys, pythons, older, torchs = holder.rngs

    def draw():
        ours = [numpys.normal(), pythons.random(), older.rand(), torch.rand(1, generator=torchs).item()]
        return [*ours, random.random(), np.random.rand(), torch.rand(1).item()]

    state = random_state([holder])
    first = draw()
    holder.late = random.Random(4)
    late = holder.late.getstate()
    restore_random(state, [holder])
    assert draw() == first
    assert holder.late.getstate() == late
