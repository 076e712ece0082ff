"""Every kind of layer: exact at full rank, best when truncated, and what is named as out of reach, with the reason."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from exact import full, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.linear import BlockLinear, LowRankFusedLinear
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.pairs.registry import make_pair, pair_class
from fxrank.passes.tracing.compare import largest_difference

# float64: sums of some hundred products of order 1.
ROUNDING = 1e-12


def pairs(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, FactorPair)}


def reasons(model):
    return {d.name: d.reason for d in fxrank.plan_of(model).layers if not d.factorized}


def outputs_and_gradients(model, x):
    x = x.clone().requires_grad_(x.is_floating_point())
    out = model(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out, x.grad


def same(dense, small, x, tolerance=ROUNDING):
    (out, grad), (found, found_grad) = outputs_and_gradients(dense, x), outputs_and_gradients(small, x)
    assert largest_difference(out, found) <= tolerance
    if grad is not None:
        assert largest_difference(grad, found_grad) <= tolerance


def is_best(dense, pair):
    """Eckart-Young: no matrix of this rank is nearer."""
    error = pair_error(dense, pair)
    assert error.spectral == pytest.approx(error.bound, rel=1e-9, abs=1e-12)
    assert error.relative == pytest.approx(error.relative_bound, rel=1e-9, abs=1e-12)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSES = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@st.composite
def convolutions(draw, dims, transposed):
    """Any geometry, and an input that fits."""

    def each(low, high):
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        options["padding"] = tuple(min(p, d * (k - 1)) for p, d, k in zip(each(0, 2), dilation, kernel, strict=True))
        limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(min(o, most) for o, most in zip(each(0, 2), limits, strict=True))
    else:
        options["padding"] = draw(st.sampled_from(["same", "valid", each(0, 2)]))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "zeros", "circular", "replicate", "reflect"]))
        if options["padding"] == "same":
            options["stride"] = 1
    kind = (TRANSPOSES if transposed else CONVOLUTIONS)[dims]
    layer = kind(inputs, outputs, kernel, **options, dtype=torch.float64)
    size = 4 if transposed else 6
    lead = draw(st.sampled_from([(), (1,), (2,)]))
    return layer, randn(*lead, inputs, *[size] * dims), draw(st.floats(0, 1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@settings(max_examples=20)
@given(data=st.data())
def test_convolutions_of_any_geometry(dims, transposed, data):
    layer, x, part = data.draw(convolutions(dims, transposed))
    if transposed and x.ndim == dims + 2 and all(map(int.__lt__, layer.output_padding, layer.stride)):
        sizes = layer(x).shape[2:]
        assert make_pair(layer, 1)(x, list(sizes)).shape == layer(x, list(sizes)).shape
    most = pair_class(layer).full_rank_of(layer)
    pair = make_pair(layer, most)
    same(layer, pair, x)
    assert largest_difference(layer.weight, pair.weight + 0) <= ROUNDING
    is_best(layer, make_pair(layer, 1 + int(part * (most - 1))))
    back = pair.dense_layer()
    assert type(back) is type(layer) and repr(back) == repr(layer)
    same(layer, back, x)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kinds", [CONVOLUTIONS, TRANSPOSES], ids=["convolution", "transposed"])
def test_convolutions_in_a_model(kinds, dims):
    kind = kinds[dims]
    model = nn.Sequential(kind(4, 6, 3, 2, 1), nn.ReLU(), kind(6, 4, 2, groups=2)).double()
    x = randn(2, 4, *[5] * dims)
    small = full(model, x)
    assert list(pairs(small)) == ["0", "2"]
    same(model, small, x)
    same(small, fxrank.merge(small), x)
    cut = fxrank.factorize(model, x, rank={"0": 2})
    is_best(model[0], cut[0])
    counts = {d.name: d for d in fxrank.plan_of(cut).layers}
    assert counts["0"].pair_parameters == sum(p.numel() for n, p in cut[0].named_parameters() if "bias" not in n)
    # As many products in u and v as planned: counted from the pair's own layers and the sizes that pass through.
    sizes = []
    for layer in (cut[0].u, cut[0].v):
        layer.register_forward_hook(lambda m, a, out: sizes.append((m, a[0], out)))
    cut(x)
    macs = sum(m.weight.numel() * (a if "Transpose" in type(m).__name__ else out)[:, :1].numel() for m, a, out in sizes)
    assert counts["0"].pair_macs == macs


@settings(max_examples=20)
@given(rows=st.integers(1, 12), width=st.integers(1, 6), pad=st.booleans(), part=st.floats(0, 1))
def test_embeddings(rows, width, pad, part):
    layer = nn.Embedding(rows, width, padding_idx=rows - 1 if pad else None, dtype=torch.float64)
    tokens = torch.randint(0, rows, (2, 5))
    most = min(rows, width)
    pair = make_pair(layer, most)
    same(layer, pair, tokens)
    assert largest_difference(layer.weight, pair.weight + 0) <= ROUNDING
    is_best(layer, make_pair(layer, 1 + int(part * (most - 1))))
    back = pair.dense_layer()
    assert repr(back) == repr(layer) and back.padding_idx == layer.padding_idx


@pytest.mark.parametrize("options", [{"padding_idx": 1}, {"padding_idx": -1}])
@pytest.mark.parametrize("way", ["module", "function"])
def test_the_gradients_of_an_embedding_follow_its_options(options, way):
    """What the dense table's gradient `G` gives the factors: `U` gets `Vᵀ G`, `V` gets `G Uᵀ`."""
    layer = nn.Embedding(5, 4, dtype=torch.float64, **options)
    nn.init.normal_(layer.weight)  # the padding row too
    pair, tokens = make_pair(layer, 4), torch.tensor([[0, 1, 1], [2, 4, 2]])
    layer(tokens).square().sum().backward()
    found = pair(tokens) if way == "module" else F.embedding(tokens, pair.weight, **options)
    found.square().sum().backward()
    u, v, gradient = pair.u.weight, pair.v.weight, layer.weight.grad
    assert largest_difference(gradient @ u.T, v.grad) <= 10 * ROUNDING
    assert largest_difference(v.T @ gradient, u.grad) <= 10 * ROUNDING


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_an_embedding_with_options_of_its_rows_is_named(options):
    model = nn.Sequential(nn.Embedding(20, 6, **options), nn.Linear(6, 6), nn.Linear(6, 6))
    small = full(model, torch.randint(0, 20, (2, 5)))
    assert type(small[0]) is nn.Embedding
    assert "Embedding has no factor pair with max_norm or scale_grad_by_freq" in reasons(small)["0"]


