"""`nn.MultiheadAttention` and torch's Transformers with factor pairs inside, against the originals."""

import copy
import io

import pytest
import torch
from exact import full, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxrank
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.pairs.reading.products import FactoredWeight
from fxrank.passes.tracing.compare import largest_difference

# float64: sums of some hundred products of order 1.
ROUNDING = 1e-12
WIDTH, HEADS = 8, 2


class Around(nn.Module):
    """One attention layer, called as it is."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.5)  # biases start at zero

    def forward(self, query, key, value, **options):
        return self.attention(query, key, value, **options)


def count(model):
    return sum(p.numel() for p in model.parameters())


def outputs_and_gradients(model, inputs, **options):
    """Outputs, and gradients of the inputs and of the parameters that both models have."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    model.zero_grad()
    out = model(*inputs, **options)
    tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors).backward()
    own = {n.replace(".v.bias", ".bias"): p.grad for n, p in model.named_parameters()}
    return out, [x.grad for x in inputs], own


def same(model, small, inputs, **options):
    (out, to_inputs, own), (found, to_found, own_found) = (
        outputs_and_gradients(m, inputs, **options) for m in (model, small)
    )
    common = own.keys() & own_found.keys()  # biases and norms
    assert largest_difference(out, found) <= ROUNDING
    # Relative to the largest of all inputs: with one key alone, that of the query is zero but for rounding.
    largest = max(float(t.abs().max()) for t in to_inputs)
    assert all(float((a - b).abs().max()) <= 10 * ROUNDING * largest for a, b in zip(to_inputs, to_found, strict=True))
    # Relative to the largest: that of a key's bias is zero but for rounding.
    largest = max(float(own[name].abs().max()) for name in own)
    assert all(float((own[name] - own_found[name]).abs().max()) <= 10 * ROUNDING * largest for name in common)
    with torch.no_grad():  # torch's fused path is open now
        assert largest_difference(out, model(*inputs, **options)) <= ROUNDING
        assert largest_difference(out, small(*inputs, **options)) <= ROUNDING


@st.composite
def masks(draw, batch, target, source):
    """Options of one call: each query has a key that it may see."""
    options = {}
    kind = draw(st.sampled_from(["none", "bool", "float", "causal"]))
    shape = (target, source) if draw(st.booleans()) else (max(batch, 1) * HEADS, target, source)
    if kind == "bool":
        options["attn_mask"] = (torch.rand(shape) < 0.4) & (torch.arange(source) > 0)
    elif kind == "float":
        options["attn_mask"] = randn(*shape)
    elif kind == "causal":
        options["attn_mask"] = torch.ones(target, source).triu(1).bool()
        options["is_causal"] = True
    if draw(st.booleans()):
        padding = (torch.rand(max(batch, 1), source) < 0.4) & (torch.arange(source) > 0)
        padding = padding if batch else padding[0]
        # torch wants both masks of one kind
        options["key_padding_mask"] = randn(*padding.shape) if kind == "float" else padding
    options["need_weights"] = draw(st.booleans())
    options["average_attn_weights"] = draw(st.booleans())
    return options


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_full_rank_attention_is_the_original(data, seed):
    torch.manual_seed(seed)
    flags = {n: data.draw(st.booleans(), n) for n in ("batch_first", "bias", "add_bias_kv", "add_zero_attn")}
    widths = {n: data.draw(st.sampled_from([None, 3, 5, 8]), n) for n in ("kdim", "vdim")}
    packed = all(w in (None, WIDTH) for w in widths.values())
    model = Around(**flags, **widths)
    model.train(data.draw(st.booleans(), "train"))
    batch = data.draw(st.sampled_from([0, 1, 2, 3]), "batch")  # 0: a single sequence without a batch dimension
    target = data.draw(st.integers(1, 4), "length")
    relation = data.draw(st.sampled_from(["self", "memory", "three"] if packed else ["three"]), "inputs")
    source = target if relation == "self" else data.draw(st.integers(1, 4), "keys")

    def sequence(length, width):
        lead = () if not batch else (batch,)
        return randn(*lead, length, width) if flags["batch_first"] or not batch else randn(length, batch, width)

    query = sequence(target, WIDTH)
    if relation == "self":
        inputs = [query] * 3
    else:
        key = sequence(source, widths["kdim"] or WIDTH)
        inputs = [query, key, key if relation == "memory" else sequence(source, widths["vdim"] or WIDTH)]
    options = data.draw(masks(batch, target, source), "masks")
    small = full(model, inputs)
    kinds = {type(m) for m in small.modules()}
    assert {LowRankWeight, LowRankLinear} <= kinds
    names = ["in_proj"] if packed else ["q_proj", "k_proj", "v_proj"]
    assert all(isinstance(getattr(small.attention, f"{n}_weight"), LowRankWeight) for n in names)
    if relation == "self":  # one tensor in three places, as modules call it
        same(Self(model), Self(small), inputs[:1], **options)
    elif relation == "memory":
        same(Memory(model), Memory(small), inputs[:2], **options)
    else:
        same(model, small, inputs, **options)


