"""What a trace does not follow: modules that ask for data, the regions inside them, errors, and calls that do not fit."""

import contextlib
import operator
import re

import pytest
import torch
from odd import Branch, Plain
from torch import nn
from torch.utils import _pytree as pytree

import fxrank
from fxrank.passes.model.calls import call_arguments, describe
from fxrank.passes.tracing.trace import trace


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Branch())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x))


def test_a_module_that_branches_on_data_is_one_node_and_what_it_calls_a_region():
    model, x = DataDependent(), torch.ones(2, 4)
    model.inner[0].weight.data.fill_(1)  # a positive sum: the branch is taken
    gm = trace(model, x)
    assert not gm.whole
    assert list(gm.leaves) == ["inner.1"]
    assert gm.leaves["inner.1"].startswith("TypeError: bool() of the tensor 'gt' needs its data")
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["inner.0", "inner.1", "head"]
    assert list(gm.regions) == ["inner.1.linear"]
    other = trace(model, x, leaf_modules=(Branch,))
    assert [n.target for n in other.graph.nodes if n.op == "call_module"] == ["inner.0", "inner.1", "head"]
    small = fxrank.factorize(model, x, rank=1)
    assert fxrank.plan_of(small).R == {"inner.1.linear": 1}


@pytest.mark.parametrize(
    ("question", "name"),
    [(bool, "bool"), (int, "int"), (float, "float"), (operator.index, "index")],
)
def test_questions_about_data_make_a_leaf(question, name):
    class Asks(Plain):
        def middle(self, x):
            return x * question(x.sum().long())

    model, x = Asks(), torch.randn(2, 4)
    gm = trace(model, x)
    assert f"TypeError: {name}() of the tensor 'long' needs its data" in gm.leaves[""]
    assert list(gm.regions) == ["first", "second"]
    assert all(torch.equal(a, b) for a, b in zip([gm(x)], [model(x)], strict=True))


class LooksAtData(nn.Module):
    """Keeps the positive rows only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.linear(x[x.sum(1) > 0])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.head = LooksAtData(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rows(x)), self.head(self.rows(torch.cat([x, x])))


def test_a_leaf_that_looks_at_data_is_known_from_a_real_run_each_time_it_is_called():
    model = Twice()
    x = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1], [2, 2, 2, 2]])
    gm = trace(model, x, leaf_modules=(LooksAtData,))
    first, second = gm.graph.find_nodes(op="call_module", target="rows")
    assert [tuple(n.meta["val"].shape) for n in (first, second)] == [(2, 4), (4, 4)]
    assert model.rows.seen == 0
    assert not model.rows._forward_hooks
    assert all(torch.equal(a, b) for a, b in zip(gm(x), model(x), strict=True))


# -- errors


class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("too long a\nstory")


class Deep(Plain):
    def __init__(self, inner):
        super().__init__()
        self.outer = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), inner)])

    def middle(self, x):
        return self.outer[0](x)


def test_errors_name_the_innermost_module_and_keep_the_cause():
    text = (
        "every operation of a traced model must be a graph node; Deep failed in 'outer.0.1' (Raises) with ValueError: "
        "too long a. Check that the example fits the model, or pass that module's class in leaf_modules to keep it as "
        "one node."
    )
    model = Deep(Raises())
    with pytest.raises(fxrank.TraceError, match=f"^{re.escape(text)}$") as caught:
        trace(model, torch.randn(2, 4))
    assert isinstance(caught.value.__cause__, ValueError)
    assert isinstance(caught.value, RuntimeError)


class CatchesThenFails(Plain):
    def forward(self, x):
        with contextlib.suppress(RuntimeError):
            self.second(x[:, :2])
        return self.first(x) if (x > 0).any() else x


def test_a_module_whose_error_was_caught_is_not_blamed():
    gm = trace(CatchesThenFails(), torch.ones(2, 4))
    (reason,) = gm.leaves.values()
    assert list(gm.leaves) == [""]
    assert "CatchesThenFails failed in its own forward with TypeError: bool()" in reason
    assert list(gm.regions) == ["first"]  # the call of `second` never ended


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(fxrank.TraceError, match=r"failed in .* with RuntimeError"):
        trace(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5))


# -- example calls


def test_call_arguments():
    two = DataDependent()
    x, y = torch.ones(2, 4), torch.ones(2)
    assert call_arguments(two, x) == ((x,), {})
    assert call_arguments(two, (x,)) == ((x,), {})
    (only,), kwargs = call_arguments(two, (x, y))  # a batch (inputs, targets)
    assert only is x
    assert kwargs == {}
    assert call_arguments(nn.Bilinear(4, 4, 2), (x, x)) == ((x, x), {})
    assert call_arguments(two, {"x": x}) == ((), {"x": x})
    with pytest.raises(
        TypeError, match=re.escape("the batch must fit TwoArguments.forward(a, b); got tuple(Tensor(2, 4) float32)")
    ):
        call_arguments(TwoArguments(), (x,))


class TwoArguments(DataDependent):
    def forward(self, a, b):
        return a + b


def test_describe():
    value = {"x": torch.zeros(2, 3), "y": (1, [torch.zeros((), dtype=torch.int64)])}
    assert describe(value) == "{'x': Tensor(2, 3) float32, 'y': tuple(int, list(Tensor() int64))}"
    assert len(pytree.tree_leaves(value)) == 3
