"""`FactoredWeight` against the dense product: every function and view, gradients, and what needs the numbers."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxrank.passes.pairs.reading import products as product
from fxrank.passes.pairs.reading.products import FactoredWeight
from fxrank.passes.pairs.registry import make_pair
from fxrank.passes.tracing.compare import largest_difference

# float64: sums of some hundred products of order 1.
ROUNDING = 1e-12


@dataclass
class Case:
    """Factors and the shape of one weight; `rand` draws other operands, always the same ones."""

    kind: str
    groups: int
    rows: int
    cols: int
    rank: int
    flipped: bool
    numbers: tuple

    def __post_init__(self):
        self.rand = torch.Generator().manual_seed(self.rows * 100 + self.cols)
        self.u = self.randn(self.groups, self.rank, self.cols).requires_grad_()
        self.v = self.randn(self.groups, self.rows, self.rank).requires_grad_()

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.rand, dtype=torch.float64)

    @property
    def shape(self):
        shape = (self.groups, self.rows, self.cols) if self.kind == "stack" else (self.groups * self.rows, self.cols)
        return (*shape[:-2], shape[-1], shape[-2]) if self.flipped else shape

    def weight(self):
        return FactoredWeight(self.u, self.v, self.shape, self.flipped)

    def pick(self, i, bound):
        """A number in 0 … bound - 1."""
        return self.numbers[i] % bound


@st.composite
def cases(draw, kind="matrix", groups=(1, 4), flipped=None):
    size = st.integers(1, 5)
    numbers = tuple(draw(st.lists(st.integers(0, 59), min_size=4, max_size=4)))
    flips = draw(st.booleans()) if flipped is None else flipped
    return Case(kind, draw(st.integers(*groups)), draw(size), draw(size), draw(st.integers(1, 3)), flips, numbers)


def gradients(case, out):
    tensors = [t.dense() if isinstance(t, FactoredWeight) else t for t in _flat(out)]
    tensors = [t for t in tensors if t.requires_grad]
    if not tensors:
        return ()
    generator = torch.Generator().manual_seed(1)
    total = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors)
    return torch.autograd.grad(total, (case.u, case.v), materialize_grads=True)


def _flat(out):
    return list(out) if isinstance(out, (tuple, list)) else [out]


def forbidden(self):
    raise AssertionError("the dense product was built")


def agrees(case, function, factored=True):
    """`function` of the weight and of the dense product: equal values and gradients, and, if `factored`, no dense
    product on the way.
    """
    state = case.rand.get_state()
    expected = function(case.weight().dense())
    wanted = gradients(case, expected)
    case.rand.set_state(state)
    with pytest.MonkeyPatch.context() as patch:
        if factored:
            patch.setattr(FactoredWeight, "dense", forbidden)
        found = function(case.weight())
    dense = [t.dense() if isinstance(t, FactoredWeight) else t for t in _flat(found)]
    assert len(dense) == len(_flat(expected))
    for a, b in zip(_flat(expected), dense, strict=True):
        assert a.shape == b.shape
        assert largest_difference(a, b) <= ROUNDING
    assert largest_difference(wanted, gradients(case, found)) <= ROUNDING
    return found


MATRIX = {
    "linear": lambda c: lambda w: F.linear(c.randn(2, 3, w.shape[1]), w, c.randn(w.shape[0])),
    "linear by names": lambda c: lambda w: F.linear(input=c.randn(w.shape[1]), weight=w, bias=None),
    "matmul": lambda c: lambda w: (torch.matmul(c.randn(3, w.shape[0]), w), c.randn(2, 3, w.shape[0]).matmul(w)),
    "left matmul": lambda c: lambda w: (torch.matmul(w, c.randn(2, w.shape[1], 3)), w.matmul(c.randn(w.shape[1], 2))),
    "mm": lambda c: lambda w: (torch.mm(c.randn(3, w.shape[0]), w), c.randn(2, w.shape[0]).mm(w)),
    "left mm": lambda c: lambda w: w.mm(c.randn(w.shape[1], 3)),
    "mv": lambda c: lambda w: (torch.mv(w, c.randn(w.shape[1])), w.mv(c.randn(w.shape[1]))),
    "@": lambda c: lambda w: (c.randn(3, w.shape[0]) @ w, c.randn(w.shape[0]) @ w),
    "@ on the left": lambda c: lambda w: (w @ c.randn(w.shape[1], 3), w @ c.randn(w.shape[1])),
    "rmatmul": lambda c: lambda w: w.__rmatmul__(c.randn(3, w.shape[0])),
    "addmm": lambda c: lambda w: torch.addmm(c.randn(w.shape[1]), c.randn(3, w.shape[0]), w),
    "method addmm": lambda c: lambda w: c.randn(w.shape[0], 3).addmm(w, c.randn(w.shape[1], 3)),
    "matmul by names": lambda c: lambda w: torch.matmul(input=c.randn(3, w.shape[0]), other=w),
    "mm by names": lambda c: lambda w: torch.mm(c.randn(3, w.shape[0]), mat2=w),
    "addmm by names": lambda c: lambda w: torch.addmm(c.randn(w.shape[1]), mat1=c.randn(2, w.shape[0]), mat2=w),
    "t": lambda c: lambda w: (w.t(), torch.t(w), w.T, w.mT, w.adjoint()),
    "transpose": lambda c: lambda w: (w.transpose(-1, 0), torch.transpose(w, 0, -1), w.swapaxes(0, 1)),
    "transpose by names": lambda c: lambda w: torch.transpose(input=w, dim0=0, dim1=1),
    "permute": lambda c: lambda w: (w.permute(1, 0), torch.permute(w, (-1, -2))),
    "permute by names": lambda c: lambda w: w.permute(dims=(1, 0)),
    "twice transposed product": lambda c: lambda w: c.randn(2, w.shape[0]) @ w.t().t(),
    "detach and data": lambda c: lambda w: (w.detach(), w.data, torch.detach(w)),
    "slices": lambda c: lambda w: _columns(c, w),
}
WITHOUT_BLOCKS = {
    "embedding": lambda c: lambda w: F.embedding(torch.tensor([[0, c.pick(0, w.shape[0])]]), w),
    "einsum": lambda c: lambda w: torch.einsum("bi,oi->bo", c.randn(2, w.shape[1]), w),
    "einsum in a list": lambda c: lambda w: torch.einsum("oi, bco -> cib", [w, c.randn(2, 3, w.shape[0])]),
    "einsum summing all": lambda c: lambda w: torch.einsum("bi,oi->b", c.randn(2, w.shape[1]), w),
    "narrow": lambda c: lambda w: _narrowed(c, w),
    "narrow from the end": lambda c: lambda w: _narrowed_from_the_end(c, w),
    "split": lambda c: lambda w: w.split(1 + c.pick(0, 3), c.pick(1, 2)),
    "torch.split": lambda c: lambda w: torch.split(w, [1, w.shape[-1] - 1], -1),
    "chunk": lambda c: lambda w: (*w.chunk(2), *torch.chunk(w, 1 + c.pick(0, 4), dim=c.pick(1, 2) - 2)),
    "rows": lambda c: lambda w: w[c.pick(0, w.shape[0]) :],
}
STACK = {
    "matmul": lambda c: lambda w: torch.matmul(c.randn(len(w), 3, w.shape[1]), w),
    "broadcast": lambda c: lambda w: (c.randn(2, 1, 3, w.shape[1]) @ w, c.randn(3, w.shape[1]) @ w),
    "vector @": lambda c: lambda w: c.randn(w.shape[1]) @ w,
    "@ vector": lambda c: lambda w: w @ c.randn(w.shape[2]),
    "left": lambda c: lambda w: w @ c.randn(len(w), w.shape[2], 2),
    "bmm": lambda c: lambda w: (torch.bmm(c.randn(len(w), 3, w.shape[1]), w), w.bmm(c.randn(len(w), w.shape[2], 3))),
    "bmm by names": lambda c: lambda w: torch.bmm(c.randn(len(w), 3, w.shape[1]), mat2=w),
    "einsum": lambda c: lambda w: torch.einsum("bei,eio->beo", c.randn(2, len(w), w.shape[1]), w),
    "einsum over experts": lambda c: lambda w: torch.einsum("eoi,bi->bo", w, c.randn(2, w.shape[2])),
    "mT": lambda c: lambda w: (w.mT, w.adjoint(), w.transpose(1, 2), w.permute(0, 2, -2)),
    "unbind": lambda c: lambda w: (*w.unbind(), *torch.unbind(w, 0)),
    "iteration": lambda c: lambda w: [c.randn(2, w.shape[1]) @ one for one in w],
    "one": lambda c: lambda w: (w[c.pick(0, len(w))], w[torch.tensor(c.pick(0, len(w)))]),
    "some": lambda c: lambda w: w[torch.tensor([c.pick(0, len(w)), c.pick(1, len(w))])],
    "a mask": lambda c: lambda w: w[torch.arange(len(w)) != c.pick(0, len(w)) + 1],
    "linear of one": lambda c: lambda w: F.linear(c.randn(2, w.shape[2]), w[c.pick(0, len(w))]),
    "some slices": lambda c: lambda w: w[c.pick(0, len(w)) :],
    "narrow": lambda c: lambda w: _narrowed(c, w),
    "narrow from the end": lambda c: lambda w: _narrowed_from_the_end(c, w),
    "split": lambda c: lambda w: w.split(1 + c.pick(0, 3), c.pick(1, 3)),
    "chunk": lambda c: lambda w: w.chunk(1 + c.pick(0, 3), c.pick(1, 3)),
}
DENSE = {
    "abs": lambda c: lambda w: w.abs(),
    "+ -": lambda c: lambda w: (w + 1, 1 - w),
    "* tensor": lambda c: lambda w: c.randn(*w.shape) * w,
    "sum": lambda c: lambda w: w.sum(),
    "mean of a dimension": lambda c: lambda w: torch.mean(w, -1),
    "implicit einsum": lambda c: lambda w: torch.einsum("...j", w),
    "einsum of one": lambda c: lambda w: torch.einsum("...i->...", w),
    "einsum of three": lambda c: lambda w: torch.einsum("...i,i,i->...i", w, *c.randn(2, w.shape[-1])),
    "cat": lambda c: lambda w: torch.cat([w, w], -1),
    "stack": lambda c: lambda w: torch.stack([w, c.randn(*w.shape)]),
    "view": lambda c: lambda w: (w.reshape(-1), w.clone(), w[..., 0]),
    "with itself": lambda c: lambda w: w @ w.mT,
    "norm": lambda c: lambda w: torch.linalg.vector_norm(w),
    "scaled addmm": lambda c: (
        lambda w: torch.addmm(c.randn(1), c.randn(2, w.shape[0]), w, beta=0.5, alpha=2) if w.ndim == 2 else w * 2
    ),
    "mask of numbers": lambda c: lambda w: w[torch.ones(w.shape[:2], dtype=torch.bool)],
    "where": lambda c: lambda w: torch.where(torch.ones(()).bool(), w, c.randn(1)),
}


def _columns(c, w):
    """Rows of whole blocks, or any columns, by slices."""
    if w.flipped if isinstance(w, FactoredWeight) else c.flipped:
        return w.t()[: c.rows], w[: 1 + c.pick(0, len(w))]
    return w[: c.rows], w[c.rows :], w.t()[1:]


def _narrowed(c, w):
    dim = c.pick(1, w.ndim)
    start = c.pick(2, w.shape[dim])
    return w.narrow(dim, start, w.shape[dim] - start), torch.narrow(w, dim - w.ndim, start, 1)


def _narrowed_from_the_end(c, w):
    dim = c.pick(1, w.ndim)
    return torch.narrow(w, dim - w.ndim, -1 - c.pick(2, w.shape[dim]), 1)


@pytest.mark.parametrize("name", MATRIX)
@settings(max_examples=10)
@given(case=cases())
def test_matrices_of_any_blocks(name, case):
    agrees(case, MATRIX[name](case))


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
@settings(max_examples=10)
@given(case=cases(groups=(1, 1)))
def test_matrices_of_one_block(name, case):
    # An embedding reads rows of V, so a transposed table has to be built.
    agrees(case, WITHOUT_BLOCKS[name](case), factored=not (name == "embedding" and case.flipped))


@pytest.mark.parametrize("name", WITHOUT_BLOCKS)
@settings(max_examples=6)
@given(case=cases(groups=(2, 3)))
def test_cuts_through_blocks_are_right_too(name, case):
    agrees(case, WITHOUT_BLOCKS[name](case), factored=False)


@pytest.mark.parametrize("name", STACK)
@settings(max_examples=10)
@given(case=cases("stack"))
def test_stacks(name, case):
    agrees(case, STACK[name](case))


@pytest.mark.parametrize("name", DENSE)
@settings(max_examples=8)
@given(case=st.one_of(cases(), cases("stack")))
def test_everything_else_is_the_dense_result(name, case):
    found = agrees(case, DENSE[name](case), factored=False)
    assert not any(isinstance(t, FactoredWeight) for t in _flat(found))


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 has no grouped product on a CPU")
@pytest.mark.parametrize("multiple", [4, 1], ids=["aligned rank", "any rank"])
@settings(max_examples=10)
@given(case=cases("stack"), public=st.booleans())
def test_grouped_products(multiple, case, public):
    """The kernel wants strides of 16 bytes; a rank that is no multiple of 4 must not be an error where the layer was
    none.
    """
    case = Case("stack", case.groups, 4 * case.rows, 4 * case.cols, case.rank * multiple, case.flipped, case.numbers)
    counts = torch.tensor([(n % 3) for n in case.numbers[: case.groups]])
    counts[-1] += 1
    x = case.randn(int(counts.sum()), case.shape[1]).float()
    weight = FactoredWeight(case.u.detach().float(), case.v.detach().float(), case.shape, case.flipped)
    expected = torch.cat([part @ w for part, w in zip(x.split(counts.tolist()), weight.dense(), strict=True)])
    function = F.grouped_mm if hasattr(F, "grouped_mm") and public else torch._grouped_mm
    with pytest.MonkeyPatch.context() as patch:
        if multiple == 4:
            patch.setattr(FactoredWeight, "dense", forbidden)
        found = function(x, weight, offs=counts.cumsum(0).to(torch.int32))
    assert largest_difference(expected, found) <= 1e-5


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@settings(max_examples=50)
@given(data=st.data(), dims=st.integers(1, 3), groups=st.integers(1, 2), bias=st.booleans())
def test_convolutions(data, dims, groups, bias):
    kernel = data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    inputs, outputs = data.draw(st.integers(1, 3)), groups * data.draw(st.integers(1, 3))
    options = {"dilation": data.draw(st.integers(1, 2)), "groups": groups}
    options |= data.draw(st.sampled_from([{"padding": "same"}, {"stride": 2, "padding": 1}, {}]))
    columns = inputs * torch.Size(kernel).numel()
    u = torch.randn(1, 2, columns, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, outputs, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(outputs, dtype=torch.float64) if bias else None
    x = torch.randn(2, groups * inputs, *[7] * dims, dtype=torch.float64)
    weight = FactoredWeight(u, v, (outputs, inputs, *kernel))
    expected = CONVOLUTIONS[dims](x, weight.dense(), b, **options)
    with pytest.MonkeyPatch.context() as patch:
        if groups == 1:
            patch.setattr(FactoredWeight, "dense", forbidden)
        found = CONVOLUTIONS[dims](x, weight, b, **options)
    assert largest_difference(expected, found) <= ROUNDING
    grads = [torch.autograd.grad(out.square().sum(), (u, v)) for out in (expected, found)]
    assert largest_difference(*grads) <= ROUNDING


KERNEL_VIEWS = {
    "one": lambda w: (w[0], *w),
    "some": lambda w: (w[1:3], w.narrow(0, 1, 2), w[torch.tensor([2, 0])], *w.split(2)),
    "inside": lambda w: (w.narrow(1, 1, 2), w.narrow(2, 0, 2), *w.chunk(2, 1)),
    "transposed": lambda w: (w.mT, w.transpose(1, 2)),
    "products": lambda w: (torch.ones(1, 4).double() @ w, torch.einsum("bi,oik->bok", torch.ones(2, 4).double(), w)),
    "shape": lambda w: (w.flatten(1), w.unsqueeze(-1), w[..., 0], w[:, 1]),
}


@pytest.mark.parametrize("name", KERNEL_VIEWS)
@pytest.mark.parametrize("groups", [1, 2])
def test_views_of_a_one_dimensional_kernel(name, groups):
    """Its three dimensions are no stack."""
    weight = make_pair(nn.Conv1d(4 * groups, 6, 3, groups=groups, dtype=torch.float64), 3).weight
    for found, expected in zip(KERNEL_VIEWS[name](weight), KERNEL_VIEWS[name](weight.dense()), strict=True):
        assert found.shape == expected.shape
        assert largest_difference(expected, found + 0) <= ROUNDING


@given(case=st.one_of(cases(), cases("stack")))
@settings(max_examples=30)
def test_it_looks_like_the_dense_tensor(case):
    w = case.weight()
    dense = w.dense()
    assert isinstance(w, torch.Tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactoredWeight, "dense", forbidden)
        assert tuple(w.shape) == tuple(w.size()) == tuple(dense.shape)
        assert (w.dtype, w.device, w.layout, len(w)) == (dense.dtype, dense.device, dense.layout, len(dense))
        assert (w.ndim, w.dim(), w.numel(), w.size(-1)) == (dense.ndim,) * 2 + (dense.numel(), dense.shape[-1])
        assert w.requires_grad and not w.detach().requires_grad and not w.data.requires_grad
        assert w.is_floating_point() and not torch.is_complex(w) and not w.is_cuda
        assert f"rank={case.rank}, groups={case.groups}" in repr(w)
        assert hash(w) == id(w)
    assert type(dense) is torch.Tensor
    assert torch.equal(torch.as_tensor(w.detach().numpy()), dense.detach())
    assert torch.equal(copy.deepcopy(w.detach()), dense.detach())


def test_every_product_is_tested():
    """The tables above and the recurrent, attention and cast tests go through each entry."""
    seen = set()
    table = dict(product.PRODUCTS)

    def spy(function):
        def call(*args, **kwargs):
            seen.add(function)
            return table[function](*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for function in table:
            patch.setitem(product.PRODUCTS, function, spy(function))
        for kind, groups, tests in (("matrix", 1, MATRIX | WITHOUT_BLOCKS), ("stack", 2, STACK)):
            case = Case(kind, groups, 3, 4, 2, False, (1, 1, 1, 1))
            for name, test in tests.items():
                if "by names" not in name:  # they go through the same functions
                    test(case)(case.weight())
    elsewhere = {torch.lstm, torch.gru, F.multi_head_attention_forward, *CONVOLUTIONS.values(), torch._grouped_mm}
    names = ("__matmul__", "to", "type_as", "float", "half", "bfloat16", "double", "cpu", "cuda")
    elsewhere |= {getattr(torch.Tensor, n) for n in names} | {getattr(F, "grouped_mm", None)}
    assert {f for f in table if f not in seen and f not in elsewhere} == set()
