import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fxrank
from fxrank.cli.main import main
from fxrank.cli.models import on_meta_where_possible


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["profile"], ["inspect"], ["env"], ["completion"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert "usage: fxrank" in capsys.readouterr().out


def test_env_names_the_machine_and_every_package(capsys, monkeypatch):
    def version(name):
        if name == "onnx":
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr("fxrank.cli.env.version", version)
    assert main(["env"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["fxrank"] == fxrank.__version__
    assert lines["torch"] == lines["transformers"] == "1.2.3"
    assert lines["onnx"] == "not installed"
    assert {"python", "system", "cores", "GPU", "scipy", "tqdm", "matplotlib", "lightning"} <= lines.keys()
    assert "pytest" not in lines and "wandb" not in lines


def test_env_of_a_checkout_that_is_not_installed(capsys, monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("fxrank.cli.env.requires", requires)
    assert main(["env"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["packages"] == "not known: fxrank is not installed; pip install . in its checkout"
    assert lines["torch"] == torch.__version__


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_read_enough_is_no_fault(monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command = [sys.executable, "-m", "fxrank", "inspect", "--model", "digits", "--input", "2x1x8x8"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


def test_a_pipe_of_something_else_that_breaks_is_told(capsys, monkeypatch):
    def broken(options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("fxrank.cli.main._profile", broken)
    assert main(["profile", "--model", "digits"]) == 2
    assert capsys.readouterr().err == "fxrank profile: [Errno 32] Broken pipe\n"


def test_inspect_needs_no_weights(capsys):
    assert main(["inspect", "--model", "torchvision:resnet18", "--input", "2x3x64x64"]) == 0
    text = capsys.readouterr().out
    assert "19 of 21 layers can be factorized" in text
    assert "first layer of the graph, left dense by default" in text
    assert (
        main(["inspect", "--model", "digits", "--input", "2x1x8x8", "--include", "*", "--exclude", "head", "--json"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert [r["name"] for r in rows if r["reason"]] == ["head"]


def test_inspect_knows_the_usual_input_of_a_model(capsys):
    assert main(["inspect", "timm:test_vit"]) == 0
    text = capsys.readouterr().out
    assert "blocks.0.attn.qkv" in text
    assert "last layer of the graph, left dense by default" in text
    pytest.importorskip("transformers")
    assert main(["inspect", "hf:distilbert"]) == 0
    text = capsys.readouterr().out
    assert "transformer.layer.0.attention.q_lin" in text
    assert "of 66,301,440 weights" in text


def test_inspect_a_folder_with_a_configuration(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    config = transformers.DistilBertConfig(**sizes, architectures=["DistilBertForMaskedLM"])
    config.save_pretrained(tmp_path)
    assert main(["inspect", f"hf:{tmp_path}", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["vocab_transform"]["weight_shape"] == [16, 16]
    assert rows["distilbert.transformer.layer.0.ffn.lin1"]["reason"] is None


def test_inspect_a_detector_tells_what_is_not_in_one_graph(capsys):
    assert main(["inspect", "torchvision:ssdlite320_mobilenet_v3_large"]) == 0
    text = capsys.readouterr().out
    assert "backbone.features.0.0.0" in text
    assert "not in one graph: SSD: " in text


def test_inspect_by_a_callable_of_the_users_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "mymodels.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "mymodels:make", "--input", "1x8"]) == 0
    assert "1 of 3 layers can be factorized" in capsys.readouterr().out
    assert main(["inspect", "mymodels:make"]) == 2
    assert "--input is needed for the model 'mymodels:make', as 32x3x224x224" in capsys.readouterr().err


def test_only_a_model_that_computes_while_it_is_built_is_built_for_real():
    def layer_and_input():
        return nn.Linear(2, 2), torch.ones(1, 2)

    def of_norm_one():
        layer, x = layer_and_input()
        layer.weight.data /= float(layer.weight.norm())
        return layer, x

    for build, device in ((layer_and_input, "meta"), (of_norm_one, "cpu")):
        layer, x = on_meta_where_possible(build)
        assert layer.weight.device.type == x.device.type == device


def test_profile(capsys):
    assert main(["profile", "--model", "digits", "--input", "2x1x8x8", "--json", "--threshold", "1000000"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["K"] == 11
    assert [len(s["names"]) for s in data["stacks"]] == [4, 1, 3, 1]


def test_train_and_repeat_a_plan(tmp_path, capsys):
    with pytest.warns(fxrank.NothingFactorizedWarning):
        assert (
            main(
                [
                    "train",
                    "--model",
                    "digits",
                    "--data",
                    "digits",
                    "--epochs",
                    "1",
                    "--policy",
                    "cuttlefish-paper",
                    "--output",
                    str(tmp_path),
                    "--quiet",
                    "--resume",
                    "--checkpoint-every",
                    "5",
                ]
            )
            == 0
        )
    assert "NOTHING WAS FACTORIZED" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert (tmp_path / "plan.json").exists()
    assert (
        main(
            [
                "train",
                "--model",
                "digits",
                "--data",
                "digits",
                "--epochs",
                "1",
                "--policy",
                "spectral-init",
                "--output",
                str(tmp_path),
                "--quiet",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "train",
                "--model",
                "digits",
                "--data",
                "digits",
                "--epochs",
                "1",
                "--policy",
                str(tmp_path / "plan.json"),
                "--output",
                str(tmp_path / "2"),
                "--quiet",
            ]
        )
        == 0
    )
    assert fxrank.Plan.load(tmp_path / "2" / "plan.json").R == fxrank.Plan.load(tmp_path / "plan.json").R != {}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect", "--model", "nonsense", "--input", "1x1"], "--model must be torchvision:NAME"),
        (["inspect", "--model", "torchvision:resnet19", "--input", "1x1"], "near it 'resnet18'"),
        (["inspect", "--model", "timm:nonsense", "--input", "1x1"], "timm model must be one of"),
        (["inspect"], "inspect needs a model: torchvision:NAME, timm:NAME, hf:MODEL_TYPE"),
        (["inspect", "hf:berd"], "hf model type, or folder with a config.json must be one of"),
        (["inspect", "--model", "digits", "--input", "1xa"], "--input must be positive sizes joined by x"),
        (["inspect", "--model", "json:dumps2", "--input", "1"], "module 'json' has none called 'dumps2'"),
        (["inspect", "--model", "builtins:list", "--input", "1"], "builtins:list must return a model; got list"),
        (["inspect", "--model", "digits", "--input", "2x3x8x8"], "failed in 'stem.0' (Conv2d)"),
        (
            ["train", "--model", "digits", "--data", "nowhere"],
            "--data must be digits, an image folder, or package.module:callable",
        ),
        (
            ["train", "--model", "digits", "--data", "builtins:tuple"],
            "must return (training loader, validation loader); got 0 values",
        ),
        (["train", "--model", "digits", "--data", "digits", "--policy", "x"], "policy must be one of"),
    ],
)
def test_errors_are_one_line(arguments, text, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_image_folder(tmp_path, capsys):

    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = generator.integers(0, 255, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    arguments = [
        "train",
        "--model",
        "torchvision:resnet18",
        "--classes",
        "2",
        "--data",
        str(tmp_path),
        "--epochs",
        "1",
        "--batch-size",
        "2",
        "--image-size",
        "32",
    ]
    assert main([*arguments, "--policy", "spectral-init", "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert "policy SpectralInit" in capsys.readouterr().out
    (tmp_path / "val").rename(tmp_path / "other")
    assert main([*arguments, "--quiet"]) == 2
    assert "an image folder must hold train/ and val/ (or test/)" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fxrank {fxrank.__version__}\n"


def test_completion_knows_every_command_and_its_options(capsys, tmp_path):
    pytest.importorskip("shtab", reason="shtab, of the extra completion, is not installed")
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef fxrank")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "fxrank.bash").write_text(capsys.readouterr().out)
    ask = 'source fxrank.bash; COMP_WORDS=({}); COMP_CWORD={}; _shtab_fxrank; echo "${{COMPREPLY[@]}}"'
    for words, at, found in [("fxrank com", 1, "compress completion"), ("fxrank train --res", 2, "--resume")]:
        done = subprocess.run(
            ["bash", "-c", ask.format(words, at)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert set(done.stdout.split()) == set(found.split()), done.stderr


def test_completion_without_what_writes_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    said = (
        "fxrank completion: completion is written by shtab, which is not installed; pip install 'fxrank[completion]'\n"
    )
    assert capsys.readouterr().err == said
