"""A layer that other things hold is still the layer that trains: whatever holds it has the pair after a rewrite."""

import functools
import warnings
import weakref
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxrank
from fxrank.passes.model.held import change_held
from fxrank.passes.pairs.base import FactorPair

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
Named = namedtuple("Named", "b")


@dataclass
class Data:
    b: object


@dataclass(frozen=True)
class Frozen:
    b: object


class Slots:
    __slots__ = ("__b",)

    def __init__(self, b):
        self.__b = b

    def get(self):
        return self.__b


class Calls:
    def __init__(self, b):
        self.b = b

    def __call__(self, x):
        return self.b(x)

    def run(self, x):
        return self.b(x)


class Aside(nn.Module):
    """In a list, so that it is no child."""

    def __init__(self, b):
        super().__init__()
        self.held = [b]


def closure(b):
    return lambda x: b(x)


def closure_over_a_list(b):
    layers = [b]
    return lambda x: layers[0](x)


def decorated(b):
    @functools.wraps(F.relu)
    def run(x, *, layer=b):
        return layer(x)

    return run


def default(b):
    return lambda x, layer=b: layer(x)


def chain(b):
    value = SimpleNamespace(next=None)
    first = value
    for _ in range(5):
        value.next = SimpleNamespace(next=None)
        value = value.next
    value.b = b
    return first


WAYS = {
    "list": (lambda b: [b], lambda held: held[0]),
    "tuple": (lambda b: (b,), lambda held: held[0]),
    "dict": (lambda b: {"b": b}, lambda held: held["b"]),
    "OrderedDict": (lambda b: OrderedDict(b=b), lambda held: held["b"]),
    "defaultdict": (lambda b: defaultdict(list, b=b), lambda held: held["b"]),
    "UserDict": (lambda b: UserDict(b=b), lambda held: held["b"]),
    "ChainMap": (lambda b: ChainMap({}, {"b": b}), lambda held: held["b"]),
    "key": (lambda b: {b: 1.0}, lambda held: next(iter(held))),
    "read-only": (lambda b: SimpleNamespace(of=lambda: MappingProxyType({"b": b})), lambda held: held.of()["b"]),
    "set": (lambda b: {b}, lambda held: next(iter(held))),
    "frozenset": (lambda b: frozenset({b}), lambda held: next(iter(held))),
    "deque": (lambda b: deque([b], maxlen=3), lambda held: held[0]),
    "namedtuple": (Named, lambda held: held.b),
    "dataclass": (Data, lambda held: held.b),
    "frozen dataclass": (Frozen, lambda held: held.b),
    "namespace": (lambda b: SimpleNamespace(b=b), lambda held: held.b),
    "slots": (Slots, lambda held: held.get()),
    "callable": (Calls, lambda held: held),
    "method of a holder": (lambda b: Calls(b).run, lambda held: held),
    "module aside": (lambda b: [Aside(b)], lambda held: held[0].held[0]),
    "partial": (functools.partial, lambda held: held),
    "partial's argument": (lambda b: functools.partial(lambda x, *, b: b(x), b=b), lambda held: held),
    "forward": (lambda b: b.forward, lambda held: held),
    "call": (lambda b: b.__call__, lambda held: held),
    "forward in a list": (lambda b: {"runs": [b.forward]}, lambda held: held["runs"][0]),
    "forward in a closure": (lambda b: closure(b.forward), lambda held: held),
    "forward in a partial": (lambda b: functools.partial(b.forward), lambda held: held),
    "closure": (closure, lambda held: held),
    "closure over a list": (closure_over_a_list, lambda held: held),
    "keyword default": (decorated, lambda held: held),
    "default": (default, lambda held: held),
    "weak reference": (weakref.ref, lambda held: held()),
    "weak values": (lambda b: weakref.WeakValueDictionary(b=b), lambda held: held["b"]),
    "far down": (chain, lambda held: held.next.next.next.next.next.b),
    "mixed": (lambda b: [{"x": (SimpleNamespace(b=OrderedDict(b=Named(b))),)}], lambda held: held[0]["x"][0].b["b"].b),
}


