"""Random programs that read a weight: what calibration collects is what was multiplied, computed by hand; and the factors are exact at full
rank, and lose no more than the weight's own.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxrank
from fxrank.passes.calibration import collect as collecting
from fxrank.passes.calibration.collect import Watch, collect
from fxrank.passes.calibration.moments import Lookups
from fxrank.passes.calibration.parts import of_parts
from fxrank.passes.pairs.parameter import LowRankWeight

pytestmark = pytest.mark.filterwarnings("ignore:ranks at or above break-even")
WIDTH = 20
"""Numbers of an input; each product takes so many of them as it sums over."""

VIEWS = {
    "cast": lambda w: w.to(torch.float64),
    "double": lambda w: w.double(),
    "type_as": lambda w: w.type_as(torch.zeros(1).double()),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: torch.permute(w, (1, 0)),
    "rows": lambda w: w[1:],
    "steps": lambda w: w[::2],
    "narrow": lambda w: w.narrow(1, 1, w.shape[1] - 1),
    "chunk": lambda w: w.chunk(2, 1)[0],
    "split": lambda w: torch.split(w, len(w) - 1)[0],
}
PRODUCTS = {
    "linear": lambda x, w: F.linear(x, w),
    "biased": lambda x, w: F.linear(x, w, x.new_ones(len(w))),
    "matmul": lambda x, w: x @ w,
    "function": lambda x, w: torch.matmul(x, w),
    "from the left": lambda x, w: (w @ x.flatten(0, 1).mT).mT,
    "mm": lambda x, w: torch.mm(x[0], w),
    "addmm": lambda x, w: torch.addmm(x.new_zeros(w.shape[1]), x[0], w),
    "mv": lambda x, w: torch.mv(w, x[0, 0]),
    "einsum": lambda x, w: torch.einsum("abi,oi->abo", x, w),
    "einsum from the left": lambda x, w: torch.einsum("io,abi->oab", w, x),
}
LAST = {"linear", "biased", "from the left", "mv", "einsum"}
"""Products that sum over the last dimension of the weight; the others sum over the first."""
FEWER = {"mm": lambda x: x[:1], "addmm": lambda x: x[:1], "mv": lambda x: x[:1, :1]}


def parts_of(index, views, product):
    """Which columns (rows) of the weight are summed over, which rows (columns) are kept, and the side, by the indices of its numbers."""
    for view in views:
        if view not in ("cast", "double", "type_as"):
            index = VIEWS[view](index)
    if product in LAST:
        index = index.mT
    return index  # (summed, kept)


class Program(nn.Module):
    def __init__(self, shape, steps):
        super().__init__()
        self.w, self.steps = nn.Parameter(torch.randn(shape)), steps

    def extra_repr(self):
        return f"{tuple(self.w.shape)}, {self.steps}"

    def forward(self, x):
        found = []
        for number, (views, product) in enumerate(self.steps):
            weight = self.w
            for view in views:
                weight = VIEWS[view](weight)
            size = weight.shape[1] if product in LAST else weight.shape[0]
            given = self.given(x, number, size).to(weight.dtype)
            found.append(PRODUCTS[product](given, weight).flatten().to(x.dtype))
        return torch.cat(found)

    @staticmethod
    def given(x, number, size):
        """What one product takes: for every third other than for the first."""
        return (x * (1 + number % 2) + number % 2)[..., number % 2 : number % 2 + size]


@st.composite
def programs(draw):
    shape = draw(st.integers(4, 8)), draw(st.integers(4, 8))
    index = torch.arange(shape[0] * shape[1]).view(shape)
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        views, left = [], index
        for view in draw(st.lists(st.sampled_from(list(VIEWS)), max_size=4)):
            after = left if view in ("cast", "double", "type_as") else VIEWS[view](left)
            if min(after.shape) > 1:  # of one row or column nobody can tell along which it is summed
                views, left = [*views, view], after
        steps.append((views, draw(st.sampled_from(list(PRODUCTS)))))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    return Program(shape, steps)


def inputs():
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(0)) * 2.0 ** -torch.arange(WIDTH)


def expected(model, x):
    """The vectors by side, what is kept and what is summed."""
    rows, cols = model.w.shape
    found = {}
    for number, (views, product) in enumerate(model.steps):
        index = parts_of(torch.arange(rows * cols).view(rows, cols), views, product)
        along_rows = bool(index[0, 0] // cols == index[1, 0] // cols)  # of the weight: it sums over columns
        summed, kept = (index[:, 0], index[0])
        summed, kept = (summed % cols, kept // cols) if along_rows else (summed // cols, kept % cols)
        given = FEWER.get(product, lambda x: x)(model.given(x, number, len(summed)))
        key = "inputs" if along_rows else "rows", tuple(kept.tolist()), tuple(summed.tolist())
        found.setdefault(key, []).append(given.reshape(-1, len(summed)).double())
    return {key: torch.cat(vectors) for key, vectors in found.items()}


def collected(model, x, **options):
    rows, cols = model.w.shape
    watch = Watch("w", LowRankWeight, (), "inputs", (1, min(rows, cols)), model.w, **options)
    found, _ = collect(model, {0: watch}, lambda: [((x,), {})])
    return found[0]


@settings(deadline=None, max_examples=150)
@given(programs())
def test_moments_are_those_computed_by_hand(model):
    x = inputs()
    parts = collected(model, x, narrow=False)
    by_hand = expected(model, x)
    assert parts.missed == ""
    found = {(side, tuple(kept), tuple(summed)): m for (side, kept, summed), m in parts.moments.items()}
    assert found.keys() == by_hand.keys()
    for key, vectors in by_hand.items():
        assert found[key].count == len(vectors)
        second = vectors.mT @ vectors / len(vectors)
        torch.testing.assert_close(found[key].second(centred=False)[0], second, rtol=1e-5, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(programs(), st.integers(1, 3))
def test_the_error_is_that_computed_by_hand_and_no_more_than_by_the_weights_own_factors(model, rank):
    x = inputs()
    w = model.w.detach()
    small = fxrank.factorize(model, x, rank, include="*", calibration=[x])
    own = fxrank.merge(fxrank.factorize(model, x, rank, include="*")).w.detach()
    (decision,) = fxrank.plan_of(small).layers
    assert "weight alone" not in decision.reason
    by_hand = expected(model, x)

    def squared(off):
        sides = {}
        for (side, kept, summed), vectors in by_hand.items():
            block = (
                off.double()[list(kept)][:, list(summed)].mT
                if side == "inputs"
                else off.double()[list(summed)][:, list(kept)]
            )
            sides[side] = sides.get(side, 0) + float((vectors @ block).square().sum())
        return sides

    whole, lost, others = squared(w), squared(w - fxrank.merge(small).w.detach()), squared(w - own)
    error, of_own = ((sum(one[s] / whole[s] for s in whole) / len(whole)) ** 0.5 for one in (lost, others))
    assert decision.output_error == pytest.approx(error, abs=1e-4)  # float32
    assert error <= of_own + 1e-4


@settings(deadline=None, max_examples=40)
@given(programs())
def test_at_full_rank_the_factors_are_exact(model):
    x = inputs()
    small = fxrank.factorize(model, x, 1.0, include="*", calibration=[x])
    (decision,) = fxrank.plan_of(small).layers
    assert decision.factorized and decision.output_error < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from(["linear", "matmul"]), st.integers(0, 2**16))
def test_what_a_whole_matrix_gives_serves_as_well_as_what_it_takes(rows, cols, product, seed):
    torch.manual_seed(seed)
    model, x = Program((rows, cols), [([], product)]), torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        wide, narrow = collected(model, x, narrow=False), collected(model, x)
        sizes = {m.shape[1] for m in narrow.moments.values()}
        assert sizes == {min(rows, cols)}
        stack = model.w.detach().double()[None]
        one, other = (of_parts(parts, stack, stacked=False)[0] for parts in (wide, narrow))
    for rank in range(1, min(rows, cols)):
        assert one.output_error(rank) == pytest.approx(other.output_error(rank), abs=1e-5)
        products = [v @ u for u, v in (one.factors(rank), other.factors(rank))]
        torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)


OF_STACKS = {
    "bmm": lambda x, w: torch.bmm(x.expand(len(w), -1, -1), w),
    "turned": lambda x, w: torch.bmm(x.expand(len(w), -1, -1), w.mT),
    "matmul": lambda x, w: x @ w,
    "einsum": lambda x, w: torch.einsum("ni,goi->gno", x, w),
    "one": lambda x, w: F.linear(x, w[1]),
    "cast": lambda x, w: x.double() @ w.double()[2].mT,
    "some": lambda x, w: x @ w[1:],
    "every other": lambda x, w: x @ w[::2],
    "unbound": lambda x, w: torch.stack([x[i:] @ one for i, one in enumerate(w.unbind())][:1]),
}
SEEN = {
    **dict.fromkeys(("bmm", "matmul"), ("rows", {0: 0, 1: 0, 2: 0, 3: 0})),
    **dict.fromkeys(("turned", "einsum"), ("inputs", {0: 0, 1: 0, 2: 0, 3: 0})),
    "one": ("inputs", {1: 0}),
    "cast": ("inputs", {2: 0}),
    "some": ("rows", {1: 0, 2: 0, 3: 0}),
    "every other": ("rows", {0: 0, 2: 0}),
    "unbound": ("rows", {0: 0, 1: 1, 2: 2, 3: 3}),
}


class Stacks(nn.Module):
    """Products with matrices of a stack."""

    def __init__(self, ways):
        super().__init__()
        self.w, self.ways = nn.Parameter(torch.randn(4, 6, 6)), ways

    def forward(self, x):
        return torch.cat([OF_STACKS[way](x * (i + 1), self.w).flatten().to(x.dtype) for i, way in enumerate(self.ways)])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(list(OF_STACKS)), min_size=1, max_size=3), st.integers(0, 2**16))
def test_each_matrix_of_a_stack_sees_its_own(ways, seed):
    torch.manual_seed(seed)
    model, x = Stacks(ways), torch.randn(7, 6)
    watch = Watch("w", LowRankWeight, (), "inputs", (4, 6), model.w)
    found, _ = collect(model, {0: watch}, lambda: [((x,), {})])
    seen = {}
    for i, way in enumerate(ways):
        side, starts = SEEN[way]
        for matrix, start in starts.items():
            seen.setdefault((side, matrix), []).append(x[start:].double() * (i + 1))
    sums = {}
    for (side, kept, summed), moments in found[0].moments.items():
        assert summed == range(6)
        for number, matrix in enumerate(kept):
            one = moments.count * moments.second(centred=False)[number]
            sums[side, matrix] = sums.get((side, matrix), 0) + one
    assert sums.keys() == seen.keys()
    for key, vectors in seen.items():
        whole = torch.cat(vectors)
        torch.testing.assert_close(sums[key], whole.mT @ whole, rtol=1e-5, atol=1e-6)


OF_COPIES = {
    "scaled": (lambda w: w.double().mul_(2), "a copy of it is written into"),
    "added to": (lambda w: w.double() + 1, "it is used in add"),
    "a column set": (lambda w: w.double().index_fill_(0, torch.tensor([1]), 0.0), "a copy of it is written into"),
    "whole numbers": (lambda w: (w * 8).int().double(), "it is used in mul"),
    "whole numbers at once": (lambda w: w.to(torch.int64).double(), "it is used in to"),
    "gathered": (lambda w: w.double()[torch.tensor([0, 0, 2])], "it is used in __getitem__"),
}


class Copies(nn.Module):
    """Multiplies with what becomes of a copy of the weight."""

    def __init__(self, way):
        super().__init__()
        self.w, self.way = nn.Parameter(torch.randn(6, 5)), way

    def forward(self, x):
        return F.linear(x.double(), OF_COPIES[self.way][0](self.w))


@pytest.mark.parametrize("way", OF_COPIES)
def test_what_is_made_of_a_copy_is_not_taken_for_the_weight(way):
    parts = collected(Copies(way), torch.randn(3, 5))
    assert parts.missed == OF_COPIES[way][1]
    assert of_parts(parts, torch.randn(1, 6, 5), stacked=False) == OF_COPIES[way][1]


def test_no_copy_is_kept_and_an_input_of_the_weights_dtype_is_no_use_of_it():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.alive = nn.Parameter(torch.randn(6, 5)), []

        def forward(self, x):
            copy_of_it = self.w.double()
            self.alive.append(weakref.ref(copy_of_it))
            out = F.linear(x.to(copy_of_it), copy_of_it)
            del copy_of_it
            assert self.alive[-1]() is None
            return out

    model = Casts()
    parts = collected(model, torch.randn(3, 5))
    assert parts.missed == "" and [m.count for m in parts.moments.values()] == [3]


def test_copies_that_are_made_in_inference_mode_are_followed():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 5))

        @torch.inference_mode()
        def forward(self, x):
            return F.linear(x.double(), self.w.double())

    parts = collected(Inside(), torch.randn(3, 5))
    assert parts.missed == "" and [m.count for m in parts.moments.values()] == [3]


def test_moments_that_would_take_too_much_memory_are_not_added_up(monkeypatch):
    model, x = Program((8, 4), [([], "matmul"), (["rows"], "matmul")]), inputs()
    monkeypatch.setattr(collecting, "LARGEST_BYTES", 8 * 7**2)
    assert collected(model, x).missed == ""
    monkeypatch.setattr(collecting, "LARGEST_BYTES", 8 * 7**2 - 1)
    assert collected(model, x).missed == "moments of inputs of 7 numbers would take 0 GiB"


def test_lookups_are_counted_by_row():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(9, 4))

        def forward(self, indices):
            return F.embedding(indices, self.w), F.embedding(indices.clamp(max=2), self.w[3:])

    indices = torch.tensor([[0, 1, 1], [8, 1, 5]])
    parts = collected(Table(), indices)
    counts = {kept: m.counts.tolist() for (side, kept, _), m in parts.moments.items() if isinstance(m, Lookups)}
    assert counts == {range(9): [1, 3, 0, 0, 0, 1, 0, 0, 1], range(3, 9): [1, 3, 2, 0, 0, 0]}
    turned = Table()
    turned.forward = lambda indices: F.embedding(indices.clamp(max=3), turned.w.t())
    assert collected(turned, indices).missed == "a part of it is looked up that is no block of rows and columns"
