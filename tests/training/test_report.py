"""What a run says about itself: the report, the figure, the counts behind them, and `fxrank.profile`."""

import json
import logging
import re
import sys
from dataclasses import replace
from html import unescape

import pytest
import torch
from nets import ConvNet, Tied, images, mlp, snapshot, vectors
from torch import nn

import fxrank
from fxrank.auto import write_run
from fxrank.passes.discovery.layer import Layer
from fxrank.passes.profiling.clock import Share, Times
from fxrank.passes.profiling.timing import StackProfile
from fxrank.training.measure import StepMemory, median, parameter_count, planned_macs, predicted_speedup
from fxrank.training.report import figure

X, _ = vectors()
DENSE = fxrank.LayerDecision(
    "stem", "linear", (16, 12), 12, None, "first layer", parameters=192, macs=1536, speedup=1.5
)
PAIR = fxrank.LayerDecision(
    "body",
    "linear",
    (16, 16),
    16,
    4,
    "as asked",
    parameters=256,
    pair_parameters=128,
    macs=2048,
    pair_macs=1024,
    speedup=2.0,
)
PLAN = fxrank.Plan("Cuttlefish", (DENSE, PAIR), 30, 3.0, "the ranks of all 1 eligible layers have settled")


def report(plan=PLAN, **changes):
    return fxrank.Report(
        **(
            {
                "plan": plan,
                "parameters_before": 1000,
                "parameters_after": 800,
                "macs_before": 3584,
                "macs_after": 2560,
                "epochs": 10,
                "settings": {"device": "cpu"},
            }
            | changes
        )
    )


FULL = {
    "step_ms": {"full-rank": 10.0, "low-rank": 4.0},
    "memory_bytes": {"full-rank": 4 * 2**20, "low-rank": 2**20},
    "predicted_speedup": 2.25,
    "loss": 0.5,
    "accuracy": 0.75,
    "val_loss": 0.625,
    "val_accuracy": 0.7,
    "accuracy_before_switch": 0.5,
    "accuracy_after_switch": 0.25,
    "seconds": {"total": 20.0, "evaluation": 1.0, "monitor": 0.25, "profile": 0.5, "switch": 0.25},
    "notes": ["body: its factors start fresh"],
}


def test_the_whole_text():
    assert report(**FULL).summary().splitlines() == [
        "policy Cuttlefish: E = 3 of 10 epochs, K = 1, 1 of 2 layers factorized (the ranks of all 1 eligible layers have settled)",
        "                          full-rank    low-rank    ratio",
        "----------------------  -----------  ----------  -------",
        "parameters                    1,000         800    1.25x",
        "MACs per call                 3,584       2,560    1.40x",
        "training step               10.0 ms      4.0 ms    2.50x",
        "as predicted                                       2.25x",
        "training memory             4.0 MiB     1.0 MiB    4.00x",
        "accuracy at the switch      50.00 %     25.00 %",
        "final loss 0.5000, training accuracy 75.00 %, validation loss 0.6250, validation accuracy 70.00 %",
        "time: total 20.00 s, evaluation 1.00 s, monitor 0.25 s, profile 0.50 s, switch 0.25 s; monitor + profile + switch = 5.00 % of the run",
        "body: its factors start fresh",
    ]
    assert str(report(**FULL)) == f"{PLAN}\n\n{report(**FULL).summary()}"


def test_what_was_not_measured_is_a_dash():
    text = report().summary()
    assert "training step                     -           -        -" in text
    assert "training memory                   -           -        -" in text
    assert "nan" not in text
    assert "None" not in text
    assert report().measured_speedup is None
    assert report().overhead == 0.0


def test_nothing_factorized_is_not_to_be_overlooked():
    plan = fxrank.Plan("Cuttlefish", (DENSE,), note="the policy did not switch within 30 of 30 steps")
    lines = report(plan).summary().splitlines()
    assert lines[0] == (
        "policy Cuttlefish: no switch, K = 1, 0 of 1 layers factorized (the policy did not switch within 30 of 30 steps)"
    )
    assert lines[1] == "NOTHING WAS FACTORIZED: the model is full-rank; the table says why, layer by layer."


def test_json(tmp_path):
    whole = report(**FULL)
    whole.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["measured_speedup"] == 2.5
    assert data["overhead"] == 0.05
    assert (data["E"], data["K"], data["R"]) == (3.0, 1, {"body": 4})
    assert data["val_accuracy"] == 0.7
    plan = {"format": "fxrank-plan", "version": 1} | data["plan"]
    assert fxrank.Plan.from_json(json.dumps(plan)) == PLAN


