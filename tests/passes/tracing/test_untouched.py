"""A trace leaves no trace: numbers, attributes and random states are as before, also where the forward itself changes them."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import fxrank

X = torch.randn(6, 8)


def mlp():
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8))


class Momentum(nn.Module):
    """Averages a part of itself in training."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.tail = mlp(), mlp().requires_grad_(False), mlp()
        self.memory = [torch.zeros(8), {"count": torch.zeros(())}]
        self.generator = torch.Generator().manual_seed(3)

    def update(self):
        with torch.no_grad():
            for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
                k.mul_(0.9).add_(q, alpha=0.1)

    def forward(self, x):
        if self.training:
            self.update()
        return self.tail(self.query(x) + self.key(x))


class ByData(Momentum):
    def update(self):
        for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            k.data = k.data  # the same memory under another name
            k.data.lerp_(q.data, 0.1)


class AllAtOnce(Momentum):
    @torch.no_grad()
    def update(self):
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), 0.1)


class Out(Momentum):
    @torch.no_grad()
    def update(self):
        weight = self.key[0].weight
        torch.add(weight, self.query[0].weight, out=weight)


class InAPart(Momentum):
    """The part that writes is not the whole model."""

    def __init__(self):
        super().__init__()
        self.inner = Momentum()

    def update(self):
        pass

    def forward(self, x):
        return self.inner(super().forward(x))


class HeldAside(Momentum):
    def update(self):
        self.memory[0].add_(1)
        self.memory[1]["count"].add_(1)


class Draws(Momentum):
    def update(self):
        random.random()
        np.random.rand()
        torch.rand(2, generator=self.generator)
        torch.rand(3)


class Buffers(Momentum):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(4, 2))

    def update(self):
        for buffer in self.buffers():
            buffer.add_(1)


KINDS = [Momentum, ByData, AllAtOnce, Out, InAPart, HeldAside, Draws, Buffers]
WRITING = [Momentum, ByData, AllAtOnce, InAPart]  # `out=` becomes a node, which writes as the model does


def everything(model):
    """All that may not move, comparable."""
    numbers = [*model.state_dict().values(), model.memory[0], model.memory[1]["count"]]
    states = [torch.get_rng_state(), model.generator.get_state(), torch.from_numpy(np.random.get_state()[1].copy())]
    return [t.clone() for t in (*numbers, *states)], (random.getstate(), np.random.get_state()[2:])


def check_same(before, model):
    after = everything(model)
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]


def attached(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = fxrank.Pufferfish(E=2, ratio=0.25)
    return fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=4, steps_per_epoch=1, policy=policy
    )


CALLS = {
    "trace": lambda model: fxrank.trace(model, X),
    "factorize": lambda model: fxrank.factorize(model, X, rank=2),
    "attach": attached,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_moves(kind, call, training):
    model = kind().train(training)
    ids = [id(p) for p in model.parameters()]
    before = everything(model)
    CALLS[call](model)
    check_same(before, model)
    assert ids == [id(p) for p in model.parameters()] and model.training is training


@pytest.mark.parametrize("kind", WRITING)
def test_who_writes_is_a_leaf_and_its_layers_are_found(kind):
    model = kind().train()
    gm = fxrank.trace(model, X)
    path = "inner" if kind is InAPart else ""
    assert list(gm.leaves) == [path] and "writes into a tensor of the model" in gm.leaves[path]
    assert len(fxrank.factorize(model, X, rank=2, include="*").tail[2].u.weight) == 2
    clone = copy.deepcopy(model)
    assert torch.equal(fxrank.trace(clone, X)(X), model(X))  # which moves both by one and the same update


@pytest.mark.parametrize("training", [True, False])
def test_nothing_moves_when_the_forward_fails_after_it_has_written(training):
    class Fails(Momentum):
        def forward(self, x):
            self.update()
            return super().forward(x) @ torch.zeros(3, 3)

    model = Fails().train(training)
    before = everything(model)
    with pytest.raises(fxrank.TraceError):
        fxrank.trace(model, X)
    check_same(before, model)


def test_nothing_moves_when_an_extra_batchnorm_is_set():
    class Convolutions(Momentum):
        def __init__(self):
            super().__init__()
            self.convolutions = nn.Sequential(*[nn.Conv1d(8, 8, 3, padding=1) for _ in range(3)])

        def forward(self, x):
            return super().forward(self.convolutions(x[:, :, None])[..., 0])

    model = Convolutions().train()
    before = everything(model)
    small = fxrank.factorize(model, X, rank=2, extra_bn=True, exclude=["query*", "key*", "tail*"])
    check_same(before, model)
    assert small.convolutions[1].norm.weight.std() > 0
    assert torch.equal(small.key[0].weight, model.key[0].weight)


class Seen:
    """A user's hook that keeps statistics."""

    def __init__(self):
        self.values = []

    def __call__(self, module, inputs, *output):
        for value in (*inputs, *output):
            self.values.append(float(value.detach().abs().mean()))  # of a real tensor only


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [True, False])
def test_hooks_that_look_on_see_real_values_only_and_stay(call, training):
    model = mlp().train(training)
    seen = Seen()
    handles = [m.register_forward_hook(seen) for m in model.modules()]
    handles += [m.register_forward_pre_hook(seen) for m in model.modules()]
    hooks = [list(m._forward_hooks.values()) for m in model.modules()]
    result = CALLS[call](model)
    real_runs = 0 if call == "factorize" else 1  # a copy of the model has a copy of this object
    assert len(seen.values) == 3 * real_runs * len(handles) / 2
    if call == "trace":
        assert result.leaves == {}
    assert hooks == [list(m._forward_hooks.values()) for m in model.modules()]
    seen.values.clear()
    model(X)
    assert seen.values
    for handle in handles:
        handle.remove()
    seen.values.clear()
    model(X)
    assert not seen.values


