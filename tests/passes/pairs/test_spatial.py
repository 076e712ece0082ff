"""Form "spatial": a convolution as one down and one across, and everything that a pair must go through."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from exact import full, matrices, randn, trains_as
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ConvNet, images, train
from programs import convs, programs
from teams import team
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.convolution import LowRankConv2d, LowRankSpatialConv2d, SamePadConv2d
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.tracing.compare import largest_difference
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.later_steps import FactorRegime
from fxrank.switch.optimizer import swap_parameters

ROUNDING = 1e-10  # float64, sums of a few hundred terms of order 1
PUFFERFISH = fxrank.Pufferfish(E=2, K=0, ratio=0.25, form="spatial")


def spatial(dense, rank=None):
    return make_pair(dense, LowRankSpatialConv2d.full_rank_of(dense) if rank is None else rank, form="spatial")


# -- one layer


@settings(max_examples=300)
@given(drawn=convs(), seed=st.integers(0, 100))
def test_exact_at_full_rank_with_any_geometry(drawn, seed):
    dense, shape = drawn
    torch.manual_seed(seed)
    pair, reference = spatial(copy.deepcopy(dense)), dense
    assert type(pair) is LowRankSpatialConv2d
    trains_as(pair, reference, randn(*shape), ROUNDING)
    back = pair.dense_layer()
    assert repr(back) == repr(dense)
    torch.testing.assert_close(back.weight, dense.weight, rtol=0, atol=ROUNDING)


@settings(max_examples=150)
@given(drawn=convs(), share=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_the_truncation_is_the_best_there_is(drawn, share, seed):
    dense, _ = drawn
    torch.manual_seed(seed)
    nn.init.normal_(dense.weight)
    rank = max(1, int(share * LowRankSpatialConv2d.full_rank_of(dense)))
    error = pair_error(dense, spatial(dense, rank))
    assert error.spectral <= error.bound + ROUNDING
    assert error.relative <= error.relative_bound + ROUNDING


@given(drawn=convs(), rank=st.integers(1, 3))
def test_folding_is_undone_by_unfolding(drawn, rank):
    dense, _ = drawn
    pair = spatial(dense, min(rank, LowRankSpatialConv2d.full_rank_of(dense)))
    assert torch.equal(pair.fold_dense(pair.unroll(pair, dense.weight)), dense.weight)
    for fold, unfold, weight in (
        (pair.fold_u, pair.unfold_u, pair.u.weight),
        (pair.fold_v, pair.unfold_v, pair.v.weight),
    ):
        marked = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
        assert torch.equal(fold(unfold(marked)), marked)


def test_the_layout_of_the_weight():
    """Rows `(out, kw)`, columns `(in, kh)`, written out."""
    dense = nn.Conv2d(2, 3, (4, 5))
    (matrix,) = LowRankSpatialConv2d.unroll(dense, dense.weight)
    assert matrix.shape == (15, 8)
    for n, m, i, j in [(0, 0, 0, 0), (2, 1, 3, 4), (1, 0, 2, 1)]:
        assert matrix[n * 5 + j, m * 4 + i] == dense.weight[n, m, i, j]
    pair = spatial(dense, 2)
    assert (pair.u.weight.shape, pair.v.weight.shape) == ((2, 2, 4, 1), (3, 2, 1, 5))


def test_a_convolution_that_pads_by_itself_goes_on_to():
    dense = SamePadConv2d(3, 4, 3, stride=2).double()
    dense.same_pad = True  # as timm's have it
    pair = LowRankSpatialConv2d(dense, 9)
    pair.fill_from(dense.weight)
    for size in (7, 8, 9):
        assert largest_difference(dense(x := randn(2, 3, size, size)), pair(x)) <= ROUNDING
    assert type(pair.dense_layer()) is SamePadConv2d


def test_channels_last_stays():
    dense = nn.Conv2d(4, 6, 3, padding=1).double().to(memory_format=torch.channels_last)
    pair = spatial(dense)
    x = randn(2, 4, 7, 7).to(memory_format=torch.channels_last)
    assert pair(x).is_contiguous(memory_format=torch.channels_last)
    assert largest_difference(dense(x), pair(x)) <= ROUNDING


def test_a_batchnorm_between_is_not_to_be_had():
    """The second factor pads what comes out of the first."""
    small = fxrank.factorize(ConvNet(), images()[0], rank=0.25, form="spatial", extra_bn=True)
    assert small.conv3.extra_norm is None and not fxrank.plan_of(small).layer("conv3").extra_bn


# -- in a model


@settings(max_examples=60)
@given(network=programs(), training=st.booleans(), seed=st.integers(0, 100))
def test_a_full_rank_rewrite_of_a_network_preserves_it(network, training, seed):
    model, shape = network
    model.train(training)
    torch.manual_seed(seed)
    x = randn(*shape)
    small = full(model, x, form="spatial")
    kinds = {type(p) for n, p in pairs_in(small).items() if isinstance(model.get_submodule(n), nn.Conv2d)}
    assert LowRankSpatialConv2d in kinds  # the stem's, say; 1×1 kernels are the channel pair's
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(copy.deepcopy(small)(x), expected, rtol=ROUNDING, atol=ROUNDING)
    assert largest_difference(expected, fxrank.merge(small).train(training)(x)) <= 1e-9  # outputs may nearly cancel
    again = fxrank.factorize(small, x, rank=0.5, include="*")
    assert fxrank.plan_of(again) == fxrank.plan_of(small)


def test_a_layer_of_the_graph_shows_as_two_nodes_of_the_right_shapes():
    model, x = ConvNet(), images()[0]
    gm = fxrank.trace(model, x)
    apply_plan(model, fxrank.plan_of(fxrank.factorize(model, x, rank=0.25, form="spatial")), gm=gm)
    assert torch.equal(gm(x), model(x))
    shapes = {n.target: tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.op == "call_module"}
    made = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, inputs, out, name=name: made.update({name: tuple(out.shape)}))
    model(x)
    assert {n: made[n] for n in shapes} == shapes
    assert "conv3.u" in shapes and shapes["conv3.u"][2:] == (4, 8)  # stride 2, down and then across


def test_which_layers_are_offered_the_form():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (3, 1)), nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 8, 3)
    )
    layers = discover(fxrank.trace(model, torch.randn(1, 3, 12, 12)), model)
    assert [a.other_forms for a in layers] == [
        *(("spatial", "gauge"), ("gauge",), ("gauge",), ("spatial", "gauge"), ("spatial", "gauge"))
    ]
    small = fxrank.factorize(model, torch.randn(1, 3, 12, 12), rank=0.25, include="*", form="spatial")
    kinds = [LowRankSpatialConv2d, LowRankConv2d, LowRankConv2d, LowRankSpatialConv2d, LowRankSpatialConv2d]
    assert [type(m) for m in small] == kinds


def test_a_kernel_that_is_read_elsewhere_is_the_product():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, dtype=torch.float64)

        def forward(self, x):
            return F.conv2d(x, self.conv.weight, self.conv.bias)

    model, x = Reads(), randn(2, 4, 7, 7)
    (layer,) = discover(fxrank.trace(model, x), model)
    assert layer.other_forms == ()  # there it would save nothing
    model.conv = spatial(model.conv)
    expected = F.conv2d(x, model.conv.dense_layer().weight, model.conv.bias)
    assert largest_difference(expected, model(x)) <= ROUNDING


def test_break_even_is_judged_in_the_form_that_is_asked_for():
    """A depthwise kernel saves nothing in channels, and a third in space."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(2, 8, 9, 9)
    with pytest.raises(fxrank.NothingToFactorizeError, match=r"break-even is 0.9"):
        fxrank.factorize(model, x, rank=1)
    decision = fxrank.plan_of(fxrank.factorize(model, x, rank=1, form="spatial")).layer("2")
    assert (decision.pair_parameters, decision.parameters) == (48, 72)
    (stack,) = fxrank.profile(model, x, form="spatial").stacks
    assert stack.names == ("2",)


