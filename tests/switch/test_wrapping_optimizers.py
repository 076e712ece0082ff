"""Optimizers around others that a session cannot go along with: refused before anything is attached."""

import pytest
import torch
from nets import SOON, mlp, vectors
from torch import nn

import fxrank

X, Y = vectors()


def attach(model, optimizer):
    return fxrank.LowRankSession.attach(model, optimizer, example_inputs=X, total_steps=4, policy=SOON)


class Delegating(torch.optim.Optimizer):
    """An optimizer by class, as Opacus' is: all it has is the one inside, which it never shows as its own."""

    def __init__(self, inner):
        self.original_optimizer = inner

    @property
    def param_groups(self):
        return self.original_optimizer.param_groups

    @property
    def state(self):
        return self.original_optimizer.state

    def step(self, closure=None):
        return self.original_optimizer.step(closure)


class Plain:
    """No optimizer by class."""

    def __init__(self, inner):
        self.inner = inner


def per_sample(model):
    """As Opacus' `GradSampleModule` does it: hooks that leave gradients of single samples on the parameters."""
    model.autograd_grad_sample_hooks = [m.register_forward_hook(lambda *_: None) for m in model]
    return model


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (Delegating, "must take hooks around its step.*; Delegating has not called Optimizer.__init__"),
        (Plain, "must be a torch optimizer, .*; got Plain"),
        (
            type("DPOptimizer", (Delegating,), {"__module__": "opacus.optimizers.optimizer"}),
            "an optimizer is a DPOptimizer",
        ),
    ],
)
def test_wrappers_are_refused_before_anything_is_attached(wrap, text):
    model = mlp()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=text):
        attach(model, wrap(inner))
    assert not inner._optimizer_step_pre_hooks and not inner._optimizer_step_post_hooks
    attach(model, inner).detach()


def test_gradients_of_single_samples_are_refused():
    model = per_sample(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"'the model' has hooks for them. Factorize first"):
        attach(model, optimizer)
    with pytest.raises(TypeError, match="'net' has hooks for them"):
        attach(nn.ModuleDict({"net": model}), optimizer)
    model = mlp()
    model[2].weight.grad_sample = None
    with pytest.raises(TypeError, match=r"'2.weight' has hooks for them"):
        attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_opacus_on_a_factorized_model():
    opacus = pytest.importorskip("opacus")
    small = fxrank.factorize(mlp(), X, rank=0.25)
    model = opacus.GradSampleModule(small)
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8
    )
    before = [p.clone() for p in small.parameters()]
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
