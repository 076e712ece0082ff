"""Factor pairs as modules: what they keep of the layer they stand for, and the way back."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.model.weights import standardizes
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.convolution import LowRankConv2d
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.passes.pairs.registry import PAIRS, make_pair, pair_class
from fxrank.passes.tracing.compare import largest_difference

# float32: sums of at most a hundred products of order 1.
ROUNDING = 1e-5


def conv(**options):
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3} | options)


LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(4, 6, bias=False),
    "conv": conv,
    "conv without bias": lambda: conv(bias=False),
    "grouped": lambda: conv(groups=2, stride=(2, 1), padding=(2, 0)),
    "same circular": lambda: conv(padding="same", padding_mode="circular", dilation=(1, 2)),
    "pointwise": lambda: conv(kernel_size=1),
}


@pytest.fixture(params=LAYERS, ids=str)
def dense(request):
    return LAYERS[request.param]()


def example(dense):
    return (
        torch.randn(3, 6 if dense.weight.shape == (4, 6) else 4)
        if type(dense) is nn.Linear
        else torch.randn(2, 4, 9, 9)
    )


def full(dense):
    return pair_class(dense).full_rank_of(dense)


def test_geometry_is_readable_under_the_layers_own_names(dense):
    pair = make_pair(dense, 1)
    names = {"in_features", "out_features"} if isinstance(dense, nn.Linear) else set(nn.Conv2d.__constants__)
    names -= {"bias"}  # a parameter, not geometry
    assert {n: getattr(pair, n) for n in names} == {n: getattr(dense, n) for n in names}
    assert (pair.rank, pair.dense_shape) == (1, tuple(dense.weight.shape))
    for name in pair.geometry:
        assert getattr(copy.deepcopy(pair), name) == getattr(dense, name)


def test_state_dict_has_the_plain_keys_only(dense):
    keys = ["u.weight", "v.weight"] + ["v.bias"] * (dense.bias is not None)
    assert list(make_pair(dense, 1).state_dict()) == keys


def test_weight_and_bias_are_readable(dense):
    pair = make_pair(dense, full(dense))
    assert pair.weight.shape == dense.weight.shape
    assert (pair.weight.dtype, pair.weight.device) == (dense.weight.dtype, dense.weight.device)
    assert largest_difference(dense.weight, pair.weight) <= ROUNDING
    assert pair.bias is dense.bias
    assert pair.v.bias is dense.bias
    assert pair.u.bias is None
    pair.weight.sum().backward()
    assert pair.u.weight.grad.abs().max() > 0
    assert pair.v.weight.grad.abs().max() > 0


def test_the_layer_is_left_as_it_is(dense):
    before = copy.deepcopy(dense.state_dict())
    pair = make_pair(dense, 1)
    with torch.no_grad():
        pair.u.weight.zero_()
        pair.v.weight.zero_()
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_a_pair_takes_its_input_by_the_layers_keyword(dense):
    pair, x = make_pair(dense, full(dense)), example(dense)
    assert torch.equal(pair(input=x), pair(x))
    assert largest_difference(dense(input=x), pair(input=x)) <= ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", [True, False], ids=["trainable", "frozen"])
def test_dtype_device_mode_and_requires_grad_are_kept_both_ways(dense, dtype, trained):
    dense = dense.to(dtype).requires_grad_(trained).train(trained)
    pair = make_pair(dense, 1)
    back = pair.dense_layer()
    for module in (pair, pair.u, pair.v, back):
        assert module.training is trained
    for parameter in (*pair.parameters(), *back.parameters()):
        assert parameter.dtype is dtype
        assert parameter.requires_grad is trained
        assert parameter.device == dense.weight.device


def test_a_frozen_weight_leaves_its_bias_trainable():
    dense = nn.Linear(4, 4)
    dense.weight.requires_grad_(False)
    pair = make_pair(dense, 2)
    assert {n: p.requires_grad for n, p in pair.named_parameters()} == {
        "u.weight": False,
        "v.weight": False,
        "v.bias": True,
    }


def test_the_meta_device_is_kept():
    with torch.device("meta"):
        pair = LowRankConv2d(conv(), 2)
    assert all(p.is_meta for p in pair.parameters())


@pytest.mark.parametrize("extra_bn", [False, True], ids=["plain", "extra_bn"])
def test_channels_last_is_kept_both_ways(extra_bn):
    dense = conv().to(memory_format=torch.channels_last)
    pair = make_pair(dense, 8, extra_bn=extra_bn)
    for weight in (pair.u.weight, pair.dense_layer().weight):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    assert pair_error(dense, pair).relative <= ROUNDING
    assert not make_pair(conv(), 8).u.weight.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_pairs_err_by_their_rounding_only():
    dense = nn.Linear(8, 6).bfloat16()
    pair = make_pair(dense, 6)
    assert pair(torch.randn(3, 8).bfloat16()).dtype is torch.bfloat16
    # Two roundings to 8 bits of mantissa, 2^-8 each, in sums of 6 products.
    assert largest_difference(dense.weight, pair.weight) <= 3e-2


def test_to_dense_undoes_the_pair(dense):
    x = example(dense)
    back = make_pair(dense, full(dense)).dense_layer()
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    assert list(back.state_dict()) == list(dense.state_dict())
    assert largest_difference(dense(x), back(x)) <= ROUNDING


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("groups", [1, 2])
def test_to_dense_folds_the_extra_norm_in(groups, bias):
    pair = make_pair(conv(groups=groups, bias=bias, padding=1), 3, extra_bn=True).eval()
    with torch.no_grad():
        pair.norm.running_mean.normal_()
        pair.norm.running_var.uniform_(0.5, 2)
        pair.norm.weight.normal_()
        pair.norm.bias.normal_()
    kept = None if pair.bias is None else pair.bias.detach().clone()
    x = torch.randn(2, 4, 7, 7)
    back = pair.dense_layer()
    assert back.bias is not None
    assert largest_difference(pair(x), back(x)) <= ROUNDING
    assert largest_difference(make_pair(back, 3, extra_bn=False)(x), back(x)) <= ROUNDING  # rank 3 it is
    if kept is not None:
        assert torch.equal(pair.bias, kept)
    assert not any(p.requires_grad for p in pair.requires_grad_(False).dense_layer().parameters())


def test_extra_norm_is_for_convolutions_only():
    assert make_pair(nn.Linear(4, 4), 2, extra_bn=True).norm is None
    norm = make_pair(conv(groups=2, dtype=torch.float64), 3, extra_bn=True).norm
    assert norm.num_features == 6
    assert norm.weight.dtype is torch.float64


@pytest.mark.parametrize("rank", [-1, 0, 5])
def test_ranks_outside_the_full_rank_are_refused(rank):
    text = re.escape(f"a rank must be in 1 … 4, the full rank of the layer; got {rank}.")
    with pytest.raises(fxrank.RankError, match=text):
        make_pair(nn.Linear(6, 4), rank)
    with pytest.raises(fxrank.RankError, match=text):
        make_pair(conv(groups=2), rank)


def test_other_layers_and_forms_are_refused():
    text = (
        "only Linear, NonDynamicallyQuantizableLinear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, "
        "ConvTranspose3d, Embedding have a factor pair; got Bilinear. Leave this layer dense."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        make_pair(nn.Bilinear(2, 2, 2), 1)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "form must be one of 'channel', 'gauge', 'qkv', 'spatial', 'stack'; got 'chanel'. Did you mean 'channel'?"
        ),
    ):
        make_pair(nn.Linear(2, 2), 1, form="chanel")


@pytest.mark.parametrize("base", [nn.Linear, nn.Conv2d])
def test_subclasses_count_as_their_base_if_they_inherit_its_forward(base):
    class Renamed(base):
        pass

    class Doubled(base):
        def forward(self, x):
            return 2 * super().forward(x)

    options = [1] if base is nn.Conv2d else []
    assert pair_class(Renamed(4, 4, *options)) is PAIRS[base]["channel"]
    assert pair_class(Doubled(4, 4, *options)) is None
    with pytest.raises(TypeError, match="got Doubled"):
        make_pair(Doubled(4, 4, *options), 1)


def test_embeddings_that_change_as_they_are_read_have_no_pair():
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        with pytest.raises(TypeError, match="got Embedding"):
            make_pair(nn.Embedding(4, 4, **options), 1)


def test_repr_tells_the_rank():
    pair = make_pair(nn.Linear(6, 4), 2)
    assert isinstance(pair, LowRankLinear)
    assert "linear (4, 6), rank=2" in repr(pair)


def test_full_ranks():
    assert LowRankLinear.full_rank_of(nn.Linear(6, 4)) == 4
    assert LowRankConv2d.full_rank_of(nn.Conv2d(3, 64, 3)) == 27
    assert LowRankConv2d.full_rank_of(nn.Conv2d(8, 8, 3, groups=8)) == 1
    assert LowRankConv2d.full_rank_of(nn.Conv2d(8, 32, 1, groups=2)) == 4


def test_spectral_view_has_the_singular_values_of_the_unrolled_weight():
    for layer in (conv(groups=2), conv().to(memory_format=torch.channels_last)):
        weight = layer.weight.detach()
        view, unrolled = LowRankConv2d.spectral_view(layer, weight), LowRankConv2d.unroll(layer, weight)
        assert view.shape == unrolled.shape
        assert view.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        torch.testing.assert_close(
            torch.linalg.svdvals(view.double()), torch.linalg.svdvals(unrolled.double()), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: nn.Conv2d(8, 8, 3), lambda: nn.Embedding(8, 8)])
def test_what_the_user_has_put_on_a_layer_is_on_its_pair_and_on_the_layer_again(make):
    layer = make()
    layer.gain, layer.names = 0.5, ["a"]
    pair = make_pair(layer, 2)
    assert (pair.gain, pair.names) == (0.5, ["a"]) and "gain" not in dict(pair.state_dict())
    assert copy.deepcopy(pair).gain == 0.5
    back = pair.dense_layer()
    assert (back.gain, back.names) == (0.5, ["a"])
    assert make_pair(make(), 2).carried == ()


class Masked(nn.Conv2d):
    """What is used of the kernel is no standardized one."""

    def forward(self, x):
        mask = torch.ones_like(self.weight)
        mask[:, :, -1] = 0
        return F.conv2d(x, self.weight * mask, self.bias, padding=1)


class Halved(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / 2, self.bias, padding=1)


class Standardized(nn.Conv2d):
    def forward(self, x):
        mean, var = self.weight.mean((1, 2, 3), keepdim=True), self.weight.var((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-5).sqrt(), self.bias, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kind", "has"), [(Masked, False), (Halved, False), (Standardized, True)])
@pytest.mark.parametrize("zero", [False, True])
def test_a_computed_kernel_counts_as_standardized_only_if_it_is(kind, has, zero, dtype):
    fresh = type(kind.__name__, (kind,), {})  # what is known of a class is remembered
    layer = fresh(8, 8, 3).to(dtype)
    if zero:
        nn.init.zeros_(layer.weight)
    seen = []
    layer.register_forward_pre_hook(lambda *_: seen.append("called"))
    weight = layer.weight
    assert standardizes(layer) is has
    assert layer.weight is weight and seen == []


def test_a_mask_holds_for_ever():
    """The layer stays dense, as the same code on a Linear does, and so the future is not seen."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), Masked(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)
    )
    small = fxrank.factorize(model, torch.randn(2, 3, 9, 9), rank=2)
    assert type(small[2]) is Masked and isinstance(small[4], FactorPair)
    reasons = {d.name: d.reason for d in fxrank.plan_of(small).layers}
    assert "mul" in reasons["2.weight"]