@pytest.mark.parametrize("stride", [1, (2, 1), (1, 2), 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_counts_are_those_of_the_pairs_own_layers(stride, groups):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride, 1, groups=groups), nn.Flatten()).double()
    x = randn(2, 4, 9, 10)
    small = fxrank.factorize(model, x, rank={"0": 2}, form="spatial")
    decision = fxrank.plan_of(small).layer("0")
    pair, sizes = small[0], []
    for layer in (pair.u, pair.v):
        layer.register_forward_hook(lambda m, inputs, out: sizes.append((m, out)))
    small(x)
    assert decision.pair_parameters == pair.u.weight.numel() + pair.v.weight.numel()
    assert decision.pair_macs == sum(out[:, :1].numel() * m.weight.numel() for m, out in sizes)
    dense = model[0](x)
    assert decision.macs == dense[:, :1].numel() * model[0].weight.numel()
    (layer,) = discover(fxrank.trace(model, x), model)
    assert layer.in_form("spatial").break_even_rank == pytest.approx(
        model[0].weight.numel() / groups / (4 / groups * 3 + 6 / groups * 3)
    )


def test_profile_times_the_form():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 12, 12)
    (stack,) = fxrank.profile(model, x, form="spatial").stacks
    places, wide = 2 * 5 * 5, 2 * 5 * 10
    assert (stack.kind, stack.probe_rank) == ("conv2d", 6)
    assert stack.pair_flops == 2 * 6 * 24 * (wide + places)
    assert stack.pair_bytes_moved == 4 * (2 * 8 * 100 + 6 * 48 + 2 * 6 * wide + places * 8)
    assert stack.pair_ms > 0
    with pytest.raises(ValueError, match=r"form must be one of .*'spatial'.*; got 'spacial'"):
        fxrank.profile(model, x, form="spacial")


