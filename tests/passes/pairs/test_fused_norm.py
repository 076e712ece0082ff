"""BatchNorm folded into factorized layers, by torch and as public models do it; and other weights that a pair is given."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import fxrank
from fxrank.passes.pairs.registry import make_pair


def _folded(layer, norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = torch.zeros(len(scale)) if layer.bias is None else layer.bias
    return scale, (bias - norm.running_mean) * scale + norm.bias


def as_parameters(layer, norm):
    """As torch does it, by hand."""
    scale, bias = _folded(layer, norm)
    layer = copy.deepcopy(layer)
    layer.weight, layer.bias = (
        nn.Parameter(layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))),
        nn.Parameter(bias),
    )
    return layer


def through_data(layer, norm):
    """As YOLO's newer `fuse_conv_and_bn` does it: in place, by a product with a diagonal matrix."""
    scale, bias = _folded(layer, norm)
    weight = layer.weight.view(len(scale), -1)
    layer.weight.data = torch.mm(torch.diag(scale), weight).view(layer.weight.shape)
    if layer.bias is None:
        layer.register_parameter("bias", nn.Parameter(bias))
    else:
        layer.bias.data = bias
    return layer.requires_grad_(False)


@torch.no_grad()
def in_place(layer, norm):
    scale, bias = _folded(layer, norm)
    layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias = nn.Parameter(bias)
    return layer


@torch.no_grad()
def by_operator(layer, norm):
    scale, bias = _folded(layer, norm)
    layer.weight *= scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.bias = nn.Parameter(bias)
    return layer


@torch.no_grad()
def through_copy(layer, norm):
    scale, bias = _folded(layer, norm)
    layer.weight.data.copy_(layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias = nn.Parameter(bias)
    return layer


def anew(layer, norm):
    """As LeViT and older YOLO do it: a fresh layer with the folded numbers, which is dense."""
    scale, bias = _folded(layer, norm)
    weight = layer.weight * scale[:, None, None, None]
    fresh = nn.Conv2d(
        weight.size(1) * layer.groups,
        weight.size(0),
        weight.shape[2:],
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )
    fresh.weight.data.copy_(weight)
    fresh.bias.data.copy_(bias)
    return fresh


WAYS = {
    f.__name__: f for f in (fuse_conv_bn_eval, as_parameters, through_data, in_place, by_operator, through_copy, anew)
}
LAYERS = {
    "plain": (nn.Conv2d(4, 8, 3, padding=1), {}),
    "without bias": (nn.Conv2d(4, 8, 3, stride=2, bias=False), {}),
    "groups": (nn.Conv2d(4, 8, 3, groups=2), {}),
    "spatial": (nn.Conv2d(4, 8, 3), {"form": "spatial"}),
    "spatial groups": (nn.Conv2d(4, 8, 3, groups=2, bias=False), {"form": "spatial"}),
    "gauge": (nn.Conv2d(4, 8, 3), {"form": "gauge"}),
    "gauge groups": (nn.Conv2d(4, 8, 3, groups=2, bias=False), {"form": "gauge"}),
    "extra norm": (nn.Conv2d(4, 8, 3), {"extra_bn": True}),
    "channels last": (nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last), {}),
}


def trained_norm(like, layer, x):
    """A BatchNorm that has seen some batches, one channel of it silent."""
    norm = like(layer(x).shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    with torch.no_grad():
        norm.weight[0] = 0
        for _ in range(3):
            norm(layer(x))
    return norm.eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LAYERS)
def test_batch_norm_folds_into_the_second_factor(case, way):
    torch.manual_seed(0)
    dense, options = LAYERS[case]
    pair, x = make_pair(dense.eval(), 2, **options), torch.randn(4, 4, 9, 9)
    if pair.extra_norm is not None:
        pair.extra_norm.running_var.uniform_(0.5, 2)
        if way == "anew":
            pytest.skip("what lies between the factors is no part of the weight that a fresh layer is made of")
    norm = trained_norm(nn.BatchNorm2d, pair, x)
    wanted, first = norm(pair(x)).detach(), pair.u.weight.clone()
    fused = WAYS[way](pair, norm)
    assert (fused(x) - wanted).abs().max() < 2e-6 * wanted.abs().max()
    if way != "anew":
        assert type(fused) is type(pair) and fused.rank == 2
        if "gauge" not in case:  # rows of the identity hold no scale
            assert torch.equal(fused.u.weight, first)  # no numbers but the second factor's have changed


def test_linear_and_transposed_layers_fold_too():
    torch.manual_seed(0)
    pair, x = make_pair(nn.Linear(6, 8).eval(), 3), torch.randn(9, 6)
    norm = trained_norm(nn.BatchNorm1d, pair, x)
    fused = fuse_linear_bn_eval(pair, norm)
    assert isinstance(fused, fxrank.LowRankLinear)
    assert (fused(x) - norm(pair(x))).abs().max() < 1e-5
    pair, x = make_pair(nn.ConvTranspose2d(4, 8, 3, stride=2).eval(), 3), torch.randn(4, 4, 5, 5)
    norm = trained_norm(nn.BatchNorm2d, pair, x)
    fused = fuse_conv_bn_eval(pair, norm, transpose=True)
    assert type(fused) is type(pair)
    assert (fused(x) - norm(pair(x))).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    pair, x = make_pair(nn.Conv2d(4, 8, 3).eval(), 2), torch.randn(4, 4, 9, 9)
    norm = trained_norm(nn.BatchNorm2d, pair, x)
    wanted = norm(pair(x))
    fused = fuse_conv_bn_eval(pair.to(dtype), norm.to(dtype))
    assert fused.v.weight.dtype is dtype
    # 8 bits of significand in bfloat16, 11 in float16; factors, scale and bias are rounded
    assert (fused(x.to(dtype)).float() - wanted).abs().max() < 8 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("form", ["channel", "gauge"])
