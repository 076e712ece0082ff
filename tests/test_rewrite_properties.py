"""The promise of the project: a rewrite preserves outputs and gradients at full rank, and errs within the spectral bound below it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import convs, linears, programs
from torch import nn

import fxrank
from fxrank.optim import swap_parameters
from fxrank.passes.factorize import pairs_in
from fxrank.passes.factors import make_pair, pair_class
from fxrank.passes.verify import largest_difference, pair_error
from fxrank.surgery import apply_plan

# Everything is float64: what is left is rounding in sums of at most a few hundred terms.
ROUNDING = 1e-10


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


networks = st.one_of(
    linears().map(lambda d: (Wrapped(d[0]), d[1])),
    convs().map(lambda d: (Wrapped(d[0]), d[1])),
    programs(),
)


def full_rank(model, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks at or above break-even")
        return fxrank.factorize(model, x, rank=1.0, include="*")


def run(model, x, cotangent_seed=1):
    """Outputs, input gradient, parameter gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(cotangent_seed))
    out.backward(cotangent)
    return out.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}


@settings(max_examples=500)
@given(network=networks, training=st.booleans(), seed=st.integers(0, 100))
def test_full_rank_rewrite_preserves_outputs_gradients_and_a_step(network, training, seed):
    torch.manual_seed(seed)
    model, shape = network
    model.train(training)
    x = torch.randn(shape, dtype=torch.float64)
    small = full_rank(model, x)
    reference = copy.deepcopy(model)
    out, grad_x, grads = run(reference, x)
    small_out, small_grad_x, small_grads = run(small, x)
    assert largest_difference(out, small_out) <= ROUNDING
    assert largest_difference(grad_x, small_grad_x) <= ROUNDING
    pairs = pairs_in(small)
    assert pairs
    for name, gradient in grads.items():
        owner = name.rpartition(".")[0]
        if owner in pairs and name.endswith(".weight"):
            pair = pairs[owner]
            g = pair.unroll(pair, gradient)
            u, v = pair.unfold_u(pair.u.weight), pair.unfold_v(pair.v.weight)
            scale = 1 + gradient.abs().max()
            torch.testing.assert_close(
                small_grads[f"{owner}.u.weight"] / scale, pair.fold_u(v.mT @ g) / scale, rtol=0, atol=ROUNDING
            )
            torch.testing.assert_close(
                small_grads[f"{owner}.v.weight"] / scale, pair.fold_v(g @ u.mT) / scale, rtol=0, atol=ROUNDING
            )
        else:
            other = small_grads[name.replace(f"{owner}.", f"{owner}.v.") if owner in pairs else name]
            torch.testing.assert_close(
                other, gradient, rtol=ROUNDING, atol=ROUNDING * (1 + float(gradient.abs().max()))
            )
    # One step: W = VU moves by -lr (V Vᵀ G + G Uᵀ U) to first order, with lr² V Vᵀ... left over; checked exactly.
    before = {
        p: (m.unfold_u(m.u.weight).detach().clone(), m.unfold_v(m.v.weight).detach().clone()) for p, m in pairs.items()
    }
    lr = 1e-2
    torch.optim.SGD(small.parameters(), lr=lr).step()
    for path, pair in pairs.items():
        u, v = before[path]
        g = pair.unroll(pair, grads[f"{path}.weight"])
        expected = (v - lr * g @ u.mT) @ (u - lr * v.mT @ g)
        moved = pair.unfold_v(pair.v.weight) @ pair.unfold_u(pair.u.weight)
        torch.testing.assert_close(moved, expected, rtol=ROUNDING, atol=ROUNDING * (1 + float(expected.abs().max())))


