"""Faults that users meet in published low-rank tools, each as a test: depthwise layers, padding modes, strides and dilations
silently wrong, raw errors for half precision or other kinds of layer, nothing replaced without a word, the dense weight kept.
"""

import copy
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.convolution import LowRankConv2d
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.tracing.compare import largest_difference, output_difference
from fxrank.training.measure import parameter_count

# float32: sums of at most a hundred products of order 1.
ROUNDING = 1e-5


def conv(**options):
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3} | options)


def assert_full_rank_pair_is_the_layer(dense, size=9):
    pair = make_pair(dense, LowRankConv2d.full_rank_of(dense))
    x = torch.randn(2, dense.in_channels, size, size)
    assert pair(x).shape == dense(x).shape
    assert largest_difference(dense(x), pair(x)) <= ROUNDING


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3, (1, 3)], ids=str)
def test_depthwise_layers_are_right(kernel, multiplier):
    assert_full_rank_pair_is_the_layer(conv(groups=4, out_channels=4 * multiplier, kernel_size=kernel))


def test_a_depthwise_pair_of_rank_one_is_exact():
    """Each group's matrix has one row, so rank 1 is full rank and the pair never saves: break-even is below 1."""
    dense = conv(groups=4, out_channels=4)
    assert LowRankConv2d.full_rank_of(dense) == 1
    assert pair_error(dense, make_pair(dense, 1)).relative <= ROUNDING
    model = nn.Sequential(conv(out_channels=4), dense, conv())
    (layer,) = (a for a in discover(fxrank.trace(model, torch.randn(1, 4, 9, 9)), model) if a.name == "1")
    assert layer.break_even_rank < 1


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("padding", [1, (2, 0), "same"], ids=str)
def test_padding_modes_are_kept(padding, mode):
    dense = conv(padding=padding, padding_mode=mode)
    assert_full_rank_pair_is_the_layer(dense)
    pair = make_pair(dense, 2)
    assert (pair.u.padding_mode, pair.u.padding) == (mode, dense.padding)
    assert (pair.v.padding_mode, pair.v.padding) == ("zeros", (0, 0))


@pytest.mark.parametrize("stride", [(2, 1), (1, 3), 2], ids=str)
def test_strides_are_kept_and_taken_once(stride):
    assert_full_rank_pair_is_the_layer(conv(stride=stride))
    assert_full_rank_pair_is_the_layer(conv(kernel_size=1, stride=stride))


@pytest.mark.parametrize("dilation", [2, (1, 3)], ids=str)
@pytest.mark.parametrize("padding", [0, 2, "same"], ids=str)
def test_dilation_is_kept(dilation, padding):
    assert_full_rank_pair_is_the_layer(conv(dilation=dilation, padding=padding))


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"kernel_size": (5, 1)}, {"groups": 2}], ids=str)
def test_padding_same_and_valid(options):
    for padding in ("same", "valid"):
        assert_full_rank_pair_is_the_layer(conv(padding=padding, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_are_rewritten(dtype):
    model = nn.Sequential(conv(), nn.Flatten(), nn.Linear(8 * 16, 16), nn.Linear(16, 2)).to(dtype)
    x = torch.randn(2, 4, 6, 6).to(dtype)
    small = fxrank.factorize(model, x, rank={"0": 2, "2": 4})
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(x).dtype is dtype
    for path in ("0", "2"):
        error = pair_error(model.get_submodule(path), small.get_submodule(path))
        # The factors are rounded to the weight's own 8 or 11 bits.
        assert error.relative <= error.relative_bound + 4 * torch.finfo(dtype).eps


OTHERS = {
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 4, 3), (2, 4, 5, 5)),
    "Conv1d": (nn.Conv1d(4, 4, 3), (2, 4, 9)),
    "Conv3d": (nn.Conv3d(4, 4, 3), (2, 4, 5, 5, 5)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_rewritten_and_not_passed_over(kind):
    layer, shape = OTHERS[kind]
    width = torch.Size(layer(torch.zeros(shape)).shape).numel() // 2
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(width, 8), nn.Linear(8, 2))
    x = torch.randn(shape)
    small = fxrank.factorize(model, x, rank={"0": 2})
    error = pair_error(layer, small[0])
    assert error.spectral == pytest.approx(error.bound, rel=1e-5)  # float32
    with pytest.warns(UserWarning, match="break-even"):
        small = fxrank.factorize(model, x, rank=1.0, include="*")
    assert len(pairs_in(small)) == 3
    assert output_difference(model, small, x) <= ROUNDING


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.body, self.head = (
            nn.Linear(4, 4),
            nn.Bilinear(4, 4, 4),
            nn.Linear(4, 4),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        return self.head(self.body(self.mix(self.stem(x), x)))


def test_a_kind_without_a_pair_is_left_alone_with_its_reason():
    small = fxrank.factorize(Bilinear(), torch.randn(2, 4), rank=1)
    assert type(small.mix) is nn.Bilinear
    assert fxrank.plan_of(small).layer("mix").reason == "Bilinear has no factor pair"
    assert fxrank.plan_of(small).R == {"body": 1}


def test_full_rank_results_equal_the_original():
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(in_channels=8), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 2)
    )
    x = torch.randn(3, 4, 6, 6)
    with pytest.warns(UserWarning, match="break-even"):
        small = fxrank.factorize(model, x, rank=1.0, include="*")
    assert len(pairs_in(small)) == 4
    assert output_difference(model, small, x) <= ROUNDING