# -- files of a run


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figure(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    curves = {"stem": [9.0, 7.0, 6.0], "body": [9.5, 5.0, 4.0]}
    paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
    for path in paths:
        figure(curves, [0, 15, 30], PLAN, 10, path)
    content = paths[0].read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    if suffix == "svg":
        assert b"switch, E = 3" in content or b"<path" in content


def test_a_run_without_matplotlib(tmp_path, monkeypatch, caplog):
    model = fxrank.factorize(mlp(), X, rank=0.25)
    graph = fxrank.trace(model, X)
    result = fxrank.Result(model, graph, fxrank.plan_of(model), [], report(), {"steps": [0], "0": [3.0]})
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING, "fxrank"):
        write_run(result, tmp_path, 10)
    assert "no figure of the rank curves: matplotlib is not installed (pip install fxrank[figures])" in caplog.text
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.safetensors",
        "plan.json",
        "report.json",
        "report.txt",
        "report.html",
    }


# -- counts


def test_parameters_are_counted_once():
    assert parameter_count(Tied()) == parameter_count(Tied(tied=False)) - 16 * 16


def test_planned_macs():
    assert planned_macs(PLAN) == (1536 + 2048, 1536 + 1024)


def test_predicted_speedup():
    # 10 ms per step, of which 4 ms are the layer; its pair takes 2 ms
    assert predicted_speedup(PLAN, {"body": 4.0, "stem": 9.0}, 10.0) == 10.0 / 8.0
    assert predicted_speedup(PLAN, {}, 10.0) is None
    assert predicted_speedup(fxrank.Plan("p", (DENSE,)), {"stem": 4.0}, 10.0) is None
    assert predicted_speedup(PLAN, {"body": 40.0}, 10.0) is None  # more than the step: the measurements contradict


def test_median_leaves_the_warm_up_out():
    assert median([100.0, 100.0, 100.0, 1.0, 3.0, 2.0]) == 2.0
    assert median([1.0, 2.0, 3.0]) is None
    assert median([5.0], skip=0) == 5.0


def test_step_memory_on_a_cpu_counts_what_training_holds():
    model = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 5, bias=False))
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.randn(7, 10)

    def step():
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    step()
    with StepMemory(model, optimizer) as memory:
        step()
    weights = 4 * (200 + 100)
    # weights, gradients and Adam's two moments with a step each; saved for backward: the input, and the output of the ReLU
    assert memory.peak_bytes == 2 * weights + 2 * weights + 2 * 4 + 4 * (7 * 10 + 7 * 20)


def test_low_rank_training_holds_less():
    model = ConvNet()
    small = fxrank.factorize(model, images()[0], rank=0.25)
    peaks = []
    for net in (model, small):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with StepMemory(net, optimizer) as memory:
            net(images()[0]).sum().backward()
        peaks.append(memory.peak_bytes - 8 * parameter_count(net))
    # the pairs save their middle values too: only the parameters get fewer
    assert parameter_count(small) < parameter_count(model)
    assert all(peak > 0 for peak in peaks)


# -- profile


def stack(names, dense_ms, pair_ms):
    return StackProfile(tuple(names), "linear", (16, 16), (8, 16), 4, dense_ms, pair_ms, 4096, 2048, 2048, 2560)


def made_up(threshold, *stacks):
    names = [name for s in stacks for name in s.names]
    layers = tuple(Layer(n, "linear", (16, 16)) for n in ["first", *names, "last"])
    return fxrank.Profile(tuple(stacks), layers, threshold, 1.25, "cpu")


STACKS = (stack(["a", "b"], 2.0, 2.0), stack(["c"], 3.0, 1.0), stack(["d"], 3.0, 2.0))


@pytest.mark.parametrize(
    ("threshold", "leading", "kept"),
    [(1.5, 3, ("a", "b", "d")), (0.5, 1, ()), (1.4, 3, ("a", "b")), (3.0, 6, ("a", "b", "c", "d"))],
)
def test_k_and_the_layers_kept(threshold, leading, kept):
    found = made_up(threshold, *STACKS)
    assert leading == found.K
    assert found.kept == kept


def test_the_table_of_a_profile():
    text = str(made_up(1.5, *STACKS))
    assert "K = 3 at threshold 1.5x on cpu; measured in 1.2 s" in text.splitlines()
    assert re.search(
        r"^a \+1 +16x16 +8x16 +4 +2\.000 +2\.000 +1\.00x ± 0\.00 +- +- +0\.000 +2\.0 +0\.8 +keep$", text, re.MULTILINE
    )
    assert re.search(r"^c +16x16 .* 3\.00x ± 0\.00 .* factorize$", text, re.MULTILINE)
    busy = [replace(STACKS[0], how="processor time"), *STACKS[1:]]
    assert "the machine is busy: 1 of 3 stacks by processor time" in str(made_up(1.5, *busy)).splitlines()
    data = made_up(1.5, *STACKS).to_dict()
    assert json.loads(json.dumps(data))["stacks"][1]["speedup"] == 3.0
    assert (data["K"], data["kept"]) == (3, ["a", "b", "d"])


