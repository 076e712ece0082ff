"""The papers' models have the papers' sizes and the reference's, to the digit, or for a reason that is checked too; their table renders."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from places import DATA, ROOT
from torch import nn

import fxrank
from benchmarks import paper_sizes, tables
from benchmarks.paper_sizes import as_printed, on_meta
from benchmarks.paper_tables import paper_sizes_table
from benchmarks.subjects.models import ResNet
from benchmarks.subjects.paper_models import ROWS, Lstm

GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))["models"]
BOTH = ("full", "factorized")
OTHER_PARAMETERS = {("resmlp-s36", "factorized"), ("lstm-wikitext2", "full"), ("lstm-wikitext2", "factorized")}
"""Not what the paper prints; the reasons are tests below."""
OTHER_MACS = {(name, which) for name in ("resnet50", "wide-resnet50-2", "lstm-wikitext2") for which in BOTH}


@functools.cache
def models(name):
    try:
        return on_meta(ROWS[name])
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@functools.cache
def counted(name):
    return paper_sizes.count(ROWS[name], *models(name))


@pytest.mark.parametrize("name", ROWS)
def test_sizes_are_the_references_to_the_digit(name):
    row, found = ROWS[name], counted(name)
    for i, which in enumerate(BOTH):
        reference, ours = row.reference[i], found[which]
        if reference is None:
            assert ours["explained"] is None
            continue
        golden = GOLDEN[reference]
        assert ours["parameters"] + row.more_parameters[i] == golden["parameters"]
        assert ours["trainable"] == golden.get("trainable", ours["parameters"])
        if "macs" in golden:
            assert ours["macs"] + row.more_macs[i] == golden["macs"]
        assert ours["explained"]


@pytest.mark.parametrize("name", ROWS)
def test_sizes_are_the_papers(name):
    row, found = ROWS[name], counted(name)
    for i, which in enumerate(BOTH):
        ours = found[which]
        assert ours["as_the_paper"] == ((name, which) not in OTHER_PARAMETERS)
        assert ours["macs_as_the_paper"] == (None if row.macs[i] is None else (name, which) not in OTHER_MACS)
        if " " not in row.parameters[i]:  # printed to the digit: the reference's own
            assert as_printed(ours["parameters"] + row.more_parameters[i], row.parameters[i]) == row.parameters[i]
        if False in (ours["as_the_paper"], ours["macs_as_the_paper"]):
            assert row.remark


def test_a_call_makes_the_products_of_its_layers_and_those_of_attention():
    for name in ("resnet18", "vgg19", "resnet50", "wide-resnet50-2", "resmlp-s36"):
        for which in BOTH:
            assert counted(name)[which]["call_macs"] == counted(name)[which]["macs"]
    for which in BOTH:  # 12 blocks: 197 queries by 197 keys, and as many values, 768 wide
        assert counted("deit-base")[which]["call_macs"] - counted("deit-base")[which]["macs"] == 12 * 2 * 197**2 * 768


# -- the reasons that rows give


@pytest.mark.parametrize("name", ["resnet50", "wide-resnet50-2"])
def test_printed_multiply_adds_count_batchnorm_relu_and_pooling(name):
    model, _, example = models(name)
    seen = 0

    def count(module, inputs, output):
        nonlocal seen
        pools = isinstance(module, (nn.MaxPool2d, nn.AdaptiveAvgPool2d))
        seen += inputs[0].numel() if pools else output.numel() * (1 + isinstance(module, nn.BatchNorm2d))

    kinds = (nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    model.eval()(example)
    for hook in hooks:
        hook.remove()
    row = ROWS[name]
    for i, which in enumerate(BOTH):
        golden = GOLDEN[row.reference[i]]["macs_with_norms"]
        assert counted(name)[which]["macs"] + row.more_macs[i] + seen == golden
        assert as_printed(golden, row.macs[i]) == row.macs[i]
    assert f"{GOLDEN[row.reference[0]]['macs_with_norms']:,}" in row.remark


def test_another_table_counts_the_buffers_of_resnet50():
    model, *_ = models("resnet50")
    buffers = sum(b.numel() for b in model.buffers())
    assert counted("resnet50")["full"]["parameters"] + buffers == 25_610_205
    assert f"{buffers:,} buffers" in ROWS["resnet50"].remark and "25,610,205" in ROWS["resnet50"].remark


@pytest.mark.parametrize(("name", "layers"), [("deit-base", 36), ("resmlp-s36", 72)])
def test_the_references_first_factors_have_a_redundant_bias_each(name, layers):
    ranks = fxrank.plan_of(models(name)[1]).R
    assert len(ranks) == layers
    assert ROWS[name].more_parameters == (0, sum(ranks.values()))


def test_the_papers_resmlp_is_not_of_one_set_of_ranks():
    found = counted("resmlp-s36")["factorized"]
    positions = 14 * 14  # at which each further parameter of a pair multiplies
    more = 29_350_000 - found["parameters"] - 72 * 192  # at the least: printed as 29.4 M
    assert as_printed(found["macs"], "5.8 G") == "5.8 G"
    assert as_printed(found["macs"] + positions * more, "5.8 G") == "5.9 G"


def test_the_lstm_has_a_second_bias_and_two_layers_and_multiplies_its_pairs_out():
    model, small, example = models("lstm-wikitext2")
    assert isinstance(model, Lstm)
    second = sum(p.numel() for name, p in model.rnn.named_parameters() if name.startswith("bias_hh"))
    assert ROWS["lstm-wikitext2"].more_parameters == (-second, -second)
    found = counted("lstm-wikitext2")
    assert [found[which]["macs"] // 2 for which in BOTH] == [18_000_000, 9_000_000]
    out = 4 * 4 * 1500 * 375 * 1500  # two weights in each layer, four gates in each
    for words in (1, 5):
        longer = example.expand(words, 1)
        dense, pairs = (paper_sizes.call_macs(m, longer, "rnn") for m in (model, small))
        assert (dense, pairs) == (36_000_000 * words, 36_000_000 * words + out)


# -- the script and the table


def test_a_count_is_written_as_a_figure():
    assert as_printed(11_173_834, "20.0 M") == "11.2 M"
    assert as_printed(398_660_608, "0.4 G") == "0.4 G"
    assert as_printed(36_000_000, "18 M") == "36 M"
    assert as_printed(11_173_834, "1,000") == "11,173,834"


def test_commands_are_those_of_the_readme():
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    commands = [row.training for row in ROWS.values() if row.training]
    assert commands and all(command in readme for command in commands)


def test_what_is_timed_are_the_models_of_imagenet():
    assert [n for n, row in ROWS.items() if row.timed] == ["resnet50", "wide-resnet50-2", "deit-base", "resmlp-s36"]


def test_a_step_is_timed_beside_the_full_rank_one():
    tiny = replace(
        ROWS["resnet18"], build=lambda: ResNet((4, 8), 1, paper_sizes.CLASSES), layers=r"layer2\.0\.conv[12]"
    )
    found = paper_sizes.time_steps(tiny, 2, 0.0, 1, torch.device("cpu"), side=8)
    assert all(ms > 0 for ms in found["step_ms"]) and found["ratio"][0] > 0 and found["how"]


def test_the_script_writes_what_the_table_shows(tmp_path, monkeypatch, capsys):
    written = paper_sizes.main(["--models", "vgg19", "--no-timing", "--results", str(tmp_path)])
    assert "8,370,634" in capsys.readouterr().out
    data = json.loads(written.read_text(encoding="utf-8"))
    assert data["configuration"]["timing"] is False and "step" not in data["results"]["vgg19"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = paper_sizes_table()
    assert "| 20,560,330 → 8,370,634 | 20,560,330 → 8,370,634 | the same " in text
    assert "398.66 → 289.35 M per image" in text and "Step:" not in text


def made_up():
    def one(parameters, **more):
        plain = {"parameters": parameters, "trainable": parameters, "macs": 4_000_000, "call_macs": 4_000_000}
        papers = {"paper_parameters": "2 M", "paper_macs": None, "as_the_paper": True, "macs_as_the_paper": None}
        return plain | papers | {"reference_more": 0, "reference_more_macs": None, "explained": True} | more

    row = {"model": "Net", "ranks": "a half", "source": "Paper (2020), Table 7", "of": "word", "training": "make it"}
    full, small = one(2_000_000), one(1_500_000, reference_more=-7, explained=False, trainable=10, call_macs=5_000_000)
    other = small | {"paper_macs": "3 M", "macs_as_the_paper": False, "as_the_paper": False, "explained": True}
    none = one(1, reference_more=None, explained=None)
    timed = {"step": {"step_ms": [9.0, 8.0], "ratio": [0.875, 0.0123], "how": "clock"}}
    return {
        "environment": {"torch_threads": 2, "torch": "9.1.0+cpu", "gpu": None},
        "configuration": {"batch": 3},
        "results": {
            "a": row | {"remark": "Because.", "full": full, "factorized": small} | timed,
            "b": row | {"remark": "Because.", "model": "Other", "full": full, "factorized": other},
            "c": row | {"remark": "", "training": None, "full": full, "factorized": none},
        },
    }


def test_the_table_shows_what_differs(tmp_path, monkeypatch):
    (tmp_path / "paper_sizes_cpu2_209901.json").write_text(json.dumps(made_up()), encoding="utf-8")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    legend, _, _, _, *lines = paper_sizes_table().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:3]]
    assert rows[0] == [
        *("Net (Paper, Table 7)", "a half", "2,000,000 → 1,500,000 (10 of them train)", "2 M → 2 M"),
        *("the same → -7 (!)", "4.00 → 4.00 (5.00) M per word", "-", "0.88 ± 0.01", "`make it`"),
    ]
    assert rows[1][3:7] == ["2 M → ≠ 2 M", "the same → -7", "4.00 → 4.00 (5.00) M per word", "≠ 3 M"]
    assert (rows[2][4], rows[2][7:]) == ("the same → -", ["-", "-"])
    assert lines[3:] == ["", "- Net, Other: Because."]
    assert "of 3 images of 224×224 on 2 CPU threads, torch 9.1.0, of the full-rank model's" in legend
    assert legend.endswith("by clock.")
