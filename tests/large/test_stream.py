"""Models in several files, factorized one weight at a time."""

import json
import os
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import fxrank
from fxrank.cli.main import main
from fxrank.large.stream import compress_shards
from fxrank.passes.errors import BudgetError, CheckpointError, NonFiniteWeightError
from fxrank.saving import shards
from fxrank.saving.shards import INDEX, Shards, ShardWriter


class Net(nn.Module):
    """Tied tables, a fused projection, a weight of zeros, a buffer, a convolution."""

    def __init__(self):
        super().__init__()
        self.table, self.fused = nn.Embedding(40, 16), nn.Linear(16, 48, bias=False)
        self.mix, self.dead = nn.Linear(16, 16), nn.Linear(16, 16)
        self.conv, self.head = nn.Conv1d(16, 24, 3, groups=2), nn.Linear(16, 40, bias=False)
        self.back = nn.Linear(24, 16)
        self.head.weight = self.table.weight
        nn.init.zeros_(self.dead.weight)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, tokens):
        x = self.table(tokens)
        a, b, c = self.fused(x).chunk(3, -1)
        x = self.mix(a * b.sigmoid() + c) + self.dead(x)
        x = self.back(self.conv(x.transpose(1, 2)).transpose(1, 2).relu())
        return self.head(x * self.scale)


TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def source(net, tmp_path):
    return in_files(net.state_dict(), tmp_path / "source")


def in_files(state, folder, files=3):
    """The tensors in several files, as other tools write them; a tied one under one name."""
    state = {name: tensor for name, tensor in state.items() if name != "head.weight"}
    folder.mkdir()
    names = sorted(state)
    index = {name: f"model-{i % files}.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        safetensors.torch.save_file({n: state[n].contiguous() for n in names if index[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def on_meta():
    with torch.device("meta"):
        return Net(), torch.zeros(2, 6, dtype=torch.long)


@pytest.mark.parametrize("include", [(), "*"], ids=["inner", "all"])
@pytest.mark.parametrize("form", ["channel", "qkv", "auto"])
@pytest.mark.parametrize("asked", [{"target_params": 0.7}, {"target_macs": 0.7}, {"rank": 3}, {"rank": 0.25}, {}])
def test_the_files_hold_what_factorize_makes_of_the_whole_model(net, source, tmp_path, asked, form, include):
    expected = fxrank.factorize(net, TOKENS, form=form, include=include, **asked)
    budget = next((fxrank.Budget(a.removeprefix("target_"), t, 0.0) for a, t in asked.items() if a != "rank"), None)
    options = {"rank": asked.get("rank"), "budget": budget, "form": form, "include": include}
    plan = compress_shards(*on_meta(), source, tmp_path / "small", limit=4000, **options)
    wanted = fxrank.plan_of(expected)
    assert plan.R == wanted.R
    assert [(d.form, d.reason) for d in plan.layers] == [(d.form, d.reason) for d in wanted.layers]
    assert plan.layer("dead").reason == "its weight is zero (stable rank 0)"
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert all(f.stat().st_size < 4000 + 1000 for f in (tmp_path / "small").glob("*.safetensors"))  # and a header
    small = fxrank.load(Net(), tmp_path / "small").eval()
    assert fxrank.plan_of(small) == plan
    torch.testing.assert_close(small(TOKENS), expected(TOKENS), rtol=1e-5, atol=1e-6)  # the same numbers but for signs
    assert small.head.weight is small.table.weight or small.head.v.weight is small.table.v.weight


def test_factors_have_the_dtype_of_the_weight_in_its_file(net, tmp_path):
    source = in_files(net.bfloat16().state_dict(), tmp_path / "source")
    compress_shards(*on_meta(), source, tmp_path / "small", rank=2)
    held = Shards(tmp_path / "small")
    assert {held.read(name).dtype for name in held.files} == {torch.bfloat16}


def test_old_angles_in_the_files_are_left_out(net, tmp_path):
    state = net.state_dict() | {"blocks.0.rotary_emb.inv_freq": torch.ones(4)}
    compress_shards(*on_meta(), in_files(state, tmp_path / "source"), tmp_path / "small", rank=2)
    assert not any("inv_freq" in name for name in Shards(tmp_path / "small").files)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"other": torch.ones(2)}, CheckpointError, "Net has no 'other'. Read the whole model"),
        ({"mix.weight": torch.ones(2, 2)}, CheckpointError, "'mix.weight' is (2, 2) in the files and (16, 16)"),
        ({"mix.bias": None}, CheckpointError, "every tensor of the model must be stored; 'mix.bias' is not in"),
        ({"mix.weight": torch.full((16, 16), torch.nan)}, NonFiniteWeightError, "'mix' holds 256 NaN"),
    ],
)
def test_files_that_do_not_fit_are_named_and_nothing_is_written(net, tmp_path, change, error, text):
    state = {name: t for name, t in (net.state_dict() | change).items() if t is not None}
    source = in_files(state, tmp_path / "source")
    with pytest.raises(error, match=re.escape(text)):
        compress_shards(*on_meta(), source, tmp_path / "small", rank=2)
    assert not (tmp_path / "small").exists()


