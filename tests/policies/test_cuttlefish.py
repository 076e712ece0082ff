"""`Cuttlefish`: its options and presets, and K, R and E decided from made-up measurements."""

import dataclasses
import re
from itertools import pairwise

import pytest
import torch
from nets import UNTIMED, SixLayers, vectors
from torch import nn

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.profiling.timing import StackProfile
from fxrank.passes.tracing.trace import trace
from fxrank.policies.monitor import RankMonitor, ReferenceDetector, SlopeDetector
from fxrank.policies.ranks import RANK_RULES
from fxrank.policies.scene import Clock, Scene

X = vectors()[0]
RULES = ", ".join(map(repr, sorted([*RANK_RULES, "outputs"])))
SCALED = dataclasses.replace(UNTIMED, rank_metric="scaled_stable_rank")


# -- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_metric": "entropie"}, f"rank_metric must be one of {RULES}; got 'entropie'. Did you mean 'entropy'?"),
        ({"k_rule": "prefixes"}, "k_rule must be one of 'prefix', 'stack'; got 'prefixes'. Did you mean 'prefix'?"),
        (
            {"xi": "initial"},
            "xi (or a number, or a dict by layer name) must be one of 'init', 'random'; got 'initial'.",
        ),
        ({"samples": "epochs"}, "samples (or a number) must be one of 'epoch'; got 'epochs'. Did you mean 'epoch'?"),
        ({"round_to": "automatic"}, "round_to (or a number) must be one of 'auto'; got 'automatic'."),
        ({"samples": 0}, "samples must be at least 1; got 0."),
        ({"latest": 7}, "latest must be a share in [0, 1] or None; got 7."),
        ({"earliest": 1.2}, "earliest must be a share in [0, 1]; got 1.2."),
        ({"min_ratio": -1}, "min_ratio must be a share in [0, 1]; got -1."),
        ({"speedup_threshold": -1}, "speedup_threshold must be at least 0 or None; got -1."),
        ({"xi": -2.0}, "xi must be above 0; got -2.0."),
        ({"xi": {"a": 0.0}}, "xi must be above 0; got {'a': 0.0}."),
        ({"round_to": 0}, "round_to must be at least 1; got 0. 1 keeps ranks as they are."),
        ({"probe_ratio": 0}, "probe_ratio must be above 0 and at most 1; got 0."),
        ({"probe_ratio": 1.5}, "probe_ratio must be above 0 and at most 1; got 1.5."),
        ({"ratio": -0.25}, "ratio must be above 0 and at most 1; got -0.25."),
        ({"floor": 1.0}, "floor is a share of the layers' parameters, in [0, 1); got 1.0."),
        ({"keep": 1.0}, "keep is the share of the model's outputs that is kept, in (0, 1); got 1.0."),
        (
            {"factors": "weight"},
            "rank_metric='outputs' says how many ranks factors need that know the data; got factors='weight'. Leave it out, or choose another",
        ),
        ({"share": 1.1}, "share must be above 0 and at most 1; got 1.1."),
        ({"epsilon": 0}, "epsilon must be above 0 and window at least 2; got 0 and 25."),
        ({"window": 1}, "epsilon must be above 0 and window at least 2; got 0.1 and 1."),
        ({"frobenius_decay": "on"}, "frobenius_decay (or a number, or None) must be one of 'auto'; got 'on'."),
        ({"frobenius_decay": -0.1}, "frobenius_decay must not be negative; got -0.1. None switches it off."),
        ({"lr_scale": 0}, "lr_scale must be above 0; got 0. 1.0 keeps the schedule."),
        ({"rewarmup": 1.0}, "rewarmup is a share of the run in [0, 1); got 1.0. 0 switches it off."),
        ({"rewarmup": -0.1}, "rewarmup is a share of the run in [0, 1); got -0.1. 0 switches it off."),
    ],
)
def test_bad_options_of_cuttlefish(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        fxrank.Cuttlefish(**options)


def test_presets():
    paper, reference = fxrank.Cuttlefish.paper(), fxrank.Cuttlefish.reference()
    assert paper.detector(Clock(0, 300, 1)) == SlopeDetector(epsilon=0.1, window=2, relative=False)
    assert reference.detector(Clock(0, 300, 1)) == ReferenceDetector(
        epsilon=0.1, window=15, tail=11, relax=((1, 5.0), (2, 2.5))
    )
    for policy in (paper, reference):
        assert (policy.k_rule, policy.speedup_needed, policy.latest, policy.round_to) == ("prefix", 1.5, None, 1)
        assert policy.rank_metric == "scaled_stable_rank"
        assert policy.interval(Clock(0, 3000, 10)) == 10
    assert (paper.rewarmup, reference.rewarmup) == (0.0, 5 / 300)


# -- K, with made-up measurements


def scene_of(model, x, speedups=None, profiler=None):
    scene = Scene(model, candidates(discover(trace(model, x), model), model), profiler=profiler)
    for name, speedup in (speedups or {}).items():
        scene.profiles[name] = StackProfile((name,), "linear", (), (), 4, speedup, 1.0, 1, 1, 1, 1)
    return scene


SPEEDUPS = {"l1": 1.5, "l2": 1.75, "l3": 1.25, "l4": 2.0}


def text(speedup, threshold="1"):
    return f"a pair at 0.25 of full rank is {speedup:.2f}x as fast, the threshold is {threshold}x"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"speedup_threshold": 1.5}, {"l1": text(1.5, "1.5"), "l3": text(1.25, "1.5")}),
        ({"speedup_threshold": 1.5, "k_rule": "prefix"}, {"l1": text(1.5, "1.5")}),
        ({"speedup_threshold": 1.75}, {n: text(SPEEDUPS[n], "1.75") for n in ("l1", "l2", "l3")}),
        ({"speedup_threshold": 1.75, "k_rule": "prefix"}, {n: text(SPEEDUPS[n], "1.75") for n in ("l1", "l2", "l3")}),
        ({}, {}),
        ({"speedup_threshold": None}, {}),
        ({"speedup_threshold": 9.0, "objective": "size"}, {}),
        ({"speedup_threshold": 9.0, "k_rule": "prefix"}, {n: text(s, "9") for n, s in SPEEDUPS.items()}),
    ],
)
def test_stack_and_prefix_rule(options, kept):
    policy = fxrank.Cuttlefish(**options)
    scene = scene_of(SixLayers(), X, SPEEDUPS)
    assert policy.eligible(scene) == kept
    assert scene.watched(kept) == {"l1", "l2", "l3", "l4"} - set(kept)