# -- through training


def test_a_policy_asks_for_the_form_and_only_auto_does_not_choose_it():
    x = images()[0]
    for form, kind in (("spatial", LowRankSpatialConv2d), ("auto", LowRankConv2d)):
        model = ConvNet()
        policy = fxrank.Cuttlefish(
            speedup_threshold=None, rank_metric="ratio", ratio=0.25, latest=0.0, form=form, round_to=1
        )
        with fxrank.LowRankSession.attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), example_inputs=x, total_steps=4, policy=policy
        ) as session:
            assert type(model.conv3) is kind
        decision = session.plan.layer("conv3")
        assert decision.form == ("spatial" if form == "spatial" else "channel")
        assert decision.rank == (12 if form == "spatial" else 4)  # a quarter of the full rank in that form
        assert 0 < decision.truncation_error < 1


@pytest.mark.parametrize("groups", [1, 2])
def test_moments_are_projected(groups):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.Flatten()).double()
    x = randn(2, 4, 6, 6)
    for kind, options in ((torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {})):
        net = copy.deepcopy(model)
        optimizer = kind(net.parameters(), lr=0.01, **options)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        old = {k: v.clone() for k, v in optimizer.state[net[0].weight].items() if torch.is_tensor(v) and v.ndim}
        plan = fxrank.plan_of(fxrank.factorize(net, x, rank={"0": 2}, form="spatial"))
        assert swap_parameters(optimizer, apply_plan(net, plan)) == []
        pair = net[0]
        u, v = matrices(pair)
        for key, moment in old.items():
            m, (a, b) = pair.unroll(pair, moment), (u.square(), v.square()) if key == "exp_avg_sq" else (u, v)
            for weight, part in (
                (pair.u.weight, pair.fold_u(b.mT @ m)),
                (pair.v.weight, pair.fold_v(m @ a.mT)),
            ):
                torch.testing.assert_close(optimizer.state[weight][key], part, rtol=1e-12, atol=1e-12)
        assert old


def test_frobenius_decay_is_the_gradient_of_the_penalty():
    model, x = ConvNet().double(), images()[0].double()
    plan = fxrank.plan_of(fxrank.factorize(model, x, rank=0.25, form="spatial"))
    replaced = apply_plan(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pairs = [r.pair for r in replaced]
    assert all(type(p) is LowRankSpatialConv2d for p in pairs)
    factors = [w for p in pairs for w in (p.u.weight, p.v.weight)]
    expected = torch.autograd.grad(sum(p.weight.square().sum() for p in pairs) / 2 * 0.3, factors)
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    FactorRegime(optimizer, replaced, 0.3).before_step()
    for factor, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=0, atol=ROUNDING)


def _member(rank, size):
    model = ConvNet().double()
    wrapper = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.05, momentum=0.9)
    x, y = images(8)
    x = x.double()
    model.eval()  # batches of BatchNorm are each process's own
    part = (x[rank::size], y[rank::size])
    session = fxrank.LowRankSession.attach(
        wrapper, optimizer, example_inputs=part[0], total_steps=6, steps_per_epoch=1, policy=PUFFERFISH
    )
    train(wrapper, optimizer, 6, part)
    session.finish()
    return {n: p.detach().numpy() for n, p in model.named_parameters()}, session.plan.layer("conv3").form


def test_two_processes_end_where_one_does():
    (first, form), (second, _) = team(_member, 2)
    alone, _ = _member(0, 1)
    assert form == "spatial" and "conv3.u.weight" in first
    assert all((first[n] == second[n]).all() for n in first)
    for name, value in alone.items():
        torch.testing.assert_close(torch.from_numpy(first[name]), torch.from_numpy(value), rtol=0, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_export(groups):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=groups), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    x = torch.randn(2, 4, 9, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        small = fxrank.factorize(model, x, rank=0.5, include="*", form="spatial")
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x), rtol=0, atol=1e-6)
    assert weight_of(small[0]).shape == model[0].weight.shape
