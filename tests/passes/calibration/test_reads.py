"""Factors that know the data of weights that are read as tensors: attention, recurrent layers, raw parameters, stacks."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.calibration.masks import paddings
from fxrank.passes.calibration.moments import Moments
from fxrank.passes.calibration.reads import Reads
from fxrank.passes.errors import CalibrationError
from fxrank.torch_private.kernels import GROUPED

pytestmark = pytest.mark.filterwarnings("ignore:ranks at or above break-even")


class Raw(nn.Module):
    """Products from the right, the left and in a view, of a stack, a read layer and a kernel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(10, 12))
        self.left = nn.Parameter(torch.randn(9, 10))
        self.one, self.two = nn.Parameter(torch.randn(3, 10, 7)), nn.Parameter(torch.randn(3, 6, 7))
        self.read, self.kernel = nn.Linear(6, 9), nn.Parameter(torch.randn(7, 9, 3))

    def forward(self, x):
        x = F.linear(x @ self.a, self.b)
        x = x + (self.left @ x.mT).mT.mean(-1, keepdim=True)
        x = torch.bmm(x.flatten(0, -2).expand(3, -1, -1), self.one)
        x = torch.einsum("gni,goi->gno", x, self.two)
        return F.conv1d(F.linear(x, self.read.weight, self.read.bias).mT, self.kernel)


class Experts(nn.Module):
    """Each row goes to one expert; none to the last."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6, 8))

    def forward(self, x):
        return torch.cat([F.linear(part, self.w[i]) for i, part in enumerate(x.chunk(3))])


class Cross(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.m = nn.MultiheadAttention(8, 2, **options)

    def forward(self, x, y):
        return self.m(x, y, y, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(6, 8, **options)

    def forward(self, x):
        return self.layer(x)[0]


class Packed(Recurrent):
    def forward(self, x):
        lengths = torch.tensor([5, 3, 2, 1])
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.layer(packed)[0].data


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


SIZES = {
    "raw": (Raw, [(4, 5, 8)]),
    "experts": (Experts, [(60, 8)]),
    "encoder": (encoder, [(4, 5, 8)]),
    "cross": (lambda: Cross(batch_first=True, bias=False), [(4, 5, 8), (4, 7, 8)]),
    "separate": (lambda: Cross(kdim=6, vdim=6), [(5, 4, 8), (7, 4, 6)]),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=4), [(5, 4, 6)]),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2, bias=False, batch_first=True), [(4, 5, 6)]),
    "rnn": (lambda: Recurrent(nn.RNN, nonlinearity="relu", bidirectional=True), [(5, 4, 6)]),
    "packed": (lambda: Packed(nn.LSTM, batch_first=True), [(4, 5, 6)]),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2, 2, groups=2)), [(2, 4, 5, 5)]),
}


def made(name, seed=0):
    torch.manual_seed(seed)
    build, shapes = SIZES[name]
    model = build().double().eval()
    mixed = [torch.randn(s, dtype=torch.float64) @ torch.randn(s[-1], s[-1], dtype=torch.float64) for s in shapes]
    return model, tuple(mixed)


def factorized(model, inputs, rank, form="channel", **options):
    batches = [((inputs if len(inputs) > 1 else inputs[0]), None)]
    return fxrank.factorize(model, inputs, rank, include="*", form=form, calibration=batches, **options)


@pytest.mark.parametrize("name", SIZES)
def test_at_full_rank_the_factors_are_exact(name):
    model, inputs = made(name)
    small = factorized(model, inputs, 1.0, "qkv")
    with torch.no_grad():
        torch.testing.assert_close(small(*inputs), model(*inputs), rtol=1e-9, atol=1e-9)
    decisions = fxrank.plan_of(small).layers
    assert all(d.output_error is not None and d.output_error < 1e-6 for d in decisions), decisions


def seen_in(model, inputs):
    """Every product with a weight that is read, by the weight's name."""
    found = {}
    reads = Reads(
        {name: p for name, p in model.named_parameters() if p.ndim > 1},
        lambda name, reading: found.setdefault(name, []).append(reading),
        lambda name, why: pytest.fail(f"{name}: {why}"),
        lambda mask: nullcontext(),
    )
    with reads, torch.no_grad():
        model(*inputs)
    return found


