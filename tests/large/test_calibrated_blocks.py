"""Models in several files, calibrated one block at a time."""

import json
import re
import weakref

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_models import empty, of_transformers, padded, tokens
from torch import nn

import fxrank
from fxrank.large import blocks, calibrated
from fxrank.large.calibrated import SHARED
from fxrank.large.stream import compress_shards
from fxrank.passes.errors import CalibrationError
from fxrank.passes.pairs.locate import dense_at
from fxrank.passes.rewriting.install import pairs_in
from fxrank.policies.outputs import Outputs
from fxrank.saving.shards import INDEX, Shards


class Block(nn.Module):
    """Called with positions and names, gives a tuple."""

    def __init__(self, width, shared):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.mix, self.shared = nn.Linear(width, width, bias=False), shared

    def forward(self, x, scale, *, angles, cache):
        cache.append(x)
        assert len(cache) <= 4, "a cache must be new in every call of the model"
        y = self.norm(x)
        x += self.shared(y)
        return x + self.down(self.up(y).relu()) * scale + self.mix(y * angles), y.mean()


class Net(nn.Module):
    """Blocks with a weight that all of them share; outside of them raw parameters, a table that is read as a matrix, buffers of both kinds."""

    def __init__(self, width=12, count=3):
        super().__init__()
        self.table, self.first = nn.Embedding(40, width), nn.Linear(width, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width))
        shared = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, shared) for _ in range(count))
        self.others = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)])
        self.last = nn.Linear(width, width)
        self.register_buffer("scale", torch.full((width,), 0.5))
        self.register_buffer("angles", torch.linspace(-1, 1, width), persistent=False)

    def forward(self, tokens):
        x = self.first(self.table(tokens) + self.places[: tokens.shape[1]])
        cache = []
        for block in self.blocks:
            x, _ = block(x, self.scale, angles=self.angles, cache=cache)
        x = x + self.others[0](x) * self.others[1](x).sigmoid()
        return (
            torch.where(torch.ones((), dtype=torch.bool, device=self.scale.device), self.last(x), x)
            @ self.table.weight.T
        )


