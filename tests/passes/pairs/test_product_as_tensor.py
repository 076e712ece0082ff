"""A factored weight where a tensor is expected: cast, written into, compared, laid out, named."""

import operator
import re

import pytest
import torch
from torch import nn

from fxrank.passes.pairs.parameter import LowRankWeight
from fxrank.passes.pairs.reading.products import FactoredWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_stay_factored_and_differentiable(dtype):
    u, v = torch.randn(1, 2, 5, requires_grad=True).double(), torch.randn(1, 4, 2, requires_grad=True).double()
    w = FactoredWeight(u, v, (4, 5))
    method = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}[dtype]
    like = torch.zeros((), dtype=dtype)
    for cast in (w.to(dtype), w.to(like), w.to("cpu", dtype), getattr(w, method)(), w.type_as(like), w.to(dtype=dtype)):
        assert isinstance(cast, FactoredWeight)
        assert cast.dtype is dtype and cast.requires_grad
        torch.testing.assert_close(
            cast.dense(), v[0].to(dtype) @ u[0].to(dtype)
        )  # batched, it may add in another order
    assert w.cpu().dtype is torch.float64


def test_other_tensors_are_cast_to_its_type():
    w = FactoredWeight(torch.randn(1, 2, 5).double(), torch.randn(1, 4, 2).double(), (4, 5))
    x = torch.ones(3)
    for cast in (x.type_as(w), x.to(w), x.to(tensor=w)):
        assert cast.dtype is torch.float64
        assert torch.equal(cast, x.double())


WRITES = {
    "__setitem__": lambda w: w.__setitem__(0, 1),
    "copy_": lambda w: w.copy_(torch.zeros(4, 5)),
    "zero_": lambda w: w.zero_(),
    "mul_": lambda w: w.mul_(2),
    "normal_": lambda w: nn.init.normal_(w),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "__set__": lambda w: type(w).data.__set__(w, torch.zeros(4, 5)),
    "relu_": lambda w: torch.relu_(w),
    "add_": lambda w: operator.iadd(w, 1),
    "out=": lambda w: torch.add(torch.zeros(4, 5), 1, out=w),
}


@pytest.mark.parametrize("name", WRITES)
def test_assignments_are_refused(name):
    u, v = torch.randn(1, 2, 5), torch.randn(1, 4, 2)
    before = u.clone(), v.clone()
    text = (
        f"a factored weight is the product of two parameters, so {name} cannot write into it; "
        "change the pair's u.weight and v.weight, or merge the pair first."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(text)}$"):
        WRITES[name](FactoredWeight(u, v, (4, 5)))
    assert torch.equal(u, before[0]) and torch.equal(v, before[1])


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_product_from_the_left_lies_in_memory_as_torchs_own(groups, flipped):
    """Dropout draws in that order: with another one the same seed would drop other numbers."""
    w = FactoredWeight(torch.randn(groups, 2, 6), torch.randn(groups, 3, 2), (3 * groups, 6))
    w = w.t() if flipped else w
    x = torch.randn(w.shape[1], 5)
    found, expected = w @ x, w.dense() @ x
    assert isinstance(w, FactoredWeight) and found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)


def test_no_method_of_a_pair_hides_one_of_the_tensor_that_a_raw_weight_stands_for():
    """What code calls on the weight, `w.split(8)`, must be the tensor's, or do the same."""
    tensors = {name for name in dir(torch.Tensor) if not name.startswith("_")}
    own = {name for cls in LowRankWeight.__mro__ if cls.__module__.startswith("fxrank") for name in vars(cls)}
    assert tensors & (own - set(vars(LowRankWeight))) == set()
    # A module's own ways to another device or type reach the factors.
    of_module = tensors & {name for name in dir(nn.Module) if not name.startswith("_")}
    assert of_module <= {
        *vars(LowRankWeight),
        "bfloat16",
        "cpu",
        "cuda",
        "double",
        "float",
        "half",
        "ipu",
        "mtia",
        "requires_grad_",
        "to",
        "type",
        "xpu",
    }
