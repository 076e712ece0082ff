"""What calibration sees of a model, and that it leaves no trace."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from fxrank.passes.calibration import collect as collecting
from fxrank.passes.calibration.collect import Drawn, Watch, collect
from fxrank.passes.errors import CalibrationError
from fxrank.passes.pairs.convolution import LowRankConv1d, LowRankConv2d
from fxrank.passes.pairs.embedding import LowRankEmbedding
from fxrank.passes.pairs.linear import LowRankFusedLinear, LowRankLinear


def calls_of(*inputs, **named):
    return lambda: [((x,), named) for x in inputs]


def watch(layer, pair, side, shape):
    return Watch("layer", pair, (layer,), side, shape)


@pytest.mark.parametrize(
    ("layer", "pair", "side", "shape", "x", "expected"),
    [
        (nn.Linear(3, 4), LowRankLinear, "outputs", (1, 4), torch.randn(5, 7, 3), lambda m, x: x @ m.weight.T),
        (nn.Linear(3, 4, bias=False), LowRankLinear, "inputs", (1, 3), torch.randn(5, 3), lambda m, x: x),
        (nn.Linear(4, 12), LowRankFusedLinear, "outputs", (3, 4), torch.randn(5, 4), lambda m, x: x @ m.weight.T),
        (
            nn.Conv2d(4, 6, 3, groups=2),
            LowRankConv2d,
            "outputs",
            (2, 3),
            torch.randn(2, 4, 5, 5),
            lambda m, x: (m(x) - m.bias[:, None, None]).movedim(1, -1),
        ),
        (
            nn.Conv1d(4, 6, 3),
            LowRankConv1d,
            "outputs",
            (1, 6),
            torch.randn(4, 9),
            lambda m, x: (m(x) - m.bias[:, None]).T,
        ),
        (nn.Embedding(9, 4), LowRankEmbedding, "lookups", (1, 4), torch.randint(9, (5, 6)), lambda m, x: m(x)),
    ],
    ids=["linear", "inputs", "qkv", "conv2d", "unbatched conv1d", "embedding"],
)
def test_vectors_are_those_before_the_bias(layer, pair, side, shape, x, expected):
    found, number = collect(layer, {"a": watch(layer, pair, side, shape)}, calls_of(x, x))
    vectors = expected(layer, x).detach().double().reshape(-1, *shape)
    assert (number, found["a"].count) == (2, 2 * len(vectors))
    torch.testing.assert_close(found["a"].mean, vectors.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found["a"].second(centred=False),
        torch.einsum("ngi,ngj->gij", vectors, vectors) / len(vectors),
        rtol=1e-5,
        atol=1e-6,
    )


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, **masks):
        return self.layer(x)


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("attention_mask", lambda kept: kept.long()),
        ("attention_mask", lambda kept: kept),
        ("src_key_padding_mask", lambda kept: ~kept),
    ],
)
def test_padding_is_left_out(name, mask):
    model, x = Masked(), torch.randn(2, 5, 3)
    kept = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    what = {"a": watch(model.layer, LowRankLinear, "outputs", (1, 3))}
    found, _ = collect(model, what, calls_of(x, **{name: mask(kept)}))
    assert found["a"].count == 4
    expected = (x[kept] @ model.layer.weight.T).mean(0, keepdim=True).detach().double()
    torch.testing.assert_close(found["a"].mean, expected, rtol=1e-5, atol=1e-6)
    other, _ = collect(model, what, calls_of(x[0], **{name: mask(kept)}))  # a mask of another shape says nothing of it
    assert other["a"].count == 5


def test_all_calls_of_a_shared_module_count_and_one_that_is_not_called_is_not_there():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.a(self.a(x))

    model = Twice()
    found, _ = collect(
        model,
        {n: watch(m, LowRankLinear, "outputs", (1, 3)) for n, m in model.named_children()},
        calls_of(torch.randn(4, 3)),
    )
    assert {name: m.count for name, m in found.items()} == {"a": 8}


def test_positions_are_sampled_to_a_bound_and_layers_go_in_rounds(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    watched = {n: watch(m, LowRankLinear, "outputs", (1, 3)) for n, m in model.named_children()}
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    whole, _ = collect(model, watched, calls_of(x))
    monkeypatch.setattr(collecting, "ROUND_BYTES", 2 * 72)
    asked = []
    rounds, number = collect(model, watched, lambda: asked.append(1) or [((x,), {})])
    assert (len(asked), number) == (2, 1)
    for name in whole:
        torch.testing.assert_close(rounds[name].mean, whole[name].mean)
    some, _ = collect(model, watched, calls_of(x, x), drawn=Drawn(40, 4.0))
    again, _ = collect(model, watched, calls_of(x, x), drawn=Drawn(40, 4.0))
    assert some["0"].count == 80
    assert torch.equal(some["0"].mean, again["0"].mean)
    assert collect(model, watched, calls_of(x, x), drawn=Drawn(1.5, 4.0))[0]["0"].count == 24
    assert collect(model, watched, calls_of(x, x), drawn=Drawn(1.5, 1.25))[0]["0"].count == 8


def test_numbers_whose_sum_overflows_are_finite():
    model = nn.Sequential(nn.Linear(2, 2, bias=False).double())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    x = torch.full((4, 2), 1e308, dtype=torch.float64)
    found, number = collect(model, {"0": watch(model[0], LowRankLinear, "outputs", (1, 2))}, calls_of(x))
    assert number == 1 and found["0"].count == 4


def test_nothing_of_the_model_is_changed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            self.calls += 1
            self.seen.append(1)
            random.random(), np.random.rand(), torch.rand(1)
            return self.drop(self.norm(self.layer(x)))

    model = Counting().train()
    model.norm.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    what = {"a": watch(model.layer, LowRankLinear, "outputs", (1, 3))}
    collect(model, what, calls_of(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))))
    with pytest.raises(CalibrationError):
        collect(model, what, calls_of(torch.full((4, 3), torch.nan)))
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert [m.training for m in model.modules()] == modes
    assert model.seen == []
    assert not model.layer._forward_hooks
    assert torch.equal(states[0], torch.get_rng_state())
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_what_is_wrong_with_the_data_is_said():
    layer = nn.Linear(3, 3)
    what = {"a": watch(layer, LowRankLinear, "outputs", (1, 3))}
    bad = torch.randn(4, 3).index_fill(0, torch.tensor([2]), torch.inf)
    with pytest.raises(
        CalibrationError, match=r"the outputs of 'layer' hold 3 NaN or infinite values of 12 in batch 2\."
    ):
        collect(layer, what, calls_of(torch.randn(4, 3), bad))
    with pytest.raises(CalibrationError, match="calibration must yield at least one batch; it is empty"):
        collect(layer, what, list)


def test_each_trained_batchnorm_may_normalize_by_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 5)
    )
    model[3].running_mean.fill_(7)
    x = torch.randn(64, 3) * 5 + 2  # of which the statistics know nothing yet
    watched = {i: watch(model[i], LowRankLinear, "inputs", (1, model[i].in_features)) for i in (2, 4)}
    before = copy.deepcopy(model.state_dict())
    found, _ = collect(model, watched, calls_of(x), by_batch=True)
    assert [m.training for m in model] == [True, True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found[2].mean.abs().max() < 1e-6  # no dropout, by the batch
    torch.testing.assert_close(
        found[2].second(centred=True).diagonal(dim1=1, dim2=2), torch.ones(1, 3).double(), rtol=1e-4, atol=0
    )
    assert found[4].mean.max() < -5  # the frozen one by its own
    stale, _ = collect(model, watched, calls_of(x))
    assert stale[2].mean.abs().max() > 1