def test_a_budget_out_of_reach_and_a_folder_in_use_are_refused(source, tmp_path):
    with pytest.raises(BudgetError, match=r"target_params must be at least 0\.\d+ here"):
        compress_shards(*on_meta(), source, tmp_path / "small", budget=fxrank.Budget("params", 0.01, 0.0))
    with pytest.raises(CheckpointError, match=r"must hold no weights yet; .*source has model-0.safetensors"):
        compress_shards(*on_meta(), source, source, rank=2)
    assert not (tmp_path / "small").exists()


# -- the files


def test_a_writer_that_is_left_with_an_error_leaves_nothing(tmp_path):
    def broken_off():
        with ShardWriter(tmp_path / "new", limit=10) as writer:
            writer.add("a", torch.ones(8))
            writer.add("b", torch.ones(8))
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("new", [True, False])
def test_a_writer_that_fails_at_the_end_leaves_nothing(tmp_path, monkeypatch, new):
    def full(*given):
        raise OSError("no space left")

    monkeypatch.setattr(shards, "_digest", full)
    folder = tmp_path / "there"
    if not new:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")

    def written():
        with ShardWriter(folder, limit=10) as writer:
            writer.add("a", torch.ones(8))
            writer.finish(fxrank.Plan("factorize", ()))

    with pytest.raises(OSError, match="no space left"):
        written()
    assert [p.name for p in tmp_path.rglob("*")] == ([] if new else ["there", "notes.txt"])


@pytest.mark.parametrize("damage", ["weights", "plan", "index", "missing", "name", "cut"])
def test_damaged_files_are_told(net, source, tmp_path, damage):
    small = tmp_path / "small"
    compress_shards(*on_meta(), source, small, rank=2, limit=4000)
    file = sorted(small.glob("*.safetensors"))[0]
    text = "must be as they were saved together"
    if damage == "weights":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "plan":
        (small / "plan.json").write_text((small / "plan.json").read_text().replace("as given", "as taken"))
    elif damage == "index":
        (small / INDEX).write_text("[]")
        text = "must be an object whose weight_map has a file"
    elif damage == "missing":
        file.unlink()
        text = f"must be there; '{file.name}' is missing"
    elif damage == "name":
        index = json.loads((small / INDEX).read_text())
        del index["metadata"]["digest"]
        index["weight_map"]["nothing"] = file.name
        (small / INDEX).write_text(json.dumps(index))
        text = "'nothing' is only in one of them"
    else:
        index = json.loads((small / INDEX).read_text())
        del index["metadata"]["digest"]
        (small / INDEX).write_text(json.dumps(index))
        file.write_bytes(file.read_bytes()[:100])
        text = f"{file.name} in {small} must be a whole safetensors file"
    before = net.state_dict()
    with pytest.raises(CheckpointError, match=re.escape(text)):
        fxrank.load(net, small)
    assert net.state_dict().keys() == before.keys()


