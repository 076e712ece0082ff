"""What `auto_lowrank` gives back: the model, history, report, files, warnings."""

import json
import logging
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from autos import run, run_net
from nets import ConvNet, Net, batches, clusters, images, mlp, snapshot, vectors
from torch import nn

import fxrank

X, Y = vectors()


def test_a_whole_run(tmp_path, capsys):
    result = run_net(val_loader=[clusters()], output_dir=tmp_path)
    assert capsys.readouterr() == ("", "")
    assert result.plan.E == 2
    assert result.plan.R == {"body": 4}
    calls = [str(n.target) for n in result.graph_module.graph.nodes if n.op == "call_module"]
    assert calls == ["stem", "norm", "body.u", "body.v", "head"]
    assert [row["phase"] for row in result.history] == ["full-rank", "low-rank", "low-rank", "low-rank"]
    assert set(result.history[0]) == {
        "epoch",
        "phase",
        "loss",
        "accuracy",
        "val_loss",
        "val_accuracy",
        "lr",
        "step_ms",
        "stable_ranks",
    }
    assert set(result.history[0]["stable_ranks"]) == {"stem", "body", "head"}
    report = result.report
    assert report.parameters_before - report.parameters_after == 16 * 144 - 4 * (16 + 144)
    assert report.macs_before > report.macs_after
    assert report.memory_bytes["full-rank"] > report.memory_bytes["low-rank"] > 0
    assert report.accuracy_before_switch is not None
    assert report.accuracy_after_switch is not None
    assert report.measured_speedup > 0
    assert 0 < report.overhead < 1
    text = str(report)
    for part in (
        "E = 2 of 4 epochs",
        "K = 1",
        "1 of 3 layers factorized",
        "first layer of the graph",
        "parameters",
        "training memory",
    ):
        assert part in text
    expected = {"model.safetensors", "plan.json", "report.json", "report.txt", "report.html", "ranks.png"}
    assert {p.name for p in tmp_path.iterdir()} == expected
    assert json.loads((tmp_path / "report.json").read_text())["R"] == {"body": 4}
    fresh = fxrank.load(Net(), tmp_path).eval()
    assert torch.equal(fresh(clusters()[0]), result.model.eval()(clusters()[0]))
    assert fxrank.plan_of(result.model) == result.plan == fxrank.Plan.load(tmp_path / "plan.json")


def test_history_curves_and_report(capsys):
    result = run(ConvNet(), batches(make=images), val_loader=[images(16, 9)])
    assert capsys.readouterr() == ("", "")
    keys = {"epoch", "phase", "loss", "accuracy", "val_loss", "val_accuracy", "lr", "step_ms", "stable_ranks"}
    assert all(set(row) == keys for row in result.history)
    assert [row["phase"] for row in result.history] == ["full-rank"] + ["low-rank"] * 3
    assert set(result.history[0]["stable_ranks"]) == {"conv1", "conv2", "conv3", "head"}
    assert result.history[-1]["stable_ranks"] == {}
    assert result.curves["steps"] == list(range(9))
    assert all(len(curve) == 9 for curve in result.curves.values())
    report = result.report
    assert (report.loss, report.val_loss) == (result.history[-1]["loss"], result.history[-1]["val_loss"])
    assert report.settings["seed"] == 0
    assert report.settings["device"] == "cpu"
    assert set(report.seconds) == {"total", "evaluation", "monitor", "profile", "switch"}
    assert report.parameters_after == sum(p.numel() for p in result.model.parameters())


def test_the_loss_of_an_epoch_is_the_mean_over_examples():
    model = mlp()
    loader = [vectors(8, 0), vectors(2, 1)]
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    result = run(model, loader, epochs=1, optimizer=frozen, policy="full-rank", val_loader=loader)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        expected = float(F.cross_entropy(model(x), y))
    # float32 sums in another order
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-6)
    assert result.history[0]["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert result.history[0]["accuracy"] == float((model(x).argmax(1) == y).sum()) / 10


def test_files(tmp_path):
    folder = tmp_path / "deep" / "run"
    result = run(mlp(), output_dir=folder, val_loader=[vectors(16, 9)])
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "plan.json", "report.json", "report.txt"}
    assert torch.equal(fxrank.load(mlp(1), folder)(X), result.model(X))
    assert (folder / "report.txt").read_text() == f"{result.report}\n"
    assert json.loads((folder / "report.json").read_text())["plan"]["policy"] == "Cuttlefish"
    assert fxrank.Plan.load(folder / "plan.json") == result.plan