def in_files(model, folder, files=3):
    folder.mkdir()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(tensor is other for other in state.values()):
            state[name] = tensor
    index = {name: f"model-{i % files}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(index.values()):
        some = {n: t.detach().contiguous() for n, t in state.items() if index[n] == file}
        safetensors.torch.save_file(some, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def options_of(asked):
    """Those of `compress_shards` for those of `factorize`."""
    targets = [name for name in asked if name.startswith("target_")]
    budget = fxrank.Budget(targets[0].removeprefix("target_"), asked[targets[0]], 0.0) if targets else None
    return {"budget": budget, **{name: value for name, value in asked.items() if name not in targets}}


def check_alike(plan, wanted):
    assert plan.R == wanted.R
    assert plan.calibration_batches == wanted.calibration_batches
    for mine, its in zip(plan.layers, wanted.layers, strict=True):
        assert (mine.name, mine.form, mine.gains_bias, mine.reason) == (its.name, its.form, its.gains_bias, its.reason)
        if its.output_error is not None:  # rounded to six digits
            assert mine.output_error == pytest.approx(its.output_error, abs=2e-6)


# -- the same as of the whole model


@pytest.mark.parametrize(
    "asked",
    [
        {"target_params": 0.7},
        {"target_macs": 0.7},
        {"rank": 5},
        {"target_params": 0.6, "include": "*"},
        {"target_params": 0.8, "form": "auto"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_files_hold_what_factorize_makes_of_the_whole_model(name, asked, tmp_path, monkeypatch):
    """But for how ranks are weighed: here by what a block gives, there by what the model gives."""
    monkeypatch.setattr(Outputs, "weights", lambda self, alone: {})
    model, build = of_transformers(name)
    model.save_pretrained(tmp_path / "big", max_shard_size="30KB")
    batches = padded(3)
    expected = fxrank.factorize(model, batches[0], calibration=batches, **asked)
    given = build()
    plan = compress_shards(
        given, batches[0], tmp_path / "big", tmp_path / "small", calibration=batches, **options_of(asked)
    )
    assert len(set(Shards(tmp_path / "small").files.values())) > 1
    check_alike(plan, fxrank.plan_of(expected))
    assert pairs_in(given).keys() == pairs_in(expected).keys()
    small = fxrank.load(type(model)(model.config), tmp_path / "small").eval()
    assert fxrank.plan_of(small) == plan
    with torch.no_grad():
        # The same operations in the same order; only where the memory lies may differ, and with it how torch sums.
        torch.testing.assert_close(small(**batches[1]).logits, expected(**batches[1]).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounds", ["one round", "several rounds"])
@pytest.mark.parametrize("include", [(), "*"], ids=["inner", "all"])
def test_what_a_model_does_outside_of_its_blocks_is_its_own_business(net, tmp_path, monkeypatch, include, rounds):
    if rounds == "several rounds":
        monkeypatch.setattr("fxrank.passes.calibration.collect.ROUND_BYTES", 2000)
    batches = [tokens(seed) for seed in range(3)]
    plan = compress_shards(
        empty(Net),
        batches[0],
        in_files(net, tmp_path / "big"),
        tmp_path / "small",
        rank=4,
        include=include,
        calibration=batches,
    )
    shared = plan.layer("blocks.0.shared")
    assert shared.reason.endswith(f"factors of the weight alone: {SHARED}")
    assert shared.output_error is None
    ranks = {name: rank for name, rank in plan.R.items() if name != "blocks.0.shared"}
    assert {"blocks.0.up", "blocks.2.down", "others.1", "first"} <= ranks.keys()
    expected = fxrank.factorize(net, batches[0], ranks, calibration=batches)
    for name, rank in ranks.items():
        assert plan.layer(name).output_error == pytest.approx(
            fxrank.plan_of(expected).layer(name).output_error, abs=2e-6
        )
        assert plan.layer(name).rank == rank
    small = fxrank.load(Net(), tmp_path / "small").eval()
    for name in ranks:  # which does not know of the shared weight
        mine, its = (dense_at(fxrank.merge(model), name) for model in (small, expected))
        torch.testing.assert_close(mine.weight, its.weight, rtol=1e-5, atol=1e-6)  # as above


def test_batches_are_counted_and_a_loader_is_enough(net, tmp_path):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens(0, 20), tokens(1, 20)), batch_size=4)
    given = {"rank": 3, "calibration": loader, "calibration_batches": 2}
    plan = compress_shards(empty(Net), tokens(0), in_files(net, tmp_path / "big"), tmp_path / "small", **given)
    assert plan.calibration_batches == 2


def test_autocast_changes_nothing(net, tmp_path):
    source, given = in_files(net, tmp_path / "big"), {"rank": 3, "calibration": [tokens(0)]}
    expected = compress_shards(empty(Net), tokens(0), source, tmp_path / "small", **given)
    with torch.autocast("cpu", torch.bfloat16):
        assert compress_shards(empty(Net), tokens(0), source, tmp_path / "same", **given) == expected


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 11))
def test_no_layer_loses_more_on_the_data_than_the_weights_factors_do(tmp_path_factory, seed, rank):
    torch.manual_seed(seed)
    net, folder = Net().eval(), tmp_path_factory.mktemp("net")
    batches = [tokens(seed + n) for n in range(2)]
    source = in_files(net, folder / "big")
    lost = []
    seen = inputs_of(net, batches)
    for calibration in (batches, None):
        output = folder / ("weights" if calibration is None else "data")
        plan = compress_shards(empty(Net), batches[0], source, output, rank=rank, calibration=calibration)
        small = fxrank.load(Net(), output).eval()
        pairs = {name: small.get_submodule(name) for name in plan.R if name in seen}
        lost.append({n: (pair(seen[n]) - net.get_submodule(n)(seen[n])).square().sum() for n, pair in pairs.items()})
    scale = {name: net.get_submodule(name)(x).square().sum() for name, x in seen.items()}
    assert len(lost[0]) >= 12
    for name, of_data in lost[0].items():  # float32 factors: an error of 1e-6 of the output, squared
        assert of_data <= lost[1][name] * (1 + 1e-4) + 1e-11 * scale[name], name


def inputs_of(net, batches):
    """What each linear layer in one block, or in none, is given."""
    seen, hooks = {}, []
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and "shared" not in name:
            hooks.append(
                module.register_forward_pre_hook(lambda m, args, n=name: seen.setdefault(n, []).append(args[0]))
            )
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in given]) for name, given in seen.items()}