# -- the command, on folders of transformers


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    model.generation_config.max_new_tokens = 5
    return model


@pytest.mark.parametrize("shards", ["30KB", "1GB"], ids=["several files", "one file"])
@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_of_transformers_becomes_one_that_loads(llama, tmp_path, capsys, shards, prefix):
    import transformers

    from fxrank.integrations.huggingface import from_pretrained

    llama.save_pretrained(tmp_path / "big", max_shard_size=shards)
    command = ["compress", f"{prefix}{tmp_path / 'big'}", "--target-params", "0.8", "--form", "channel"]
    assert main([*command, "--output", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"parameters \((0\.79\d|0\.800)\)", printed)
    assert (tmp_path / "small" / INDEX).is_file() == (shards == "30KB")
    small = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "small")
    tokens = torch.arange(3, 15).reshape(2, 6)
    expected = fxrank.factorize(llama, {"input_ids": torch.ones(1, 32, dtype=torch.long)}, target_params=0.8)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, expected(tokens).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(small.generate(tokens, do_sample=False), expected.generate(tokens, do_sample=False))
    assert small.generate(tokens, do_sample=False).shape == (2, 11)  # as generation_config.json says


def test_what_several_files_cannot_do_is_said(llama, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "big", max_shard_size="30KB")
    command = ["compress", str(tmp_path / "big"), "--target-params", "0.8", "--output", str(tmp_path / "small")]
    assert main([*command, "--target-latency", "0.5", "--input", "1x4"]) == 2
    assert (
        "is read a part at a time, from model.safetensors.index.json alone, and never timed or called as a whole; got --input and --target-latency. Leave"
        in (capsys.readouterr().err)
    )
    assert main([*command, "--keep", "0.9"]) == 2
    assert "or called as a whole; got --keep. Leave" in capsys.readouterr().err
    assert main([*command, "--rank", "4"]) == 2
    assert "got target_params=0.8 and rank=." in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_folder_that_lacks_weights_of_its_model_is_refused(llama, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "big")
    state = safetensors.torch.load_file(tmp_path / "big" / "model.safetensors")
    del state["model.norm.weight"]
    safetensors.torch.save_file(state, tmp_path / "big" / "model.safetensors", metadata={"format": "pt"})
    assert main(["compress", str(tmp_path / "big"), "--output", str(tmp_path / "small")]) == 2
    assert "'model.norm.weight' of LlamaForCausalLM is missing in" in capsys.readouterr().err


# -- with data


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each of 60 characters."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {chr(62 + number): number for number in range(60)} | {"?": 60}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def text_of(characters, seed=0):
    numbers = torch.randint(97, 123, (characters,), generator=torch.Generator().manual_seed(seed))
    return "".join(map(chr, numbers.tolist()))