def test_tied_layers_fold_each_with_its_own_norm(form):
    """As detectors have heads that share convolutions and not their BatchNorm."""
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3)
            self.two.weight = self.one.weight
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            return self.norms[0](self.one(x)), self.norms[1](self.two(x))

    model, x = Heads(), torch.randn(4, 3, 9, 9)
    for norm in model.norms:
        nn.init.normal_(norm.weight)
    model(x)
    small = fxrank.factorize(model.eval(), x, rank={"one": 2}, form=form)
    assert small.one.v.weight is small.two.v.weight
    assert all(a is b for a, b in zip(small.one.held, small.two.held, strict=True))
    h = small.stem(x)
    wanted = small(x)
    small.one, small.two = (fuse_conv_bn_eval(p, n) for p, n in zip((small.one, small.two), small.norms, strict=True))
    assert all(torch.allclose(p(h), w, atol=1e-5) for p, w in zip((small.one, small.two), wanted, strict=True))


@pytest.mark.parametrize("form", ["channel", "gauge"])
def test_any_weight_of_its_rank_is_taken(form):
    torch.manual_seed(0)
    pair, x = make_pair(nn.Linear(6, 8), 3, form=form), torch.randn(5, 6)
    other = torch.randn(8, 3) @ torch.randn(3, 6)
    pair.weight = nn.Parameter(other, requires_grad=False)
    assert torch.allclose(pair(x), x @ other.T + pair.bias, atol=1e-5)
    assert not pair.u.weight.requires_grad and not pair.v.weight.requires_grad
    columns = torch.rand(6)  # a LayerNorm before the layer folds into its columns
    with torch.no_grad():
        pair.weight.mul_(columns)
    assert torch.allclose(pair.weight.dense(), other * columns, atol=1e-5)
    held = pair.u.weight, pair.v.weight
    pair.weight.data = other
    assert held == (pair.u.weight, pair.v.weight)  # in place: an optimizer goes on with them
    assert torch.allclose(pair(x), x @ other.T + pair.bias, atol=1e-5)


def test_a_raw_parameter_takes_data_as_the_tensor_does():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.w = nn.Linear(6, 6), nn.Parameter(torch.randn(8, 6))

        def forward(self, x):
            return self.stem(x) @ self.w.t()

    x = torch.randn(5, 6)
    small = fxrank.factorize(Raw(), x, rank={"w": 2})
    wanted = 2 * small(x)
    small.w.data = 2 * small.w.data
    assert torch.allclose(small(x), wanted, atol=1e-5) and "data" not in vars(small.w)


@pytest.mark.parametrize("form", ["channel", "spatial", "gauge"])
def test_other_weights_are_refused_and_nothing_changes(form):
    torch.manual_seed(0)
    pair = make_pair(nn.Conv2d(4, 8, 3), 2, form=form)
    state = {name: value.clone() for name, value in pair.state_dict().items()}
    full, small = torch.randn(8, 4, 3, 3), pair.weight.detach().clone()
    small[3] = 1e-4 * torch.randn(4, 3, 3)  # one small row is of another kind

    def set_data():
        pair.weight.data = full

    text = r"the weight of a factor pair must be a product of rank 2; got one that differs by .* Merge the pair first"
    for act in (
        lambda: setattr(pair, "weight", nn.Parameter(full)),
        lambda: setattr(pair, "weight", nn.Parameter(small)),
        set_data,
        lambda: pair.weight.detach().copy_(full),
    ):
        with pytest.raises(fxrank.RankError, match=text):
            act()
    with pytest.raises(fxrank.RankError, match=r"must have the layer's shape \(8, 4, 3, 3\); got \(8, 4, 1, 1\)"):
        pair.weight = nn.Parameter(torch.ones(8, 4, 1, 1))
    with pytest.raises(fxrank.NonFiniteWeightError):
        pair.weight = nn.Parameter(full * torch.nan)
    with pytest.raises(TypeError, match="must be a parameter; got a Tensor"):
        pair.weight = full
    with pytest.raises(RuntimeError, match="without recording it"):
        pair.weight.mul_(2)
    for write in (nn.init.normal_, lambda w: w.zero_(), lambda w: w.__setitem__(0, 0.0)):
        with pytest.raises(RuntimeError, match="cannot write into it"):
            write(pair.weight)
    assert all(torch.equal(state[name], value) for name, value in pair.state_dict().items())


def test_rows_of_the_identity_are_not_scaled_under_a_norm():
    torch.manual_seed(0)
    pair = make_pair(nn.Conv2d(4, 8, 3), 2, extra_bn=True, form="gauge")
    state = {name: value.clone() for name, value in pair.state_dict().items()}
    with torch.no_grad(), pytest.raises(fxrank.RankError, match=r"these rows cannot be scaled.*Merge the pair first"):
        pair.weight.mul_(2)
    assert all(torch.equal(state[name], value) for name, value in pair.state_dict().items())


def test_under_a_norm_only_rows_are_scaled():
    pair = make_pair(nn.Conv2d(4, 8, 3), 2, extra_bn=True)
    with torch.no_grad(), pytest.raises(fxrank.RankError, match="more than its rows scaled, under a BatchNorm"):
        pair.weight.mul_(torch.rand(1, 4, 1, 1))
