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
from fxrank.passes.pairs.base import FactorPair
from fxrank.passes.pairs.error import pair_error
from fxrank.passes.pairs.registry import make_pair, pair_class
from fxrank.passes.rewriting.install import pairs_in
from fxrank.passes.tracing.compare import largest_difference
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.optimizer import swap_parameters

# What is left is rounding in sums of at most a few hundred terms.
ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5}


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def wrapped(layers):
    return layers.map(lambda drawn: (Wrapped(drawn[0]), drawn[1]))


networks = st.one_of(wrapped(linears()), wrapped(convs()), programs())
networks32 = st.one_of(wrapped(linears(torch.float32)), wrapped(convs(torch.float32)))
seeds = st.integers(0, 100)


def rewritten(model, x, rank=1.0):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ranks at or above break-even")
        return fxrank.factorize(model, x, rank=rank, include="*")


def drawn_input(model, shape, seed):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=next(model.parameters()).dtype)


def assert_agree(found, expected):
    """Equal up to rounding, which is relative to the largest of the numbers that were added."""
    tolerance = ROUNDING[expected.dtype]
    scale = 1 + float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def run(model, x):
    """Outputs, input gradient, parameter gradients."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.backward(torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1)))
    return out.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}


def matrices(pair):
    """`U` and `V` as they stand."""
    return pair.unfold_u(pair.u.weight).detach().clone(), pair.unfold_v(pair.v.weight).detach().clone()


@settings(max_examples=600)
@given(network=st.one_of(networks, networks32), training=st.booleans(), seed=seeds)
def test_full_rank_rewrite_preserves_outputs_gradients_and_a_step(network, training, seed):
    model, shape = network
    model.train(training)
    x = drawn_input(model, shape, seed)
    small = rewritten(model, x)
    reference = copy.deepcopy(model)
    out, grad_x, grads = run(reference, x)
    small_out, small_grad_x, small_grads = run(small, x)
    assert_agree(small_out, out)
    assert_agree(small_grad_x, grad_x)
    pairs = pairs_in(small)
    weights = {n.removesuffix(".weight") for n, p in reference.named_parameters() if p.ndim >= 2}
    # named_modules gives a weight shared by two modules two pairs with the same factors.
    assert weights <= set(pairs)
    before = {path: matrices(pair) for path, pair in pairs.items()}
    for path in weights:
        pair, (u, v) = pairs[path], before[path]
        g = pair.unroll(pair, grads[f"{path}.weight"])
        assert_agree(small_grads[f"{path}.u.weight"], pair.fold_u(v.mT @ g))
        assert_agree(small_grads[f"{path}.v.weight"], pair.fold_v(g @ u.mT))
    others = {n: n.replace(".bias", ".v.bias") if n.rpartition(".")[0] in pairs else n for n in grads}
    others = {n: new for n, new in others.items() if n.removesuffix(".weight") not in weights}
    for name, new in others.items():
        assert_agree(small_grads[new], grads[name])
    # One step of SGD: W = V U moves by -lr (V Vᵀ G + G Uᵀ U) to first order, in full by the product of the two steps.
    lr = 1e-2
    torch.optim.SGD(reference.parameters(), lr=lr).step()
    torch.optim.SGD(small.parameters(), lr=lr).step()
    for path in weights:
        pair, (u, v) = pairs[path], before[path]
        g = pair.unroll(pair, grads[f"{path}.weight"])
        new_u, new_v = matrices(pair)
        assert_agree(new_v @ new_u, (v - lr * g @ u.mT) @ (u - lr * v.mT @ g))
    for name, new in others.items():
        assert_agree(small.get_parameter(new), reference.get_parameter(name))


@settings(max_examples=100)
@given(network=networks, share=st.floats(0.01, 1), seed=seeds)
def test_graph_and_module_tree_are_two_views_of_one_model(network, share, seed):
    model, shape = network
    model.eval()
    x = drawn_input(model, shape, seed)
    gm = fxrank.trace(model, x)
    plan = fxrank.plan_of(rewritten(model, x, share))
    replaced = apply_plan(model, plan, gm=gm)
    gm.graph.lint()
    assert torch.equal(gm(x), model(x))
    assert torch.equal(gm.train()(x), model.train()(x))
    targets = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    for r in replaced:
        assert f"{r.name}.u" in targets
        assert f"{r.name}.v" in targets
        assert r.name not in targets
        assert gm.get_parameter(f"{r.name}.u.weight") is model.get_parameter(f"{r.name}.u.weight")


@settings(max_examples=150)
@given(layer=st.one_of(linears(), convs()), share=st.floats(0.01, 1), seed=seeds)
def test_truncation_is_the_best_there_is(layer, share, seed):
    torch.manual_seed(seed)
    dense, _ = layer
    nn.init.normal_(dense.weight)
    rank = max(1, int(share * pair_class(dense).full_rank_of(dense)))
    error = pair_error(dense, make_pair(dense, rank))
    assert error.spectral <= error.bound + 1e-10  # float64, entries of order 1
    assert error.relative <= error.relative_bound + 1e-10


@settings(max_examples=60)
@given(network=programs(), share=st.floats(0.01, 1), seed=seeds)
def test_every_pair_of_a_truncated_model_is_within_its_bound(network, share, seed):
    model, shape = network
    small = rewritten(model, drawn_input(model, shape, seed), share)
    for path, pair in pairs_in(small).items():
        dense = model.get_submodule(path)
        assert pair.rank == max(1, int(share * pair.full_rank_of(dense) + 1e-9))
        error = pair_error(dense, pair)
        assert error.spectral <= error.bound + 1e-10  # float64, entries of order 1
        assert error.relative <= error.relative_bound + 1e-10


@given(layer=linears(), share=st.floats(0.01, 1), seed=seeds)
def test_linear_outputs_move_within_the_spectral_bound(layer, share, seed):
    dense, shape = layer
    x = drawn_input(dense, shape, seed)
    rank = max(1, int(share * min(dense.weight.shape)))
    sigma = torch.linalg.svdvals(dense.weight.detach())
    bound = sigma[rank] if rank < len(sigma) else torch.zeros(())
    moved = torch.linalg.vector_norm(make_pair(dense, rank)(x) - dense(x), dim=-1)
    assert (moved <= bound * torch.linalg.vector_norm(x, dim=-1) + 1e-10).all()  # float64, outputs of order 1


@settings(max_examples=60)
@given(network=networks, share=st.floats(0.01, 1), seed=seeds)
def test_rewritten_models_live_on_as_ordinary_modules(network, share, seed):
    model, shape = network
    model.eval()
    x = drawn_input(model, shape, seed)
    small = rewritten(model, x, share)
    assert type(small) is type(model)
    expected = small(x)
    assert torch.equal(copy.deepcopy(small)(x), expected)
    unpickled = pickle.loads(pickle.dumps(small))
    assert torch.equal(unpickled(x), expected)
    assert fxrank.plan_of(unpickled) == fxrank.plan_of(small)
    buffer = io.BytesIO()
    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    again = rewritten(model, x, share)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert not torch.equal(again(x), expected)
    again.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(again(x), expected)
    small.train()
    assert all(m.training for m in small.modules())
    small.eval()
    assert not any(m.training for m in small.modules())
    assert torch.equal(small(x), expected)
    merged = fxrank.merge(small)
    assert list(merged.state_dict()) == list(model.state_dict())
    assert largest_difference(expected, merged(x)) <= 1e-9  # float64; relative to outputs that may nearly cancel


@settings(max_examples=60)
@given(network=programs(), seed=seeds)
def test_a_second_rewrite_changes_nothing(network, seed):
    model, shape = network
    x = drawn_input(model, shape, seed)
    small = rewritten(model, x)
    twice = fxrank.factorize(small, x, rank=0.5, include="*")
    assert list(twice.state_dict()) == list(small.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(), small.state_dict().values(), strict=True))
    assert fxrank.plan_of(twice) == fxrank.plan_of(small)


@settings(max_examples=100)
@given(layer=st.one_of(linears(), convs()), momentum=st.sampled_from([0.0, 0.9]), seed=seeds)
def test_the_step_after_a_switch_goes_where_the_dense_optimizer_would(layer, momentum, seed):
    """With the dense optimizer's next update B = μ M + G, the pair's step is (V - lr B Uᵀ) (U - lr Vᵀ B)."""
    dense, shape = layer
    model = Wrapped(dense)
    x = drawn_input(model, shape, seed)
    lr = 1e-2
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for _ in range(2):
        step(model, optimizer)
    plan = fxrank.plan_of(rewritten(model, x))
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=lr, momentum=momentum)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weight = twin.layer.weight.detach().clone()
    step(twin, twin_optimizer)
    update = (weight - twin.layer.weight.detach()) / lr

    assert swap_parameters(optimizer, apply_plan(model, plan)) == []
    pair = model.layer
    assert isinstance(pair, FactorPair)
    u, v = matrices(pair)
    step(model, optimizer)
    b = pair.unroll(pair, update)
    new_u, new_v = matrices(pair)
    # B comes from a difference of weights, divided by lr.
    scale = 1 + float(b.abs().max())
    torch.testing.assert_close(new_u, u - lr * v.mT @ b, rtol=0, atol=1e-10 * scale)
    torch.testing.assert_close(new_v, v - lr * b @ u.mT, rtol=0, atol=1e-10 * scale)
    if pair.bias is not None:
        assert_agree(pair.bias, twin.layer.bias)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_projected_momentum_itself(momentum):
    dense = Wrapped(nn.Linear(6, 5, dtype=torch.float64))
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.05, momentum=momentum)
    x = torch.randn(8, 6, dtype=torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        dense(x).square().sum().backward()
        optimizer.step()
    old = optimizer.state[dense.layer.weight].get("momentum_buffer")
    replaced = apply_plan(dense, fxrank.plan_of(rewritten(dense, x)))
    assert swap_parameters(optimizer, replaced) == []
    pair = dense.layer
    if momentum:
        assert old is not None
        u, v = pair.u.weight.detach(), pair.v.weight.detach()
        torch.testing.assert_close(optimizer.state[pair.u.weight]["momentum_buffer"], v.T @ old, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[pair.v.weight]["momentum_buffer"], old @ u.T, rtol=1e-12, atol=1e-12)
    else:
        assert not optimizer.state[pair.u.weight]
