"""Whatever is given, and whatever it is a model of: a right result, or an error of fxrank's own that says what to do."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_uses import OUTPUTS, PARTS, is_own
from torch import nn

import fxrank
from fxrank.passes.tracing.compare import largest_difference

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))

RAW = (KeyError, IndexError, AttributeError, NameError, RecursionError)

pytestmark = [
    pytest.mark.filterwarnings("ignore:ranks at or above break-even"),
    pytest.mark.filterwarnings("ignore:.*nested tensors"),
    pytest.mark.filterwarnings("ignore:.*is in beta state"),  # sparse rows, nested tensors
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore:.*hold NaN or infinity"),
    pytest.mark.filterwarnings("ignore:the factors must have gradients"),  # the steps here are of no loss
]


class Chain(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


@st.composite
def chains(draw):
    """Makes a model of one to three odd parts, the same at each call."""
    names = draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=3))
    last = draw(st.sampled_from([None, None, None, *OUTPUTS]))
    between, training = draw(st.booleans()), draw(st.booleans())

    def make():
        torch.manual_seed(1)
        parts = [nn.Linear(8, 8)] if between else []
        for name in names:
            parts += [PARTS[name](), nn.Linear(8, 8)] if between else [PARTS[name]()]
        if last is not None:
            parts.append(OUTPUTS[last]())
        model = parts[0] if len(parts) == 1 else Chain(parts)
        return model.train(training)

    make.__qualname__ = make.__name__ = f"{names} {last} {between} {training}"
    return make


class Stepping:
    """Trains one model by a session that switches at once, or after a step."""

    def __init__(self, **options):
        self.options = {"example_inputs": X, "total_steps": 3, "steps_per_epoch": 1} | options

    def __call__(self, model):
        # torch's own word for no parameter at all is none of fxrank's
        parameters = [*model.parameters()] or [torch.zeros(1, requires_grad=True)]
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        session = fxrank.LowRankSession.attach(model, optimizer, **self.options)
        for _ in range(2):
            optimizer.step()
        session.detach()


def attempt(call, *arguments):
    """The result, or None where fxrank refuses."""
    try:
        return call(*arguments)
    except Exception as error:
        if not is_own(error) or len(str(error)) < 30:  # a word alone says nothing
            raise
        return None


def outputs(model):
    with torch.no_grad():
        return model.eval()(X)


@settings(max_examples=60)
@given(make=chains())
def test_a_model_of_odd_parts_is_rewritten_exactly_or_refused(make, tmp_path_factory):
    graph = attempt(fxrank.trace, make(), X)
    model = make()
    exact = attempt(lambda: fxrank.factorize(model, X, rank=1.0, include="*"))
    assert graph is not None or exact is None  # what cannot run cannot be rewritten
    if exact is not None:
        expected, found = outputs(model), outputs(exact)
        if isinstance(expected, (torch.Tensor, dict)):
            # float32 through at most seven layers of width 8, one of them of weights near 1e19
            assert largest_difference(expected, found) <= 1e-4
            assert largest_difference(expected, outputs(fxrank.merge(exact))) <= 1e-4
        folder = tmp_path_factory.mktemp("odd")
        fresh = make()

        def saved_and_loaded():
            fxrank.save(exact, folder)
            return fxrank.load(fresh, folder)

        if attempt(saved_and_loaded) is not None and isinstance(expected, (torch.Tensor, dict)):
            assert largest_difference(found, outputs(fresh)) == 0
    attempt(lambda: fxrank.profile(make(), X, include="*"))
    for policy in (fxrank.Pufferfish(E=1, K=0, ratio=0.5), fxrank.SpectralInit(ratio=1.0), fxrank.Cuttlefish()):
        attempt(Stepping(policy=policy), make())


NAN = math.nan
ODD = [
    *(None, 0, 1, -1, 10**12, True, 0.0, 0.5, 1.0, 1.5, -0.5, NAN, math.inf, -math.inf, 1j, ...),
    *(
        "",
        "*",
        "1",
        "x",
        "re:(",
        "re:.*",
        "re:[",
        b"1",
        "channel",
        "spatial",
        "qkv",
        "cpu",
        "meta",
        "nowhere",
        "cuda:99",
    ),
    *([], (), {}, set(), [None], ["1", 3], {"1": 2}, {"1": NAN}, {"1": None}, {"x": 1}, {2: 2}, {None: 1}, {"1": "2"}),
    *(np.int64(2), np.float32(0.5), np.float64(NAN), torch.tensor(2), torch.tensor([1, 2]), X, range(3), slice(2)),
    *(object(), int, type, nn.Linear, nn.Linear(8, 8), re.compile("1"), re.compile(b"1"), torch.float32, torch.int64),
    *(torch.device("meta"), fxrank.Plan(policy="odd", layers=()), fxrank.SpectralInit(), X.to_sparse(), X.to("meta")),
]
"""What nobody means as an option."""


def plain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def factorize(**options):
    return fxrank.factorize(plain(), **({"example_inputs": X, "rank": 2} | options))


def profile(**options):
    return fxrank.profile(plain(), **({"example_inputs": X} | options))


def attach(**options):
    return Stepping(**({"policy": fxrank.Pufferfish(E=1, ratio=0.5)} | options))(plain())


def fixed(**options):
    return attach(policy=fxrank.Pufferfish(**({"E": 1, "ratio": 0.5} | options)))


def cuttlefish(**options):
    return attach(policy=fxrank.Cuttlefish(**options))


SELECTORS = ("include", "exclude")
OPTIONS = [
    *((factorize, name) for name in ("example_inputs", "rank", "form", *SELECTORS)),
    *((profile, name) for name in ("example_inputs", "device", "amp", "probe_ratio", "speedup_threshold", "form")),
    *((attach, name) for name in ("example_inputs", "total_steps", "steps_per_epoch", "policy", "amp", *SELECTORS)),
    (attach, "followers"),
    *((fixed, name) for name in ("E", "K", "ratio", "form", "frobenius_decay", "lr_scale", "rewarmup", "freeze")),
    *(
        (cuttlefish, name)
        for name in ("epsilon", "window", "latest", "speedup_threshold", "probe_ratio", "share", "xi")
    ),
    *((cuttlefish, name) for name in ("round_to", "samples", "rank_metric", "test", "min_ratio", "ratio", "k_rule")),
]
FUNCTIONS = {
    "trace": lambda value: fxrank.trace(value, X),
    "an example": lambda value: fxrank.trace(plain(), value),
    "factorize": lambda value: fxrank.factorize(value, X),
    "profile": lambda value: fxrank.profile(value, X),
    "merge": fxrank.merge,
    "plan_of": fxrank.plan_of,
    "stable_rank": fxrank.stable_rank,
    "save": lambda value: fxrank.save(value, "nowhere"),
    "load": lambda value: fxrank.load(value, "nowhere"),
    "attach": lambda value: fxrank.LowRankSession.attach(
        value, torch.optim.SGD(plain().parameters()), example_inputs=X, total_steps=2
    ),
    "optimizer": lambda value: fxrank.LowRankSession.attach(plain(), value, example_inputs=X, total_steps=2),
}


@settings(max_examples=250)
@given(option=st.sampled_from(OPTIONS), value=st.sampled_from(ODD))
def test_an_odd_option_is_taken_or_refused(option, value):
    function, name = option
    attempt(lambda: function(**{name: value}))


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(FUNCTIONS)), value=st.sampled_from(ODD))
def test_what_is_no_model_is_refused(name, value):
    attempt(FUNCTIONS[name], value)


@pytest.mark.parametrize("error", RAW)
@pytest.mark.parametrize("where", ["while it is traced", "always"])
def test_errors_of_the_forward_itself_come_as_ours(error, where):
    kind = "Raises" if where == "while it is traced" else "RaisesAlways"
    model = nn.Sequential(nn.Linear(8, 8), PARTS[f"{kind}{error.__name__}"]())
    if where == "always":
        with pytest.raises(fxrank.TraceError, match=rf"failed in '1' .* with {error.__name__}") as caught:
            fxrank.trace(model, X)
        assert isinstance(caught.value.__cause__, error)
    else:
        gm = fxrank.trace(model, X)
        # Too deep a recursion is not tried once more in a run of the part alone: the model is the node then.
        path, inside = ("", ["0", "1"]) if error is RecursionError else ("1", ["1.layer"])
        assert error.__name__ in gm.leaves[path] and list(gm.regions) == inside


@pytest.mark.parametrize("name", ["class", "in", "global", "a*", 'a"b', "é", "0"])
def test_modules_with_names_that_python_cannot_write(name):
    model = Named(name)
    gm = fxrank.trace(model, X)
    assert gm.whole and torch.equal(gm(X), model(X))
    small = fxrank.factorize(model, X, rank=2, include="*")
    assert set(fxrank.plan_of(small).R) == {"layer", f"parts.{name}"}


class Named(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layer, self.name = nn.Linear(8, 8), name
        self.parts = nn.ModuleDict({name: nn.Linear(8, 8)})

    def forward(self, x):
        return self.layer(self.parts[self.name](x))


def test_a_graph_that_fails_in_the_proof_is_not_printed(capfd):
    with warnings.catch_warnings(record=True) as heard:
        gm = fxrank.trace(PARTS["Generates"](), X)
    assert "batch size only" in gm.notes[0] and not heard
    assert capfd.readouterr() == ("", "")


def test_a_nested_input_and_numbers_of_eight_bits_are_named():
    from fxrank.passes.discovery.discover import discover

    for part, name, reason in (
        ("Nested", "layer", "nested tensor"),
        ("Bytes", "small", "float8_e4m3fn, with which nothing computes"),
    ):
        model = PARTS[part]()
        (layer,) = (one for one in discover(fxrank.trace(model, X), model) if one.name == name)
        assert not layer.supported and reason in layer.reason
