"""A plan whose training step is not faster as a whole is given back before anything is changed (clocks are prepared)."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import SOON, SixLayers, attach, sgd, snapshot, train, vectors
from torch import nn

import fxrank
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.profiling.clock import times_of
from fxrank.passes.profiling.timing import Profiler
from fxrank.policies import times as timed
from fxrank.session.worth import _timed_whole

TIMED = replace(SOON, speedup_threshold=1.1)
FOUND = "the training step with pairs in {} layers took {} of the dense one's time"


@pytest.fixture
def clock(monkeypatch):
    """Pairs are twice as fast as layers by themselves, and of more numbers more is saved; a whole model takes 100 ms, and per pair what
    `clock["pair"]` says more, with `clock["spread"]` around it.
    """
    said = {"pair": -10.0, "spread": 0.0, "how": "clock", "models": [], "options": []}

    def times(self, layer, ranks):
        self.seconds += 1.0
        return times_of([[layer.parameters / 1e3, *([layer.parameters / 2e3] * len(ranks))]] * 3, "clock")

    def compare(models, example, watch, **options):
        said["models"].append(models)
        said["options"].append(options)
        ms = [100 + said["pair"] * sum(isinstance(m, FactorPair) for m in model.modules()) for model in models]
        rounds = [[ms[0], ms[1] + 2 * step * said["spread"] * 100] for step in (-1, 0, 1)]
        return times_of(rounds, said["how"])

    monkeypatch.setattr(Profiler, "times", times)
    monkeypatch.setattr(timed, "compare", compare)
    return said


def run(policy, model=None, steps=10):
    model = SixLayers() if model is None else model
    session = attach(model, optimizer := sgd(model), policy)
    train(model, optimizer, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        session.finish()
    return session


def test_a_step_that_is_faster_is_switched_to_and_told(clock):
    session = run(TIMED)
    assert session.plan.R.keys() == {"l1", "l2", "l3", "l4"}
    assert session.share == (0.6, 0.0)
    assert session.notes == ["measured on copies before the switch: " + FOUND.format(4, "0.60 ± 0.00")]
    assert session.seconds["profile"] >= 8  # of the layers, at attach and at the switch
    ((dense, small),) = clock["models"]
    own = {p.data_ptr() for p in session.model.parameters()}
    for model in (dense, small):
        assert not own & {p.data_ptr() for p in model.parameters()}
    (options,) = clock["options"]
    assert (options["backward"], options["amp"], options["least"]) == (True, None, 3)


def test_what_pays_nothing_is_given_back_by_halves_and_nothing_is_switched(clock):
    clock["pair"] = 3.0
    model = SixLayers()
    before = [type(m) for m in model.modules()]
    session = run(TIMED, model)
    assert [type(m) for m in model.modules()] == before and session.plan.R == {} and session.share is None
    assert session.plan.note.endswith("no pair pays: " + FOUND.format(1, "1.03 ± 0.00"))
    reasons = {d.name: d.reason for d in session.plan.layers}
    least = {f"l{i}": FOUND.format(4, "1.12 ± 0.00") for i in (1, 2)}
    rest = {"l3": FOUND.format(2, "1.06 ± 0.00"), "l4": FOUND.format(1, "1.03 ± 0.00")}
    assert reasons.items() >= {n: f"given back: {found}" for n, found in (least | rest).items()}.items()
    assert len(session.notes) == 3 and session.scene.factors == {}
    assert session.plan.layer("l4").speedup == 2.0 and session.plan.layer("l4").stable_rank is not None


def test_only_what_does_not_pay_is_given_back(clock, monkeypatch):
    def compare(models, example, watch, **options):
        names = {n for n, m in models[1].named_modules() if isinstance(m, FactorPair)}
        return times_of([[100.0, 101.0 if names & {"l1", "l2"} else 90.0]] * 3, "clock")

    monkeypatch.setattr(timed, "compare", compare)
    session = run(TIMED)
    assert session.plan.R.keys() == {"l3", "l4"} and session.share == (0.9, 0.0)
    assert isinstance(session.model.l3, FactorPair) and type(session.model.l1) is nn.Linear


def test_within_the_spread_it_counts_as_fast(clock):
    clock["pair"], clock["spread"] = 1.0, 0.05
    assert run(TIMED).share == pytest.approx((1.04, 0.05))
    clock["spread"] = 0.03
    assert run(TIMED).plan.R.keys() == {"l3", "l4"}  # 1.02 ± 0.03


def test_of_a_busy_machine_it_is_said_how_it_was_measured(clock):
    clock["how"] = "processor time"
    (note,) = run(TIMED).notes
    assert note.endswith("of the dense one's time, by processor time: the machine is busy")


@pytest.mark.parametrize(
    ("options", "must"),
    [
        ({}, True),
        ({"target_params": 0.7}, False),
        ({"target_params": 0.7, "objective": "speed"}, True),
        ({"objective": "size"}, False),
        ({"k_rule": "prefix"}, None),
        ({"k_rule": "prefix", "objective": "speed"}, True),
        ({"speedup_threshold": None}, None),
    ],
    ids=str,
)
def test_what_is_wanted_for_its_size_is_timed_and_kept(clock, options, must):
    clock["pair"] = 3.0
    policy = replace(TIMED, **options)
    assert policy.must_pay is must
    session = run(policy)
    assert bool(session.plan.R) == (must is not True)
    assert bool(session.notes) == (must is not None)
    assert (session.share is not None) == (must is False)


def test_the_presets_of_the_papers_and_plans_are_not_asked_to_pay():
    policies = [fxrank.Cuttlefish.paper(), fxrank.Cuttlefish.reference(), fxrank.Pufferfish(E=1), fxrank.FullRank()]
    assert [p.must_pay for p in policies] == [None] * 4
    assert "objective" not in repr(fxrank.Cuttlefish())  # runs of before go on


def test_an_unknown_objective_is_refused():
    with pytest.raises(ValueError, match=r"objective must be one of.*got 'small'|unknown objective 'small'"):
        fxrank.Cuttlefish(objective="small")


class Watched(SixLayers):
    """A model with a history in an attribute, hooks, random numbers and statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.last, self.calls = nn.BatchNorm1d(16), nn.Dropout(0.5), None, []
        self.l1.register_forward_hook(lambda module, args, out: self.calls.append(len(out)))

    def forward(self, x):
        x = self.drop(self.norm(F.relu(self.l1(F.relu(self.l0(x))))))
        self.last = x
        return self.l5(F.relu(self.l4(F.relu(self.l3(F.relu(self.l2(x)))))))