class Self(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.training = inner, inner.training

    def forward(self, x, **options):
        return self.inner(x, x, x, **options)


class Memory(Self):
    def forward(self, x, memory, **options):
        return self.inner(x, memory, memory, **options)


def test_dropout_drops_the_same_weights():
    model = Around(dropout=0.5, batch_first=True)
    x = randn(2, 5, WIDTH)
    small = full(model, (x, x, x))
    found = []
    for net in (model, small):
        torch.manual_seed(3)
        found.append(net(x, x, x, need_weights=True))
    assert largest_difference(*found) <= ROUNDING
    assert largest_difference(model.eval()(x, x, x), found[0]) > 0.01
    assert largest_difference(model(x, x, x), small.eval()(x, x, x)) <= ROUNDING


def test_the_dense_matrix_is_not_built(monkeypatch):
    model = Around()
    x, y = randn(4, 2, WIDTH), randn(3, 2, WIDTH)
    small = full(model, (x, x, x))
    small.eval()

    def forbidden(self):
        raise AssertionError("the dense product was built")

    monkeypatch.setattr(FactoredWeight, "dense", forbidden)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            small(x, x, x)
            small(x, y, y, need_weights=False)


def test_static_keys_are_refused():
    model = full(Around(), (randn(3, 1, WIDTH),) * 3).attention
    x = randn(3, 1, WIDTH)
    arguments = (x, x, x, WIDTH, HEADS, model.in_proj_weight, model.in_proj_bias, None, None, False, 0.0)
    with pytest.raises(NotImplementedError, match="takes no static_k or static_v; call it without them, or merge it"):
        nn.functional.multi_head_attention_forward(
            *arguments, model.out_proj.weight, model.out_proj.bias, static_k=randn(2, 3, 4), static_v=randn(2, 3, 4)
        )


# -- the Transformers of torch


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 12, dropout=0.0, dtype=torch.float64, **options)


def decoder_layer(**options):
    return nn.TransformerDecoderLayer(WIDTH, HEADS, 12, dropout=0.0, dtype=torch.float64, **options)


TRANSFORMERS = {
    "encoder layer": (lambda **o: encoder_layer(**o), 1),
    "gelu": (lambda **o: encoder_layer(activation="gelu", bias=False, **o), 1),
    "encoder": (lambda **o: nn.TransformerEncoder(encoder_layer(**o), 2, enable_nested_tensor=o["batch_first"]), 1),
    "decoder layer": (lambda **o: decoder_layer(**o), 2),
    "decoder": (lambda **o: nn.TransformerDecoder(decoder_layer(**o), 2), 2),
    "transformer": (lambda **o: nn.Transformer(WIDTH, HEADS, 1, 1, 12, dropout=0.0, dtype=torch.float64, **o), 2),
}