@pytest.mark.parametrize(
    ("pair_ms", "faster", "parameters", "time", "verdict"),
    [
        # two of four layers of 16 x 16 may be pairs: of rank 4 at 0.5, of rank 2 at 0.3
        (
            0.75,
            2,
            [1 - 2 * 128 / 820, 1 - 2 * 192 / 820],
            [0.75, 0.75],
            "Worth it here: as pairs of 0.5 of their parameters 2 of 2",
        ),
        (1.25, 0, [1.0, 1.0], [1.0, 1.0], "Not worth it here for time: none of 2 layers is faster"),
    ],
)
def test_a_profile_says_what_pairs_of_half_and_less_would_do(monkeypatch, pair_ms, faster, parameters, time, verdict):
    def times(self, layer, ranks):
        shares = [Share(1.0, 0.0), *(Share(pair_ms, 0.0) for _ in ranks)]
        return Times([share.median for share in shares], shares, "clock")

    monkeypatch.setattr("fxrank.profiling.Profiler.times", times)
    found = fxrank.profile(mlp(), X)
    assert [one.share for one in found.outcomes] == [0.5, 0.3]
    assert [one.faster for one in found.outcomes] == [faster, faster]
    assert [one.layers for one in found.outcomes] == [2, 2]
    assert [one.parameters for one in found.outcomes] == pytest.approx(parameters)
    assert [one.time for one in found.outcomes] == time
    assert found.verdict.startswith(verdict)
    assert str(found).splitlines()[-1] == found.verdict


def test_a_profile_without_a_layer_that_may_be_a_pair_is_not_worth_it():
    assert made_up(1.0).verdict == "Not worth it here: no layer can be a pair; the table says why, layer by layer."


def test_a_profile_is_saved_as_json_or_as_a_page(tmp_path):
    found = fxrank.profile(mlp(), X)
    found.save(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    found.save(tmp_path / "x.html")
    html = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert found.verdict in unescape(html) and "first layer of the graph" in html
    assert re.findall(r'<section id="(\w+)"', html) == ["stacks", "decisions"]
    assert found._repr_html_().startswith("<iframe srcdoc=")


def test_profiling_measures_and_changes_nothing():
    model = ConvNet()
    model.bn2.eval()
    before, random = snapshot(model), torch.get_rng_state()
    found = fxrank.profile(model, images()[0], speedup_threshold=1.0)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert [s.names for s in found.stacks] == [("conv2",), ("conv3",)]
    assert all(s.dense_ms > 0 and s.pair_ms > 0 for s in found.stacks)
    assert [s.probe_rank for s in found.stacks] == [2, 4]
    # conv2: 8 channels in two groups to 16, 3x3, 8x8 positions, a batch of 4; 2 FLOP per multiply-add
    assert found.stacks[0].flops == 2 * 16 * 4 * 9 * 64 * 4
    assert found.stacks[0].bytes_moved == 4 * (4 * 8 * 64 + 16 * 4 * 9 + 4 * 16 * 64)
    assert found.seconds > 0
    assert found.device == "cpu"
    roof = found.roofline
    assert roof.flops > 1e8 and roof.bandwidth > 1e8
    for stack, (predicted, largest), written in zip(
        found.stacks, found.outlook, found.to_dict()["stacks"], strict=True
    ):
        dense, pair = roof.ms(stack.flops, stack.bytes_moved), roof.ms(stack.pair_flops, stack.pair_bytes_moved)
        assert predicted == written["roofline_speedup"] == pytest.approx(dense / pair)
        assert largest == written["largest_rank"]
    assert "GB/s at best, even at" in str(found)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_stacks_are_drawn_under_the_roofline(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    found = fxrank.profile(ConvNet(), images()[0], speedup_threshold=1.0)
    found.figure(path := tmp_path / f"roofline.{suffix}")
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_layers_of_one_shape_are_one_stack():
    assert [s.names for s in fxrank.profile(mlp(), X).stacks] == [("2", "4")]
    assert [s.names for s in fxrank.profile(mlp(), X, include="*").stacks] == [("0",), ("2", "4"), ("6",)]


def test_profile_errors():
    with pytest.raises(
        fxrank.NothingToFactorizeError, match=re.escape("at least one layer must be factorizable; 0 of 4 are:")
    ):
        fxrank.profile(mlp(), X, exclude=["2", "4"])
    with pytest.raises(fxrank.TraceError, match=re.escape("Sequential failed in '0' (Linear)")):
        fxrank.profile(mlp(), torch.randn(2, 5))


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_profile_under_autocast_counts_the_smaller_numbers(amp):
    found = fxrank.profile(mlp(), X, amp=amp).stacks[0]
    assert found.bytes_moved == (2 if amp else 4) * (8 * 16 + 16 * 16 + 8 * 16)