def net(hold, get, kind=nn.Linear):
    """Computes with `b` as it is held aside, and not as a child."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            if kind is nn.Linear:
                self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            else:
                self.a, self.b, self.c = nn.Conv1d(1, 8, 3), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 2, 3)
            self.held = hold(self.b)

        def forward(self, x):
            x = x if kind is nn.Linear else x[:, None]
            return self.c(F.relu(get(self.held)(F.relu(self.a(x)))))

    return Net()


def trains(pair, loss):
    assert isinstance(pair, FactorPair)
    loss.square().sum().backward()
    return all(p.grad is not None and p.grad.abs().sum() > 0 for p in (pair.u.weight, pair.v.weight, pair.bias))


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
@pytest.mark.parametrize("way", WAYS)
def test_a_session_trains_the_pair_through_whatever_holds_it(way, kind):
    model = net(*WAYS[way], kind)
    layer, weight = model.b, weakref.ref(model.b.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=X, total_steps=9, policy=fxrank.SpectralInit()
    )
    assert list(session.plan.R) == ["b"] and model.b is layer
    before = model.b.u.weight.detach().clone()
    assert trains(model.b, model(X))
    optimizer.step()
    assert not torch.equal(model.b.u.weight, before)
    assert weight() is None


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
@pytest.mark.parametrize("way", WAYS)
def test_factorize_and_merge_follow_and_copies_share_nothing(way, kind):
    model = net(*WAYS[way], kind)
    expected, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # above break-even
        small = fxrank.factorize(model, X, rank=1.0)
    assert list(fxrank.plan_of(small).R) == ["b"]
    torch.testing.assert_close(small(X), expected, rtol=1e-4, atol=1e-5)
    assert trains(small.b, small(X))
    dense = fxrank.merge(small)
    torch.testing.assert_close(dense(X), expected, rtol=1e-4, atol=1e-5)
    dense(X).sum().backward()
    assert dense.b.weight.grad is not None
    assert model.b.weight.grad is None and torch.equal(model(X), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_saved_and_loaded(way, tmp_path):
    small = fxrank.factorize(net(*WAYS[way]), X, rank=0.25)
    fxrank.save(small, tmp_path)
    loaded = fxrank.load(net(*WAYS[way]), tmp_path)
    assert torch.equal(loaded(X), small(X))
    assert trains(loaded.b, loaded(X))


# -- the walk


def changed(model, change=lambda value, where: value):
    seen = []
    change_held(model, lambda value, where: seen.append((where, value)) or change(value, where))
    return seen


def test_what_does_not_change_stays_the_same_object():
    model = net(*WAYS["mixed"])
    model.more = [OrderedDict(a=(1, Named(2))), {"b": frozenset({3})}, functools.partial(max, [4]), lambda: model.b]
    model.me = [model.more]
    model.more.append(model.me)
    before = [*model.more, model.more[0]["a"], model.held, model.held[0]]
    changed(model)
    assert all(
        a is b for a, b in zip(before, [*model.more, model.more[0]["a"], model.held, model.held[0]], strict=True)
    )


def test_a_thing_that_many_hold_is_gone_through_once_and_stays_one():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shared = ("x", [model[0]])
    model[0].of, model[1].of = shared, [shared]
    seen = changed(model, lambda value, where: model[1] if value is model[0] else value)
    assert sum(value is shared for _, value in seen) == 2 and sum(value is shared[1] for _, value in seen) == 1
    assert model[0].of is model[1].of[0] is shared and shared[1] == [model[1]]


def test_deep_nests_and_strange_things_are_left():
    model = nn.Sequential(nn.Linear(2, 2))
    deep = []
    for _ in range(100_000):
        deep = [deep]
    generator = (x for x in [model])
    model.deep, model.things = deep, [generator, torch.optim.SGD(model.parameters()), functools, nn.Linear, iter([1])]
    where = {name for name, value in changed(model) if isinstance(value, nn.Parameter)}
    assert not where
    while deep:  # freed level by level
        deep = deep.pop()


class Empty:
    __slots__ = ("never",)


def test_empty_slots_and_cells():
    model = nn.Sequential(nn.Linear(2, 2))

    def unfinished():
        return later

    if model is None:
        later = 1
    model.held = [Empty(), unfinished]
    changed(model)


def test_a_function_keeps_all_but_the_variable_that_changes():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(first)
    count = 0

    def run(x: int = 1, *, y: int = 2) -> object:
        """Says what it has."""
        nonlocal count
        count += 1
        return first, x, y

    run.mark = "kept"
    model.run = run
    changed(model, lambda value, where: second if value is first else value)
    made = model.run
    assert made() == (second, 1, 2) and run() == (first, 1, 2) and count == 2
    assert (made.__name__, made.__doc__, made.mark) == ("run", "Says what it has.", "kept")
    assert made.__annotations__ == run.__annotations__ and not hasattr(made, "__wrapped__")


def test_a_class_with_another_memory_stays_dense_with_the_reason():
    class Slotted(nn.Linear):
        __slots__ = ("extra",)

    model = nn.Sequential(nn.Linear(16, 16), Slotted(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    small = fxrank.factorize(model, X, rank=0.25)
    assert list(fxrank.plan_of(small).R) == ["2"]
    assert (
        "has no factor pair because objects of its class have another memory" in fxrank.plan_of(small).layer("1").reason
    )


def test_hooks_that_hold_a_layer_have_the_pair():
    model = net(*WAYS["list"])
    model.a.register_forward_hook(functools.partial(lambda module, args, out, layer: layer(out), layer=model.b))
    expected = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # above break-even
        small = fxrank.factorize(model, X, rank=1.0)
    torch.testing.assert_close(small(X), expected, rtol=1e-4, atol=1e-5)
    small(X).sum().backward()
    assert model.b.weight.grad is None and small.b.u.weight.grad is not None