@settings(max_examples=100)
@given(network=networks, seed=st.integers(0, 100))
def test_graph_and_module_tree_are_two_views_of_one_model(network, seed):
    torch.manual_seed(seed)
    model, shape = network
    model.eval()
    x = torch.randn(shape, dtype=torch.float64)
    gm = fxrank.trace(model, x)
    plan = fxrank.plan_of(full_rank(model, x))
    expected = model(x)
    replaced = apply_plan(model, plan, gm=gm)
    assert torch.equal(gm(x), model(x))
    assert largest_difference(expected, model(x)) <= ROUNDING
    targets = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    for r in replaced:
        assert f"{r.name}.u" in targets
        assert f"{r.name}.v" in targets
        assert r.name not in targets
        assert gm.get_parameter(f"{r.name}.u.weight") is model.get_parameter(f"{r.name}.u.weight")


@settings(max_examples=150)
@given(layer=st.one_of(linears(), convs()), share=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_truncation_is_the_best_there_is(layer, share, seed):
    torch.manual_seed(seed)
    dense, _ = layer
    nn.init.normal_(dense.weight)
    full = pair_class(dense).full_rank_of(dense)
    rank = max(1, int(share * full))
    error = pair_error(dense, make_pair(dense, rank))
    assert error.spectral <= error.bound + ROUNDING
    assert error.relative <= error.relative_bound + ROUNDING


@given(layer=linears(), share=st.floats(0.01, 1), seed=st.integers(0, 100))
def test_linear_outputs_move_within_the_spectral_bound(layer, share, seed):
    torch.manual_seed(seed)
    dense, shape = layer
    rank = max(1, int(share * min(dense.weight.shape)))
    pair = make_pair(dense, rank)
    x = torch.randn(shape, dtype=torch.float64)
    moved = torch.linalg.vector_norm(pair(x) - dense(x), dim=-1)
    assert (moved <= pair_error(dense, pair).bound * torch.linalg.vector_norm(x, dim=-1) + ROUNDING).all()


@settings(max_examples=60)
@given(network=networks, seed=st.integers(0, 100))
def test_rewritten_models_live_on_as_ordinary_modules(network, seed):
    torch.manual_seed(seed)
    model, shape = network
    model.eval()
    x = torch.randn(shape, dtype=torch.float64)
    small = full_rank(model, x)
    expected = small(x)
    assert type(small) is type(model)
    assert torch.equal(copy.deepcopy(small)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)
    assert fxrank.plan_of(pickle.loads(pickle.dumps(small))) == fxrank.plan_of(small)
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    again = full_rank(model, x)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(again(x), expected)
    small.train()
    assert all(m.training for m in small.modules())
    small.eval()
    assert torch.equal(small(x), expected)
    assert largest_difference(expected, fxrank.merge(small)(x)) <= ROUNDING


@settings(max_examples=60)
@given(network=programs(), seed=st.integers(0, 100))
def test_a_second_rewrite_changes_nothing(network, seed):
    torch.manual_seed(seed)
    model, shape = network
    x = torch.randn(shape, dtype=torch.float64)
    small = full_rank(model, x)
    twice = fxrank.factorize(small, x, rank=0.5, include="*")
    assert list(twice.state_dict()) == list(small.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), small.state_dict().values(), strict=True))
    assert fxrank.plan_of(twice) == fxrank.plan_of(small)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_projected_at_full_rank_continues_the_same_direction(momentum):
    torch.manual_seed(0)
    dense = Wrapped(nn.Linear(6, 5, dtype=torch.float64))
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=momentum)
    x = torch.randn(8, 6, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        dense(x).square().sum().backward()
        optimizer.step()
    old = optimizer.state[dense.layer.weight].get("momentum_buffer")
    replaced = apply_plan(dense, fxrank.plan_of(full_rank(dense, x)))
    assert swap_parameters(optimizer, replaced) == []
    pair = dense.layer
    if momentum:
        assert old is not None
        u, v = pair.u.weight.detach(), pair.v.weight.detach()
        torch.testing.assert_close(optimizer.state[pair.u.weight]["momentum_buffer"], v.T @ old, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[pair.v.weight]["momentum_buffer"], old @ u.T, rtol=1e-12, atol=1e-12)
    else:
        assert not optimizer.state[pair.u.weight]
