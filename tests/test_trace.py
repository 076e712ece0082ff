import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.trace import call_arguments, trace


class Nested(nn.Module):
    """Dict and tuple inputs, keywords, a decorated forward, shape tests, a cache, a counter."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)
        self.cache = {}
        self.register_buffer("calls", torch.zeros(()))

    def passing(function):  # noqa: N805 (a decorator)
        @functools.wraps(function)
        def wrapper(self, *args, **kwargs):
            return function(self, *args, **kwargs)

        return wrapper

    @passing
    def forward(self, batch, pair=None, *, scale=None):
        x = batch["x"]
        if x.shape[0] > 1 and x.dim() == 2 and len(pair) == 2:
            x = x.view(x.size(0), -1)
        self.cache["last"] = x
        self.calls += 1
        for extra in pair:
            x = x + extra
        if scale is not None:
            x = x * scale
        return {"out": self.norm(self.drop(self.linear(x))), "rows": x.shape[0]}


def test_nested_inputs_keywords_and_python_questions():
    model = Nested().eval()
    x, a, b, s = torch.randn(3, 4), torch.randn(4), torch.randn(4), torch.tensor(2.0)
    gm = trace(model, {"batch": {"x": x}, "pair": (a, b), "scale": s})
    names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    assert names == ["batch", "pair_0", "pair_1", "scale"]
    bigger = torch.randn(7, 4)
    expected = model({"x": bigger}, (a, b), scale=s)
    found = gm(bigger, a, b, s)
    assert torch.equal(found["out"], expected["out"])
    assert found["rows"] == expected["rows"] == 7
    assert all("val" in n.meta for n in gm.graph.nodes if n.op != "output")
    (node,) = gm.graph.find_nodes(op="call_module", target="linear")
    assert tuple(node.meta["val"].shape) == (3, 4)
    assert node.meta["nn_module_stack"]


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_in_the_model_and_no_random_number_is_drawn(training):
    model = Nested().train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = set(vars(model))
    state = torch.random.get_rng_state()
    trace(model, {"batch": {"x": torch.randn(3, 4)}, "pair": (torch.ones(4), torch.ones(4))})
    rng = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    torch.randn(3, 4)
    assert torch.equal(rng, torch.random.get_rng_state())
    assert model.cache == {}
    assert set(vars(model)) == attributes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert type(model.calls) is torch.Tensor


def test_the_graph_follows_train_and_eval():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    gm = trace(model.eval(), torch.randn(3, 4))
    x = torch.randn(5, 4)
    gm.train()
    torch.manual_seed(1)
    first = gm(x)
    model.train()
    torch.manual_seed(1)
    assert torch.equal(first, model(x))
    gm.eval()
    assert torch.equal(gm(x), model.eval()(x))


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), Branch())
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.inner(x))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


def test_data_dependent_control_flow_is_refused_with_the_module_and_the_fix():
    text = "failed in 'inner.1' (Branch) with TypeError: bool() of the tensor"
    with pytest.raises(fxrank.TraceError, match=re.escape(text)) as caught:
        trace(DataDependent(), torch.randn(2, 4))
    assert "leaf_modules" in str(caught.value)
    gm = trace(DataDependent(), torch.randn(2, 4), leaf_modules=(Branch,))
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["inner.0", "inner.1", "head"]


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(fxrank.TraceError, match=r"failed in .* with RuntimeError"):
        trace(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 5))


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


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        n = int(x.shape[1])
        y = F.linear(x, self.weight)
        y[:, 0] = 0
        return torch.cat([y, x[:, : n // 2]], 1), list(range(len(x.shape)))


def test_functions_indexing_and_numbers():
    model = Functional()
    x = torch.randn(2, 4)
    gm = trace(model, x)
    found, expected = gm(x), model(x)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