class FakeProfiler:
    """Milliseconds by rank from a function; remembers what was asked."""

    seconds = 0.0

    def __init__(self, ms, dense=10.0, on_cpu=True):
        self.ms, self.dense, self.on_cpu, self.asked = ms, dense, on_cpu, []

    def times_ms(self, layer, ranks):
        self.asked.append((layer.name, list(ranks)))
        return [self.dense, *(self.ms(rank) for rank in ranks)]


def decide(policy, model=None, profiler=None, speedups=None):
    model = SixLayers() if model is None else model
    scene = scene_of(model, X, speedups, profiler)
    scene.monitor = RankMonitor(scene.layers, model, SlopeDetector(), 1)
    scene.monitor.observe(0, exact=True)
    return {d.name: d for d in policy.decide(scene)}


def test_kept_by_k_keeps_its_measurement():
    policy = fxrank.Cuttlefish(rank_metric="ratio", ratio=0.25, round_to=1, speedup_threshold=1.5)
    profiler = FakeProfiler(lambda rank: 4.0)
    decisions = decide(policy, profiler=profiler, speedups=SPEEDUPS)
    assert {n: d.rank for n, d in decisions.items()} == {
        "l0": None,
        "l1": None,
        "l2": 4,
        "l3": None,
        "l4": 8,
        "l5": None,
    }
    assert decisions["l1"].reason == text(1.5, "1.5")
    assert decisions["l1"].speedup == 1.5
    assert decisions["l2"].speedup == 2.5  # at the rank chosen
    assert decisions["l0"].reason == "first layer of the graph, left dense by default"
    assert decisions["l5"].reason == "last layer of the graph, left dense by default"


# -- R


def test_a_pair_that_is_not_faster_is_not_made():
    policy = fxrank.Cuttlefish(rank_metric="ratio", ratio=0.25, round_to=1)
    decisions = decide(policy, profiler=FakeProfiler(lambda rank: 10.0 if rank == 4 else 5.0))
    assert decisions["l1"].rank is None
    assert decisions["l1"].reason == "at rank 4 a pair measured 1.00x as fast as the layer"
    assert decisions["l1"].speedup == 1.0
    assert decisions["l3"].rank == 8