def test_hooks_that_compute_are_in_the_graph():
    model = mlp()
    handle = model[2].register_forward_hook(lambda module, inputs, output: output * 3)
    expected = model(X)
    gm = fxrank.trace(model, X)
    assert torch.allclose(gm(X), expected)
    handle.remove()
    assert not torch.allclose(model(X), expected)


def test_a_legacy_norm_goes_on_deriving_its_weight_beside_a_hook_that_looks_on():
    model = mlp()
    with pytest.warns(FutureWarning, match="deprecated"):
        nn.utils.weight_norm(model[2])
    seen = Seen()
    model[2].register_forward_hook(seen)
    gm = fxrank.trace(model, X)
    assert torch.equal(gm(X), model(X)) and gm.leaves == {}


def test_the_run_that_a_part_needs_finds_the_model_as_it_was():
    """By then the trace has assigned a buffer: a value that is none."""

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return x - self.mean

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) if x.sum() > -1e9 else x

    model = nn.Sequential(Running(), nn.Linear(8, 8), Asks())
    gm = fxrank.trace(model, X)
    assert list(gm.leaves) == ["2"] and list(gm.regions) == ["2.layer"]
    assert torch.equal(model[0].mean, torch.zeros(8))


class HooksItself(nn.Module):
    """Puts hooks on its parts when it is called first, and notes it, as models of transformers 5 do for their hidden states."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.hooked = False

    def forward(self, x):
        if not self.hooked:
            for part in self.parts:
                part.register_forward_hook(lambda *call: self.seen.append(call[2]))
            self.hooked = True
        self.seen = []
        for part in self.parts:
            x = torch.relu(part(x))
        return x, list(self.seen)


class HooksItselfByData(HooksItself):
    """With a part that no graph holds, so that it is run once more meanwhile."""

    def __init__(self):
        super().__init__()
        self.parts.append(Branching())


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [HooksItself, HooksItselfByData])
@pytest.mark.parametrize("how", ["trace", "factorize", "attach"])
def test_hooks_that_a_first_call_puts_on_are_put_on_once(kind, how):
    torch.manual_seed(0)
    model = kind()
    if how == "trace":
        fxrank.trace(model, X)
    elif how == "factorize":
        model = fxrank.factorize(model, X, rank=2, include="*")
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        policy = fxrank.Pufferfish(E=1, K=0, ratio=0.25)
        fxrank.LowRankSession.attach(model, optimizer, example_inputs=X, total_steps=2, policy=policy, include="*")
    assert not model.hooked and not any(part._forward_hooks for part in model.parts)
    for _ in range(2):
        assert len(model(X)[1]) == len(model.parts)
