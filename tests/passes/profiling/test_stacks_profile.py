"""Stacks of interchangeable layers, what they cost by count, and how they are timed (never how long it takes)."""

import copy
import itertools

import pytest
import torch
from torch import nn

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.discovery.stacks import Stack, stacks
from fxrank.passes.profiling.clock import times_of
from fxrank.passes.profiling.timing import Profiler
from fxrank.passes.tracing.trace import trace

CPU = torch.device("cpu")


def found(model, x, **options):
    return candidates(discover(trace(model, x), model), model, **options)


def test_stacks_group_interchangeable_layers_in_graph_order():
    model = nn.Sequential(
        *[nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)],
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    groups = stacks(found(model, torch.randn(1, 4, 8, 8)))
    assert [[layer.name for layer in g.layers] for g in groups] == [["1", "2", "3"], ["4"], ["5"]]
    assert [g.name for g in groups] == ["1 +2", "4", "5"]
    assert groups[0].sample is groups[0].layers[0]


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
    ],
    ids=str,
)
def test_one_difference_in_geometry_makes_another_stack(other):
    plain = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)]
    assert len(stacks(found(nn.Sequential(*plain), torch.randn(1, 4, 8, 8)))) == 1
    assert len(stacks(found(nn.Sequential(*plain[:2], other, plain[3]), torch.randn(1, 4, 8, 8)))) == 2


def test_layers_with_a_reason_are_in_no_stack():
    layers = found(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), torch.randn(1, 4), exclude="1")
    assert [[a.name for a in s.layers] for s in stacks(layers)] == [["2"]]
    assert stacks([]) == []


def profiled(model, x, name, probe_ratio, amp=None):
    layer = {a.name: a for a in found(model, x, include="*")}[name]
    return Profiler(model, CPU, amp=amp, rounds=1, budget_ms=0).stack(Stack((layer,)), probe_ratio)


def test_counts_of_a_linear():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 4))
    p = profiled(model, torch.randn(5, 3, 8), "1", 0.25)
    rows = 5 * 3
    assert (p.names, p.kind, p.weight_shape, p.input_shape) == (("1",), "linear", (16, 8), (5, 3, 8))
    assert p.probe_rank == 2
    assert p.flops == 2 * rows * 8 * 16
    assert p.bytes_moved == 4 * (rows * 8 + 8 * 16 + rows * 16)
    assert p.pair_flops == 2 * rows * 2 * (8 + 16)
    assert p.pair_bytes_moved == 4 * (rows * 8 + 2 * (8 + 16) + 2 * rows * 2 + rows * 16)
    assert p.intensity == p.flops / p.bytes_moved
    assert p.pair_intensity == p.pair_flops / p.pair_bytes_moved
    assert p.speedup == p.dense_ms / p.pair_ms


@pytest.mark.parametrize(("amp", "size"), [(None, 4), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_counts_of_a_grouped_strided_convolution(amp, size):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2), nn.Conv2d(6, 2, 1))
    p = profiled(model, torch.randn(2, 3, 10, 10), "1", 1.0, amp)
    positions = 2 * 4 * 4
    assert p.input_shape == (2, 8, 8, 8)
    assert p.probe_rank == 3
    assert p.flops == 2 * positions * 6 * 4 * 9
    assert p.bytes_moved == size * (2 * 8 * 64 + 6 * 4 * 9 + positions * 6)
    assert p.pair_flops == 2 * positions * (6 * 4 * 9 + 6 * 3)
    assert p.pair_bytes_moved == size * (2 * 8 * 64 + (6 * 4 * 9 + 6 * 3) + 2 * positions * 6 + positions * 6)


def test_the_probe_has_at_least_rank_one():
    assert (
        profiled(
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4), "1", 0.01
        ).probe_rank
        == 1
    )