def test_where_size_counts_no_layer_is_kept_for_its_time():
    policy = fxrank.Cuttlefish(rank_metric="ratio", ratio=0.25, round_to=1, objective="size")
    decisions = decide(policy, profiler=FakeProfiler(lambda rank: 20.0), speedups=dict.fromkeys(SPEEDUPS, 0.5))
    assert {n: d.rank for n, d in decisions.items() if d.factorized} == {"l1": 4, "l2": 4, "l3": 8, "l4": 8}
    assert decisions["l1"].speedup == 0.5


def test_break_even_and_its_reason():
    decisions = decide(dataclasses.replace(UNTIMED, rank_metric="ratio", ratio=0.5))
    # a 16x16 layer breaks even at 8, a 16x32 layer at 32/3
    assert decisions["l1"].rank is None
    assert decisions["l1"].reason == "rank 8 of 16 would not save anything: break-even is 8.0"
    assert decisions["l2"].rank == 8
    assert decisions["l2"].pair_parameters == 8 * (16 + 32) < decisions["l2"].parameters
    assert decisions["l1"].stable_rank is not None


def test_at_initialization_the_scaled_rank_is_full():
    decisions = decide(SCALED)
    assert decisions["l1"].reason == "rank 16 of 16 would not save anything: break-even is 8.0"
    assert not any(d.factorized for d in decisions.values())


def test_a_zero_matrix_is_kept():
    model = SixLayers()
    nn.init.zeros_(model.l2.weight)
    for policy in (dataclasses.replace(SCALED, xi=1.0), UNTIMED, fxrank.Pufferfish(E=0)):
        decision = decide(policy, model)["l2"]
        assert decision.rank is None
        assert decision.reason == "its weight is zero (stable rank 0)"


@pytest.mark.parametrize(("min_ratio", "rank"), [(0.0, 2), (0.125, 2), (0.15, 3), (0.25, 4)])
def test_min_ratio_bounds_from_below(min_ratio, rank):
    policy = dataclasses.replace(UNTIMED, rank_metric="ratio", ratio=0.125, min_ratio=min_ratio)
    assert decide(policy)["l2"].rank == rank