@settings(max_examples=20)
@given(width=st.integers(1, 5), inputs=st.integers(1, 6), bias=st.booleans(), part=st.floats(0, 1))
def test_fused_projections_in_three(width, inputs, bias, part):
    layer = nn.Linear(inputs, 3 * width, bias=bias, dtype=torch.float64)
    most = min(width, inputs)
    pair = make_pair(layer, most, form="qkv")
    assert isinstance(pair, LowRankFusedLinear) and isinstance(pair.v, BlockLinear)
    x = randn(2, 3, inputs)
    same(layer, pair, x)
    same(layer, pair.dense_layer(), x)
    assert largest_difference(F.linear(x, layer.weight[:width]), F.linear(x, pair.weight[:width])) <= ROUNDING
    rank = 1 + int(part * (most - 1))
    cut = make_pair(layer, rank, form="qkv")
    is_best(layer, cut)
    assert cut.u.weight.numel() + cut.v.weight.numel() == 3 * rank * inputs + rank * 3 * width


class Raw(nn.Module):
    """A parameter, and how it is used."""

    def __init__(self, shape, use):
        super().__init__()
        self.inp, self.w, self.out = nn.Linear(6, 6), nn.Parameter(torch.randn(shape)), nn.Linear(6, 6)
        self.use = use
        self.double()

    def forward(self, x):
        return self.out(self.use(torch.tanh(self.inp(x)), self.w))