def test_times_are_of_the_layer_then_of_each_rank(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=2, bias=False)).to(
        memory_format=torch.channels_last
    )
    layer = found(model, torch.randn(2, 3, 8, 8), include="*")[1]
    timed = []

    def step(self, module, x):
        timed.append((type(module).__name__, getattr(module, "rank", None), tuple(x.shape), x.dtype, x.is_contiguous()))
        assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert all(torch.isfinite(p).all() for p in module.parameters())
        return lambda: None

    monkeypatch.setattr(Profiler, "_step", step)
    assert len(Profiler(model, CPU).times_ms(layer, [1, 2])) == 3
    assert timed == [
        ("Conv2d", None, (2, 4, 6, 6), torch.float32, False),
        ("LowRankConv2d", 1, (2, 4, 6, 6), torch.float32, False),
        ("LowRankConv2d", 2, (2, 4, 6, 6), torch.float32, False),
    ]


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_one_step_is_forward_and_backward_in_the_jobs_precision(amp):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.dtype)
            return out

    module = Spy(4, 3)
    step = Profiler(module, CPU, amp=amp)._step(module, torch.randn(2, 4))
    step()
    assert module.weight.grad is not None
    first = module.weight.grad.clone()
    step()
    assert torch.equal(module.weight.grad, first)  # not added up
    assert set(seen) == {amp or torch.float32}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_profiling_leaves_no_trace(training):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Dropout(), nn.Linear(16, 4)).train(
        training
    )
    x = torch.randn(5, 8)
    model(x).sum().backward()
    before, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    ids, state = [id(p) for p in model.parameters()], torch.random.get_rng_state()
    with torch.no_grad():
        measured = fxrank.profile(model, x, include="*", exclude="0")
    assert torch.equal(state, torch.random.get_rng_state())
    assert [id(p) for p in model.parameters()] == ids
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(m.training is training for m in model.modules())
    assert [s.names for s in measured.stacks] == [("2",), ("4",)]
    assert measured.seconds > 0
    assert "FLOP/B" in str(measured)
    assert measured.to_dict()["K"] == measured.K
    assert measured.to_dict()["stacks"][0]["intensity"] == measured.stacks[0].intensity


@pytest.fixture
def asked(monkeypatch):
    """Each layer takes 10 ms and a pair what is said by its rows, plus or minus what is said; what was measured, with its budget."""
    seen, pair_ms, wobble = [], {}, {}

    def measured(self, layer, ranks):
        seen.append((layer.name, list(ranks), self.budget_ms))
        base, by = pair_ms.get(layer.rows, 5.0), wobble.get(layer.rows, 0.0)
        return times_of([[10.0, *([base + by * step] * len(ranks))] for step in (-1, 0, 1)], "clock")

    monkeypatch.setattr(Profiler, "_measured", measured)
    return seen, pair_ms, wobble


def four():
    sizes = [8, 8, 8, 16, 32]
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
    return model, found(model, torch.randn(3, 8), include="*")


def test_what_was_measured_of_a_stack_is_remembered(asked):
    seen, pair_ms, _ = asked
    model, layers = four()
    profiler = Profiler(model, CPU)
    assert profiler.times_ms(layers[0], [2, 4]) == [10.0, 5.0, 5.0]
    pair_ms |= {8: 2.0, 16: 2.0}
    assert profiler.times_ms(layers[1], [4, 2]) == [10.0, 5.0, 5.0]  # as of the other
    assert profiler.times_ms(layers[1], [4, 3]) == [10.0, 5.0, 2.0]
    assert profiler.times_ms(layers[0], []) == [10.0]
    assert profiler.times_ms(layers[2], [4]) == [10.0, 2.0]
    assert [ask[:2] for ask in seen] == [("0", [2, 4]), ("1", [3]), ("2", [4])]


def test_more_rounds_go_where_the_verdict_is_not_clear_and_are_a_share_of_the_run(asked):
    seen, pair_ms, wobble = asked
    model, layers = four()
    pair_ms |= {8: 10 / 1.6, 16: 10 / 4, 32: 10 / 4}
    profiles = Profiler(model, CPU).stacks(stacks(layers), 0.25, 1.5, steps=100)
    assert seen[:3] == [("0", [2], 0.0), ("2", [2], 0.0), ("3", [4], 0.0)]
    (again,) = seen[3:]
    assert again[:2] == ("0", [2]) and again[2] == pytest.approx(0.01 * 100 * 4 * 10)  # of four layers of 10 ms
    assert [p.names for p in profiles] == [("0", "1"), ("2",), ("3",)]
    seen.clear()
    Profiler(model, CPU).stacks(stacks(layers), 0.25, 1.5, steps=10**6)
    assert seen[3:] == [("0", [2], 200.0)]
    seen.clear()
    Profiler(model, CPU).stacks(stacks(layers), 0.25, 2.5, steps=10**6)
    assert [ask[0] for ask in seen] == ["0", "2", "3"]
    wobble[16] = 2.4  # whose speed-up is as wide as it is far away
    seen.clear()
    Profiler(model, CPU).stacks(stacks(layers), 0.25, 2.5, steps=10**6)
    assert [ask[0] for ask in seen] == ["0", "2", "3", "2"]


def test_a_profile_has_its_spread(asked):
    _, pair_ms, wobble = asked
    model, layers = four()
    pair_ms[8], wobble[8] = 5.0, 1.0
    profile = Profiler(model, CPU).stack(Stack(tuple(layers[:1])), 0.25)
    assert (profile.speedup, profile.how) == (2.0, "clock")
    assert profile.spread == pytest.approx(0.05 / 0.5**2)  # quartiles of the share are 0.45 and 0.55