def test_the_measurement_leaves_no_trace(clock, monkeypatch):
    """Of whole models, by the clock on the wall: each step of the run is what it is without."""
    monkeypatch.undo()
    fast = [[1.0, 0.5]] * 3
    monkeypatch.setattr(Profiler, "times", lambda self, layer, ranks: times_of(fast, "clock"))
    ends = []
    for policy in (replace(TIMED, objective="size"), SOON):
        model = Watched()
        session = attach(model, optimizer := sgd(model), policy)
        torch.manual_seed(1)
        train(model, optimizer, 10)
        assert len(session.plan.R) == 4 and (session.share is None) == (policy is SOON)
        ends.append((snapshot(model), list(model.calls), torch.get_rng_state()))
    (state, calls, drawn), (other_state, other_calls, other_drawn) = ends
    # whether a hook only looks on is found out by two rows, in a trace and in each copy
    assert [n for n in calls if n != 2] == [n for n in other_calls if n != 2] and torch.equal(drawn, other_drawn)
    assert state["state"] == other_state["state"] and state["hooks"] == other_state["hooks"]


class Uncopied(SixLayers):
    def __deepcopy__(self, memo):
        raise RuntimeError("only one of me\nand no more")


def test_compiled_parts_are_timed_as_python(monkeypatch):
    monkeypatch.setattr(Profiler, "times", lambda self, layer, ranks: times_of([[1.0, 0.5]] * 3, "clock"))

    def backend(gm, inputs):
        raise AssertionError("compiled")

    model = SixLayers()
    model.l3 = torch.compile(model.l3, backend=backend)
    session = attach(model, sgd(model), replace(TIMED, objective="size"))
    session.detach()
    plan = session.policy.plan(session.scene, session.clock, "now")
    assert plan.R.keys() == {"l1", "l2", "l3", "l4"}
    _, share, (note,) = _timed_whole(plan, session._attached, None, 0.0)
    assert share is not None and note.startswith("measured on copies")


def test_what_cannot_be_timed_is_switched_with_a_note(clock):
    session = run(TIMED, Uncopied())
    assert session.plan.R and session.share is None
    assert (
        "the training step was not timed as a whole: a copy of the model fails with RuntimeError: only one of me"
        in session.notes
    )


def test_the_report_predicts_what_was_measured(clock):
    loader = [(vectors()[0][:8], torch.randint(0, 4, (8,))) for _ in range(10)]
    result = fxrank.auto_lowrank(SixLayers(), loader, epochs=4, policy=TIMED, progress=False, seed=0)
    assert result.report.predicted_speedup == pytest.approx(1 / 0.6)
    assert any("took 0.60 ± 0.00" in note for note in result.report.notes)


def test_timing_has_its_share_of_the_run(clock, monkeypatch):
    model = SixLayers()
    session = attach(model, optimizer := sgd(model), TIMED)
    budgets = []
    inner = Profiler.times
    monkeypatch.setattr(
        Profiler, "times", lambda self, layer, ranks: budgets.append(self.budget_ms) or inner(self, layer, ranks)
    )
    session.step_ms["full-rank"].extend([30.0] * 100)
    train(model, optimizer, 10)
    assert copy.copy(budgets) and max(budgets) <= 200.0
    (options,) = clock["options"]
    assert options["budget_ms"] <= 0.01 * 30.0 * session.clock.total_steps
    assert max(budgets) <= options["budget_ms"] / len(session.scene.layers) * 1.0001
