"""What a user may get wrong at the command line gets one sentence, and no traceback."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from nets import batches, mlp, vectors
from places import PYTHONPATH

import fxrank
from fxrank.cli import main as cli
from fxrank.cli.main import main

TRAIN = ["train", "--model", "digits", "--data", "digits", "--epochs", "1", "--quiet"]


def said(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "warp"])
@pytest.mark.parametrize("command", ["train", "profile"])
def test_an_unknown_device(command, device, capsys, tmp_path):
    arguments = {"train": [*TRAIN, "--output", str(tmp_path / "run")], "profile": ["profile", "--model", "digits"]}
    line = said([*arguments[command], "--device", device], capsys)
    assert f"fxrank {command}: device must be one that torch has here, cpu" in line and f"got {device!r}: " in line
    assert not (tmp_path / "run").exists()


def test_an_unknown_device_in_python():
    with pytest.raises(ValueError, match=re.escape("device must be one that torch has here, cpu")):
        fxrank.auto_lowrank(mlp(), batches(), device="gpu")
    with pytest.raises(ValueError, match=re.escape("got 'gpu'")):
        fxrank.profile(mlp(), vectors()[0], device="gpu")
    assert fxrank.profile(mlp(), vectors()[0], device=torch.device("cpu"), speedup_threshold=1.0)


@pytest.mark.parametrize("expression", ["re:(", "re:*", "re:[a-", "re:a{2,1}"])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_bad_regular_expression(argument, expression, capsys):
    line = said(["inspect", "digits", "--input", "2x1x8x8", f"--{argument}", expression], capsys)
    assert f"what follows 're:' in {argument} must be a regular expression; {expression!r} is not: " in line
    with pytest.raises(ValueError, match="must be a regular expression"):
        fxrank.factorize(mlp(), vectors()[0], **{argument: expression})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--resume"], "interrupted; the same command goes on from the last checkpoint in {folder}."),
        ([], "interrupted; nothing was written. With --resume a run can go on."),
    ],
)
def test_an_interrupt_gets_a_sentence(options, text, capsys, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train_lowrank", interrupted)
    assert main([*TRAIN, "--output", str(tmp_path), *options]) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"fxrank train: {text.format(folder=tmp_path)}"


def test_ctrl_c_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "fxrank", *TRAIN, "--epochs", "500", "--output", str(tmp_path), "--resume"]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's job in the background ignores it
    )
    try:
        for _ in range(600):
            if (tmp_path / "checkpoint.safetensors").exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "fxrank train: interrupted; the same command goes on" in err and "Traceback" not in err
    files = {"checkpoint.safetensors", "checkpoint.before.safetensors", "checkpoint.grown.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} <= files


@pytest.mark.parametrize("command", ["train", "profile", "inspect"])
def test_the_help_says_that_code_is_imported(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    times = text.count("that module is imported and run, from the current folder first")
    assert times == text.count("package.module:callable") >= (2 if command == "train" else 1)