# -- what is held, and what is left


def test_no_block_is_there_while_the_next_one_is(net, tmp_path, monkeypatch):
    filled, parts = blocks.Feed.part, []

    def part(feed, number):
        assert all(one() is None for one in parts)
        found = filled(feed, number)
        parts.append(weakref.ref(found.get_submodule(f"blocks.{number}").up.weight))
        return found

    monkeypatch.setattr(blocks.Feed, "part", part)
    compress_shards(
        empty(Net), tokens(0), in_files(net, tmp_path / "big"), tmp_path / "small", rank=3, calibration=[tokens(1)]
    )
    assert len(parts) == 6  # every block twice


@pytest.mark.parametrize("call", range(1, 9))
def test_nothing_is_left_of_a_run_that_fails_in_the_middle(net, tmp_path, monkeypatch, call):
    gather, calls = calibrated.gather, []

    def full(*given):
        calls.append(given)
        if len(calls) == call:
            raise OSError("no space left")
        return gather(*given)

    monkeypatch.setattr(calibrated, "gather", full)
    source, model = in_files(net, tmp_path / "big"), empty(Net)
    with pytest.raises(OSError, match="no space left"):
        compress_shards(model, tokens(0), source, tmp_path / "small", rank=3, calibration=[tokens(1)])
    assert not (tmp_path / "small").exists()
    assert not pairs_in(model)
    assert "forward" not in vars(model)


# -- errors


class Plain(nn.Module):
    """No blocks: what is between them is not handed on as it is."""

    def __init__(self, between=True, cut=False):
        super().__init__()
        self.table, self.last = nn.Embedding(40, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.between, self.cut = between, cut

    def forward(self, tokens):
        x = self.table(tokens)
        for layer in self.layers:
            x = layer(x)
            x = x.relu() if self.between else x
        return self.last(x)


class Handed(nn.Module):
    """The first block makes what the others are given beside the hidden states."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(40, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(Beside() for _ in range(3))

    def forward(self, tokens):
        x, bias = self.table(tokens), None
        for layer in self.layers:
            x, bias = layer(x, bias)
        return self.last(x)


class Beside(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x, bias):
        bias = x.mean() if bias is None else bias
        return self.mix(x) + bias, bias


@pytest.mark.parametrize(
    ("build", "batches", "text"),
    [
        (Plain, [tokens(0)], "must have blocks: an nn.ModuleList whose members are called one after another, each with what the one before it gives; Plain has none. Leave the data out"),
        (Handed, [tokens(0)], "nothing that depends on it; 'layers.1' is. Leave the data out"),
        (Net, [], "calibration must yield at least one batch; it is empty."),
        (Net, [tokens(0) + 40], "its weights read when they are used; Net said of the first: index out of range"),
        (Net, [tokens(0), tokens(0) + 40], "as far as its blocks; batch 2 did not: index out of range"),
    ],
)  # fmt: skip
def test_what_cannot_be_calibrated_is_said_and_nothing_is_written(tmp_path, build, batches, text):
    torch.manual_seed(0)
    source = in_files(build(), tmp_path / "big")
    with pytest.raises(CalibrationError, match=re.escape(text)):
        compress_shards(empty(build), tokens(0), source, tmp_path / "small", rank=2, calibration=batches)
    assert not (tmp_path / "small").exists()


def test_activations_that_are_not_finite_are_named(net, tmp_path):
    with torch.no_grad():
        net.places[3, 2] = torch.inf
    batches = [tokens(0, length=3), tokens(1, length=7)]
    text = (
        r"activations must be finite .* the inputs of 'blocks.0.up' hold 4. NaN or infinite values of 336 in batch 2\."
    )
    with pytest.raises(CalibrationError, match=text):
        compress_shards(
            empty(Net), batches[0], in_files(net, tmp_path / "big"), tmp_path / "small", rank=2, calibration=batches
        )
    assert not (tmp_path / "small").exists()


def test_buffers_that_are_in_no_file_must_be_there(net, tmp_path):
    with torch.device("meta"):
        model = Net()
    with pytest.raises(CalibrationError, match=r"'angles' is on the meta device. Build the model inside"):
        compress_shards(
            model, tokens(0), in_files(net, tmp_path / "big"), tmp_path / "small", rank=2, calibration=[tokens(0)]
        )
