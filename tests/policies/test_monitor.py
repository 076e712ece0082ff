import re

import pytest
import torch
from nets import UNTIMED, ConvNet, images, mlp, train, vectors

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.tracing.trace import trace
from fxrank.policies.monitor import RankMonitor, ReferenceDetector, SlopeDetector, moving_average, spacing
from fxrank.policies.scene import Clock

NONE = frozenset()


def verdict(detector, curve, full_rank=100):
    return "it" in detector.settled({"it": curve}, {"it": full_rank}, NONE)


def ramp(slope, n=60):
    return [10 + slope * i for i in range(n)]


class TestSlope:
    def test_needs_a_whole_window_after_the_sample_at_initialization(self):
        detector = SlopeDetector(window=5)
        assert not verdict(detector, [7.0] * 5)
        assert verdict(detector, [7.0] * 6)
        # the drop right after initialization is not part of the window
        assert verdict(detector, [70.0] + [7.0] * 5)
        assert not verdict(detector, [70.0] + [70.0] + [7.0] * 4)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_absolute_limit_is_in_ranks_per_sample(self, sign):
        detector = SlopeDetector(epsilon=0.1, relative=False)
        assert verdict(detector, ramp(sign * 0.0999), full_rank=5)
        assert not verdict(detector, ramp(sign * 0.1001), full_rank=5000)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("full_rank", [32, 512])
    def test_relative_limit_is_in_percent_of_the_full_rank(self, sign, full_rank):
        detector = SlopeDetector(epsilon=0.1)
        limit = 0.1 * full_rank / 100
        assert verdict(detector, ramp(sign * 0.999 * limit), full_rank)
        assert not verdict(detector, ramp(sign * 1.001 * limit), full_rank)

    def test_jitter_is_not_movement(self):
        assert verdict(SlopeDetector(epsilon=0.1, relative=False), [10 + (-1) ** i for i in range(60)])

    def test_a_slow_staircase_is_not_rest(self):
        # one rank in 8 samples is 0.125 per sample: the reference's rounded-down average calls this settled
        stairs = [float(10 + i // 8) for i in range(60)]
        assert not verdict(SlopeDetector(epsilon=0.1, relative=False), stairs)
        assert verdict(ReferenceDetector(), stairs)

    def test_a_verdict_lasts_only_while_it_is_true(self):
        detector = SlopeDetector(epsilon=0.1, window=5, relative=False)
        curve = [5.0] * 6
        before = detector.settled({"it": curve}, {"it": 10}, NONE)
        assert before == {"it"}
        assert detector.settled({"it": [*curve, 9.0, 12.0]}, {"it": 10}, before) == NONE

    def test_layers_are_judged_one_by_one(self):
        curves = {"flat": [5.0] * 30, "moving": ramp(1.0, 30), "young": [5.0] * 3}
        assert SlopeDetector().settled(curves, dict.fromkeys(curves, 10), NONE) == {"flat"}

    def test_the_papers_rule_takes_the_difference_of_two_samples(self):
        detector = fxrank.Cuttlefish.paper().detector(Clock(0, 300, 1))
        assert not verdict(detector, [9.0, 5.0])
        assert verdict(detector, [9.0, 5.0, 5.09])
        assert not verdict(detector, [9.0, 5.0, 5.11])


class TestReference:
    def test_verdicts_are_sticky(self):
        detector = ReferenceDetector()
        assert detector.settled({"it": ramp(9.0)}, {}, frozenset({"it"})) == {"it"}

    def test_the_limit_is_relaxed_for_the_last_layers(self):
        detector = ReferenceDetector(epsilon=0.1)
        curves = {n: ramp(0.2 if n == "slow" else 9.0) for n in ("slow", "a", "b")}
        assert detector.settled(curves, {}, NONE) == NONE
        assert detector.settled(curves, {}, frozenset({"a"})) == {"a", "slow"}

    def test_no_verdict_before_the_window_is_full(self):
        assert not verdict(ReferenceDetector(window=15), [5.0] * 15)
        assert verdict(ReferenceDetector(window=15), [5.0] * 16)


def test_moving_average_of_a_constant_is_the_constant():
    assert moving_average([3.0] * 10, 15).tolist() == [3.0] * 10


def layers_of(model, x):
    return candidates(discover(trace(model, x), model), model)


def monitor(model, x, **options):
    return RankMonitor(
        layers_of(model, x), model, options.pop("detector", SlopeDetector()), options.pop("interval", 1), **options
    )


@pytest.mark.parametrize(("model", "x"), [(mlp(), vectors()[0]), (ConvNet(), images()[0])], ids=["mlp", "conv"])
def test_all_supported_layers_are_watched_the_first_sample_is_exact(model, x):
    watch = monitor(model, x)
    watch.observe(0, exact=True)
    names = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert list(watch.curves) == names
    for name in names:
        weight = model.get_submodule(name).weight.detach()
        groups = getattr(model.get_submodule(name), "groups", 1)
        parts = weight.chunk(groups)
        # 1e-12: the mean of the groups is summed in another order
        assert watch.latest()[name] == pytest.approx(sum(map(fxrank.stable_rank, parts)) / groups, rel=1e-12)
        assert watch.full_ranks[name] == min(parts[0].flatten(1).shape)


def test_later_samples_follow_the_live_weights():
    model = mlp()
    watch = monitor(model, vectors()[0])
    watch.observe(0, exact=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(1, 6):
        train(model, optimizer, 2)
        watch.observe(step)
        for name, value in watch.latest().items():
            # the tracker stops at 2e-4 of σ_max²
            assert value == pytest.approx(fxrank.stable_rank(model.get_submodule(name).weight), rel=1e-3)
    assert watch.steps == [0, 1, 2, 3, 4, 5]


def test_observing_draws_no_random_numbers_and_changes_no_weight():
    model = mlp()
    watch = monitor(model, vectors()[0])
    state, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    watch.observe(0, exact=True)
    watch.observe(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_due_steps():
    watch = monitor(mlp(), vectors()[0], interval=3)
    assert [step for step in range(1, 10) if watch.due(step)] == [3, 6, 9]
    assert monitor(mlp(), vectors()[0], interval=0).interval == 1


def test_only_the_judged_layers_settle():
    watch = monitor(mlp(), vectors()[0], detector=SlopeDetector(window=2))
    for step in range(4):
        watch.observe(step, exact=True, judged=frozenset({"4"}))
    assert watch.settled == {"4"}
    watch.observe(4, exact=True)
    assert watch.settled == {"0", "2", "4", "6"}


def test_state_round_trip():
    model = mlp()
    watch = monitor(model, vectors()[0], detector=SlopeDetector(window=2))
    for step in (0, 3, 6, 9):
        watch.observe(step, exact=True)
    state = watch.state_dict()
    other = monitor(model, vectors()[0], detector=SlopeDetector(window=2))
    other.load_state_dict(state)
    assert (other.steps, other.curves, other.settled) == (watch.steps, watch.curves, watch.settled)
    other.observe(12, exact=True)
    assert other.steps == [0, 3, 6, 9, 12]
    assert watch.steps == [0, 3, 6, 9] == state["steps"]  # nothing is shared with the copy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0", "2"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_broken_weight_is_named_and_no_sample_is_kept(value, name, exact):
    model = mlp()
    watch = monitor(model, vectors()[0])
    watch.observe(0, exact=True)
    with torch.no_grad():
        model.get_submodule(name).weight[1, 2] = value
    with pytest.raises(fxrank.NonFiniteWeightError, match=re.escape(f"{name!r} holds")):
        watch.observe(1, exact=exact)
    assert watch.steps == [0]
    assert {len(curve) for curve in watch.curves.values()} == {1}


@pytest.mark.parametrize(
    ("samples", "steps", "per_epoch", "expected"),
    [(300, 3000, 100, 10), (300, 100, 10, 1), (300, 450, 10, 2), ("epoch", 3000, 100, 100), (1, 70, 10, 70)],
)
def test_samples_are_spread_over_the_run(samples, steps, per_epoch, expected):
    from fxrank.policies.scene import Clock

    policy = fxrank.Cuttlefish(samples=samples)
    assert policy.interval(Clock(0, steps, per_epoch)) == expected


def test_a_session_samples_by_step():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    policy = fxrank.Cuttlefish(speedup_threshold=None, samples=10, latest=None, epsilon=1e-9)
    session = fxrank.LowRankSession.attach(model, optimizer, example_inputs=vectors()[0], total_steps=40, policy=policy)
    train(model, optimizer, 19)
    assert session.scene.monitor.steps == [0, 4, 8, 12, 16]
    with pytest.warns(fxrank.NothingFactorizedWarning):
        session.finish()


def test_a_zero_layer_has_stable_rank_zero_all_along():
    model = mlp()
    torch.nn.init.zeros_(model[2].weight)
    watch = monitor(model, vectors()[0])
    watch.observe(0, exact=True)
    watch.observe(1)
    assert watch.curves["2"] == [0.0, 0.0]


def test_the_default_policy_has_the_slope_test():
    assert UNTIMED.detector(Clock(0, 300, 1)) == SlopeDetector(epsilon=0.1, window=25, relative=True)
    own = ReferenceDetector(window=3)
    assert fxrank.Cuttlefish(test=own).detector(Clock(0, 300, 1)) is own


def spaced(model, x, policy, total_steps, steps_per_epoch=None):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    session = fxrank.LowRankSession.attach(
        model,
        optimizer,
        example_inputs=x,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        policy=policy,
    )
    session.detach()
    return session.scene.monitor


def test_samples_that_cost_much_of_a_step_are_spaced_with_their_test():
    """Two rows are a small step beside a look at the weights: there are 60 samples of a run then, and the window spans as many steps."""
    monitor = spaced(mlp(), vectors(2)[0], UNTIMED, 3000)
    assert monitor.interval == 50
    assert monitor._detector == SlopeDetector(0.1 * 5, 8)
    assert spaced(mlp(), vectors(2)[0], UNTIMED, 300).interval == 5
    assert spaced(mlp(), vectors(2)[0], UNTIMED, 59).interval == 1


def test_samples_are_as_wanted_where_they_cost_little_or_were_asked_for():
    assert spaced(mlp(width=32), torch.randn(40_000, 12), UNTIMED, 3000).interval == 10
    paper = fxrank.Cuttlefish(test=ReferenceDetector(), speedup_threshold=None)
    assert spaced(mlp(), vectors(2)[0], paper, 3000).interval == 10  # whose test counts samples
    by_epoch = fxrank.Cuttlefish(samples="epoch", speedup_threshold=None)
    assert spaced(mlp(), vectors(2)[0], by_epoch, 3000, steps_per_epoch=7).interval == 7


def test_a_wider_spacing_asks_for_the_same_slope_by_step():
    detector = SlopeDetector(epsilon=0.2, window=25)
    assert detector.spaced(2) == SlopeDetector(epsilon=0.4, window=12)
    assert detector.spaced(100) == SlopeDetector(epsilon=20.0, window=8)
    assert SlopeDetector(window=5).spaced(3) == SlopeDetector(epsilon=pytest.approx(0.3), window=5)
    assert ReferenceDetector().spaced(2) is None


def test_what_a_sample_costs_grows_with_the_weights():
    def at(width, total=10**6):
        model = mlp(width=width)
        layers = discover(trace(model, torch.randn(512, 12)), model)
        return spacing(layers, 1, total)

    assert at(16) > at(64)  # calls count, not numbers
    assert at(512) == at(512, 10**7) > 1
    assert spacing([], 7, 100) == 7