def part(tensor, places, dim=0):
    return tensor.index_select(dim, torch.tensor(places))


def squared(weight, reading):
    """`‖W x‖²` over what one product saw."""
    weight, x = weight.detach(), reading.vectors.flatten(0, -3)
    inputs = reading.side == "inputs"
    if weight.ndim == 3:
        block = part(weight, reading.kept)
        return float(torch.einsum("goi,ngi->ngo", block if inputs else block.mT, x).square().sum())
    block = part(part(weight if inputs else weight.mT, reading.kept), reading.summed, 1)
    return float((x[:, 0] @ block.mT).square().sum())


@pytest.mark.parametrize("name", [n for n in SIZES if n != "transposed"])
def test_the_reported_error_is_the_measured_one_and_no_larger_than_that_of_the_weights_own_factors(name):
    model, inputs = made(name, 1)
    small = factorized(model, inputs, 0.5, "qkv")
    plain = fxrank.factorize(model, inputs, 0.5, include="*", form="qkv")
    seen = seen_in(model, inputs)
    weights = dict(model.named_parameters())
    dense, dense_plain = (dict(fxrank.merge(m).named_parameters()) for m in (small, plain))
    checked = 0
    for decision in fxrank.plan_of(small).layers:
        at = next((n for n in (decision.name, f"{decision.name}.weight") if n in seen), None)
        if at is None or (weights[at].ndim == 3 and decision.kind != "parameter") or seen[at][0].side == "outputs":
            continue
        if decision.gains_bias or (decision.kind == "linear" and ".linear" in decision.name):
            continue  # a layer that is called has a bias too, which these products do not show
        off, off_plain, whole = (
            sum(squared(w, r) for r in seen[at])
            for w in (weights[at] - dense[at], weights[at] - dense_plain[at], weights[at])
        )
        assert decision.output_error == pytest.approx((off / whole) ** 0.5, abs=2e-6), decision.name
        assert off <= off_plain * (1 + 1e-9) + 1e-12, decision.name
        checked += 1
    assert checked


def test_an_expert_that_saw_nothing_keeps_its_weights_own_factors_and_the_reason_says_so():
    model, inputs = made("experts")
    small, plain = factorized(model, inputs, 3), fxrank.factorize(model, inputs, 3, include="*")
    (decision,) = fxrank.plan_of(small).layers
    assert decision.reason.endswith("1 of its 4 matrices saw no data: they know their weights alone")
    ours, own = fxrank.merge(small).w, fxrank.merge(plain).w
    torch.testing.assert_close(ours[3], own[3])
    assert not torch.allclose(ours[0], own[0])


@pytest.mark.parametrize("function", GROUPED)
def test_grouped_products_see_the_rows_of_each_group(function):
    x, w = torch.randn(12, 16, dtype=torch.bfloat16), torch.randn(3, 16, 8, dtype=torch.bfloat16)
    ends = torch.tensor([5, 5, 12], dtype=torch.int32)
    seen = []
    reads = Reads({"w": w}, lambda _, r: seen.append(r), lambda *why: pytest.fail(str(why)), lambda _: nullcontext())
    with reads:
        function(x, w, offs=ends)
    assert [(r.side, r.kept, r.summed) for r in seen] == [("rows", range(i, i + 1), range(16)) for i in range(3)]
    for reading, part in zip(seen, (x[:5], x[5:5], x[5:]), strict=True):
        assert torch.equal(reading.vectors[:, 0], part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["raw", "encoder", "lstm"])
