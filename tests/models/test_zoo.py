"""A sample of the model zoo: what is reached, exactness, and that the models are left as they were."""

import importlib.util
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import fxrank
from benchmarks.model_zoo import study, summary, tensors_in
from benchmarks.subjects import zoo
from fxrank.passes.model.calls import call_arguments
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.embedding import LowRankEmbedding
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.tracing.compare import largest_difference, output_difference

SOURCES = {"hf": "transformers", "timm": "timm", "torchvision": "torchvision"}
MISC = [*zoo.zoo_misc.MODELS]
HF = ["bert", "gpt2", "mixtral", "t5", "mamba", "whisper", "swin"]
TIMM = ["test_vit", "test_byobnet", "test_resnet", "test_efficientnet"]
SLOW = [("torchvision", "fasterrcnn_mobilenet_v3_large_320_fpn")]
SAMPLE = [("misc", n) for n in MISC] + [("hf", n) for n in HF] + [("timm", n) for n in TIMM]
ALL = [*SAMPLE, *(pytest.param(*entry, marks=pytest.mark.slow) for entry in SLOW)]


def everything():
    """All models of the zoo but the sample: those of the libraries that are here."""
    here = [source for source in SOURCES if importlib.util.find_spec(SOURCES[source])]
    names = [(e.source, e.name) for e in zoo.entries(here)]
    return [pytest.param(*name, marks=pytest.mark.zoo) for name in names if name not in [*SAMPLE, *SLOW]]


MODES = [(*model, "as built") for model in [*SAMPLE, *SLOW]] + [("misc", name, "the other") for name in MISC]


@pytest.fixture(scope="module")
def rows():
    """What `study` finds, once for each model."""
    return {}


def entry(source, name):
    if source in SOURCES:
        pytest.importorskip(SOURCES[source])
    return next(e for e in zoo.entries((source,)) if e.name == name)


def studied(rows, source, name):
    if name not in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the models' own
            rows[name] = study(entry(source, name), meta=False, max_parameters=60_000_000)
    return rows[name]


@pytest.mark.parametrize(("source", "name"), [*ALL, *everything()])
def test_reach_and_exactness(rows, source, name):
    row = studied(rows, source, name)
    asks_for_data = name == "data_dependent" or zoo.needs_data(name)  # then it is traced in parts
    assert row["whole"] == (not asks_for_data), row["leaves"]
    assert (row["regions"] == 0) == row["whole"]
    assert row["share"] >= 0.95, row["unreached"]
    assert row["share"] == pytest.approx(row["in_graph"] + row["in_regions"])
    assert row["factorizable"] <= row["parameters"]
    # hardcorenas_b in float32 is itself 2e-6 away from its float64 self, and a pair's two products round twice.
    assert row["float32"] <= (2e-5 if name == "hardcorenas_b" else 1e-5)
    if row.get("float64") is None:  # grouped products have no double precision
        assert name == "mixtral", row
    else:
        assert row["float64"] <= 1e-12
    if "note_train" in row:
        assert "rcnn" in name, row["note_train"]  # detectors need targets
    elif "float64_train" in row:
        assert row["float64_train"] <= 1e-12
        assert row["gradients"] <= 1e-10
    if row["factorized"]:
        assert row["parameters_after"] < row["parameters"]
        assert row["macs_after"] <= row["macs"]


def test_the_summary(rows):
    found = [studied(rows, "misc", "wave"), studied(rows, "misc", "data_dependent")]
    got = summary([*found, {"source": "misc", "name": "broken", "error": "RuntimeError: no"}])
    assert (got["models"], got["errors"], got["whole"]) == (3, ["broken"], 1)
    assert got["share_mean"] == pytest.approx((found[0]["share"] + found[1]["share"]) / 2)
    assert got["share_least"] == min(r["share"] for r in found)
    assert got["below_95"] == [r["name"] for r in found if r["share"] < 0.95]
    assert got["worst"]["float64"] == max(r["float64"] for r in found)
    assert got["checked"] == dict.fromkeys(("float32", "float64", "float64_train", "gradients"), 2)


# -- nothing is left behind


def inventory(model):
    """Everything a trace could leave in a model: state, attributes of all modules, hooks, modes, caches in containers."""

    def shown(value, depth=0):
        if isinstance(value, torch.Tensor):
            return (id(value), value.dtype, tuple(value.shape), value.requires_grad, value._version)
        if isinstance(value, dict) and depth < 4:
            return {str(k): shown(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple, set)) and depth < 4:
            return [shown(v, depth + 1) for v in value]
        if isinstance(value, (int, float, str, bool, type(None), torch.dtype, torch.device)):
            return value
        return id(value)

    return {path: shown(vars(module)) for path, module in model.named_modules()}


def versionless(tree):
    """Buffers that a forward updates are put back, which counts as a write."""
    return pytree.tree_map_only(tuple, lambda t: t[:-1], tree, is_leaf=lambda t: isinstance(t, tuple))