def test_xi():
    model = SixLayers()
    ranks = {n: fxrank.stable_rank(model.get_submodule(n).weight) for n in ("l1", "l2", "l3", "l4")}
    # rounded to four digits in the plan
    init = decide(SCALED, model)
    assert {n: init[n].xi for n in ranks} == {n: round(init[n].full_rank / ranks[n], 4) for n in ranks}
    assert decide(dataclasses.replace(SCALED, xi="random"), model)["l3"].xi == 4.0
    number = decide(dataclasses.replace(SCALED, xi=1.0), model)
    assert {n: number[n].stable_rank for n in ranks} == {n: pytest.approx(r, abs=1e-4) for n, r in ranks.items()}
    assert number["l4"].rank == -(-ranks["l4"] // 1)
    by_name = decide(dataclasses.replace(SCALED, xi={"l1": 1.0, "l2": 1.0, "l3": 1.0, "l4": 0.5}), model)
    assert by_name["l4"].xi == 0.5
    message = "xi as a dict must name every layer to factorize; 'l2' is missing. Add it, or use 'init' or 'random'."
    with pytest.raises(ValueError, match=re.escape(message)):
        decide(dataclasses.replace(SCALED, xi={"l1": 1.0}), model)


@pytest.mark.parametrize(
    ("round_to", "ratio", "ranks"),
    [
        (1, 0.25, {"l2": 4, "l3": 8, "l4": 8}),
        (3, 0.25, {"l2": 6, "l3": 9, "l4": 9}),
        (8, 0.125, {"l2": 8, "l3": 8, "l4": 8}),
        (16, 0.125, {"l2": 2, "l3": 4, "l4": 16}),  # 16 is not below break-even of l2 (10.7) and l3 (16)
        ("auto", 0.125, {"l2": 2, "l3": 4, "l4": 4}),  # without timing nothing says that a multiple is better
    ],
)
def test_rounding_without_timing(round_to, ratio, ranks):
    policy = dataclasses.replace(UNTIMED, rank_metric="ratio", ratio=ratio, round_to=round_to)
    decisions = decide(policy)
    assert {n: decisions[n].rank for n in ranks} == ranks


def test_auto_rounding_takes_the_fastest_and_of_equals_the_largest():
    policy = fxrank.Cuttlefish(rank_metric="ratio", ratio=0.15, round_to="auto")
    steps = FakeProfiler(lambda rank: 4.0 if rank <= 8 else 5.0)
    decisions = decide(policy, profiler=steps)
    assert dict(steps.asked) == {"l1": [2], "l2": [2, 8], "l3": [4, 8], "l4": [4, 8, 16]}
    assert {n: decisions[n].rank for n in ("l1", "l2", "l3", "l4")} == {"l1": 2, "l2": 8, "l3": 8, "l4": 8}
    odd = FakeProfiler(lambda rank: 4.0 if rank % 8 == 0 else 3.9)  # 2.5 % slower is not a tie
    assert decide(policy, profiler=odd)["l4"].rank == 4


def test_a_number_to_round_to_is_obeyed_with_timing_too():
    policy = fxrank.Cuttlefish(rank_metric="ratio", ratio=0.15, round_to=3)
    profiler = FakeProfiler(float)
    assert decide(policy, profiler=profiler)["l3"].rank == 6
    assert dict(profiler.asked)["l3"] == [6]


# -- E


def ready(policy, settled, step=0, fallen=0.2, model=None, moved=6):
    scene = scene_of(model or SixLayers(), X)
    scene.monitor = RankMonitor(scene.layers, scene.model, SlopeDetector(), 1)
    scene.monitor.observe(0, exact=True)
    for number, curve in enumerate(scene.monitor.curves.values()):
        curve.append(fallen * curve[0] if number < moved else curve[0])
    scene.monitor.settled = frozenset(settled)
    return policy.ready(Clock(step, 100, 10), scene)


def test_switches_when_all_eligible_layers_have_settled():
    assert ready(UNTIMED, ["l1", "l2", "l3"], 49) is None
    assert ready(UNTIMED, ["l1", "l2", "l3", "l4"], 49) == "the ranks of all 4 eligible layers have settled"
    assert ready(UNTIMED, ["l0", "l5"], 0) is None


@pytest.mark.parametrize("metric", ["scaled_stable_rank", "max_scaled_accumulative"])
def test_ranks_that_have_settled_where_they_save_nothing_do_not_count(metric):
    policy = dataclasses.replace(UNTIMED, rank_metric=metric)
    settled = ["l1", "l2", "l3", "l4"]
    assert ready(policy, settled, 49, fallen=0.99) is None
    assert ready(policy, settled, 49, fallen=0.2) is not None
    assert ready(dataclasses.replace(policy, min_ratio=0.9), settled, 49, fallen=0.2) is None
    assert ready(policy, settled, 50, fallen=0.99) == "deadline at 0.5 of the run; 0 of 4 layers had not settled"
    assert ready(dataclasses.replace(policy, wait=False), settled, 49, fallen=0.99) is not None
    assert ready(dataclasses.replace(policy, rank_metric="energy"), settled, 49, fallen=0.99) is not None
    assert not fxrank.Cuttlefish.paper().wait
    assert not fxrank.Cuttlefish.reference().wait


def pretrained():
    model = SixLayers()
    with torch.no_grad():
        for layer in model.children():
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(u * s.sort(descending=True).values ** 2 @ v)
    return model


def test_spectra_that_are_as_they_were_at_the_start_say_nothing_of_when():
    policy, settled = UNTIMED, ["l1", "l2", "l3", "l4"]
    for fallen in (0.995, 1.0, 1.005):
        assert ready(policy, settled, 49, fallen, pretrained()) is None
        at_last = ready(policy, settled, 50, fallen, pretrained())
        assert at_last == "deadline at 0.5 of the run; most of 4 ranks are as they were at the start"
    moved = "the ranks of all 4 eligible layers have settled"
    assert ready(policy, settled, 49, 0.8, pretrained()) == moved
    assert ready(policy, settled, 49, 0.8, pretrained(), moved=3) == moved  # l0, l1 and l2: two of four
    assert ready(policy, settled, 49, 0.8, pretrained(), moved=2) is None
    assert ready(dataclasses.replace(policy, wait=False), settled, 49, 1.0, pretrained()) == moved


def test_deadline():
    assert ready(UNTIMED, ["l1"], 49) is None
    assert ready(UNTIMED, ["l1"], 50) == "deadline at 0.5 of the run; 3 of 4 layers had not settled"
    assert ready(dataclasses.replace(UNTIMED, latest=None), ["l1"], 100) is None
    assert (
        ready(dataclasses.replace(UNTIMED, latest=0.2), [], 20)
        == "deadline at 0.2 of the run; 4 of 4 layers had not settled"
    )


def test_ranks_that_have_settled_early_wait():
    policy, settled = dataclasses.replace(UNTIMED, earliest=0.6, latest=0.7), ["l1", "l2", "l3", "l4"]
    assert ready(policy, settled, 59) is None
    assert ready(policy, settled, 60) == "the ranks of all 4 eligible layers have settled"
    assert ready(policy, ["l1"], 69) is None
    assert ready(policy, ["l1"], 70) == "deadline at 0.7 of the run; 3 of 4 layers had not settled"
    sooner = dataclasses.replace(policy, latest=0.3)
    assert ready(sooner, settled, 29) is None
    assert ready(sooner, settled, 30) == "deadline at 0.3 of the run; 0 of 4 layers had not settled"
    assert (fxrank.Cuttlefish().earliest, fxrank.Cuttlefish().latest) == (0.65, 0.75)
    for preset in (fxrank.Cuttlefish.paper(), fxrank.Cuttlefish.reference(), fxrank.Cuttlefish.transformer()):
        assert preset.earliest == 0


# -- R, of layers that were chosen together


def as_chosen(ranks, profiler, **options):
    """The decisions on four layers 64 wide, between a first and a last one, of which these ranks were chosen."""
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise([8, 64, 64, 64, 64, 64, 4])])
    scene = scene_of(model, torch.randn(2, 8), profiler=profiler)
    scene.monitor = RankMonitor(scene.layers, model, SlopeDetector(), 1)
    scene.monitor.observe(0, exact=True)
    scene.chosen = {layer.name: (layer, ranks[layer.name]) for layer in scene.layers if layer.name in ranks}
    return {d.name: d for d in fxrank.Cuttlefish(**options).decide(scene)}


