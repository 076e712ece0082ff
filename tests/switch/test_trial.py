"""Models whose code asks what its parts are, or holds them aside: what a pair would change is left dense, with the reason."""

import functools
import re
import warnings

import pytest
import torch
from exact import full, randn
from nets import sgd, snapshot
from torch import nn

import fxrank
from fxrank.passes.model.asks import may_ask


class Three(nn.Module):
    """`(N, 8)` to `(N, 8)`: two plain layers around one that the code asks about."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.c(torch.tanh(self.middle(torch.tanh(self.a(x)))))


class ByClass(Three):
    def middle(self, x):
        return self.b(x) if isinstance(self.b, nn.Linear) else x


class ByName(Three):
    def middle(self, x):
        return self.b(x) * len(type(self.b).__name__)


class ByState(Three):
    def middle(self, x):
        return self.b(x) * self.b.state_dict()["weight"].mean()


class ByParameter(Three):
    def middle(self, x):
        return self.b(x) * self.get_parameter("b.weight").abs().mean()


class Penalty(Three):
    def middle(self, x):
        return self.b(x) * (1 + sum(p.abs().mean() for p in self.b.parameters()))


class Average(Three):
    """In training, `slow` follows `b`: an average of factors is none of weights."""

    def __init__(self):
        super().__init__()
        self.slow = nn.Linear(8, 8).requires_grad_(False)

    def middle(self, x):
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.slow.parameters(), self.b.parameters(), strict=True):
                    slow.lerp_(fast, 0.5)
        return self.b(x) + self.slow(x)


class Aside(Three):
    """Calls `b` through what only a closure of a copyable object holds."""

    class Hold:
        __slots__ = ("layer",)

        def __init__(self, layer):
            self.layer = layer

        def __reduce__(self):
            return type(self), (self.layer,)

    def __init__(self):
        super().__init__()
        self.held = self.Hold(self.b)

    def middle(self, x):
        return self.held.layer(x)


ASKING = [ByClass, ByName, ByState, ByParameter, Penalty, Average]


@pytest.mark.parametrize("kind", ASKING, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_asked_about_stays_dense_and_the_others_do_not(kind, training):
    model, x = kind().double().train(training), randn(5, 8)
    before = snapshot(model)
    small = full(model, x)
    assert snapshot(model) == before
    plan = fxrank.plan_of(small)
    assert set(plan.R) >= {"a", "c"}
    assert "b" not in plan.R
    assert plan.layer("b").reason.startswith(
        ("with a pair in its place the model ", "its weight is read past its layer")
    )
    for mode in (True, False):
        torch.testing.assert_close(small.train(mode)(x), model.train(mode)(x), rtol=1e-12, atol=1e-12)  # float64


@pytest.mark.parametrize("kind", ASKING, ids=lambda kind: kind.__name__)
def test_a_session_leaves_it_dense_too(kind):
    model, x = kind(), torch.randn(5, 8)
    optimizer = sgd(model)
    session = fxrank.LowRankSession.attach(
        model, optimizer, example_inputs=x, total_steps=9, policy=fxrank.SpectralInit(), include="*"
    )
    assert "b" not in session.plan.R
    assert "c" in session.plan.R
    assert session.plan.layer("b").reason.startswith(("with a pair in its place", "its weight is read past its layer"))
    model(x).sum().backward()
    assert model.b.weight.grad is not None


def test_what_goes_on_with_the_old_weight_is_seen_or_follows():
    """However it is held: either the pair computes, or the layer stays dense."""
    model, x = Aside().double(), randn(5, 8)
    small = full(model, x)
    small(x).sum().backward()
    part = small.b
    computing = part.u.weight if isinstance(part, fxrank.FactorPair) else part.weight
    assert computing.grad is not None


def test_a_layer_that_is_named_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"layer 'b' cannot be factorized: with a pair .* its outputs differ by"):
        fxrank.factorize(ByClass(), torch.randn(5, 8), rank={"b": 2})
    small = fxrank.factorize(ByClass(), torch.randn(5, 8), rank={"a": 2})
    assert fxrank.plan_of(small).R == {"a": 2}


def test_the_profile_names_it_too():
    found = fxrank.profile(ByClass(), torch.randn(5, 8), include="*")
    (reason,) = (layer.reason for layer in found.layers if layer.name == "b")
    assert reason.startswith("with a pair in its place the model computes something else: its outputs differ by")


CALLS = []


class Counting(Three):
    """Counts the calls of all copies."""

    def middle(self, x):
        CALLS.append(self)
        return self.b(x)


def test_code_that_asks_nothing_is_not_tried():
    model, x = Counting(), torch.randn(5, 8)
    assert not may_ask(model)
    CALLS.clear()
    fxrank.trace(model, x)
    once = len(CALLS)
    fxrank.factorize(model, x, rank=2)
    assert len(CALLS) == 2 * once


class Plain(Three):
    def middle(self, x):
        return self.b(x)


@pytest.mark.parametrize("held", [functools.partial(nn.Linear(2, 2)), [nn.Linear(2, 2)], {"a": nn.Linear(2, 2)}.get])
def test_what_may_hide_a_layer_is_looked_at(held):
    model = nn.Sequential(Plain(), nn.Linear(2, 2), nn.TransformerEncoderLayer(4, 2), nn.LSTM(2, 2))
    model[0].size, model[0].act, model[0].norm = (2, [3]), torch.relu, functools.partial(nn.LayerNorm, eps=1e-6)
    assert not may_ask(model)
    model[0].held = held
    assert may_ask(model)


def test_hooks_of_the_users_that_look_on_see_none_of_it():
    model, x, seen = ByClass(), torch.randn(5, 8), []
    for layer in (model.a, model.b):
        layer.register_forward_hook(lambda module, args, out: seen.append((type(module), out.isfinite().all())))
    fxrank.factorize(model, x, rank=2, include="*")
    assert all(finite for _, finite in seen)
    assert {kind for kind, _ in seen} == {nn.Linear}


class Uncopyable:
    def __deepcopy__(self, memo):
        raise RuntimeError("there is one of me")


def test_a_model_that_cannot_be_copied_is_trained_as_before_with_a_note():
    model = Plain()
    model.held = Uncopyable()
    session = fxrank.LowRankSession.attach(
        model, sgd(model), example_inputs=torch.randn(5, 8), total_steps=9, policy=fxrank.SpectralInit()
    )
    assert session.plan.R
    assert any("not tried" in note and "there is one of me" in note for note in session.notes)


class Unlike(Three):
    """Never computes the same twice, whatever the seed."""

    calls = 0

    def middle(self, x):
        if isinstance(x, torch.Tensor):
            type(self).calls += 1
        return self.b(x) * (1 + 0.1 * (type(self).calls % 7))


def test_a_model_that_never_computes_the_same_is_no_reason():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = fxrank.factorize(Unlike(), torch.randn(5, 8), rank=2, include="*")
    assert len(fxrank.plan_of(small).R) == 3


def test_a_small_step_of_an_average_is_seen():
    """It moves the outputs by less than a trace's proof would mind, and goes on in every step."""

    class Slowly(Average):
        def middle(self, x):
            if self.training:
                with torch.no_grad():
                    for slow, fast in zip(self.slow.parameters(), self.b.parameters(), strict=True):
                        slow.lerp_(fast, 1e-6)
            return self.b(x) + self.slow(x)

    plan = fxrank.plan_of(full(Slowly().double().train(), randn(5, 8)))
    assert set(plan.R) == {"a", "c"}


