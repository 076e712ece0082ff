"""Layers that do more than multiply with their weight, or keep something true of it: each is factorized so that nothing of it is
lost, or stays dense with the reason.
"""

import copy
import functools
import re
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from exact import full, randn
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.pairs.registry import PAIRS
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


# -- forwards that were put on a layer


def patched_by_closure(layer):
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2


def patched_by_adapter(layer):
    inner, down, up = layer.forward, nn.Linear(WIDTH, 2).double(), nn.Linear(2, WIDTH).double()
    layer.forward = lambda x: inner(x) + up(down(x))


def _doubled(layer, x):
    return 2 * F.linear(x, layer.weight, layer.bias)


def patched_by_method(layer):
    layer.forward = types.MethodType(_doubled, layer)


def patched_by_partial(layer):
    layer.forward = functools.partial(_doubled, layer)


def _hooked(layer, *args):
    return layer._old_forward(*args).tanh()


def patched_as_accelerate_does(layer):
    layer._old_forward = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(_hooked, layer), layer._old_forward)


def _adapted(layer, x):
    return F.linear(x, layer.weight, layer.bias) + layer.up(layer.down(x))


def adapted(layer):
    layer.down, layer.up = nn.Linear(WIDTH, 2).double(), nn.Linear(2, WIDTH).double()
    layer.forward = types.MethodType(_adapted, layer)


def _computed(layer, x):
    return F.linear(x, layer.weight * x.mean(), layer.bias)


def patched_to_compute_its_kernel(layer):
    layer.forward = types.MethodType(_computed, layer)


PATCHES = {
    patched_by_closure: "has a forward that was put on the layer",
    patched_by_adapter: "has a forward that was put on the layer",
    patched_by_method: "weight",
    patched_by_partial: "weight",
    patched_as_accelerate_does: "weight",
    adapted: "weight",
    patched_to_compute_its_kernel: "it is read by mul",
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_forward_that_was_put_on_a_layer_is_kept(patch):
    layer = nn.Linear(WIDTH, WIDTH)
    patch(layer)
    check(layer, PATCHES[patch])


def test_the_hooks_of_accelerate_are_kept():
    hooks = pytest.importorskip("accelerate.hooks")

    class Twice(hooks.ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    layer = nn.Linear(WIDTH, WIDTH)
    hooks.add_hook_to_module(layer, Twice())
    check(layer, "weight")


@pytest.mark.parametrize("patch", [patched_by_adapter, adapted])
def test_an_adapter_goes_on_training_after_the_switch(patch):
    model = around(nn.Linear(WIDTH, WIDTH))
    patch(model[1])
    cells = [cell.cell_contents for cell in getattr(model[1].forward, "__closure__", None) or ()]
    held = model[1].children() if patch is adapted else (m for m in cells if isinstance(m, nn.Module))
    adapter = [p for m in held for p in m.parameters()]
    assert len(adapter) == 4
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters(), *adapter], 0.1)
    x = randn(3, WIDTH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that nothing is left, where it stays dense
        fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=x, total_steps=9, policy=fxrank.SpectralInit(ratio=0.34)
        )
    model(x).square().sum().backward()
    trained = [p for n, p in model.named_parameters() if n.startswith("1.")] if patch is adapted else adapter
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    assert isinstance(model[1].weight, LowRankWeight) == (patch is adapted)


# -- classes with more than a forward


class Renamed(nn.Linear):
    """Nothing of its own."""


