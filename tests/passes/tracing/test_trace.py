"""The traced graph: it computes what the model does, at every size and in both modes, and the model is left as it was."""

import builtins
import dataclasses
import functools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from odd import ODD, Branch, Buffers, Plain
from programs import programs
from torch import fx, nn

import fxrank
from fxrank.passes.tracing.trace import trace


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


@settings(max_examples=60)
@given(network=programs())
def test_the_graph_computes_what_the_model_does_and_knows_every_value(network):
    """Bit for bit, in both modes, at another batch size; each node's recorded value has the shape and dtype of the real one."""
    model, shape = network
    x = torch.randn(shape, dtype=torch.float64)
    gm = trace(model, x)
    assert torch.equal(gm(x), model(x))
    other = torch.randn(shape[0] + 2, *shape[1:], dtype=torch.float64)
    assert torch.equal(gm.eval()(other), model.eval()(other))

    class Compare(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if node.op != "output":
                recorded = node.meta["val"]
                assert (recorded.shape, recorded.dtype, recorded.device) == (value.shape, value.dtype, value.device)
            return value

    Compare(gm).run(x)
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is p for name, p in gm.named_parameters())


@pytest.mark.parametrize("kind", ODD, ids=lambda c: c.__name__)
def test_odd_models_at_another_batch_size(kind):
    model = kind()
    gm = trace(model, torch.randn(3, 4))
    x = torch.randn(7, 4)
    found = gm(x)
    updated = {name: buffer.clone() for name, buffer in gm.named_buffers()}
    for name in updated:
        model.get_buffer(name).zero_()
    assert torch.equal(found, model(x))
    buffers = dict(model.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in updated.items())


def test_the_graph_updates_the_buffers_that_the_forward_assigns():
    model = Buffers()
    gm = trace(model, torch.randn(3, 4))
    assert gm.mean is model.mean
    gm(torch.randn(5, 4))
    assert gm.calls == model.calls == 1
    assert gm.mean.any()
    assert model.table is None