def test_narrow_numbers_lose_what_their_exact_copies_lose(name, dtype):
    model, inputs = made(name)
    narrow, x = model.to(dtype), tuple(x.to(dtype) / 8 for x in inputs)
    exact = copy.deepcopy(narrow).double()
    small, wide = factorized(narrow, x, 0.5, "qkv"), factorized(exact, tuple(t.double() for t in x), 0.5, "qkv")
    assert {p.dtype for p in small.parameters()} == {dtype}
    for mine, theirs in zip(fxrank.plan_of(small).layers, fxrank.plan_of(wide).layers, strict=True):
        # Activations are rounded to 8 or 11 bits on their way.
        assert mine.output_error == pytest.approx(theirs.output_error, rel=0.05, abs=0.02), mine.name


def test_dead_inputs_and_fewer_samples_than_inputs():
    model, (x,) = made("raw")
    x = x[:1, :4].clone()
    x[..., :3] = 0
    small = factorized(model, (x,), 4)
    with torch.no_grad():
        assert torch.isfinite(small(x)).all()
    assert next(d for d in fxrank.plan_of(small).layers if d.name == "a").output_error == pytest.approx(0, abs=1e-5)


def test_nan_names_the_weight():
    model, (x,) = made("gru")
    bad = x.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"the inputs of 'layer.weight_ih_l0' hold 6 NaN or infinite"):
        fxrank.factorize(model, x, 2, include="*", calibration=[(bad, None)])


def test_padding_of_attention_does_not_count():
    model, (x,) = made("encoder")
    padded = torch.zeros(4, 5, dtype=torch.bool)
    padded[:, 3:] = True
    junk = x.clone()
    junk[:, 3:] = 1e3

    def weights(batch):
        small = fxrank.factorize(model, {"src": x}, 3, include="*", calibration=[batch])
        return fxrank.merge(small).layers[0].self_attn.in_proj_weight

    a = weights({"src": x, "src_key_padding_mask": padded})
    torch.testing.assert_close(a, weights({"src": junk, "src_key_padding_mask": padded}))
    assert not torch.allclose(a, weights({"src": junk}))


class Masked(nn.Module):
    def forward(self, x, attention_mask=None, decoder_attention_mask=None, key_padding_mask=None):
        return x


LEFT_OUT = torch.finfo(torch.float32).min
EXPECTED = torch.tensor([[False, False, True]])


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((torch.tensor([[1, 1, 0]]),), {}),
        ((), {"attention_mask": torch.tensor([[1.0, 1.0, 0.0]])}),
        ((), {"attention_mask": torch.tensor([[[[0.0, 0.0, LEFT_OUT]]]])}),
        ((), {"attention_mask": torch.tensor([[[[1, 0, 0], [1, 1, 0], [1, 1, 0]]]]).bool()}),
        ((), {"key_padding_mask": torch.tensor([[0.0, 0.0, -float("inf")]])}),
        ((), {"attention_mask": torch.tensor([[1, 1, 0]]), "decoder_attention_mask": torch.tensor([[1, 0, 0]])}),
    ],
    ids=["by position", "numbers", "added", "causal", "infinite", "decoder"],
)
def test_masks_say_what_is_padding(args, kwargs):
    (found,) = paddings(Masked(), (torch.zeros(1, 3), *args), kwargs)
    assert torch.equal(found, EXPECTED)


@pytest.mark.parametrize("shape", [(1, 3), (1, 1, 3, 3)])
def test_zeros_that_are_added_to_scores_leave_nothing_out(shape):
    assert paddings(Masked(), (), {"attention_mask": torch.zeros(shape)}) == []


def test_moments_added_up_are_those_of_all():
    torch.manual_seed(0)
    x = torch.randn(50, 2, 3, dtype=torch.float64) + 100
    parts, whole = [Moments(2, 3) for _ in range(3)], Moments(2, 3)
    whole.add(x)
    parts[0].add(x[:13])
    parts[1].add(x[13:])
    found = Moments.added(parts)
    assert found.count == 50
    for centred in (True, False):
        torch.testing.assert_close(found.second(centred=centred), whole.second(centred=centred), rtol=1e-12, atol=1e-9)