class Initialized(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.init_weights()

    def init_weights(self):
        nn.init.orthogonal_(self.weight)

    def extra_repr(self):
        return "initialized"


class Penalized(nn.Linear):
    def penalty(self):
        return self.weight.abs().sum()


class WithProperty(nn.Linear):
    @property
    def norm(self):
        return self.weight.norm()


class WithConstant(nn.Linear):
    gain = 0.5


class WithParameter(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(3))


class Called(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Projected(nn.Linear):
    def project(self):
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)


class ProjectedByData(nn.Linear):
    def project(self):
        self.weight.data = self.weight.data.clamp(-0.1, 0.1)


class Lora(nn.Linear):
    """As `loralib.Linear`: the mode merges the adapter into the weight."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (self.lora_B @ self.lora_A) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.lora_A.T @ self.lora_B.T


CLASSES = {
    Renamed: "whole",
    Initialized: "whole",
    Penalized: "weight",
    WithProperty: "weight",
    WithConstant: "weight",
    WithParameter: "weight",
    Called: "weight",
    Projected: "Projected.project may write into it",
    ProjectedByData: "ProjectedByData.project may write into it",
    Lora: "Lora.train may write into it",
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_keeps_what_it_has(kind):
    check(kind(WIDTH, WIDTH), CLASSES[kind])


def test_methods_answer_for_the_product_and_train_its_factors():
    model = around(Penalized(WIDTH, WIDTH))
    small = fxrank.factorize(model, randn(3, WIDTH), rank={"1": 2})
    pair = small[1].weight
    penalty = sum(m.penalty() for m in small.modules() if isinstance(m, Penalized))
    assert penalty.item() == pytest.approx((pair.v.weight @ pair.u.weight).abs().sum().item(), rel=1e-12)
    penalty.backward()
    assert pair.u.weight.grad.abs().min() > 0 and pair.v.weight.grad.abs().min() > 0
    assert set(fxrank.merge(small).state_dict()) == set(model.state_dict())


def test_a_layer_that_shares_its_weight_with_one_that_does_more_stays_dense():
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Penalized(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
    )
    model = model.double()
    model[2].weight = model[1].weight
    small = full(model, randn(3, WIDTH))
    assert small[1].weight is small[2].weight
    assert "shared with" in fxrank.plan_of(small).layer("1").reason
    same(model, small)
    model[1] = Penalized(WIDTH, WIDTH).double()
    model[1].weight = model[2].weight
    small = full(model, randn(3, WIDTH))
    assert small[1].weight.u.weight is small[2].weight.u.weight and small[1].penalty() == small[2].penalty()
    same(model, small)


@pytest.mark.parametrize("selector", ["1", "1.weight", "re:^1", Penalized])
def test_such_a_layer_is_named_as_before(selector):
    model, x = around(Penalized(WIDTH, WIDTH)), randn(3, WIDTH)
    small = fxrank.factorize(model, x, rank=2, include=selector)
    assert fxrank.plan_of(small).R == {"1.weight": 2}
    with pytest.raises(fxrank.NothingToFactorizeError):
        fxrank.factorize(model, x, rank=2, exclude=selector)
    again = fxrank.factorize(small, x, rank={"0": 2})
    assert fxrank.plan_of(again).R == {"0": 2, "1.weight": 2} and isinstance(again[1].weight, LowRankWeight)
    assert largest_difference(fxrank.merge(again)(x), again(x)) <= ROUNDING


def test_nothing_writes_into_the_product_in_silence():
    weight = fxrank.factorize(around(Penalized(WIDTH, WIDTH)), randn(3, WIDTH), rank={"1": 2})[1].weight
    for write in (lambda: weight.data.clamp_(-1, 1), lambda: nn.init.zeros_(weight), lambda: weight.mul_(2)):
        with pytest.raises(RuntimeError, match="cannot write into it"):
            write()
    with pytest.raises(RuntimeError, match="so its data cannot be set; change the pair's"):
        weight.data = torch.zeros(WIDTH, WIDTH)


def test_the_output_projection_of_an_attention_that_does_more_stays_dense():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
            self.attention.out_proj.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.attention(x, x, x)[0] * self.attention.out_proj.scale

    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Attends(), nn.Linear(WIDTH, 4)).double(), randn(2, 3, WIDTH)
    small = full(model, x)
    assert "holds scale beside its weight" in fxrank.plan_of(small).layer("1.attention.out_proj").reason
    assert largest_difference(model(x), small(x)) <= ROUNDING


def test_a_profile_of_nothing_warns():
    model = around(parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)))
    with pytest.warns(fxrank.NothingFactorizedWarning, match="keeps what Orthogonal makes"):
        assert fxrank.profile(model, randn(3, WIDTH)).stacks == ()


@pytest.mark.parametrize("name", ["gain", "_gain"])
def test_what_the_user_has_put_on_a_plain_layer_answers_on_its_pair(name):
    model = around(nn.Linear(WIDTH, WIDTH))
    setattr(model[1], name, 0.5)
    small = fxrank.factorize(model, randn(3, WIDTH), rank={"1": 2})
    assert isinstance(small[1], fxrank.FactorPair) and getattr(small[1], name) == 0.5
    assert getattr(fxrank.merge(small)[1], name) == 0.5


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding])
def test_other_kinds_of_layers_keep_their_class_too(make):
    kind = type("Penalized", (make,), {"penalty": lambda self: self.weight.abs().sum()})
    table = make is nn.Embedding
    middle = kind(20, WIDTH) if table else kind(WIDTH, WIDTH, 1)
    dims = 2 if table else middle.weight.ndim - 2
    last = nn.Linear(WIDTH, 4) if table else nn.Flatten()
    model = nn.Sequential(nn.Identity(), middle, last).double()
    x = torch.randint(20, (2, 5)) if table else randn(2, WIDTH, *[3] * dims)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        small = full(model, x)
    assert type(small[1]) is kind
    assert isinstance(small[1].weight, LowRankWeight) == (make is not nn.ConvTranspose2d)
    assert largest_difference(model(x), small(x)) <= ROUNDING
    assert small[1].penalty().item() == pytest.approx(model[1].penalty().item(), rel=1e-9)
    if table:  # and is a table still, which nobody has asked for
        layers = {a.name: a.reason for a in candidates(discover(fxrank.trace(around_table(model), x), model), model)}
        assert "left dense by default" in layers["1.weight"]


def around_table(model):
    return model


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
    OwnBackward: "its forward fails with a pair: ",
    Scaled: "weight",
    SometimesScaled: "weight",
    LoraLike: "weight",
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_kernel_is_left_dense_and_a_forward_around_a_product_is_kept(kind):
    check(kind(WIDTH, WIDTH), COMPUTED[kind])


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


def test_a_plan_that_names_a_layer_with_methods_of_its_own_is_followed(tmp_path):
    model, x = around(Penalized(WIDTH, WIDTH)), randn(3, WIDTH)
    plan = fxrank.plan_of(fxrank.factorize(around(nn.Linear(WIDTH, WIDTH)), x, rank={"1": 2}))
    small = fxrank.factorize(model, x, rank=plan)
    assert isinstance(small[1], LowRankLinear)
    alone = fxrank.factorize(model, x, rank={"1": 2})
    assert isinstance(alone[1].weight, LowRankWeight)
    for one in (small, alone):
        fxrank.save(one, tmp_path)
        again = fxrank.load(around(Penalized(WIDTH, WIDTH)), tmp_path)
        assert torch.equal(one(x), again(x)) and list(again.state_dict()) == list(one.state_dict())


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


# -- the comparison


@pytest.fixture
def register():
    before = {cls: dict(there) for cls, there in PAIRS.items()}
    yield fxrank.register_pair
    PAIRS.clear()
    PAIRS.update(before)


def registered(of_output):
    """A class of a user's own that claims to be a Linear."""

    class Claimed(nn.Linear):
        def forward(self, x):
            return of_output(self, F.linear(x, self.weight, self.bias), x)

    return Claimed


CLAIMS = {
    "the same": (lambda m, out, x: out, None),
    "mode": (lambda m, out, x: 1.5 * out if m.training else out, r"its pair differs by 0\.\d in training mode"),
    "evaluation": (lambda m, out, x: out if m.training else out.relu(), "in evaluation mode"),
    "chance": (lambda m, out, x: out + torch.randn_like(out), "it computes more than its weight"),
    "input": (lambda m, out, x: out * x.mean(), "it computes more than its weight"),
    "size": (lambda m, out, x: out / len(x), "it computes more than its weight"),
    "gradient": (lambda m, out, x: out.detach() + 0 * x.sum(), "it computes more than its weight"),
    "reversed": (lambda m, out, x: 2 * out.detach() - out, "it computes more than its weight"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_class_that_computes_something_else_than_its_pair_stays_dense(name, register):
    of_output, reason = CLAIMS[name]
    kind = registered(of_output)
    register(kind, LowRankLinear)
    model = around(kind(WIDTH, WIDTH))
    small = full(model, randn(3, WIDTH))
    found = decision(small)
    assert (found.rank == WIDTH) == (reason is None)
    if reason is not None:
        assert type(small[1]) is kind and re.search(reason, found.reason)


def test_each_kind_of_layer_is_compared_once_and_each_instance_that_differs_by_itself(register):
    calls = []

    class Scaled(nn.Linear):
        def __init__(self, scale):
            super().__init__(WIDTH, WIDTH)
            self.scale = scale

        def forward(self, x):
            calls.append(self.scale)
            return self.scale * F.linear(x, self.weight, self.bias)

    register(Scaled, LowRankLinear)
    model = nn.Sequential(*[Scaled(scale) for scale in (1, 1, 1, 2, 2)]).double()
    gm = fxrank.trace(model, randn(3, WIDTH))
    calls.clear()
    layers = {a.name: a.reason is None for a in discover(gm, model)}
    assert layers == {"0": True, "1": True, "2": True, "3": False, "4": False}
    assert calls.count(1) == 8  # two inputs in two modes, each tried and compared


def test_the_comparison_leaves_nothing_in_the_model(register):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(WIDTH, WIDTH)
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.calls, self.seen = 0, []
            self.generator = torch.Generator()

        def forward(self, x):
            self.calls += 1
            self.seen.append(len(x))
            self.mean += x.detach().mean(0)
            torch.randn(3, generator=self.generator)
            return F.linear(x, self.weight, self.bias)

    register(Counting, LowRankLinear)
    model = around(Counting())
    gm = fxrank.trace(model, randn(3, WIDTH))
    state, drawn, own = copy.deepcopy(model.state_dict()), torch.get_rng_state(), model[1].generator.get_state()
    modes = [m.training for m in model.modules()]
    assert {a.reason for a in discover(gm, model)} == {None}
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert torch.equal(drawn, torch.get_rng_state()) and torch.equal(own, model[1].generator.get_state())
    assert (model[1].calls, model[1].seen, [m.training for m in model.modules()]) == (0, [], modes)
    assert all(p.grad is None for p in model.parameters())


def test_without_data_nothing_is_compared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Renamed(WIDTH, WIDTH), nn.Linear(WIDTH, 4))
        small = fxrank.factorize(model, torch.randn(3, WIDTH), rank=2)
    assert isinstance(small[1], fxrank.FactorPair)