@pytest.mark.parametrize("shards", ["30KB", "1GB"], ids=["several files", "one file"])
def test_a_folder_is_calibrated_on_a_text(llama, tokenizer, tmp_path, capsys, shards):
    import transformers

    from fxrank.integrations.huggingface import from_pretrained

    llama.save_pretrained(tmp_path / "big", max_shard_size=shards)
    tokenizer.save_pretrained(tmp_path / "big")
    (tmp_path / "text.txt").write_text(text_of(500))
    command = ["compress", str(tmp_path / "big"), "--target-params", "0.8", "--form", "channel", "--tokens", "16"]
    data = ["--data", str(tmp_path / "text.txt"), "--batch-size", "4", "--calibration-batches", "3"]
    assert main([*command, *data, "--output", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    assert "output error" in printed
    assert (tmp_path / "small" / INDEX).is_file() == (shards == "30KB")
    assert ("factors know 3 batches" in printed) == (shards == "30KB")
    small = from_pretrained(transformers.AutoModelForCausalLM, tmp_path / "small")
    ids = torch.tensor(tokenizer(text_of(500))["input_ids"])
    assert len(ids) == 500
    starts = torch.linspace(0, 500 - 16, 12).long().tolist()
    batches = list(torch.stack([ids[s : s + 16] for s in starts]).split(4))
    expected = fxrank.factorize(llama, batches[0], target_params=0.8, calibration=batches)
    if shards == "30KB":  # where ranks are weighed by what a block gives
        expected = fxrank.factorize(llama, batches[0], fxrank.plan_of(small), calibration=batches)
    assert fxrank.plan_of(small).R == fxrank.plan_of(expected).R
    with torch.no_grad():
        torch.testing.assert_close(small(ids[None, :20]).logits, expected(ids[None, :20]).logits, rtol=1e-4, atol=1e-5)


def test_what_is_wrong_with_a_text_is_said(llama, tokenizer, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "big", max_shard_size="30KB")
    text = tmp_path / "text.txt"
    text.write_text(text_of(10))
    command = ["compress", str(tmp_path / "big"), "--rank", "4", "--output", str(tmp_path / "small")]

    def said(*more):
        assert main([*command, "--data", str(text), *more]) == 2
        assert not (tmp_path / "small").exists()
        return capsys.readouterr().err

    assert re.search(r"AutoTokenizer finds nothing in .*big: .* Save the tokenizer there, or name in --data", said())
    tokenizer.save_pretrained(tmp_path / "big")
    assert "must have at least one sequence of 512 tokens; " in said()
    assert "text.txt has 10. Give a longer one, or fewer --tokens." in said()
    assert "--tokens must be above 0; got -1." in said("--tokens", "-1")
    assert "--batch-size must be above 0; got -2." in said("--batch-size", "-2")
    text.write_bytes(b"\xff\xfe\x00")
    assert re.search(r"a text must be UTF-8; .*text.txt is not: ", said())
    text.unlink()
    assert "A text file is for fxrank compress FOLDER alone." in said()


PROGRAM = """
import re, resource, sys
from transformers import AutoModelForCausalLM
from fxrank.cli.main import main

limit, how, big, small, tiny, *data = sys.argv[1:]
command = ["compress", "--target-params", "0.8", "--form", "channel", *data]
main([*command, tiny, "--output", tiny + "er"])  # all libraries are loaded, the threads made
used = int(re.search(r"VmData:\\s*(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (int(limit) << 20),) * 2)
if how == "whole":
    AutoModelForCausalLM.from_pretrained(big)
else:
    sys.exit(main([*command, big, "--output", small]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's own")
def test_a_model_larger_than_the_memory_is_compressed(llama, tokenizer, tmp_path):
    """300 MB under a limit of 160: the whole model cannot be read, one layer at a time can, and with data one block."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=8))
    model.save_pretrained(tmp_path / "big", max_shard_size="20MB")
    tokenizer.save_pretrained(tmp_path / "big")
    size = sum(f.stat().st_size for f in (tmp_path / "big").glob("*.safetensors"))
    assert size > 300 << 20
    del model
    (tmp_path / "text.txt").write_text(text_of(5000))

    def run(how, *data):
        llama.save_pretrained(tmp_path / how, max_shard_size="30KB")
        tokenizer.save_pretrained(tmp_path / how)
        folders = [str(tmp_path / name) for name in ("big", f"small {how}", how)]
        command = [sys.executable, "-c", PROGRAM, "160", how, *folders, *data]
        # What is freed goes back at once, as it does by itself where weights are large: the limit is for what is held.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)

    whole = run("whole")
    assert whole.returncode != 0
    assert re.search(r"memory|alloc", whole.stderr)
    for how, data in {"parts": [], "blocks": ["--data", str(tmp_path / "text.txt"), "--tokens", "64"]}.items():
        parts = run(how, *data)
        assert parts.returncode == 0, parts.stderr[-2000:]
        small = sum(f.stat().st_size for f in (tmp_path / f"small {how}").glob("*.safetensors"))
        assert 0.79 < small / size < 0.801