def shake(model):
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    return model


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, norm_first, mode):
    build, inputs = TRANSFORMERS[name]
    model = shake(build(norm_first=norm_first, batch_first=True)).train(mode == "train")
    xs = [randn(2, 5, WIDTH), randn(2, 4, WIDTH)][:inputs]
    small = full(model, tuple(xs))
    assert sum(isinstance(m, LowRankWeight) for m in small.modules()) == sum(
        isinstance(m, nn.MultiheadAttention) for m in model.modules()
    )
    same(model, small, xs)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    if name.startswith("encoder"):
        for net in (model, small):  # torch zeroes padded places on its nested path: compare the others
            with torch.no_grad():
                net.out = net(xs[0], src_key_padding_mask=padding).masked_fill(padding.unsqueeze(-1), 0)
        assert largest_difference(model.out, small.out) <= ROUNDING
        causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
        option = {"mask" if name == "encoder" else "src_mask": causal, "is_causal": True}
        same(model, small, xs, **option)
    elif name == "transformer":
        causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
        same(model, small, xs, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("dense", ["layers.0.*", "layers.1.*", "*linear*", "*self_attn*", "*in_proj*", "*out_proj*"])
def test_a_half_factorized_encoder_keeps_off_the_fused_path(dense):
    """The encoder asks its first layer only whether the fused path is open for all of them."""
    model = shake(nn.TransformerEncoder(encoder_layer(batch_first=True), 2)).eval()
    x = randn(3, 5, WIDTH)
    small = full(model, x, exclude=dense)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    with torch.no_grad():
        for options in ({}, {"src_key_padding_mask": padding}):
            expected, found = model(x, **options), small(x, **options)
            if options:
                expected, found = (t.masked_fill(padding.unsqueeze(-1), 0) for t in (expected, found))
            assert largest_difference(expected, found) <= ROUNDING


# -- sizes, forms, copies, the way back


def test_three_matrices_of_their_own():
    model = Around(batch_first=True)
    x = randn(2, 5, WIDTH)
    small = full(model, (x, x, x), form="qkv")
    pair = small.attention.in_proj_weight
    assert (pair.u.weight.shape, pair.v.weight.shape) == ((3, WIDTH, WIDTH), (3, WIDTH, WIDTH))
    same(Self(model), Self(small), [x])
    same(model, small, [x, randn(2, 3, WIDTH), randn(2, 3, WIDTH)])
    plans = {d.name: d for d in fxrank.plan_of(small).layers}
    assert plans["attention.in_proj_weight"].form == "qkv"
    cut = fxrank.factorize(model, (x, x, x), rank={"attention.in_proj_weight": 2}, form="qkv")
    pair = cut.attention.in_proj_weight
    parts = zip(model.attention.in_proj_weight.detach().chunk(3), pair.weight.detach().chunk(3), strict=True)
    for dense, third in parts:
        sigma = torch.linalg.svdvals(dense)
        assert torch.linalg.matrix_norm(dense - third, 2).item() == pytest.approx(sigma[2].item(), rel=1e-10)
    assert largest_difference(cut(x, x, x), fxrank.merge(cut)(x, x, x)) <= ROUNDING


@given(rank=st.integers(1, 5))
def test_truncated_ranks_take_fewer_parameters(rank):
    model = Around()
    x = randn(3, 2, WIDTH)
    small = fxrank.factorize(model, (x, x, x), rank={"attention.in_proj_weight": rank, "attention.out_proj": 2})
    assert type(small) is Around and type(small.attention) is nn.MultiheadAttention
    pair = small.attention.in_proj_weight
    assert isinstance(pair, LowRankWeight)
    assert count(pair) == rank * 4 * WIDTH < model.attention.in_proj_weight.numel()
    assert count(model) - count(small) == 3 * WIDTH**2 - rank * 4 * WIDTH + WIDTH**2 - 2 * 2 * WIDTH
    assert list(small.state_dict()) == [
        "attention.in_proj_bias",
        "attention.out_proj.u.weight",
        "attention.out_proj.v.weight",
        "attention.out_proj.v.bias",
        "attention.in_proj_weight.u.weight",
        "attention.in_proj_weight.v.weight",
    ]
    sigma = torch.linalg.svdvals(model.attention.in_proj_weight.detach())
    error = torch.linalg.matrix_norm(model.attention.in_proj_weight.detach() - pair.weight.detach(), 2)
    assert error.item() == pytest.approx(sigma[rank].item(), rel=1e-10)
    with torch.no_grad():
        before = small(x, x, x)[0]
        pair.u.weight.mul_(2)
        assert largest_difference(before, small(x, x, x)[0]) > 0.01  # it is the pair that is used


@pytest.mark.parametrize("widths", [{}, {"kdim": 3, "vdim": 5}], ids=["packed", "separate"])
def test_merge_gives_the_original_back(widths):
    model = Around(**widths)
    inputs = randn(3, 2, WIDTH), randn(4, 2, widths.get("kdim", WIDTH)), randn(4, 2, widths.get("vdim", WIDTH))
    small = full(model, inputs)
    back = fxrank.merge(small)
    assert set(back.state_dict()) == set(model.state_dict())
    assert type(back.attention) is nn.MultiheadAttention
    assert type(back.attention.out_proj) is type(model.attention.out_proj)
    assert not any(isinstance(m, fxrank.FactorPair) for m in back.modules())
    assert all(largest_difference(v, back.state_dict()[k]) <= ROUNDING for k, v in model.state_dict().items())
    same(model, back, inputs)
    model.load_state_dict(back.state_dict())
    assert list(back.attention.state_dict()) == list(model.attention.state_dict())


def test_copies_and_files(tmp_path):
    model = Around()
    x = randn(3, 2, WIDTH)
    small = fxrank.factorize(model, (x, x, x), rank=0.25, include="*")
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    fxrank.save(small, tmp_path / "saved")
    others = [copy.deepcopy(small), torch.load(buffer, weights_only=False), fxrank.load(Around(), tmp_path / "saved")]
    for other in others:
        assert isinstance(other.attention.in_proj_weight, LowRankWeight)
        assert largest_difference(small(x, x, x), other(x, x, x)) == 0
        with torch.no_grad():
            other.attention.in_proj_weight.u.weight.zero_()
    assert all(p.abs().max() > 0 for n, p in small.named_parameters() if "weight" in n)
    moved = copy.deepcopy(small).float()
    assert moved.attention.in_proj_weight.dtype is torch.float32
    assert largest_difference(small(x, x, x), moved(*[x.float()] * 3)) <= 1e-5


def test_a_missing_pair_is_no_pair():
    """Only what was asked for is factorized, and a frozen projection stays frozen."""
    model = Around()
    model.attention.in_proj_weight.requires_grad_(False)
    x = randn(3, 2, WIDTH)
    small = fxrank.factorize(model, (x, x, x), rank={"attention.in_proj_weight": 2})
    assert small.attention.out_proj.weight.shape == (WIDTH, WIDTH)
    assert not any(p.requires_grad for p in small.attention.in_proj_weight.parameters())
    assert small(x, x, x)[0].requires_grad
