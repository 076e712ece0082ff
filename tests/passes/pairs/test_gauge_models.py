"""Form "gauge" in whole models, and in what other tools make of them."""

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from exact import full, matrices, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import ConvNet, Tied, images, vectors
from programs import programs
from torch import nn

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.pairs.convolution import LowRankConvTranspose2d
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.gauge import FreeRows
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.tracing.compare import largest_difference
from fxrank.policies.scene import Scene

ROUNDING = 1e-10  # float64, sums of a few hundred terms of order 1


# -- in a model


@settings(max_examples=60)
@given(network=programs(), training=st.booleans(), seed=st.integers(0, 100))
def test_a_full_rank_rewrite_of_a_network_preserves_it(network, training, seed):
    model, shape = network
    model.train(training)
    torch.manual_seed(seed)
    x = randn(*shape)
    small = full(model, x, form="gauge")
    assert any(isinstance(p.v, FreeRows) for p in pairs_in(small).values())
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(copy.deepcopy(small)(x), expected, rtol=ROUNDING, atol=ROUNDING)
    assert largest_difference(expected, fxrank.merge(small).train(training)(x)) <= 1e-9  # outputs may nearly cancel
    again = fxrank.factorize(small, x, rank=0.5, include="*")
    assert fxrank.plan_of(again) == fxrank.plan_of(small)


def test_which_layers_are_offered_the_form():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv, self.up = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3)
            self.attention, self.read = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)
            self.raw, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 4)

        def forward(self, x):
            x = self.up(self.conv(self.table(x).mT)).mT
            return self.head(F.linear(self.attention(x, x, x)[0], self.read.weight) @ self.raw)

    model = Net()
    layers = discover(fxrank.trace(model, torch.randint(9, (2, 7))), model)
    # Where only its weight is read, by attention too, the pair multiplies with all of V, and is not offered.
    assert {a.name for a in layers if "gauge" in a.other_forms} == {"conv", "head"}
    small = full(model, torch.randint(9, (2, 7)), form="gauge")
    assert {n for n, p in pairs_in(small).items() if isinstance(p.v, FreeRows)} == {"conv", "head"}
    assert len(pairs_in(small)) == 8


def test_a_weight_that_is_read_elsewhere_is_the_product():
    torch.manual_seed(0)
    pair, x = make_pair(nn.Linear(8, 6).double(), 3, form="gauge"), randn(5, 8)
    assert largest_difference(F.linear(x, pair.weight, pair.bias), pair(x)) <= ROUNDING
    (pair.weight.square().sum()).backward()
    u, v = matrices(pair)
    torch.testing.assert_close(pair.v.weight.grad, pair.fold_v(2 * v @ u @ u.mT), rtol=0, atol=ROUNDING)
    graph = fxrank.trace(nn.Sequential(pair, nn.Linear(6, 2).double()), x)
    assert largest_difference(graph(x), graph.get_submodule("1")(pair(x))) <= ROUNDING


@pytest.mark.parametrize("groups", [1, 2])
def test_the_counts_are_those_of_the_pairs_own_layers(groups):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=groups), nn.Flatten()).double()
    x = randn(2, 4, 9, 10)
    small = fxrank.factorize(model, x, rank={"0": 2}, form="gauge")
    decision, pair = fxrank.plan_of(small).layer("0"), small[0]
    assert decision.pair_parameters == pair.u.weight.numel() + pair.v.weight.numel()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        small(x)
    assert decision.pair_macs * 2 == counter.get_total_flops()
    (layer,) = discover(fxrank.trace(model, x), model)
    layer = layer.in_form("gauge")
    assert layer.break_even_rank == layer.full_rank == 6 / groups
    assert layer.pair_parameters(layer.full_rank) == layer.parameters
    assert [layer.rank_within(n) for n in (0, layer.pair_parameters(2) - 1, layer.pair_parameters(2), 10**6)] == [
        *(0, 1, 2, layer.full_rank)
    ]