@pytest.mark.parametrize(("source", "name", "mode"), MODES)
def test_a_trace_leaves_nothing_behind(source, name, mode):
    one = entry(source, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, example = one.build(), one.example()
        model.train(model.training is (mode == "as built"))
        before, state = inventory(model), {k: v.clone() for k, v in model.state_dict().items()}
        random = torch.get_rng_state()
        inputs = pytree.tree_map_only(torch.Tensor, torch.clone, example)
        fxrank.trace(model, example)
    assert versionless(inventory(model)) == versionless(before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(_tensors(inputs), _tensors(example), strict=True))
    assert all(p.grad is None for p in model.parameters())


def _tensors(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# -- trained through the switch, and reloaded


@pytest.mark.parametrize(("source", "name"), [m for m in SAMPLE if m[0] != "timm"])
def test_a_session_goes_through_the_switch_and_the_result_reloads(source, name, tmp_path):
    one = entry(source, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the models' own
        model, example = one.build().train(), one.example()
        args, kwargs = call_arguments(model, example)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        policy = fxrank.Pufferfish(E=1, K=0, ratio=0.25)
        before = sum(p.numel() for p in model.parameters())
        session = fxrank.LowRankSession.attach(
            model, optimizer, example_inputs=example, total_steps=3, steps_per_epoch=1, policy=policy
        )
        for _ in range(3):
            optimizer.zero_grad()
            outputs = [o for o in tensors_in(model(*args, **kwargs)) if o.is_floating_point() and o.requires_grad]
            sum(o.square().mean() for o in outputs).backward()
            optimizer.step()
        plan = session.finish()
        assert plan.R
        assert sum(p.numel() for p in model.parameters()) < before
        factors = {n: p for n, p in model.named_parameters() if n.endswith((".u.weight", ".v.weight"))}
        assert all(p.grad is not None for p in factors.values())
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held >= {id(p) for p in factors.values()}
        fxrank.save(model, tmp_path)
        loaded = fxrank.load(one.build(), tmp_path)
        with torch.no_grad():
            expected, found = model.eval()(*args, **kwargs), loaded.eval()(*args, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(expected), tensors_in(found), strict=True))


# -- layers of other libraries


def full(model, example):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no smaller than the layers, as it must be here
        return fxrank.factorize(model, example, rank=1.0, include="*")


def test_conv1d_of_transformers():
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(nn.Linear(6, 8), utils.Conv1D(24, 8), nn.Linear(24, 3)).double()
    x = torch.randn(2, 5, 6).double()
    small = full(model, x)
    assert type(small[1]) is utils.Conv1D and isinstance(small[1].weight, LowRankWeight)
    assert output_difference(model, small, x) <= 1e-12
    cut = fxrank.factorize(model, x, rank={"1.weight": 3})
    sigma = torch.linalg.svdvals(model[1].weight.detach())
    error = torch.linalg.matrix_norm(model[1].weight.detach() - cut[1].weight.weight.detach(), 2)
    assert error.item() == pytest.approx(sigma[3].item(), rel=1e-10)
    assert set(fxrank.merge(small).state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("name", ["Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
@settings(max_examples=5)
@given(stride=st.integers(1, 3), kernel=st.integers(1, 4), groups=st.integers(1, 2), size=st.integers(4, 9))
def test_convolutions_of_timm(name, stride, kernel, groups, size):
    layers = pytest.importorskip("timm.layers")
    options = {"stride": stride, "groups": groups}
    if name in ("Conv2dSame", "StdConv2d", "ScaledStdConv2d"):
        options["padding"] = 0 if name == "Conv2dSame" else kernel // 2
    model = nn.Sequential(nn.Conv2d(4, 4, 1), getattr(layers, name)(4, 6, kernel, **options), nn.Conv2d(6, 2, 1))
    model = model.double().eval()
    x = torch.randn(2, 4, size, size).double()
    small = full(model, x)
    if name == "Conv2dSame" and groups > 1:  # a forward of its own, and groups in it: no pair
        assert (
            list(pairs_in(small)) == ["0", "2"]
            and {d.name: d for d in fxrank.plan_of(small).layers}["1.weight"].rank is None
        )
    else:
        assert len(pairs_in(small)) == 3
    assert output_difference(model, small, x) <= 1e-12
    assert output_difference(model, fxrank.merge(small), x) <= 1e-12


# -- weights that two layers share


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20)
        self.out.weight = self.embed.weight
        self.double()

    def forward(self, tokens):
        return self.out(torch.tanh(self.inner(self.embed(tokens))))


def test_a_tied_decoder_shares_the_factors(tmp_path):
    model, tokens = Tied(), torch.randint(0, 20, (2, 5))
    default = fxrank.factorize(model, tokens, rank={"inner": 2})
    assert default.out.weight is default.embed.weight
    cut = fxrank.factorize(model, tokens, rank={"embed": 3})
    assert isinstance(cut.embed, LowRankEmbedding)
    assert cut.out.u.weight is cut.embed.u.weight and cut.out.v.weight is cut.embed.v.weight
    assert cut.out.bias is not None and cut.embed.bias is None
    assert sum(p.numel() for p in cut.parameters()) == 3 * 26 + 42 + 20
    error = pair_error(model.embed, cut.embed)
    assert error.spectral == pytest.approx(error.bound, rel=1e-9)
    small = full(model, tokens)
    assert output_difference(model, small, tokens) <= 1e-12
    back = fxrank.merge(small)
    assert back.out.weight is back.embed.weight
    assert output_difference(model, back, tokens) <= 1e-12
    fxrank.save(cut, tmp_path)
    loaded = fxrank.load(Tied(), tmp_path)
    assert loaded.out.u.weight is loaded.embed.u.weight
    assert torch.equal(cut(tokens), loaded(tokens))


# -- models of transformers stay what they are


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def factorized(name, **options):
    model, example = zoo.hf_model(name), zoo.HF[name][3]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, fxrank.factorize(model, example, **options), example


@pytest.mark.parametrize("name", HF)
def test_class_and_config_are_unchanged(transformers, name):
    model, small, example = factorized(name, rank=0.25)
    assert type(small) is type(model)
    assert small.config.to_dict() == model.config.to_dict()
    assert small.config is not model.config
    assert any(isinstance(m, FactorPair) for m in small.modules())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not small.training
    with torch.no_grad():
        out, found = model(**example), small(**example)
        assert type(out) is type(found) and list(out) == list(found)
        assert largest_difference(out[0], fxrank.merge(small)(**example)[0]) > 0  # it is another model now
        assert largest_difference(found[0], fxrank.merge(small)(**example)[0]) <= 1e-5
    assert list(fxrank.merge(small).state_dict().keys() ^ model.state_dict().keys()) == []


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5"])
def test_generation(transformers, name):
    """With a cache, and equal to the merged model's."""
    model, small, _ = factorized(name, rank=0.5)
    tokens = torch.randint(3, 99, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "decoder_start_token_id": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = small.generate(tokens, **options)
        assert torch.equal(text, fxrank.merge(small).generate(tokens, **options))
        _, whole, _ = factorized(name, rank=1.0, include="*")
        whole.load_state_dict(fxrank.factorize(model, zoo.HF[name][3](), rank=1.0, include="*").state_dict())
        assert torch.equal(model.generate(tokens, **options), whole.generate(tokens, **options))
    assert text.shape[0] == 2 and text.shape[1] > 1


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 has no grouped product on a CPU")
@pytest.mark.parametrize("rank", [3, 6])
def test_experts_of_any_rank(transformers, rank):
    """The grouped kernel wants aligned memory; a rank that is not must work as well."""
    model, example = zoo.hf_model("mixtral"), zoo.HF["mixtral"][3]()
    names = [n for n, p in model.named_parameters() if p.ndim == 3]
    small = fxrank.factorize(model, example, rank=dict.fromkeys(names, rank))
    assert sum(isinstance(m, LowRankWeight) for m in small.modules()) == len(names)
    with torch.no_grad():
        assert largest_difference(fxrank.merge(small)(**example)[0], small(**example)[0]) <= 1e-5
    out = small(**example)[0]
    out.sum().backward()
    pair = small.get_submodule(names[0])
    assert pair.u.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_save_pretrained(transformers, name, tmp_path):
    _, small, example = factorized(name, rank=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small.save_pretrained(tmp_path)
    stored = importlib.import_module("safetensors.torch").load_file(str(tmp_path / "model.safetensors"))
    own = small.state_dict()
    assert stored and all(torch.equal(v, own[k]) for k, v in stored.items())
    keyed = {k for k in own if k.endswith((".u.weight", ".v.weight"))}
    assert keyed <= set(stored)
    fresh = fxrank.factorize(zoo.hf_model(name), example, rank=fxrank.plan_of(small))
    missing = fresh.load_state_dict(stored, strict=False)
    assert not missing.unexpected_keys
    fresh.tie_weights()
    with torch.no_grad():
        assert largest_difference(small(**example)[0], fresh(**example)[0]) == 0
    fxrank.save(small, tmp_path / "fx")
    loaded = fxrank.load(zoo.hf_model(name), tmp_path / "fx")
    with torch.no_grad():
        assert largest_difference(small(**example)[0], loaded(**example)[0]) == 0


def test_every_name_is_found_once():
    """Names are addresses: `--name` takes them."""
    names = [e.name for e in zoo.entries(("misc", "hf"))]
    assert len(names) == len(set(names))
    assert [e.source for e in zoo.named("functional")] == ["misc"]
