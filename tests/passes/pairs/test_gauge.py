"""Form "gauge": pairs in whose second factor some rows are the identity, and everything that a pair must go through."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from exact import matrices, randn, trains_as
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ConvNet, images
from programs import convs, linears
from torch import nn

import fxrank
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.gauge import LowRankGaugeConv2d, LowRankGaugeLinear
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.spectra.exact import truncated_factors
from fxrank.passes.tracing.compare import largest_difference

ROUNDING = 1e-10  # float64, sums of a few hundred terms of order 1
LAYERS = st.one_of(linears(), convs())


def full_rank_of(dense):
    return type(make_pair(dense, 1)).full_rank_of(dense)


def gauge(dense, rank=None, **options):
    return make_pair(dense, full_rank_of(dense) if rank is None else rank, form="gauge", **options)


def rank_of(dense, share):
    return max(1, int(share * full_rank_of(dense)))


# -- one layer


@settings(max_examples=300)
@given(drawn=LAYERS, share=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_output_and_gradients_are_those_of_the_product(drawn, share, seed):
    dense, shape = drawn
    torch.manual_seed(seed)
    pair = gauge(copy.deepcopy(dense), rank_of(dense, share))
    reference = pair.dense_layer()
    reference.bias = copy.deepcopy(reference.bias)
    trains_as(pair, reference, randn(*shape), ROUNDING)


@settings(max_examples=200)
@given(drawn=LAYERS, share=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_the_truncation_is_the_best_there_is_and_full_rank_is_the_layer(drawn, share, seed):
    dense, shape = drawn
    torch.manual_seed(seed)
    nn.init.normal_(dense.weight)
    error = pair_error(dense, gauge(dense, rank_of(dense, share)))
    assert error.spectral <= error.bound + ROUNDING
    assert error.relative <= error.relative_bound + ROUNDING
    pair, x = gauge(dense), randn(*shape)
    assert pair.u.weight.numel() + pair.v.weight.numel() == dense.weight.numel()
    assert largest_difference(dense(x), pair(x)) <= ROUNDING
    back = pair.dense_layer()
    assert repr(back) == repr(dense) and type(back) is type(dense)
    torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=ROUNDING)


@given(drawn=LAYERS, share=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_the_identity_stands_in_rows_of_v_and_u_has_those_of_the_product(drawn, share, seed):
    dense, _ = drawn
    torch.manual_seed(seed)
    pair = gauge(dense, rank_of(dense, share))
    u, v = matrices(pair)
    product = pair.unroll(pair, pair.dense_layer().weight.detach())
    for mask, matrix, first, wanted in zip(pair.v.is_free.reshape(v.shape[:2]), v, u, product, strict=True):
        assert torch.equal(matrix[~mask], torch.eye(pair.rank, dtype=v.dtype))
        torch.testing.assert_close(first, wanted[~mask], rtol=0, atol=ROUNDING)
    for fold, unfold, weight in (
        (pair.fold_u, pair.unfold_u, pair.u.weight),
        (pair.fold_v, pair.unfold_v, pair.v.weight),
    ):
        marked = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
        assert torch.equal(fold(unfold(marked)), marked)


@given(drawn=LAYERS, share=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_it_is_smaller_than_the_layer_below_full_rank(drawn, share, seed):
    dense, _ = drawn
    rank = rank_of(dense, share)
    pair = gauge(dense, rank)
    numbers = pair.u.weight.numel() + pair.v.weight.numel()
    groups, rows, cols = pair.unroll(pair, dense.weight).shape
    assert numbers == groups * rank * (rows + cols - rank)
    assert (numbers < dense.weight.numel()) == (rank < min(rows, cols))


def test_the_rows_are_chosen_so_that_rounding_stays_small():
    """float32, against the same factors with the first rows made the identity."""
    torch.manual_seed(0)
    dense, x = nn.Linear(256, 256, bias=False), torch.randn(64, 256)
    u, v = (m[0].double() for m in truncated_factors(dense.weight.detach()[None], 128))
    wanted = x.double() @ (v @ u).T
    pair = gauge(dense, 128)
    assert matrices(pair)[1].abs().max() < 2
    naive = (v @ torch.linalg.inv(v[:128])).float(), (v[:128] @ u).float()
    error = (pair(x) - wanted).norm() / wanted.norm()
    assert error < 3e-6  # some 8 units of the last place; the middle is as wide as the output here
    assert error < ((x @ naive[1].T) @ naive[0].T - wanted).norm() / wanted.norm() / 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda w: w.zero_(),
        lambda w: w[:, 1:].zero_(),  # dead inputs
        lambda w: w[2:].zero_(),  # dead outputs
        lambda w: w.copy_(torch.outer(torch.arange(8.0), torch.arange(6.0))),  # rank 1
        lambda w: w.mul_(1e-150),
        lambda w: w.copy_(w[[0, 0, 0, 0, 1, 1, 1, 1]]),  # rows that are the same
    ],
    ids=["zeros", "dead inputs", "dead outputs", "rank 1", "tiny", "twins"],
)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_weights_of_a_lower_rank_are_no_special_case(spoil, rank):
    torch.manual_seed(0)
    dense, x = nn.Linear(6, 8).double(), randn(5, 6)
    with torch.no_grad():
        spoil(dense.weight)
    pair, plain = gauge(dense, rank), make_pair(dense, rank)
    assert all(torch.isfinite(p).all() for p in pair.parameters())
    assert pair.v.is_free.sum() == 8 - rank and pair.v.weight.abs().sum() < 100
    assert largest_difference(plain(x), pair(x)) <= ROUNDING
    zero = torch.zeros(1, rank, 6).double()
    pair.fill(zero, torch.zeros(1, 8, rank).double())
    assert torch.equal(pair(x), dense.bias.expand(5, 8))


def test_any_factors_can_be_given():
    torch.manual_seed(0)
    pair, x = gauge(nn.Conv2d(6, 8, 3, groups=2).double(), 2), randn(3, 6, 5, 5)
    u, v = randn(2, 2, 27), randn(2, 4, 2)
    v[0, :, 1] = 0
    pair.fill(u, v)
    kernel = (v @ u).reshape(8, 3, 3, 3)
    assert largest_difference(F.conv2d(x, kernel, pair.bias, groups=2), pair(x)) <= ROUNDING
    before = [t.clone() for t in pair.held]
    pair.fill(*matrices(pair))
    assert all(largest_difference(a, b) <= ROUNDING for a, b in zip(before, pair.held, strict=True))


@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (nn.Conv1d(4, 9, 3, 2, 1), (2, 4, 7)),
        (nn.Conv3d(4, 6, 2, groups=2, bias=False), (2, 4, 5, 5, 5)),
        (nn.Conv3d(2, 3, 2), (2, 5, 5, 5)),
        (nn.Conv2d(6, 8, 3, padding=1).to(memory_format=torch.channels_last), (2, 6, 7, 7)),
        (nn.Conv2d(6, 8, 1), (2, 6, 7, 7)),
    ],
    ids=["1d", "3d", "no batch", "channels last", "1x1"],
)
def test_kinds_and_memory_formats(dense, shape):
    torch.manual_seed(0)
    dense, x = dense.double(), randn(*shape)
    formats = [torch.contiguous_format, torch.channels_last] if x.ndim == 4 else [torch.contiguous_format]
    for given_x in [x.to(memory_format=one) for one in formats]:
        for rank in (2, full_rank_of(dense)):
            pair = gauge(dense, rank)
            assert largest_difference(make_pair(dense, rank)(given_x), pair(given_x)) <= ROUNDING
            assert pair(given_x).stride() == dense(given_x).stride()
    assert type(pair.dense_layer()) is type(dense)


def test_a_batchnorm_between_the_factors():
    torch.manual_seed(0)
    model, x = ConvNet().double().eval(), images()[0].double()
    small = fxrank.factorize(model, x, rank=0.5, form="gauge", extra_bn=True)
    assert isinstance(small.conv3, LowRankGaugeConv2d) and small.conv3.extra_norm is not None
    small.train()(x)
    small.eval()
    assert largest_difference(small(x), fxrank.merge(small)(x)) <= ROUNDING


@pytest.mark.parametrize("rank", [3, 8])
def test_under_autocast_the_dtype_is_the_layers(rank):
    dense, x = nn.Linear(16, 8), torch.randn(5, 16)
    pair = gauge(dense, rank)
    with torch.autocast("cpu", torch.bfloat16):
        out = pair(x)
        assert out.dtype is dense(x).dtype is torch.bfloat16
    out.sum().backward()
    assert pair.u.weight.grad.dtype is torch.float32
    torch.testing.assert_close(pair.bias.grad, torch.full((8,), 5.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers(dtype):
    torch.manual_seed(0)
    dense, x = nn.Linear(64, 48), torch.randn(5, 64)
    pair = gauge(dense, 16)
    narrow, wanted = copy.deepcopy(pair).to(dtype), pair(x)
    assert torch.equal(narrow.v.is_free, pair.v.is_free)
    assert (narrow(x.to(dtype)) - wanted).abs().max() < 8 * torch.finfo(dtype).eps * wanted.abs().max()
    made = gauge(dense.to(dtype), 16)
    assert made.v.weight.dtype is made.u.weight.dtype is dtype
    assert (made(x.to(dtype)) - wanted).abs().max() < 8 * torch.finfo(dtype).eps * wanted.abs().max()


def test_the_mask_goes_where_the_pair_goes():
    torch.manual_seed(0)
    pair, x = gauge(nn.Linear(9, 7), 3), torch.randn(4, 9)
    assert list(pair.state_dict()) == ["u.weight", "v.weight", "v.bias", "v.free"]
    for other in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        assert torch.equal(other(x), pair(x))
    fresh = LowRankGaugeLinear(nn.Linear(9, 7), 3)
    fresh.load_state_dict(pair.state_dict())
    assert torch.equal(fresh(x), pair(x))
    away = copy.deepcopy(pair).to("meta")
    assert away(x.to("meta")).shape == (4, 7) and away.weight.shape == (7, 9)
    away.to_empty(device="cpu").load_state_dict(pair.state_dict())
    assert torch.equal(away(x), pair(x))
    assert "7 rows, 4 of them free" in repr(pair)
