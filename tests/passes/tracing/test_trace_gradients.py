"""A graph has the gradients of its model: where the forward switches them off, reverses or invents them."""

import copy

import pytest
import torch
from gradient_nets import (
    EXACT,
    NO_GRAPH,
    Derived,
    Energy,
    Mapped,
    Net,
    OnInsideOff,
    Reverse,
    SwitchedOff,
    WeightsByHand,
)
from torch import nn

import fxrank
from fxrank.passes.tracing import proof
from fxrank.torch_private.kernels import set_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # what that kind of checkpoint says
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),  # by torch's own jvp
]


def gradients(model, x):
    """Of every parameter and of the input, None where there is none."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(x.requires_grad)
    outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.square().mean() for o in outputs).backward()
    return [t.grad for t in (*model.parameters(), x)]


def check_gradients(model, graph, x):
    expected, found = gradients(model, x), gradients(graph, x)
    assert any(g is not None and g.any() for g in expected)
    for a, b in zip(expected, found, strict=True):
        # The same operations in the same order; a sum over paths may be taken in another.
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("needs", [False, True], ids=["", "input needs gradient"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", EXACT, ids=lambda c: c.__name__)
def test_the_graph_has_the_gradients_of_the_model(kind, training, needs):
    model = kind().train(training)
    with torch.set_grad_enabled(training):  # the caller's choice does not matter
        gm = fxrank.trace(model, torch.randn(3, 6, requires_grad=needs))
        assert torch.is_grad_enabled() is training
    assert gm.leaves == {} and gm.notes == []
    assert {n.target for n in gm.graph.nodes if n.op == "call_module"} >= {"body", "head"}
    for mode in (training, not training):
        model.train(mode)
        check_gradients(model, gm.train(mode), torch.randn(5, 6, requires_grad=needs))
    with torch.no_grad():
        x = torch.randn(4, 6)
        assert torch.equal(gm(x), model(x)) and not gm(x).requires_grad
    clone = copy.deepcopy(gm)
    clone.graph.eliminate_dead_code()
    clone.recompile()
    check_gradients(model, clone, torch.randn(5, 6, requires_grad=needs))
    assert torch.is_grad_enabled()


def says(text, reason, kind):
    """In torch 2.8 an `apply` that was taken along before the trace takes no proxies, and says so first."""
    return reason in text or ("Taken" in kind.__name__ and "unwrap_if_dead" in text)


@pytest.mark.parametrize(("kind", "reason"), NO_GRAPH, ids=lambda c: getattr(c, "__name__", ""))
def test_what_no_graph_can_do_is_one_node(kind, reason):
    model = kind()
    gm = fxrank.trace(model, torch.randn(3, 6))
    assert list(gm.leaves) == [""] and says(gm.leaves[""], reason, kind)
    check_gradients(model, gm, torch.randn(5, 6))
    inside = {Mapped: set(), Derived: {"head"}}.get(kind, {"body", "head"})
    assert set(gm.regions) == inside
    aside = ", ".join(sorted({"body", "head"} - inside))
    assert gm.notes == ([f"not looked into, because torch.func (vmap, grad, jvp) calls them: {aside}"] if aside else [])


class InAPart(Net):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def middle(self, h):
        return torch.tanh(self.part(h)[..., :1]) * h


@pytest.mark.parametrize(("kind", "reason"), NO_GRAPH, ids=lambda c: getattr(c, "__name__", ""))
def test_the_part_that_does_it_is_one_node(kind, reason):
    if kind in (Energy, WeightsByHand) or "Identity" in kind.__name__:
        pytest.skip("two outputs; or found in the proof only, which takes the whole model")
    model = InAPart(kind())
    gm = fxrank.trace(model, torch.randn(3, 6))
    assert list(gm.leaves) == ["part"] and says(gm.leaves["part"], reason, kind)
    assert len(gm.regions) + len(gm.notes) == 2 - (kind is Mapped)
    check_gradients(model, gm, torch.randn(5, 6))


def switches(gm):
    return [n.args[0] for n in gm.graph.nodes if n.target is set_gradients]


def test_the_graph_switches_as_the_forward_does():
    gm = fxrank.trace(OnInsideOff(), torch.randn(3, 6))
    assert [str(n) for n in switches(gm)] == ["False", "is_grad_enabled"] * 2


class Tables(Net):
    """What needs no gradient is often made without: positions, masks, angles."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.rand(6))
        self.scale = nn.Parameter(torch.ones(6))

    @torch.no_grad()
    def angles(self, h, positions):
        mask = torch.arange(h.shape[-1], device=h.device) > 3
        return (positions[:, None] * self.frequencies).sin().to(h.dtype) * mask, h.argmax(-1), h > 0

    def forward(self, x, positions):
        h = self.body(x)
        angles, best, positive = self.angles(h, positions)
        return self.head(h * angles * self.scale * positive) + best[:, None]