def test_an_output_path_that_cannot_be_is_refused_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    model = mlp()
    before = snapshot(model)
    with pytest.raises(FileExistsError):
        run(model, output_dir=tmp_path / "file")
    assert snapshot(model) == before


def test_full_rank_trains_the_twin():
    model = mlp()
    result = run(model, policy=fxrank.FullRank())
    assert result.plan.R == {}
    assert type(model[2]) is nn.Linear
    assert result.curves == {}
    assert result.report.memory_bytes["low-rank"] is None
    assert fxrank.plan_of(model) is result.plan


def test_progress_is_shown_on_request(capsys):
    run(mlp(), progress=True, epochs=5)
    captured = capsys.readouterr()
    assert captured.out == ""  # epochs were given: nothing to announce
    assert "20/20" in captured.err
    assert "low-rank" in captured.err


def test_a_loss_that_is_not_finite_is_logged(caplog):
    with caplog.at_level(logging.WARNING, "fxrank"):
        run(mlp(), epochs=1, policy="full-rank", loss_fn=lambda o, t: F.cross_entropy(o, t) * torch.nan, optimizer=None)
    assert "the training loss of epoch 0 is nan" in caplog.text


def test_weights_that_break_are_named():
    with pytest.raises(
        fxrank.NonFiniteWeightError, match=re.escape("layer '0' holds NaN or infinity. Lower the learning rate")
    ):
        run(mlp(), loss_fn=lambda o, t: F.cross_entropy(o, t) * torch.nan)


def test_the_same_seed_gives_the_same_run_and_a_plan_repeats_it():
    first, second = run_net(), run_net()
    repeated = run_net(policy=first.plan)
    for other in (second, repeated):
        assert other.plan.R == first.plan.R
        assert [r["loss"] for r in other.history] == [r["loss"] for r in first.history]
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_autocast_on_a_cpu(amp):
    result = run(mlp(), amp=amp)
    assert result.plan.R == {"2": 4, "4": 4}
    assert {p.dtype for p in result.model.parameters()} == {torch.float32}
    assert result.report.settings["amp"] == f"torch.{amp}"


@pytest.mark.parametrize("amp", ["bfloat16", torch.bfloat16, "float16"])
def test_autocast(amp):
    result = run_net(amp=amp)
    assert result.plan.R == {"body": 4}
    assert result.model.body.u.weight.dtype is torch.float32
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_profiling_runs_in_the_default_policy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        result = run_net(policy=fxrank.Cuttlefish(speedup_threshold=1e-6, latest=0.5, rank_metric="ratio", ratio=0.25))
    body = result.plan.layer("body")
    assert body.speedup is not None
    assert result.report.seconds["profile"] > 0
    if body.factorized:
        assert body.speedup > 1
        assert body.rank in (4, 8, 16)
    else:  # one or the other: by the layer's own time, or by the whole step's
        assert ("a pair measured" in body.reason) == (body.speedup <= 1)
        assert ("given back: the training step with pairs" in body.reason) == (body.speedup > 1)


def test_nothing_factorized_returns_the_trained_model_and_says_so():
    with pytest.warns(fxrank.NothingFactorizedWarning, match="did not switch"):
        result = run_net(policy=fxrank.Cuttlefish(speedup_threshold=None, epsilon=1e-9, latest=None))
    assert result.plan.R == {}
    assert "NOTHING WAS FACTORIZED" in str(result.report)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert fxrank.plan_of(result.model) == result.plan
    full = run_net(policy="full-rank")
    assert "NOTHING WAS FACTORIZED" not in str(full.report)
