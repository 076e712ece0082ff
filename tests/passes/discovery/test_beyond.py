"""Layers that do more than multiply with their weight: nothing of it is lost, or they stay dense with the reason."""

import functools
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from exact import full, randn
from middle import ROUNDING, WIDTH, around, check, same
from torch import nn
from torch.nn.utils import parametrizations

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.tracing.compare import largest_difference

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
    Lora: "it belongs to an adapter",
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
    for write in (lambda: weight.data.clamp_(-1, 1), lambda: nn.init.zeros_(weight)):
        with pytest.raises(RuntimeError, match="cannot write into it"):
            write()
    with pytest.raises(RuntimeError, match="must be changed without recording it"):
        weight.mul_(2)
    with pytest.raises(fxrank.RankError, match="must be a product of rank 2"):
        weight.data = torch.eye(WIDTH)


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
        layers = {a.name: a.reason for a in candidates(discover(fxrank.trace(model, x), model), model)}
        assert "left dense by default" in layers["1.weight"]


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
