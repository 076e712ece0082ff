import pytest
import torch
from torch import nn

from fxrank.torch_private.compile import (
    compile_anew,
    compiles_recurrent,
    inside_compiled,
    is_compiled,
    leave_to_python,
    run_as_python,
)
from fxrank.torch_private.modules import COMPILED, own_children


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def graphs():
    return []


@pytest.fixture
def backend(graphs):
    def keep(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    return keep


def test_a_wrapper_is_known_and_looked_into(backend):
    layer = nn.Linear(2, 2)
    wrapper = torch.compile(layer, backend=backend)
    assert is_compiled(wrapper) and inside_compiled(wrapper) is layer
    layer.compile(backend=backend)
    assert not is_compiled(layer) and not is_compiled(nn.Sequential(wrapper))


def test_a_wrapper_calls_what_was_put_into_it(backend):
    wrapper, other, x = torch.compile(nn.Linear(2, 2), backend=backend), nn.Linear(2, 2), torch.randn(3, 2)
    wrapper(x)
    own_children(wrapper)[COMPILED] = other
    compile_anew(wrapper)
    assert torch.equal(wrapper(x), other(x))


class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x


@torch.no_grad()
def test_nothing_is_compiled_meanwhile_and_everything_afterwards(backend, graphs):
    marked = Doubles()
    marked.compile(backend=backend)
    model, x = nn.Sequential(torch.compile(nn.Linear(2, 2), backend=backend), marked), torch.randn(3, 2)
    with run_as_python(model):
        expected = model(x)
        assert graphs == []
    with pytest.raises(ValueError, match="ends early"), run_as_python(model):
        raise ValueError("ends early")
    assert torch.equal(model(x), expected) and len(graphs) == 2


def test_a_place_can_be_left_to_python(backend, graphs):
    def function(x):
        x = x + 1
        leave_to_python("for the test")
        return x * 2

    assert function(torch.ones(2)).tolist() == [4, 4]
    assert torch.compile(function, backend=backend)(torch.ones(2)).tolist() == [4, 4] and len(graphs) == 2


def test_whether_recurrent_layers_are_compiled_is_torch_s_option():
    assert compiles_recurrent() is torch._dynamo.config.allow_rnn
    with torch._dynamo.config.patch(allow_rnn=True):
        assert compiles_recurrent()