def test_only_full_rank_is_at_break_even():
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8)), torch.randn(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxrank.factorize(model, x, rank=5, include="*", form="gauge")
    with pytest.warns(UserWarning, match=r"no smaller: 0 \(rank 6, break-even 6.0\), 2 \(rank 6, break-even 6.0\)"):
        fxrank.factorize(model, x, rank=6, include="*", form="gauge")


def test_profile_times_the_form():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    (stack,) = fxrank.profile(model, torch.randn(2, 8), form="gauge").stacks
    assert (stack.kind, stack.probe_rank) == ("linear", 2) and stack.pair_ms > 0
    assert stack.pair_flops == 2 * 2 * 2 * (8 + 6)


def test_auto_chooses_it_under_a_budget_of_parameters_alone_and_a_policy_asks_for_it():
    """It loses less than the channel pair at the same size, always; it is no faster."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(32, 32), nn.ReLU()))), torch.randn(4, 32)
    cases = ({"target_params": 0.7}, {"gauge"}), ({"target_macs": 0.7}, {"channel"}), ({"rank": 0.25}, {"channel"})
    for target, forms in cases:
        small = fxrank.factorize(model, x, form="auto", **target)
        lost = {
            form: sum(pair_error(model.get_submodule(n), p).relative ** 2 for n, p in pairs_in(made).items())
            for form, made in (("auto", small), ("channel", fxrank.factorize(model, x, **target)))
        }
        assert {d.form for d in fxrank.plan_of(small).layers if d.factorized} == forms
        assert (lost["auto"] < lost["channel"]) == (forms == {"gauge"})
    layers = [a for a in discover(fxrank.trace(model, x), model) if a.name == "2"]
    policy = fxrank.Pufferfish(E=0, K=0, ratio=0.6)  # 19 of 32 is above the break-even of a channel pair
    for form, rank in (("auto", None), ("gauge", 19)):
        wanted = dataclasses.replace(policy, form=form)
        (decision,) = wanted.decide(Scene(model, [layers[0].if_in_form(form)]))
        assert decision.rank == rank


def test_tied_layers_share_their_rows_too(tmp_path):
    model, x = Tied(), vectors()[0]
    small = full(model, x, form="gauge", rank=0.5)
    assert all(a is b for a, b in zip(small.a.held, small.b.held, strict=True)) and len(small.a.held) == 3
    fxrank.save(small, tmp_path)
    again = fxrank.load(Tied(), tmp_path)
    assert all(a is b for a, b in zip(again.a.held, again.b.held, strict=True))
    assert torch.equal(again(x), small(x))
    before, rank = small.b.weight.dense(), small.b.rank
    other = torch.randn(len(before), rank) @ torch.randn(rank, before.shape[1])
    small.a.weight = nn.Parameter(other)  # from now on one of its own
    assert torch.equal(small.b.weight.dense(), before)
    torch.testing.assert_close(small.a.weight.dense(), other, rtol=1e-5, atol=1e-6)  # float32
    assert not torch.equal(small.a.v.is_free, small.b.v.is_free)


# -- elsewhere


@pytest.mark.parametrize("dense", [nn.Linear(8, 8), nn.Conv2d(4, 6, 3, 2, 1, groups=2)], ids=["linear", "conv"])
def test_export_and_compile(dense):
    model = nn.Sequential(dense, nn.ReLU()).eval()
    shape = (8,) if isinstance(dense, nn.Linear) else (4, 9, 9)
    x, more = torch.randn(2, *shape), torch.randn(5, *shape)
    small = fxrank.factorize(model, x, rank={"0": 2}, form="gauge")
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(small, (x,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(exported(more), small(more))
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(small), backend="aot_eager", fullgraph=True)
    wanted, found = small(x), compiled(x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    wanted.sum().backward()
    found.sum().backward()
    for (name, a), b in zip(small.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)  # float32, another order of sums
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that it is old
        traced = torch.jit.trace(small, x)
    assert torch.equal(traced(x), small(x))


def test_transposed_convolutions_keep_the_pair_that_they_have():
    """The identity would stand in rows that overlap in the output."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 2, 1))
    small = fxrank.factorize(model, torch.randn(1, 3, 5, 5), rank=0.5, form="gauge")
    assert type(small[1]) is LowRankConvTranspose2d and fxrank.plan_of(small).layer("1").form == "channel"


def test_quantizers_take_the_first_factor_and_pass_by_the_second():
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantized layers")
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3))), torch.randn(4, 32)
    small = fxrank.factorize(model, x, rank=16, form="gauge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, dtype=torch.qint8)
        assert type(quantized[1].u) is not nn.Linear and type(quantized[1].v) is FreeRows
        assert (quantized(x) - small(x)).norm() < 0.05 * small(x).norm()  # eight bits
        with pytest.raises(TypeError, match="merging must come before quantizing"):
            fxrank.merge(quantized)


def test_a_plan_repeats_it(tmp_path):
    model, x = ConvNet(), images()[0]
    small = fxrank.factorize(model, x, rank=0.25, form="gauge")
    fxrank.plan_of(small).save(tmp_path / "plan.json")
    again = fxrank.factorize(model, x, rank=fxrank.Plan.load(tmp_path / "plan.json"))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in small.state_dict().items())