RAW = {
    "linear": ((6, 6), lambda x, w: F.linear(x, w, torch.ones(6).to(x))),
    "@": ((6, 6), lambda x, w: x @ w),
    "left @": ((6, 6), lambda x, w: (w @ x.mT).mT),
    "transposed": ((6, 6), lambda x, w: x @ w.t()),
    "matmul by name": ((6, 6), lambda x, w: torch.matmul(input=x, other=w)),
    "addmm": ((6, 6), lambda x, w: torch.addmm(x.sum(0), x, w)),
    "bmm": ((3, 6, 6), lambda x, w: torch.bmm(x.expand(3, *x.shape), w).mean(0)),
    "stack by index": ((3, 6, 6), lambda x, w: x @ w[0] + x @ w[2]),
    "stack by loop": ((3, 6, 6), lambda x, w: sum(F.linear(x, one) for one in w)),
    "einsum": ((6, 6), lambda x, w: torch.einsum("bi,io->bo", x, w)),
    "einsum of experts": ((3, 6, 6), lambda x, w: torch.einsum("bi,eoi->bo", x, w)),
    "halves": ((12, 6), lambda x, w: sum(F.linear(x, half) for half in w.chunk(2))),
    "slices": ((12, 6), lambda x, w: F.linear(x, w[:6]) * F.linear(x, w[6:])),
    "conv1d": ((6, 6, 3), lambda x, w: F.conv1d(x.unsqueeze(-1), w, padding=1).squeeze(-1)),
    "conv1d to one channel": ((1, 6, 3), lambda x, w: x + F.conv1d(x.unsqueeze(-1), w, padding=1).squeeze(-1)),
    "conv2d": ((6, 6, 3, 1), lambda x, w: F.conv2d(x[..., None, None], w, padding=(1, 0)).flatten(1)),
    "weight as a vector's matrix": ((3, 6, 6), lambda x, w: x + (w @ x.sum(0)).sum(0)),
    "cast": ((6, 6), lambda x, w: F.linear(x, w.to(x.dtype).type_as(x))),
    "to float": ((6, 6), lambda x, w: F.linear(x.float(), w.float()).to(x.dtype)),
    "to float by dtype": ((6, 6), lambda x, w: F.linear(x.float(), w.to(torch.float32)).to(x.dtype)),
    "over its norm": ((6, 6), lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True))),
    "and its norm": ((6, 6), lambda x, w: F.linear(x, w) + (0 if w.shape[0] else w.norm())),
    "cast to the weight": ((6, 6), lambda x, w: F.linear(x.type_as(w), w)),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_parameters(name):
    shape, use = RAW[name]
    model, x = Raw(shape, use), randn(4, 6)
    small = full(model, x)
    assert isinstance(small.w, LowRankWeight) or reasons(small)["w"]
    tolerance = 1e-5 if name.startswith("to ") else ROUNDING
    same(model, small, x, tolerance)
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    if isinstance(small.w, LowRankWeight):
        cut = full(model, x, rank={"w": 0.4})
        same(cut, fxrank.merge(cut), x, tolerance)
        for a, b in ((small, fxrank.merge(small)), (model, fxrank.merge(small)), (model, copy.deepcopy(small))):
            same(a, b, x, tolerance)
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in small.w.parameters())


class Own(nn.Linear):
    """A forward of its own."""

    def forward(self, input):
        return 2 * F.linear(input, self.weight, self.bias).tanh()


class Inherited(nn.Linear):
    pass


@pytest.mark.parametrize("kind", [Own, Inherited])
def test_subclasses_of_linear(kind):
    model, x = nn.Sequential(nn.Linear(6, 8), kind(8, 8), nn.Linear(8, 3)).double(), randn(2, 6)
    small = full(model, x)
    assert (type(small[1]) is Own) == (kind is Own)
    assert len(pairs(small)) == 3
    same(model, small, x)
    assert set(fxrank.merge(small).state_dict()) == set(model.state_dict())
    same(model, fxrank.merge(small), x)


