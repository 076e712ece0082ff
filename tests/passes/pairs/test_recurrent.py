"""`nn.LSTM`, `nn.GRU` and `nn.RNN` with factor pairs as gates, by the fused kernels and step by step."""

import copy
import io

import pytest
import torch
from exact import full, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fxrank
from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.pairs.reading import recurrent
from fxrank.passes.pairs.reading.products import FactoredWeight
from fxrank.passes.tracing.compare import largest_difference

# float64: sums of some dozen products of order 1, over a few steps.
ROUNDING = 1e-12
INPUTS, HIDDEN = 5, 6


class Around(nn.Module):
    """One recurrent layer, called as it is."""

    def __init__(self, cell, **options):
        super().__init__()
        self.rnn = cell(INPUTS, HIDDEN, dtype=torch.float64, **options)

    def forward(self, x, state=None):
        return self.rnn(x, state)


@pytest.fixture(params=["fused", "stepped"])
def way(request, monkeypatch):
    """Both ways of a narrow layer: the product for torch's kernel, and the factors step by step."""
    monkeypatch.setattr(recurrent, "WIDE", 1 if request.param == "stepped" else 512)
    return request.param


def count(model):
    return sum(p.numel() for p in model.parameters())


def pairs(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankWeight)}


def flat(out):
    """Tensors of an output, packed or not."""
    if isinstance(out, torch.Tensor):
        return [out]
    return [t for part in out if part is not None for t in flat(part)]


