"""Weights that are computed, of which something is kept true, or that hooks know: they stay as they are, with the reason."""

import functools
import operator
import re

import pytest
import torch
import torch.ao.nn.intrinsic.qat
import torch.nn.functional as F
from exact import full, randn
from middle import ROUNDING, WIDTH, around, check, decision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.passes.tracing.compare import largest_difference

# -- kernels that are computed


class Noisy(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + torch.randn_like(self.weight) if self.training else self.weight, self.bias)


class NoisyPair(nn.Linear):
    """As in NoisyNet."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sigma = nn.Parameter(torch.randn_like(self.weight))

    def forward(self, x):
        weight = self.weight
        if self.training:
            weight = weight + self.sigma * torch.randn_like(self.sigma)
        return F.linear(x, weight, self.bias)


class ByInput(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * x.mean(), self.bias)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return w.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Xnor(nn.Linear):
    def forward(self, x):
        return F.linear(x, Sign.apply(self.weight) * self.weight.abs().mean(), self.bias)


class DoReFa(nn.Linear):
    def forward(self, x):
        t = self.weight.tanh()
        t = t / (2 * t.abs().max()) + 0.5
        return F.linear(x, t + ((t * 3).round() / 3 - t).detach(), self.bias)


class DropConnect(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)


class Masked(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", torch.ones_like(self.weight).tril())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Equalized(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * self.in_features**-0.5, self.bias)


class MaxNorm(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 100.0)
        return super().forward(x)


class ByFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.t() @ x


class OwnBackward(nn.Linear):
    def forward(self, x):
        return ByFunction.apply(x, self.weight) + self.bias


class Scaled(nn.Linear):
    """Of its input, not its kernel."""

    def forward(self, x):
        return F.linear(x * x.mean(), self.weight, self.bias)


class SometimesScaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * (2 if self.training else 1)


class LoraLike(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.down, self.up = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


COMPUTED = {
    Noisy: "read by",
    NoisyPair: "read by",
    ByInput: "read by mul",
    Xnor: "read by",
    DoReFa: "read by tanh",
    DropConnect: "read by dropout",
    Masked: "read by mul",
    Equalized: "read by mul",
    MaxNorm: "read by renorm",
    OwnBackward: "no layer multiplies with it; it is read by by_function",
    Scaled: "weight",
    SometimesScaled: "weight",
    LoraLike: "weight",
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_kernel_is_left_dense_and_a_forward_around_a_product_is_kept(kind):
    check(kind(WIDTH, WIDTH), COMPUTED[kind])


QAT = ["nn.qat.Conv2d", "nn.intrinsic.qat.ConvReLU2d", "nn.intrinsic.qat.ConvBn2d", "nn.intrinsic.qat.ConvBnReLU2d"]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max to specify the range for observers")
@pytest.mark.parametrize("name", QAT)
def test_a_layer_of_quantization_aware_training_stays_as_it_is(name):
    kind = operator.attrgetter(name)(torch.ao)
    layer = kind(4, 4, 3, padding=1, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm"))
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 6, 6)
    model(x)
    model.eval().apply(torch.ao.quantization.disable_observer)
    small = full(model, x)
    assert type(small[1]) is kind and re.search("it is read by|Conv2d has no factor pair$", decision(small).reason)
    assert isinstance(small[0], fxrank.FactorPair)
    assert largest_difference(model(x), small(x)) <= 1e-2  # float32, rounded to 8 bits inside


# -- what is kept true of a weight


class Lower(nn.Module):
    def forward(self, weight):
        return weight.tril()


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def parametrized(step):
    return lambda layer: parametrize.register_parametrization(layer, "weight", step)


def normed_and_lower(layer):
    parametrizations.weight_norm(layer)
    return parametrize.register_parametrization(layer, "weight", Lower())


CONSTRAINED = {
    "spectral norm": (parametrizations.spectral_norm, "Linear has no factor pair that keeps what SpectralNorm makes"),
    "old spectral norm": (torch.nn.utils.spectral_norm, "keeps what SpectralNorm makes of its weight"),
    "orthogonal": (parametrizations.orthogonal, "keeps what Orthogonal makes of its weight"),
    "lower": (parametrized(Lower()), "keeps what Lower makes of its weight"),
    "symmetric": (parametrized(Symmetric()), "keeps what Symmetric makes of its weight"),
    "weight norm and lower": (normed_and_lower, "keeps what Lower makes of its weight"),
    "pruned": (lambda layer: prune.random_unstructured(layer, "weight", 0.5), "weight or bias is computed, as after"),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CONSTRAINED)
def test_what_is_kept_true_of_a_weight_stays_true(name):
    put, reason = CONSTRAINED[name]
    torch.manual_seed(0)
    model = around(put(nn.Linear(WIDTH, WIDTH))).eval()
    small = full(model, randn(3, WIDTH))
    assert isinstance(small[0], fxrank.FactorPair) and type(small[1]) is type(model[1])
    _, (own, found), _ = sorted((d.name, d.reason) for d in fxrank.plan_of(small).layers)
    assert reason in found
    x = randn(3, WIDTH)
    assert largest_difference(model(x), small(x)) <= ROUNDING
    with pytest.raises(ValueError, match=f"layer '{own}' cannot be factorized: "):
        fxrank.factorize(model, x, rank={own: 2})
    # Nothing else is left without the first and the last layer.
    with pytest.warns(
        fxrank.NothingFactorizedWarning,
        match="nothing will be factorized, the model stays dense; 0 of 3 layers can be:",
    ):
        session = fxrank.LowRankSession.attach(
            model.train(),
            torch.optim.SGD(model.parameters(), 0.1),
            example_inputs=x,
            total_steps=2,
            policy="spectral-init",
        )
    with pytest.warns(fxrank.NothingFactorizedWarning, match="nothing was factorized"):
        assert session.finish().R == {} and type(model[1]) is type(small[1])


def test_weight_norm_keeps_nothing_true_and_is_factorized():
    check(parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), "whole")


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "put", [parametrizations.spectral_norm, torch.nn.utils.spectral_norm, parametrizations.orthogonal]
)
def test_a_plan_that_names_such_a_layer_is_followed(put, tmp_path):
    """One that was made when these layers were factorized."""
    dense, x = around(nn.Linear(WIDTH, WIDTH)), randn(3, WIDTH)
    plan = fxrank.plan_of(fxrank.factorize(dense, x, rank={"1": 2}))
    model = around(put(nn.Linear(WIDTH, WIDTH)))
    small = fxrank.factorize(model, x, rank=plan)
    assert fxrank.plan_of(small).R == {"1": 2} and isinstance(small[1], LowRankLinear)
    fxrank.save(small, tmp_path)
    again = fxrank.load(around(put(nn.Linear(WIDTH, WIDTH))), tmp_path)
    assert torch.equal(small.eval()(x), again.eval()(x))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fxrank.LowRankSession.attach(model, optimizer, example_inputs=x, total_steps=1, policy=plan)
    assert isinstance(model[1], LowRankLinear)


# -- hooks


def test_hooks_that_change_what_goes_in_and_out_go_on_with_the_pair():
    layer = nn.Linear(WIDTH, WIDTH)
    layer.register_forward_pre_hook(lambda m, args: (F.normalize(args[0]),))
    layer.register_forward_hook(lambda m, args, out: 3 * out)
    check(layer, "whole")


def clamps(module, args):
    module.weight.data.clamp_(-1, 1)


class Clamper:
    def __call__(self, module, args, out):
        with torch.no_grad():
            module.weight.mul_(0.99)


@pytest.mark.parametrize(
    ("put", "name"),
    [
        (lambda m: m.register_forward_pre_hook(clamps), "clamps"),
        (lambda m: m.register_forward_hook(Clamper()), "Clamper"),
    ],
)
def test_a_layer_whose_hook_writes_into_its_weight_stays_dense(put, name):
    model = around(nn.Linear(WIDTH, WIDTH))
    put(model[1])
    layers = {a.name: a for a in discover(fxrank.trace(model, randn(3, WIDTH)), model)}
    assert layers["1"].reason.startswith(f"the hook {name} may write into its weight")


def test_hooks_that_look_on_do_not_see_the_comparison():
    seen = []
    layer = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    layer.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    model = around(layer)
    gm = fxrank.trace(model, randn(3, WIDTH))
    seen.clear()
    assert {a.reason for a in discover(gm, model)} == {None}
    assert not seen


MASK = (torch.arange(WIDTH * WIDTH) % 3 > 0).double().view(WIDTH, WIDTH)


class Masks:
    def __init__(self):
        self.mask = MASK

    def apply(self, gradient):
        return gradient * self.mask


def masked_in_place(mask, parameter):
    parameter.grad.mul_(mask)


def of_closure(weight, mask):
    weight.register_hook(lambda gradient: gradient * mask)


MASKS = {
    "closure": of_closure,
    "rows": lambda weight, mask: of_closure(weight, mask[:, :1]),
    "global": lambda weight, mask: weight.register_hook(lambda gradient: gradient * MASK),
    "by name": lambda weight, mask: (lambda masks: weight.register_hook(lambda g: g * masks["1"]))({"1": mask}),
    "method": lambda weight, mask: weight.register_hook(Masks().apply),
    "after": lambda weight, mask: weight.register_post_accumulate_grad_hook(functools.partial(masked_in_place, mask)),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_on_the_gradient_is_kept(name):
    model, x = around(nn.Linear(WIDTH, WIDTH)), randn(3, WIDTH)
    MASKS[name](model[1].weight, MASK)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(
        fxrank.NothingFactorizedWarning, match="a hook on its gradient holds something of the weight's shape"
    ):
        session = fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=x, total_steps=2, policy="spectral-init"
        )
    model(x).square().sum().backward()
    with pytest.warns(fxrank.NothingFactorizedWarning, match="nothing was factorized"):
        assert session.finish().R == {}
    if name != "rows":
        assert torch.equal(model[1].weight.grad != 0, MASK != 0)


def test_a_hook_that_scales_the_gradient_goes_to_the_factors():
    model, x = around(nn.Linear(WIDTH, WIDTH)), randn(3, WIDTH)
    model[1].weight.register_hook(lambda gradient: 0.5 * gradient)
    layers = {a.name: a for a in discover(fxrank.trace(model, x), model)}
    assert layers["1"].reason is None
