"""`fxrank compress`, as a shell calls it."""

import re

import pytest
import safetensors.torch
import torch

import fxrank
from fxrank.cli.main import main
from fxrank.demo import DigitsNet, digits
from fxrank.passes.profiling.clock import times_of
from fxrank.passes.profiling.timing import Profiler
from fxrank.policies import times


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return DigitsNet().eval()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_trained_model_becomes_small_and_its_folder_loads(trained, tmp_path, capsys, kind):
    weights = tmp_path / f"weights.{kind}"
    if kind == "pt":
        torch.save(trained.state_dict(), weights)
    else:
        safetensors.torch.save_file(trained.state_dict(), weights)
    command = ["compress", "digits", "--weights", str(weights), "--target-params", "0.4", "--data", "digits"]
    assert main([*command, "--calibration-batches", "2", "--output", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"parameters \(0\.39\d|0\.400\)", printed)
    assert re.search(r"dense: loss .* accuracy .* on 360 examples\ncompressed: loss", printed)
    small = fxrank.load(DigitsNet(), tmp_path / "small").eval()
    plan = fxrank.plan_of(small)
    assert (plan.budget.of, plan.budget.target, plan.calibration_batches) == ("params", 0.4, 2)
    assert any(d.form == "spatial" for d in plan.layers)
    for name, tensor in small.state_dict().items():
        if name.startswith("head"):
            assert torch.equal(tensor, trained.state_dict()[name])


def test_a_share_of_the_outputs_is_kept_and_told(tmp_path, capsys):
    torch.manual_seed(0)
    model = DigitsNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in digits()[0]:
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    command = ["compress", "digits", "--weights", str(tmp_path / "weights.pt"), "--keep", "0.9", "--data", "digits"]
    assert main([*command, "--calibration-batches", "2", "--output", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"the model kept 0\.9\d{3} of its outputs in 2 of the batches", printed)
    assert fxrank.Plan.load(tmp_path / "small" / "plan.json").R


def test_without_data_the_weights_alone_are_looked_at(tmp_path, capsys):
    out = str(tmp_path / "small")
    assert (
        main(["compress", "digits", "--input", "2x1x8x8", "--target-macs", "0.5", "--form", "channel", "--output", out])
        == 0
    )
    assert re.search(r"0\.(500|49\d) of the multiply-adds", capsys.readouterr().out)
    assert fxrank.Plan.load(tmp_path / "small" / "plan.json").calibration_batches is None


@pytest.mark.parametrize("of", ["latency", "step_time"])
def test_a_target_of_time_is_measured_and_told(tmp_path, capsys, monkeypatch, of):
    monkeypatch.setattr(times, "compare", lambda models, *_, **__: times_of([[8.0, 6.0][: len(models)]] * 5, "clock"))
    monkeypatch.setattr(Profiler, "times_ms", lambda self, layer, ranks: [1.0, *(r / 99 for r in ranks)])
    out = str(tmp_path / "small")
    asked = [f"--target-{of.replace('_', '-')}", "0.75", "--input", "2x1x8x8", "--form", "channel"]
    assert main(["compress", "digits", *asked, "--output", out]) == 0
    assert f"budget: target_{of}=0.75, reached 0.7500 ± 0.0000, measured on cpu, " in capsys.readouterr().out
    budget = fxrank.Plan.load(tmp_path / "small" / "plan.json").budget
    assert (budget.of, budget.reached, budget.spread) == (of, 0.75, 0.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--weights", "none.pt"], "none.pt"),
        (["--weights", "garbage.pt"], "--weights must be a state dict of the model, DigitsNet; garbage.pt is not"),
        (["--weights", "garbage.safetensors"], "--weights must be a state dict of the model, DigitsNet"),
        (["--weights", "other.pt"], "--weights must be a state dict of the model, DigitsNet; other.pt is not"),
        (["--target-params", "0.0001"], "target_params must be at least 0."),
        (["--target-latency", "0.5", "--target-macs", "0.1"], "got target_macs=0.1 and target_latency=0.5."),
        (["--target-params", "0.5", "--rank", "0.1"], "got target_params=0.5 and rank=."),
        (["--form", "best"], "form must be one of"),
        (["--keep", "0.9"], "keep=0.9 is a share of what the model gives on data; got no calibration=."),
    ],
)
def test_what_is_wrong_gets_one_line(tmp_path, monkeypatch, capsys, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garbage.pt").write_bytes(b"not a pickle")
    (tmp_path / "garbage.safetensors").write_bytes(b"not safetensors")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    assert main(["compress", "digits", "--input", "2x1x8x8", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fxrank compress: ")
    assert printed.count("\n") == 1
    assert text in printed
    assert not (tmp_path / "run").exists()