def test_tables_made_without_gradients_need_no_switch():
    model, positions = Tables(), torch.arange(3)
    gm = fxrank.trace(model, (torch.randn(3, 6), positions))
    assert switches(gm) == [] and gm.leaves == {}
    x = torch.randn(3, 6)
    assert torch.equal(gm(x, positions), model(x, positions))


def test_a_graph_that_fails_leaves_the_gradients_on():
    gm = fxrank.trace(SwitchedOff(), torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="shapes"):
        gm(torch.randn(3, 7))
    assert torch.is_grad_enabled()


class Clipped:
    def __call__(self, module, given, taken):
        return tuple(g.clamp(-0.01, 0.01) for g in given)


def test_a_part_with_hooks_on_its_gradients_is_one_node():
    model = InAPart(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model.part.register_full_backward_hook(Clipped())
    gm = fxrank.trace(model, torch.randn(3, 6))
    assert gm.leaves == {"part": "TypeError: it has hooks on its gradients, which no graph calls"}
    assert set(gm.regions) == {"part.0"}
    check_gradients(model, gm, torch.randn(5, 6))
    other = InAPart(nn.Linear(6, 6))  # a node anyhow
    other.part.register_full_backward_hook(Clipped())
    gm = fxrank.trace(other, torch.randn(3, 6))
    assert gm.whole
    check_gradients(other, gm, torch.randn(5, 6))


def test_a_model_with_hooks_on_its_own_gradients_is_one_node():
    model = Net()
    model.register_full_backward_hook(Clipped())
    gm = fxrank.trace(model, torch.randn(3, 6, requires_grad=True))
    reason = "the graph's gradients do not come by BackwardHookFunction, as the model's do"
    assert gm.leaves == {"": reason} and set(gm.regions) == {"body", "head"}
    check_gradients(model, gm, torch.randn(5, 6, requires_grad=True))


def test_gradients_of_gradients():
    model = SwitchedOff()
    gm = fxrank.trace(model, torch.randn(3, 6))
    found = []
    for one in (model, gm):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        (first,) = torch.autograd.grad(one(x).square().sum(), one.head.weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), one.head.weight)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("change", ["cut", "reversed", "opened"])
def test_the_proof_finds_gradients_that_differ(change):
    """Whatever the tracer may overlook."""
    model = SwitchedOff() if change == "opened" else Net()
    gm = fxrank.trace(model, torch.randn(3, 6))
    (body,) = gm.graph.find_nodes(op="call_module", target="body")
    with gm.graph.inserting_after(body):
        if change == "opened":
            for node in reversed(gm.graph.find_nodes(op="call_function", target=set_gradients)):
                gm.graph.erase_node(node)
        else:
            function = Reverse.apply if change == "reversed" else torch.detach
            made = gm.graph.call_function(function, (body,))
            body.replace_all_uses_with(made, lambda user: user is not made)
    wrong = proof.differs(_interpreted(gm), model, (torch.randn(3, 6),), {}, [])
    assert (
        wrong
        == {
            "cut": "the graph's gradients do not come by body.bias, body.weight, as the model's do",
            "reversed": "the graph's gradients come by Reverse, which the model's do not",
            "opened": "the graph's gradients come by body.bias, body.weight, which the model's do not",
        }[change]
    )


def _interpreted(gm):
    class Interpreted(nn.Module):
        def forward(self, *inputs):
            return torch.fx.Interpreter(gm).run(*inputs)

    return Interpreted()