def outputs_and_gradients(model, x, state, pack):
    x = x.clone().requires_grad_()
    state = [s.clone().requires_grad_() for s in state]
    model.zero_grad()
    given_state = None if not state else state[0] if len(state) == 1 else tuple(state)
    out = model(pack(x), given_state)
    values = [t for t in flat(out) if t.is_floating_point()]
    sum((t * torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in values).backward()
    biases = [p.grad for n, p in model.named_parameters() if ".bias" in n]
    return flat(out), [x.grad, *(s.grad for s in state), *biases]


def same(model, small, x, state=(), pack=lambda x: x):
    (out, grads), (found, found_grads) = (outputs_and_gradients(m, x, state, pack) for m in (model, small))
    assert largest_difference(out, found) <= ROUNDING
    assert largest_difference(grads, found_grads) <= 10 * ROUNDING


@st.composite
def layers(draw):
    cell = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    options = {
        "num_layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    if cell is nn.LSTM:
        options["proj_size"] = draw(st.sampled_from([0, 2]))
    if cell is nn.RNN:
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    return Around(cell, **options)


def states(model, batch, lead=()):
    """A random initial state, a hidden one and, of an LSTM, a cell's. `batch` None: of a single sequence."""
    rnn = model.rnn
    depth = rnn.num_layers * (2 if rnn.bidirectional else 1)
    middle = () if batch is None else (batch,)
    hidden = randn(depth, *middle, rnn.proj_size or HIDDEN)
    return [hidden, randn(depth, *middle, HIDDEN)] if isinstance(rnn, nn.LSTM) else [hidden]


@settings(max_examples=15)
@given(model=layers(), batch=st.integers(1, 3), steps=st.integers(1, 4), stateful=st.booleans(), train=st.booleans())
def test_full_rank_is_the_original(way, model, batch, steps, stateful, train):
    model.train(train)
    x = randn(batch, steps, INPUTS) if model.rnn.batch_first else randn(steps, batch, INPUTS)
    small = full(model, x)
    assert len(pairs(small)) == sum(n.startswith("weight") for n, _ in model.rnn.named_parameters())
    same(model, small, x, states(model, batch) if stateful else ())


@settings(max_examples=15)
@given(model=layers(), data=st.data(), ordered=st.booleans(), stateful=st.booleans())
def test_packed_sequences(way, model, data, ordered, stateful):
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    lengths = sorted(lengths, reverse=True) if ordered else lengths
    batch, steps, first = len(lengths), max(lengths), model.rnn.batch_first
    x = randn(batch, steps, INPUTS) if first else randn(steps, batch, INPUTS)

    def pack(x):
        return pack_padded_sequence(x, torch.tensor(lengths), batch_first=first, enforce_sorted=ordered)

    small = full(model, x)
    same(model, small, x, states(model, batch) if stateful else (), pack)
    assert isinstance(small(pack(x))[0], PackedSequence)
    padded, found = pad_packed_sequence(small(pack(x))[0], batch_first=first)
    assert found.tolist() == lengths
    assert padded.shape == small(x)[0].shape


@settings(max_examples=10)
@given(model=layers(), stateful=st.booleans())
def test_single_sequences(way, model, stateful):
    x = randn(3, INPUTS)
    same(model, full(model, randn(3, 3, INPUTS)), x, states(model, None) if stateful else ())


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_packed_example(cell):
    model = Around(cell)
    x = pack_padded_sequence(randn(3, 2, INPUTS), torch.tensor([3, 2]))
    small = full(model, (x,))
    assert len(pairs(small)) == 2
    assert largest_difference(flat(model(x)), flat(small(x))) <= ROUNDING


class Packing(nn.Module):
    """Tokens and lengths, packed inside, as text classifiers do it; with `branch`, and a question about the data."""

    def __init__(self, cell, ordered=True, branch=False):
        super().__init__()
        self.embed = nn.Embedding(20, INPUTS)
        self.rnn = cell(INPUTS, HIDDEN, batch_first=True)
        self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
        self.out = nn.Linear(HIDDEN, 3)
        self.ordered, self.branch = ordered, branch
        self.double()

    def forward(self, tokens, lengths):
        x = self.embed(tokens)
        if self.branch:
            x = x * 2 if x.sum() > 1e3 else x
            hidden, _ = self.rnn(x)
        else:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.ordered)
            hidden, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(self.attention(hidden, hidden, hidden)[0])


@pytest.mark.parametrize("branch", [False, True], ids=["packing", "branching"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_inside_an_untraceable_forward(cell, ordered, branch):
    model = Packing(cell, ordered, branch)
    example = torch.randint(0, 20, (3, 4)), torch.tensor([4, 3, 1] if ordered else [3, 1, 4])
    small = full(model, example)
    decisions = {d.name: d.reason for d in fxrank.plan_of(small).layers if not d.factorized}
    assert decisions == {}
    assert {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "attention.in_proj_weight"} == set(pairs(small))
    assert largest_difference(model(*example), small(*example)) <= ROUNDING


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_dropout_between_layers(cell, way):
    model = Around(cell, num_layers=2, dropout=0.5)
    x = randn(4, 2, INPUTS)
    small = full(model, x)
    torch.manual_seed(1)
    first, second = small(x)[0], small(x)[0]
    assert largest_difference(first, second) > 0.01
    ones = torch.ones(20, 50, INPUTS, dtype=torch.float64)
    assert largest_difference(model(ones)[0].mean(), small(ones)[0].mean()) < 0.2  # rescaled
    assert largest_difference(model.eval()(x)[0], small.eval()(x)[0]) <= ROUNDING


def test_the_step_by_step_way_builds_no_dense_matrix(monkeypatch):
    def forbidden(self):
        raise AssertionError("the dense product was built")

    x = randn(4, 2, INPUTS)
    smalls = [
        full(Around(cell, **o), x) for cell, o in ((nn.LSTM, {"proj_size": 2}), (nn.GRU, {"bidirectional": True}))
    ]
    monkeypatch.setattr(FactoredWeight, "dense", forbidden)
    for small in smalls:
        with pytest.raises(AssertionError, match="the dense product was built"):
            small(x)
    monkeypatch.setattr(recurrent, "WIDE", HIDDEN)
    for small in smalls:
        small(x)


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_each_gate_has_factors_of_its_own(cell, gates):
    model = Around(cell)
    rank = 2
    small = fxrank.factorize(model, randn(3, 2, INPUTS), rank={"rnn.weight_ih_l0": rank, "rnn.weight_hh_l0": rank})
    assert type(small.rnn) is cell
    lead = (gates,) if gates > 1 else ()
    shapes = {n: (tuple(p.u.weight.shape), tuple(p.v.weight.shape)) for n, p in pairs(small).items()}
    assert shapes == {
        "rnn.weight_ih_l0": ((*lead, rank, INPUTS), (*lead, HIDDEN, rank)),
        "rnn.weight_hh_l0": ((*lead, rank, HIDDEN), (*lead, HIDDEN, rank)),
    }
    assert count(small) == gates * rank * (INPUTS + HIDDEN + 2 * HIDDEN) + 2 * gates * HIDDEN
    decisions = {d.name: d for d in fxrank.plan_of(small).layers}
    for name, pair in pairs(small).items():
        assert decisions[name].pair_parameters == count(pair)
        dense = model.get_parameter(name).detach()
        for gate, low in zip(dense.chunk(gates), pair.weight.detach().chunk(gates), strict=True):
            sigma = torch.linalg.svdvals(gate)
            assert torch.linalg.matrix_norm(gate - low, 2).item() == pytest.approx(sigma[rank].item(), rel=1e-10)


@given(model=layers(), ratio=st.floats(0.05, 1.0))
@settings(max_examples=10)
def test_parameters_at_a_ratio(model, ratio):
    x = randn(3, 3, INPUTS)
    small = full(model, x, rank=ratio)
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[type(model.rnn)]
    expected = sum(p.numel() for n, p in model.named_parameters() if "bias" in n)
    for name, weight in model.named_parameters():
        if "bias" not in name:
            groups = 1 if "weight_hr" in name else gates
            rows, cols = weight.shape[0] // groups, weight.shape[1]
            expected += groups * max(1, int(ratio * min(rows, cols) + 1e-9)) * (rows + cols)
    assert count(small) == expected


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_merge_undoes_it(cell, way):
    model = Around(cell, num_layers=2, bidirectional=True)
    x = randn(4, 2, INPUTS)
    small = full(model, x)
    back = fxrank.merge(small)
    assert set(back.state_dict()) == set(model.state_dict())
    assert not pairs(back) and pairs(small)
    assert all(largest_difference(v, back.state_dict()[k]) <= ROUNDING for k, v in model.state_dict().items())
    same(model, back, x)
    assert [id(w) for w in back.rnn._flat_weights] == [id(getattr(back.rnn, n)) for n in back.rnn._flat_weights_names]
    assert back.rnn._flat_weights[0] is not small.rnn._flat_weights[0]
    with torch.no_grad():
        back.rnn.weight_ih_l0.zero_()
    assert largest_difference(model(x), back(x)) > 0.01
    truncated = fxrank.factorize(model, x, rank={"rnn.weight_hh_l1_reverse": 2})
    same(truncated, fxrank.merge(truncated), x)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_it_can_be_moved_copied_and_pickled(cell, way):
    model = Around(cell, num_layers=2)
    x = randn(4, 2, INPUTS)
    small = full(model, x)
    moved = copy.deepcopy(small).float()
    assert {p.dtype for p in moved.parameters()} == {torch.float32}
    assert largest_difference(small(x)[0], moved(x.float())[0]) <= 1e-5
    for other in (moved.double(), copy.deepcopy(small).to(torch.float32).to(torch.float64)):
        assert largest_difference(small(x)[0], other(x)[0]) <= 1e-5
    assert all(p.is_meta for p in copy.deepcopy(small).to("meta").parameters())
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(small), torch.load(buffer, weights_only=False)):
        assert largest_difference(small(x), other(x)) == 0
        with torch.no_grad():
            other.rnn.weight_hh_l0.u.weight.zero_()
        assert largest_difference(small(x), other(x)) > 1e-3
    small.rnn.flatten_parameters()
    same(model, small, x)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_files(cell, tmp_path):
    model = Around(cell, bidirectional=True)
    x = randn(4, 2, INPUTS)
    small = full(model, x, rank=0.5)
    fxrank.save(small, tmp_path)
    fresh = Around(cell, bidirectional=True)
    assert fxrank.load(fresh, tmp_path) is fresh
    assert list(fresh.state_dict()) == list(small.state_dict())
    assert largest_difference(small(x), fresh(x)) == 0
    assert fxrank.plan_of(fresh) == fxrank.plan_of(small)
    state = small.state_dict()
    other = full(Around(cell, bidirectional=True), x, rank=0.5)
    assert largest_difference(small(x), other(x)) > 1e-3
    other.load_state_dict(state)
    assert largest_difference(small(x), other(x)) == 0


def test_a_step_of_an_optimizer_changes_the_outputs(way):
    """A recurrent layer keeps a list of its weights; the list must hold the pairs."""
    small = full(Around(nn.LSTM), randn(4, 2, INPUTS), rank=0.5)
    x = randn(4, 2, INPUTS)
    before = small(x)[0]
    before.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in small.parameters())
    torch.optim.SGD([p for n, p in small.named_parameters() if "weight" in n], 0.1).step()
    assert largest_difference(before, small(x)[0]) > 1e-3


def test_frozen_gates_stay_frozen():
    model = Around(nn.LSTM)
    model.rnn.weight_hh_l0.requires_grad_(False)
    small = full(model, randn(3, 2, INPUTS), rank=0.5)
    flags = {n: p.requires_grad for n, p in small.named_parameters()}
    assert {n for n, flag in flags.items() if not flag} == {"rnn.weight_hh_l0.u.weight", "rnn.weight_hh_l0.v.weight"}


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_exact_or_named(cell):
    """A layer's cell by itself is no recurrent layer: it is factorized rightly, or left dense with a reason."""
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS), cell(INPUTS, HIDDEN)).double()
    x = randn(3, INPUTS)
    small = full(model, x)
    assert largest_difference(flat(model(x)), flat(small(x))) <= ROUNDING
    reasons = {d.name: d.reason for d in fxrank.plan_of(small).layers}
    assert {"1.weight_ih", "1.weight_hh"} <= set(reasons)
    assert all(reasons.values())


def test_wide_layers_are_stepped_on_a_cpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [recurrent.steps(cpu, n) for n in (511, 512, 2000)] == [False, True, True]
    assert not recurrent.steps(cuda, 2000)