def test_pairs_larger_than_the_layer_are_announced():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    text = "ranks at or above break-even make a layer no smaller: 1 (rank 6, break-even 3.0). They are used as given."
    with pytest.warns(UserWarning, match=re.escape(text)):
        small = fxrank.factorize(model, torch.randn(2, 6), rank=1.0)
    assert parameter_count(small) > parameter_count(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxrank.factorize(model, torch.randn(2, 6), rank=2)


def test_a_rank_below_break_even_makes_the_layer_smaller_and_one_at_it_does_not():
    dense = nn.Linear(6, 6, bias=False)
    assert parameter_count(make_pair(dense, 2)) < parameter_count(dense)
    assert parameter_count(make_pair(dense, 3)) == parameter_count(dense)


def test_nothing_replaced_is_an_error_with_every_reason():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Conv1d(4, 4, 1, groups=4), nn.Flatten(), nn.Linear(20, 2))
    with pytest.raises(fxrank.NothingToFactorizeError) as caught:
        fxrank.factorize(model, torch.randn(2, 3, 5), rank=0.5)
    assert str(caught.value).splitlines() == [
        "at least one layer must be factorizable; 0 of 3 are:",
        "  0 (conv1d): first layer of the graph, left dense by default",
        "  1 (conv1d): a pair of rank 1 would not save anything: break-even is 0.5",
        "  3 (linear): last layer of the graph, left dense by default",
        "Name layers to take in with include=… ('*' takes everything).",
    ]


def test_no_dense_weight_is_kept():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    small = fxrank.factorize(model, torch.randn(2, 8), rank=2)
    assert parameter_count(small) == parameter_count(model) - 2 * (256 - 2 * 32)
    assert not any(t.shape == (16, 16) for t in [*small.parameters(), *small.buffers(), *small.state_dict().values()])
    reachable = [value for module in small.modules() for value in vars(module).values()]
    assert not any(isinstance(value, torch.Tensor) for value in reachable)
    for pair in pairs_in(small).values():
        assert isinstance(pair, FactorPair)
        assert not any(isinstance(m, nn.Linear) and m.weight.shape == (16, 16) for m in pair.modules())


def test_ranks_are_in_the_manifest():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    plan = fxrank.plan_of(fxrank.factorize(model, torch.randn(2, 8), rank={"1": 2, "2": 3}))
    assert plan.R == {"1": 2, "2": 3}
    assert fxrank.Plan.from_json(plan.to_json()).R == {"1": 2, "2": 3}


def test_weights_load_where_the_library_is_not_installed(tmp_path):
    """The state dict of a rewritten model is plain tensors under plain names: torch alone reads it."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 2))
    x = torch.randn(2, 8)
    small = fxrank.factorize(model, x, rank=2)
    torch.save({"state": small.state_dict(), "x": x, "y": small(x).detach()}, tmp_path / "saved.pt")
    program = """if True:
        import sys, torch
        from torch import nn
        torch.set_num_threads(1)
        saved = torch.load(sys.argv[1], weights_only=True)
        pair = nn.ModuleDict({"u": nn.Linear(16, 2, bias=False), "v": nn.Linear(2, 16)})
        model = nn.Sequential(nn.Linear(8, 16), pair, nn.Linear(16, 2))
        model.load_state_dict(saved["state"])
        assert torch.equal(model[2](pair["v"](pair["u"](model[0](saved["x"])))), saved["y"])
        assert "fxrank" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "saved.pt")], check=True, timeout=300)


def test_a_merged_model_is_the_plain_class_again():
    model = nn.Sequential(conv(), conv(in_channels=8), nn.Flatten(), nn.Linear(8 * 16, 2))
    x = torch.randn(2, 4, 8, 8)
    small = fxrank.factorize(model, x, rank=0.5)
    assert pairs_in(small)
    merged = fxrank.merge(small)
    assert [type(m) for m in merged.modules()] == [type(m) for m in model.modules()]
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(merged.state_dict())
    assert largest_difference(small(x), fresh(x)) <= ROUNDING
