import importlib
import io
import json
import re
import tarfile
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fxrank
from benchmarks import cifar10, compiled, convergence, faults, oneshot, rank_tracking, switch_cost
from benchmarks.subjects.data import MEAN, STD, Cifar, DeviceLoader
from benchmarks.subjects.data import cifar10 as load_cifar10
from benchmarks.subjects.models import build, handwritten_lowrank_resnet18
from benchmarks.subjects.peers import largest, size


def images(count=20):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(count) % 10


def epoch(loader):
    return [(x.clone(), y.clone()) for x, y in loader]


def test_loader_without_augmentation_is_the_data():
    x, y = images()
    batches = epoch(DeviceLoader(x, y, 8, augment=False))
    assert [len(b[1]) for b in batches] == [8, 8, 4]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(
        torch.cat([b[0] for b in batches]), (x / 255 - mean) / std, rtol=1e-5, atol=1e-5
    )  # float32
    assert torch.equal(torch.cat([b[1] for b in batches]), y)


def test_augmented_stream_depends_on_the_seed_alone():
    x, y = images()
    one, same, other = (DeviceLoader(x, y, 8, augment=True, seed=s, drop_last=True) for s in (1, 1, 2))
    assert len(one) == 2
    first, second = epoch(one), epoch(one)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, epoch(same), strict=True))
    assert not torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], epoch(other)[0][0])