NORMS = {
    "weight_norm": (torch.nn.utils.weight_norm, {}),
    "weight_norm of columns": (torch.nn.utils.weight_norm, {"dim": 1}),
    "new weight_norm": (parametrizations.weight_norm, {}),
}
KEEPING = {
    "spectral_norm": (torch.nn.utils.spectral_norm, {}),
    "new spectral_norm": (parametrizations.spectral_norm, {}),
    "new orthogonal": (parametrizations.orthogonal, {}),
}
"""What these make true of a weight does not stay true of its factors."""


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(6, 6, 3, padding=1)], ids=["fc", "conv"])
@pytest.mark.parametrize("name", NORMS | KEEPING)
def test_derived_weights(name, layer):
    norm, options = (NORMS | KEEPING)[name]
    dense = layer()
    first, last = copy.deepcopy(dense), copy.deepcopy(dense)
    model = nn.Sequential(first, norm(dense, **options), last).double().eval()
    x = randn(2, 6) if isinstance(dense, nn.Linear) else randn(2, 6, 4, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # A plan of fxrank 0.1 may name layers that are left dense by now: it is followed.
    plain = nn.Sequential(*[layer() for _ in range(3)]).double()
    small = full(model, x, rank=fxrank.plan_of(full(plain, x)))
    assert list(pairs(small)) == ["0", "1", "2"]
    same(model, small, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(small[1].state_dict()) == {"u.weight", "v.weight", "v.bias"}
    back = fxrank.merge(small)
    assert set(back[1].state_dict()) == {"weight", "bias"}
    same(model, back, x)
    cut = fxrank.factorize(model, x, rank=fxrank.plan_of(fxrank.factorize(plain, x, rank={"1": 2})))
    is_best(model[1], cut[1])
    decided = full(model, x)
    assert list(pairs(decided)) == (["0", "1", "2"] if name in NORMS else ["0", "2"])
    assert name in NORMS or "has no factor pair that keeps what" in reasons(decided)["1"]
    same(model, decided, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights(dtype):
    # Two roundings to 8 (or 11) bits of mantissa, in sums of 8 products.
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Conv1d(3, 4, 3), nn.Linear(6, 3)).to(dtype), randn(2, 3, 6).to(dtype)
    small = full(model, x)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(x).dtype is dtype
    assert largest_difference(model(x), small(x)) <= tolerance
    assert {p.dtype for p in fxrank.merge(small).parameters()} == {dtype}


def test_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 6))
        lstm, x, sequence = nn.Sequential(nn.LSTM(6, 8)), torch.randn(2, 3, 8, 8), torch.randn(4, 2, 6)
    small = fxrank.factorize(model, x, rank=2, include="*")
    assert all(p.is_meta for p in small.parameters())
    weights = 2 * (8 + 27) + 2 * (8 + 72) + 2 * (6 + 128)
    assert sum(p.numel() for p in small.parameters()) == weights + 8 + 8 + 6
    assert small(x).shape == (2, 6)
    gates = fxrank.factorize(lstm, sequence, rank=2, include="*")
    assert sum(p.numel() for p in gates.parameters()) == 4 * 2 * (6 + 8 + 8 + 8) + 64


def test_frozen_weights_stay_frozen():
    model = nn.Sequential(nn.Linear(6, 8), nn.Conv1d(3, 4, 3), nn.Linear(6, 3))
    model[1].weight.requires_grad_(False)
    model[2].requires_grad_(False)
    small = full(model, torch.randn(2, 3, 6))
    frozen = {n for n, p in small.named_parameters() if not p.requires_grad}
    assert frozen == {"1.u.weight", "1.v.weight", "2.u.weight", "2.v.weight", "2.v.bias"}
    back = fxrank.merge(small)
    assert {n for n, p in back.named_parameters() if not p.requires_grad} == {"1.weight", "2.weight", "2.bias"}


class Odd(nn.Module):
    """A layer with numbers of another kind between ordinary ones."""

    def __init__(self, weight, use):
        super().__init__()
        self.inp, self.out, self.use = nn.Linear(6, 6), nn.Linear(6, 6), use
        self.odd = nn.Linear(6, 6, bias=False)
        self.odd.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return self.out(self.use(self.odd, self.inp(x)))


ODD = {
    "integer": (torch.ones(6, 6, dtype=torch.int32), lambda m, x: m(x.to(torch.int32)).float(), "its weight is int32"),
    "complex": (torch.eye(6, dtype=torch.complex64), lambda m, x: m(x.to(torch.complex64)).real, "complex64"),
}


@pytest.mark.parametrize("name", ODD)
def test_other_numbers_are_named_with_a_reason(name):
    weight, use, reason = ODD[name]
    model, x = Odd(weight, use), torch.randn(2, 6)
    small = full(model, x)
    assert list(pairs(small)) == ["inp", "out"]
    assert reason in reasons(small)["odd"]
    assert largest_difference(model(x), small(x)) <= 1e-5
    with pytest.raises(ValueError, match="layer 'odd' cannot be factorized: "):
        fxrank.factorize(model, x, rank={"odd": 2})


def test_sparse_weights_are_named_with_a_reason():
    """torch cannot copy such a parameter, so it is only looked at."""
    model = Odd(torch.eye(6).to_sparse(), lambda m, x: torch.sparse.mm(m.weight, x.t()).t())
    found = {a.name: a for a in discover(fxrank.trace(model, torch.randn(2, 6)), model)}
    assert found["odd"].reason is not None and "sparse" in found["odd"].reason
    assert found["inp"].reason is found["out"].reason is None


def test_a_quantized_layer_is_named_with_a_reason():
    quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantized layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(6, 8), quantized.Linear(8, 8), nn.Linear(8, 3))
        small = full(model, torch.randn(2, 6))
        assert list(pairs(small)) == ["0", "2"]
        assert reasons(small)["1"] == "its weight is quantized; factorize before quantizing"
