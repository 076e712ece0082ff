"""What a model would become, and what that would take, from its shapes."""

import json
import re

import pytest
import torch
from torch import nn

import fxrank
from fxrank.cli.main import main
from fxrank.large.outlook import EIGH, TOKENS, Rates, Row, outlook
from fxrank.passes.discovery.discover import discover
from fxrank.passes.discovery.selection import candidates
from fxrank.passes.errors import BudgetError
from fxrank.passes.tracing.trace import trace

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}


@pytest.fixture
def found():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Embedding(50, 32), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32), nn.Linear(32, 50)
        )
        tokens = torch.zeros(2, 4, dtype=torch.long)
    return model, candidates(discover(trace(model.eval(), tokens), model), model)


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("target", [0.6, 0.8, 1.0])
def test_the_share_is_the_largest_that_keeps_to_the_target(found, of, target):
    model, layers = found
    told = outlook(model, layers, of, target)
    before, after = told.parameters if of == "params" else told.macs
    assert target - 0.03 < after / before <= target
    assert told.parameters[0] == sum(p.numel() for p in model.parameters())
    ranks = {row.layer.name: row.rank for row in told.rows}
    assert ranks["0"] is ranks["4"] is None
    real = nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32), nn.Linear(32, 50))
    small = fxrank.factorize(real, torch.zeros(2, 4, dtype=torch.long), {n: r for n, r in ranks.items() if r})
    assert sum(p.numel() for p in small.parameters()) == told.parameters[1]


def test_what_it_takes_is_counted_by_the_sizes_that_calibration_looks_at(found):
    model, layers = found
    rows = {row.layer.name: row for row in outlook(model, layers, "params", 0.7).rows}
    wide, tall = rows["1"], rows["3"]
    assert (wide.side, wide.watched) == ("inputs", 32)
    assert (tall.side, tall.watched) == ("outputs", 32)
    assert wide.moment_bytes == tall.moment_bytes == 8 * 32**2
    assert wide.moment_macs == 32**2 * TOKENS
    assert wide.split_macs == (32 * 128 * (32 + wide.rank), EIGH * 32**3)
    assert wide.fit_macs == (5 * 32 * 128 * 32, 2 * EIGH * 32**3)
    assert tall.fit_macs == (2 * 32 * 128 * 32, EIGH * 32**3)
    dense = rows["4"]
    assert (dense.moment_bytes, dense.split_macs, dense.fit_macs) == (0, (0, 0), (0, 0))


def test_rounds_hold_no_more_moments_than_calibration_does(found, monkeypatch):
    model, layers = found
    told = outlook(model, layers, "params", 0.7)
    assert told.rounds == 1
    monkeypatch.setattr("fxrank.large.outlook.ROUND_BYTES", 8 * 32**2)
    assert told.rounds == 2


def test_seconds_grow_with_the_cube_of_the_size(found):
    _, layers = found
    one = next(layer for layer in layers if layer.name == "1")
    rates = Rates(1e9, 1e8)
    row = Row(one, 8, "inputs")
    from fxrank.large.outlook import Outlook

    seconds = Outlook([row], 0.5, 0).seconds(rates)
    assert seconds["split"] == pytest.approx(32 * 128 * 40 / 1e9 + EIGH * 32**3 / 1e8)
    assert seconds["moments"] == pytest.approx(32**2 * TOKENS / 1e9)
    measured = Rates.measured()
    assert measured.products > 0
    assert measured.eigh > 0


def test_a_target_out_of_reach_says_what_can_be_reached(found):
    model, layers = found
    with pytest.raises(BudgetError, match=r"target_params must be at least 0\.\d+ here.*got 0.01"):
        outlook(model, layers, "params", 0.01)


@pytest.fixture
def folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "bfloat16"}
    transformers.LlamaConfig(**SIZES, **heads, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def test_the_command_shows_it_for_a_folder_without_weights(folder, capsys):
    assert main(["inspect", f"hf:{folder}", "--target-params", "0.8"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^model\.layers\.2\.mlp\.up_proj +160x64 +64 +\d+ +[\d,]+ +[\d.]+ +[\d.]+ +0 +pair$", text, re.M)
    assert re.search(
        r"parameters \(0\.(7[89]\d\d|8000)\), 0\.\d+ of the multiply-adds: every pair has 0\.\d+ of its", text
    )
    assert "times are estimates for this device" in text
    assert main(["inspect", f"hf:{folder}", "--target-macs", "0.7", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["macs"][1] <= 0.7 * told["macs"][0]
    row = next(r for r in told["layers"] if r["name"] == "model.layers.0.mlp.up_proj")
    assert row["bytes"] == 2 * row["parameters"]  # bfloat16, as the configuration says
    assert row["rank"] < 160 * 64 / 224
    assert set(told["estimated_seconds"]) == {"split", "moments", "fit"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--target-params", "0.5", "--target-macs", "0.5"], "got --target-params and --target-macs. Leave one out."),
        (["--target-params", "1.5"], "--target-params is a share in (0, 1]; got 1.5. 0.5 halves them."),
        (["--target-params", "0.001"], "target_params must be at least 0."),
    ],
)
def test_what_is_wrong_gets_one_line(arguments, text, capsys):
    assert main(["inspect", "digits", "--input", "2x1x8x8", *arguments]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_seventy_billion_takes_no_memory(tmp_path):
    """Most of it is what `import torch` takes: the limit is for the model."""
    import subprocess
    import sys

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "num_hidden_layers": 80,
    }
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = "import resource, sys; from fxrank.cli.main import main; code = main(sys.argv[1:]); "
    program += "print('KIB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    command = [sys.executable, "-c", program, "inspect", f"hf:{tmp_path}", "--target-params", "0.8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of 68,976,648,192 parameters" in done.stdout
    assert int(done.stdout.rpartition("KIB")[2]) < 2 << 20
