"""Layer classes of a user's own, written as they come."""

import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.pairs.registry import PAIRS


class PlainNone(nn.Module):
    """`(…, in)` to `(…, out)`; without a bias it notes None as an ordinary attribute, and registers no parameter."""

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features, **place) / in_features**0.5)
        self.bias = nn.Parameter(torch.zeros(out_features, **place)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class LowRankPlainNone(fxrank.FactorPair):
    kind = "plain_none"
    geometry = ("in_features", "out_features")

    def make_layers(self, dense, place, extra_bn):
        first, second = (self.in_features, self.rank), (self.rank, self.out_features)
        return PlainNone(*first, bias=False, **place), None, PlainNone(*second, bias=False, **place)

    def empty_dense(self, place):
        return PlainNone(self.in_features, self.out_features, bias=False, **place)


def test_a_layer_that_notes_none_for_its_bias_is_factorized_timed_saved_and_merged(monkeypatch, tmp_path):
    monkeypatch.setitem(PAIRS, PlainNone, {})  # which is gone again after the test
    fxrank.register_pair(PlainNone, LowRankPlainNone)

    def build():
        return nn.Sequential(*(PlainNone(12, 12) for _ in range(3)))

    model, x = build(), torch.randn(8, 12)
    assert fxrank.profile(model, x).stacks
    small = fxrank.factorize(model, x, 4)
    fxrank.save(small, tmp_path)
    loaded = fxrank.load(build(), tmp_path)
    assert isinstance(loaded[1], LowRankPlainNone) and torch.equal(loaded(x), small(x))
    merged = fxrank.merge(small)
    assert type(merged[1]) is PlainNone and merged[1].bias is not None
    # float32 sums in another order
    torch.testing.assert_close(merged(x), small(x), rtol=1e-5, atol=1e-5)