class Steps(nn.Module):
    """Runs whatever in it is a `Linear`."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                x = torch.tanh(module(x))
        return x


@pytest.mark.parametrize("form", ["channel", "gauge"])
def test_a_factor_that_is_the_layer_at_full_rank_hides_nothing(form):
    """In form "gauge" the first one is then."""
    torch.manual_seed(0)
    with pytest.warns(
        fxrank.NothingFactorizedWarning, match="with a pair in its place the model computes something else"
    ):
        fxrank.factorize(Steps(), torch.randn(3, 8), rank=0.5, include="*", form=form)


class Counts(nn.Module):
    """Multiplies with the number of its layer's buffers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) * (1 + len(list(self.layer.buffers())))


@pytest.mark.parametrize(("form", "kept"), [("channel", False), ("gauge", True), ("auto", True)])
def test_the_buffer_of_a_basis_is_seen_by_code_that_counts_buffers(form, kept):
    torch.manual_seed(0)
    target = {"target_params": 0.7} if form == "auto" else {"rank": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxrank.NothingFactorizedWarning)
        warnings.filterwarnings("ignore", "ranks at or above break-even")
        if kept and form == "auto":
            with pytest.raises(fxrank.BudgetError):
                fxrank.factorize(Counts(), torch.randn(3, 8), include="*", form=form, **target)
            return
        small = fxrank.factorize(Counts(), torch.randn(3, 8), include="*", form=form, **target)
    (decision,) = fxrank.plan_of(small).layers
    assert (decision.rank is None) == kept
    assert not kept or "computes something else" in decision.reason


class Rounded(nn.Module):
    """What comes in is rounded away: the nearest of four codes goes out, with the gradient of what came in."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", 10 * torch.randn(4, 8))

    def forward(self, y):
        codes = self.codes[torch.cdist(y.detach(), self.codes).argmin(-1)]
        return y + (codes - y).detach()


class TakesPlain(nn.Module):
    """Takes plain layers for a little less than others, which the codes do not show."""

    def __init__(self):
        super().__init__()
        self.inner, self.round = nn.Linear(8, 8), Rounded()

    def forward(self, x):
        return self.round(self.inner(x) * (0.999 if type(self.inner) is nn.Linear else 1.0))


class Averaged(nn.Module):
    """The slow layer follows the fast one's weight, which shows in later calls only."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.fast(x) + self.slow(x)
        if self.training:
            with torch.no_grad():
                for slow, fast in zip(self.slow.parameters(), self.fast.parameters(), strict=True):
                    slow.lerp_(fast, 0.01)
        return y


def at_full_rank(model):
    with pytest.warns(fxrank.NothingFactorizedWarning) as told:
        small = fxrank.factorize(model, torch.randn(3, 8), rank=1.0, include="*")
    return small, str(told[0].message)


def test_what_the_outputs_hide_is_seen_inside():
    torch.manual_seed(0)
    _, reasons = at_full_rank(TakesPlain())
    assert re.search(r"computes something else: what its parts see and return differ by 1\.0e-03 relative", reasons)


def test_what_shows_in_later_calls_is_seen_in_the_weights():
    torch.manual_seed(0)
    model = Averaged().train()
    small, _ = at_full_rank(model)
    x = torch.randn(5, 8)
    model(x), small(x)
    torch.testing.assert_close(small.slow.weight, model.slow.weight)
    torch.testing.assert_close(small(x), model(x))


class BesideScript(nn.Module):
    """Asks what a layer is, beside a part that takes no hooks."""

    def __init__(self):
        super().__init__()
        self.layer, self.script = nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8))

    def forward(self, x):
        return self.script(torch.tanh(self.layer(x) if isinstance(self.layer, nn.Linear) else x))


def test_a_script_beside_a_layer_does_not_keep_it_from_being_tried():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", Warning)
        model = BesideScript()
    _, reasons = at_full_rank(model)
    assert re.search(r"layer \(linear\): with a pair in its place the model computes something else", reasons)