def test_crops_and_flips_are_those_of_the_padded_image():
    x, y = images(1)
    loader = DeviceLoader(x, y, 1, augment=True)
    plain = next(iter(DeviceLoader(x, y, 1, augment=False)))[0][0]
    padded = torch.nn.functional.pad(plain, (4, 4, 4, 4))
    crops = [padded[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    options = torch.stack([*crops, *(c.flip(2) for c in crops)])
    for _ in range(10):
        drawn = next(iter(loader))[0][0]
        assert (options == drawn).flatten(1).all(1).any()


def test_subset_and_channels_last():
    x, y = images()
    loader = DeviceLoader(x, y, 4, augment=False, subset=10, channels_last=True)
    batches = epoch(loader)
    assert sum(len(b[1]) for b in batches) == 10
    assert next(iter(loader))[0].is_contiguous(memory_format=torch.channels_last)


def test_decoding_an_archive_once(tmp_path):
    archive = tmp_path / "tiny.tar.xz"
    generator = np.random.default_rng(0)
    with tarfile.open(archive, "w:xz") as tar:
        for split in ("train", "test"):
            for name in ("airplane", "truck"):
                data = io.BytesIO()
                Image.fromarray(generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(data, "JPEG")
                member = tarfile.TarInfo(f"{split}/{name}/0001.jpg")
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)
    cache = tmp_path / "cache" / "it.pt"
    first = load_cifar10(tmp_path, source=archive, cache=cache)
    assert isinstance(first, Cifar)
    assert first.train_x.shape == (2, 3, 32, 32)
    assert first.train_y.tolist() == [0, 1]
    archive.unlink()
    assert torch.equal(load_cifar10(tmp_path, source=archive, cache=cache).test_x, first.test_x)
    with tarfile.open(archive, "w:xz"):
        pass
    with pytest.raises(ValueError, match="the archive must hold train/<class>"):
        load_cifar10(tmp_path, source=archive)


def test_model_names():
    assert type(build("resnet20", 5).linear).__name__ == "Linear"
    assert build("torchvision:resnet18").fc.out_features == 10
    with pytest.raises(ValueError, match=r"must be one of 'resnet18', 'resnet20', .*'vit_tiny'; got 'resnet2'"):
        build("resnet2")
    with pytest.raises(ValueError, match="the 12 convolutions of stages 2-4; got 3"):
        handwritten_lowrank_resnet18([1, 2, 3])


def results(path):
    data = json.loads(path.read_text())
    assert {"cpu", "torch", "python", "command", "date"} <= set(data["environment"])
    assert "configuration" in data
    return data["results"]


@pytest.mark.slow
def test_cost_benchmarks_write_what_they_say(tmp_path, capsys):
    found = results(
        rank_tracking.main(
            [
                "--synthetic",
                "--batch",
                "2",
                "--interval",
                "1",
                "--samples",
                "4",
                "--device",
                "cpu",
                "--results",
                str(tmp_path),
            ]
        )
    )
    assert found["exact_path_error"] <= 1e-6
    assert len(found["samples"]) == 4
    found = results(
        switch_cost.main(
            ["--batch", "2", "--rounds", "1", "--steps", "1", "--device", "cpu", "--results", str(tmp_path)]
        )
    )
    assert found["split"]["excess_error"] <= 1e-6
    assert found["handwritten"]["step_ratio"] > 0
    found = results(convergence.main(["--epochs", "1", "--results", str(tmp_path)]))
    assert set(found) == {"sgd", "adamw"}
    capsys.readouterr()


@pytest.mark.slow
def test_compiled_benchmark_finds_one_compilation_and_the_same_numbers(tmp_path, capsys):
    pytest.importorskip("timm")
    options = {"models": "vit_tiny", "depth": 3, "batch": 2, "rounds": 1, "backend": "aot_eager", "device": "cpu"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    found = results(compiled.main([*arguments, "--results", str(tmp_path)]))["vit_tiny"]
    assert (found["switch"]["graphs_before"], found["switch"]["graphs_by_the_switch"]) == (1, 1)
    assert found["switch"]["graph_breaks"] == 0
    assert found["difference"]["float32"] < 1e-4
    assert max(found["difference"]["float64"], found["difference"]["float64_gradients"]) < 1e-12
    assert set(found["train"]) == set(found["eval"]) and len(found["train"]) == 4
    assert "switch" in capsys.readouterr().out


def test_cifar10_benchmark_runs_every_method(tmp_path, capsys):
    x, y = images(16)
    torch.save({"train_x": x, "train_y": y, "test_x": x, "test_y": y}, tmp_path / "cifar10-jpeg.pt")
    arguments = [
        "--source",
        "absent.tar.xz",
        "--root",
        str(tmp_path),
        "--epochs",
        "2",
        "--batch",
        "4",
        "--device",
        "cpu",
        "--results",
        str(tmp_path),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)  # timing decides, and timing is not under test
        found = results(cifar10.main(arguments))
    assert [r["method"] for r in found["runs"]] == ["full-rank", "cuttlefish", "pufferfish", "spectral-init"]
    for run in found["runs"]:
        assert {
            "best_val_accuracy",
            "parameters_after",
            "macs_after",
            "E",
            "K",
            "R",
            "seconds",
            "overhead",
            "plan",
            "step_ms",
        } <= set(run)
    assert found["runs"][3]["E"] == 0
    assert found["runs"][2]["E"] == 1
    assert "spectral-init" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--methods must be among"):
        cifar10.main(["--methods", "magic"])


REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_learning_rate" name="test_a_scheduler_sees_only_its_own_values[StepLR]" time="0.1"/>
<testcase classname="tests.test_learning_rate" name="test_a_scheduler_sees_only_its_own_values[CyclicLR]" time="0.1"><failure message="1 != 2&#10;more"/></testcase>
<testcase classname="tests.test_learning_rate" name="test_lr_scale" time="0.1"/>
<testcase classname="tests.test_learning_rate" name="test_other" time="0.1"><skipped message="no GPU"/></testcase>
<testcase classname="tests.test_loops" name="test_a" time="0.1"/>
</testsuite></testsuites>"""


def test_the_fault_table_counts_what_a_report_says(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    (fault,) = (f for f in faults.FAULTS if f.what == "torch's schedulers")
    found = faults.row(fault, faults.outcomes(tmp_path / "report.xml"))
    assert (found["tried"], found["lost"], found["skipped"]) == (3, 1, 1)
    assert found["named"] == ["StepLR", "CyclicLR"]
    assert found["tests"] == {"learning_rate::a_scheduler_sees_only_its_own_values": 2, "learning_rate::lr_scale": 1}
    assert [(c["with"], c["outcome"], c["reason"]) for c in found["not as hoped"]] == [
        ("CyclicLR", "lost", "1 != 2"),
        ("", "skipped", "no GPU"),
    ]


def test_every_row_of_the_fault_table_has_tests():
    for fault in faults.FAULTS:
        texts = "".join(file.read_text(encoding="utf-8") for file in faults.files_of(fault))
        assert texts and re.search(rf"def test_{fault.named.rstrip('*')}", texts), fault.what
    with pytest.raises(SystemExit):
        faults.main(["--only", "meteorites"])


def test_rows_that_are_measured_again_take_their_places(tmp_path, monkeypatch):
    tried = [{"test": "leading::it", "with": "", "outcome": "lost", "reason": "no"}]
    monkeypatch.setattr(faults.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    monkeypatch.setattr(faults, "outcomes", lambda report: tried)
    path = faults.main(["--results", str(tmp_path), "--kills"])
    before = json.loads(path.read_text())
    assert before["configuration"] == {"kills": True} and len(before["results"]) == len(faults.FAULTS)
    tried[0]["outcome"] = "nothing lost"
    assert faults.main(["--results", str(tmp_path), "--kills", "--only", "large layers"]) == path
    after = json.loads(path.read_text())
    (what,) = after["configuration"]["measured again"]
    assert (before["results"][what]["lost"], after["results"][what]["lost"]) == (1, 0)
    assert list(after["results"]) == list(before["results"])
    assert {w: r for w, r in after["results"].items() if w != what} == {
        w: r for w, r in before["results"].items() if w != what
    }


def test_no_row_of_the_fault_table_takes_what_another_counts():
    files = [file for fault in faults.FAULTS for file in faults.files_of(fault)]
    assert len(files) == len(set(files))


def small_network():
    """Of few layers, each of which all ways look at."""
    layers = [torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.ReLU()]
    for _ in range(3):
        layers += [torch.nn.Conv2d(32, 32, 3, 2), torch.nn.BatchNorm2d(32), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10))


def test_the_one_shot_benchmark_has_a_row_for_each_way(tmp_path, monkeypatch, capsys):
    x, y = images(160)
    monkeypatch.setattr(oneshot, "cifar10", lambda root, source, cache: Cifar(x, y, x[:40], y[:40]))
    monkeypatch.setattr(oneshot, "build", lambda name: small_network())
    options = {"model": "resnet20", "epochs": 1, "subset": 128, "test-subset": 40, "calibration": 32, "budgets": 0.5}
    command = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command += ["--steps", "1", "--peers", "torch-that-nobody-has", "--no-timing", "--forms", "spatial", "gauge"]
    command += ["--weights", str(tmp_path / "weights.pt"), "--results", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setitem(oneshot.PEERS, "torch-that-nobody-has", lambda *given: importlib.import_module("not_there"))
    path = oneshot.main(command)
    dense, *rows, peer = json.loads(path.read_text())["results"]
    assert dense["tool"] == "dense"
    ways = [(r["form"], r["factors"], r["ranks"]) for r in rows]
    assert len(set(ways)) == len(ways) == 9
    assert all(abs(r["parameters"] / dense["parameters"] - 0.5) < 0.02 for r in rows)
    assert peer["failed"].startswith("ModuleNotFoundError: No module named 'not_there'")
    assert not any("forward" in r for r in rows)
    assert any("healed" in r for r in rows)
    assert "healed" in capsys.readouterr().out
    monkeypatch.setattr(oneshot.Bench, "_row", None)  # what is in the ledger is not done again
    assert json.loads(oneshot.main(command).read_text())["results"] == [dense, *rows, peer]


def test_the_largest_model_that_fits():
    made = largest(lambda ratio: torch.nn.Linear(1, max(1, round(100 * ratio)), bias=False), 42, steps=12)
    assert size(made) == 42
    with pytest.raises(ValueError, match="no setting leaves at most 0 parameters"):
        largest(lambda ratio: torch.nn.Linear(1, 1), 0)
