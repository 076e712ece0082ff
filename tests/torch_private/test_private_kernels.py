import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrank.torch_private import kernels, pytree


def test_a_backward_pass_is_told_from_everything_else():
    seen = []
    weight = nn.Parameter(torch.ones(2))
    weight.register_hook(lambda grad: seen.append(kernels.inside_backward()))
    (weight * 2).sum().backward()
    assert seen == [True] and not kernels.inside_backward()


class Hollow(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func.__name__, types

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_a_tensor_may_have_a_shape_and_no_numbers():
    hollow = kernels.tensor_without_numbers(Hollow, (2, 3), dtype=torch.float64, requires_grad=True)
    assert F.linear(torch.ones(1, 3), hollow) == ("linear", (Hollow,))
    with kernels.without_torch_function():
        assert hollow.shape == (2, 3) and hollow.dtype is torch.float64 and hollow.requires_grad


def test_the_written_functions_are_there():
    assert kernels.NN_FUNCTIONS.linear is F.linear and kernels.NN_FUNCTIONS.gelu is F.gelu


@pytest.mark.parametrize("function", kernels.GROUPED)
def test_rows_are_multiplied_with_a_matrix_of_their_group(function):
    x, weights = torch.randn(6, 16).bfloat16(), torch.randn(2, 16, 8).bfloat16()
    try:
        found = function(x, weights, offs=torch.tensor([2, 6], dtype=torch.int32))
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this torch has no such kernel here: {str(error).partition(chr(10))[0]}")
    assert torch.allclose(found, torch.cat([x[:2] @ weights[0], x[2:] @ weights[1]]), atol=0.1, rtol=0.02)


def test_the_private_product_comes_first():
    assert kernels.GROUPED[0] is torch._grouped_mm


def test_nests_are_taken_apart_and_put_together():
    nest = {"a": [torch.ones(1), 2], "b": (None, "x")}
    leaves, spec = pytree.tree_flatten(nest)
    assert pytree.tree_unflatten(leaves, spec) == nest and pytree.tree_leaves(nest) == leaves
    assert pytree.tree_map(type, nest)["a"] == [Tensor, int]
    assert pytree.tree_map_only(int, lambda n: n + 1, nest)["a"][1] == 3
