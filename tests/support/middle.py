"""A layer between two plain ones, and what must become of it when the model is factorized."""

import copy
import re

import torch
from exact import full, randn
from torch import nn

import fxrank
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.tracing.compare import largest_difference

ROUNDING = 1e-10
"""float64, three layers."""
WIDTH = 6


def around(layer):
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, 4)).double()


def decision(model):
    """About the layer in the middle."""
    return fxrank.plan_of(model).layer("1")


def outputs_and_gradient(model, x):
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    out = model(x)
    (gradient,) = torch.autograd.grad((out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum(), x)
    return out, gradient


def same(model, small):
    for training in (True, False):
        for x in (randn(3, WIDTH), 5 * randn(2, WIDTH)):
            expected = outputs_and_gradient(copy.deepcopy(model).train(training), x)
            assert (
                largest_difference(expected, outputs_and_gradient(copy.deepcopy(small).train(training), x)) <= ROUNDING
            )


def check(layer, expected):
    """`expected`: "whole" if the pair takes the layer's place, "weight" if the weight's, else the reason why it is dense."""
    for training in (True, False):
        model = around(layer).train(training)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        attributes = {n: list(vars(m)) for n, m in model.named_modules()}
        small = full(model, randn(3, WIDTH))
        assert {n: list(vars(m)) for n, m in model.named_modules()} == attributes
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert decision(small).rank == (WIDTH if expected in ("whole", "weight") else None)
        if expected == "whole":
            assert isinstance(small[1], fxrank.FactorPair)
        elif expected == "weight":
            assert type(small[1]) is type(layer) and isinstance(small[1].weight, LowRankWeight)
        else:
            assert re.search(expected, decision(small).reason), decision(small).reason
        same(model, small)