class Outputs(nn.Module):
    """A leaf that returns a mapping."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return {"a": self.linear(x), "b": (x, x + 1)}


class ReadsMapping(Plain):
    def __init__(self):
        super().__init__()
        self.parts = Outputs()

    def middle(self, x):
        parts = self.parts(x)
        assert "a" in parts
        assert "c" not in parts
        assert list(parts) == list(parts.keys()) == ["a", "b"]
        total = sum(v if k == "a" else v[0] + v[1] for k, v in parts.items())
        (a, (b, c)), d = parts.values(), parts.get("a")
        return total + a + b + c + d + dict(**parts)["a"]


def test_mappings_that_leaves_return():
    model, x = ReadsMapping(), torch.randn(3, 4)
    gm = trace(model, x, leaf_modules=(Outputs,))
    assert "parts" in [n.target for n in gm.graph.nodes if n.op == "call_module"]
    assert torch.equal(gm(x), model(x))


class Cache:
    """An object no graph can hold."""

    def __init__(self, value):
        self.value = value


@dataclasses.dataclass
class Result:
    out: torch.Tensor
    extra: int = 3


class ReturnsObjects(Plain):
    def forward(self, x):
        return {"out": super().forward(x), "cache": Cache(x), "shape": x.shape, "result": Result(x), "text": "a"}


def test_outputs_that_no_graph_can_hold_are_none():
    model, x = ReturnsObjects(), torch.randn(3, 4)
    found, expected = trace(model, x)(x), model(x)
    assert torch.equal(found["out"], expected["out"])
    assert found["cache"] is None
    assert found["shape"] == expected["shape"] == (3, 4)
    assert isinstance(found["result"], Result)
    assert torch.equal(found["result"].out, x)
    assert found["text"] == "a"


class Dropping(nn.Module):
    """No matrix, and a look at the mode: stays one node."""

    def forward(self, x):
        return F.dropout(x, 0.5, training=self.training)


def test_a_module_that_asks_for_the_mode_follows_it_after_the_trace():
    model = nn.Sequential(nn.Linear(4, 4), Dropping(), nn.Linear(4, 4)).train()
    gm = trace(model, torch.randn(2, 4))
    x = torch.ones(2, 4)
    assert not torch.equal(gm(x), gm(x))
    gm.eval()
    assert torch.equal(gm(x), gm(x))
    assert torch.equal(gm(x), model.eval()(x))


class ManyInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, first, *more, flag=False, options=None, **extra):
        out = self.linear(first)
        for x in (*more, *extra.values()):
            out = out + x
        return out * 2 if flag and options["deep"][1] == "yes" else out


def test_placeholders_are_the_tensors_under_their_names():
    model, x = ManyInputs(), torch.randn(2, 4)

    def names(example):
        return [n.target for n in trace(model, example).graph.nodes if n.op == "placeholder"]

    assert names(x) == ["first"]
    assert names((x, x, x)) == ["first", "arg1", "arg2"]
    example = {"first": x, "flag": True, "options": {"deep": [1, "yes"]}, "late": x}
    assert names(example) == ["first", "late"]
    assert torch.equal(trace(model, example)(x, x), model(**example))


# -- what is left behind


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


@pytest.mark.parametrize("kind", [*ODD, Functional, Branch], ids=lambda c: c.__name__)
def test_python_and_torch_are_as_they_were_afterwards(kind):
    names = ["arange", "empty", "finfo", "full", "ones", "rand", "tensor", "zeros"]
    before = [builtins.isinstance, *(getattr(torch, n) for n in names), nn.Module.__call__, nn.Module.__getattr__]
    model = kind()
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        trace(model, torch.randn(3, 4))
    except fxrank.TraceError:
        assert kind is Branch
    after = [builtins.isinstance, *(getattr(torch, n) for n in names), nn.Module.__call__, nn.Module.__getattr__]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(isinstance(v, fx.Proxy) for m in model.modules() for v in vars(m).values())


class Remembers(Plain):
    """Keeps what it sees in nests of lists, dicts, tuples and sets."""

    def __init__(self):
        super().__init__()
        self.seen, self.nest = [], {"a": [], "b": ({}, [[]]), "c": OrderedDict()}
        self.nest["self"] = self.nest
        self.shapes = set()

    def middle(self, x):
        self.seen.append(x)
        self.nest["a"].append(x)
        self.nest["b"][0]["x"] = x
        self.nest["b"][1][0].append(x)
        self.nest["c"]["x"] = x
        self.shapes.add(len(x.shape))
        self.last = x
        return x


def test_caches_are_emptied_again_however_deep():
    model = Remembers()
    model.nest["c"]["kept"] = kept = object()
    trace(model, torch.randn(3, 4))
    assert model.seen == []
    assert model.nest["a"] == []
    assert model.nest["b"] == ({}, [[]])
    assert model.nest["c"] == {"kept": kept}
    assert model.nest["self"] is model.nest
    assert model.shapes == set()
    assert not hasattr(model, "last")


class DrawsNumbers(Plain):
    def middle(self, x):
        return x + torch.randn(4) + torch.rand(x.shape[0], 1) + torch.rand_like(x) + F.dropout(x, training=True)


def test_a_trace_draws_no_random_number_for_a_model_that_does():
    model, x = DrawsNumbers(), torch.randn(3, 4)
    state = torch.random.get_rng_state()
    gm = trace(model, x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(gm(x), gm(x))
    assert gm(torch.randn(7, 4)).shape == (7, 4)


def test_a_lazy_model_is_refused_until_it_has_been_called():
    model = nn.Sequential(nn.Linear(6, 8), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(2))
    with pytest.raises(
        fxrank.TraceError, match=r"'1\.weight' has no shape yet\. Call the lazy model once, on a batch,"
    ):
        trace(model, torch.randn(4, 6))
    assert type(model[1]) is nn.LazyLinear
    model(torch.randn(4, 6))
    assert trace(model, torch.randn(4, 6)).whole and model[1].in_features == 8
