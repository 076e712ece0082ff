"""Remembered values are those that would have been computed."""

import operator
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.parametrizations import weight_norm

import fxrank
from fxrank.passes.discovery.discover import discover
from fxrank.passes.tracing.fake_values import Values
from fxrank.passes.tracing.trace import trace


def fake(values, *shape, dtype=torch.float32):
    return values.fake(torch.empty(shape, dtype=dtype))


def described(value):
    if isinstance(value, torch.Tensor):
        assert type(value) is FakeTensor
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad
    if isinstance(value, (tuple, list)):
        return type(value), [described(v) for v in value]
    return type(value), value


def counting(function):
    """The function, and how often it was called."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    counted.__module__ = "torch.nn.functional"
    return counted, calls


METHODS = [
    ("transpose", (0, 1)),
    ("flatten", (1,)),
    ("chunk", (2, -1)),
    ("unbind", (0,)),
    ("size", ()),
    ("dim", ()),
    ("to", (torch.float64,)),
    ("sum", ()),
    ("mul", (2,)),
    ("select", (0, 1)),
]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(METHODS),
            st.sampled_from([(2, 4), (3, 4, 5)]),
            st.sampled_from([torch.float32, torch.int64]),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_methods_give_the_same_the_second_time(calls):
    values = Values()
    for (name, args), shape, dtype in [*calls, *calls]:
        x = fake(values, *shape, dtype=dtype)
        found = values.of_method(name, (x, *args), {})
        assert described(found) == described(Values().of_method(name, (fake(Values(), *shape, dtype=dtype), *args), {}))


def test_equal_numbers_of_different_types_are_different():
    values = Values()
    x = fake(values, 3, dtype=torch.int64)
    dtypes = [values.of_function(torch.mul, (x, n), {}).dtype for n in (1, 1.0, True, 1, 1.0)]
    assert dtypes == [torch.int64, torch.float32, torch.int64, torch.int64, torch.float32]


def test_a_function_is_called_once_for_each_kind_of_argument():
    values = Values()
    function, calls = counting(F.relu)
    for shape in [(2, 3), (2, 3), (3, 2), (2, 3)]:
        assert values.of_function(function, (fake(values, *shape),), {}).shape == shape
    assert len(calls) == 2
    function.__module__ = "mine"  # it may do something else as well
    for _ in range(3):
        values.of_function(function, (fake(values, 2, 3),), {})
    assert len(calls) == 5


def test_what_changes_its_argument_is_done_each_time():
    values = Values()
    for _ in range(2):
        x = fake(values, 2, 3).clone()
        values.of_method("t_", (x,), {})
        assert x.shape == (3, 2)


def test_small_constants_keep_their_number():
    values = Values()
    for n in (3, 3, 4):
        with values.mode:
            number = torch.tensor(n)
        assert values.of_method("item", (number,), {}) == n


def test_layers_are_told_apart_by_all_they_hold():
    values, x = Values(), None
    x = fake(values, 2, 4, 6, 6)
    layers = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, dtype=torch.float64),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.BatchNorm2d(4).eval(),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 2, 1), nn.Flatten()),
    ]
    for layer in [*layers, *layers]:
        inputs = x.double() if any(p.dtype == torch.float64 for p in layer.parameters()) else x
        expected = layer(torch.zeros(inputs.shape, dtype=inputs.dtype))
        found = values.of_module(layer, (inputs,), {})
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert not found.requires_grad


def test_a_second_layer_of_the_same_make_is_not_computed(monkeypatch):
    values = Values()
    x = fake(values, 2, 4)
    values.of_module(nn.Linear(4, 3), (x,), {})
    monkeypatch.setattr(torch.func, "functional_call", None)
    assert values.of_module(nn.Linear(4, 3), (x,), {}).shape == (2, 3)
    hooked = nn.Linear(4, 3)
    hooked.register_forward_hook(lambda *_: None)
    for other in (hooked, nn.Linear(4, 3, bias=False)):
        with pytest.raises(TypeError):
            values.of_module(other, (x,), {})


def test_buffers_stay_as_they_are():
    values, norm = Values(), nn.BatchNorm1d(4)
    values.of_module(norm, (fake(values, 3, 4),), {})
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()


def test_elements_and_attributes_are_looked_up():
    values = Values()
    x, y = fake(values, 2), fake(values, 3)
    assert values.of_function(operator.getitem, ((x, y), 1), {}) is y
    assert values.of_function(getattr, (x, "shape"), {}) == (2,)
    assert values.of_function(operator.getitem, (fake(values, 4, 5), 2), {}).storage_offset() == 10
    assert values.of_function(operator.getitem, (fake(values, 4, 5), 2), {}).storage_offset() == 10


def test_empty_views_of_something():
    values = Values()
    for _ in range(2):
        x = fake(values, 10, 50)
        with values.mode:
            x = x.t()
        found = values.of_function(operator.getitem, (x, (slice(1, 3), slice(0, 0))), {})
        assert (found.shape, found.stride(), found.storage_offset()) == ((2, 0), (1, 50), 1)


class ReadsAside(nn.Module):
    """A weight that is read out of a container, past the module that has it."""

    def __init__(self, hold):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.held = hold(w=self.layer.weight)

    def forward(self, x):
        return self.layer(x) + torch.tanh(x) @ self.held["w"]


@pytest.mark.parametrize("hold", [dict, OrderedDict], ids=["dict", "OrderedDict"])
def test_a_weight_that_is_read_out_of_a_container_has_a_value(hold):
    model, x = ReadsAside(hold), torch.randn(3, 4)
    graph = trace(model, x)
    assert all("val" in node.meta for node in graph.graph.nodes if node.op != "output")
    names = [layer.name for layer in discover(graph, model)]
    assert names == ["layer"]
    small = fxrank.factorize(nn.Sequential(nn.Linear(4, 4), model), x, rank=1, include="*")
    assert small(x).shape == (3, 4)


def test_a_computed_weight_inside_attention_is_looked_at_in_silence():
    """Where warnings are errors, as they are here: torch looks for the gradient of a tensor that is no leaf."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    weight_norm(attention.out_proj)

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model, x = Attends(), torch.randn(2, 3, 8)
    assert trace(model, x).whole
    assert "attention.out_proj" in {layer.name for layer in discover(trace(model, x), model)}