def test_on_a_cpu_chosen_ranks_stay_and_are_timed_at_the_multiple_of_8_that_takes_as_long_all_of_a_stack_together():
    profiler = FakeProfiler(lambda rank: rank / 4)
    found = as_chosen({"1": 3, "2": 16, "3": 17, "4": 31}, profiler)
    assert {name: found[name].rank for name in "1234"} == {"1": 3, "2": 16, "3": 17, "4": 31}
    assert {name: found[name].speedup for name in "1234"} == {"1": 5.0, "2": 2.5, "3": 1.6667, "4": 1.2903}
    # 32 is break-even, which no pair may have
    assert profiler.asked[0] == ("1", [8, 16, 24, 31])


def test_no_more_than_four_are_timed_beside_each_other():
    profiler = FakeProfiler(lambda rank: 4.0, on_cpu=False)
    as_chosen({"1": 3, "2": 10, "3": 17}, profiler)
    assert profiler.asked[:2] == [("1", [3, 8, 10, 16]), ("1", [17, 24])]


def test_a_chosen_pair_that_is_not_faster_says_at_which_rank_it_was_timed():
    found = as_chosen({"1": 3, "2": 18, "3": 8}, FakeProfiler(lambda rank: 10.0 if rank == 8 else 5.0))
    assert found["1"].reason == "at rank 3, timed at 8, a pair measured 1.00x as fast as the layer"
    assert found["3"].reason == "at rank 8 a pair measured 1.00x as fast as the layer"
    assert found["2"].rank == 18


def test_on_a_gpu_a_chosen_rank_is_rounded_up_where_that_is_faster():
    slow = FakeProfiler(lambda rank: 4.0 if rank % 8 == 0 else 6.0, on_cpu=False)
    found = as_chosen({"1": 3, "2": 16}, slow)
    assert slow.asked[0] == ("1", [3, 8, 16])
    assert {name: found[name].rank for name in "12"} == {"1": 8, "2": 16}
    tied = FakeProfiler(lambda rank: 4.0, on_cpu=False)
    assert as_chosen({"1": 3}, tied)["1"].rank == 3


def test_a_number_to_round_to_is_obeyed_with_chosen_ranks_too():
    profiler = FakeProfiler(lambda rank: 4.0)
    assert as_chosen({"1": 3, "2": 9}, profiler, round_to=4)["2"].rank == 12
    assert profiler.asked[0] == ("1", [4, 12])
