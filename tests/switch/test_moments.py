"""Optimizer state through the switch: every optimizer of torch, against the same memory worked out by hand, and against the
dense weight itself where the two must go on alike.
"""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxrank
from fxrank.passes.pairs.linear import LowRankLinear
from fxrank.switch.apply_plan import apply_plan
from fxrank.switch.moments import NoProjectionError, projected
from fxrank.switch.optimizer import swap_parameters

ROWS, COLS, RANK = 7, 5, 3
OPTIONS = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adam": {"amsgrad": True},
}
NOT_HERE = {
    "LBFGS": "refused: several evaluations in one step",
    "SparseAdam": "refused layer by layer: the second factor's gradient is dense",
}
EVERY = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and cls is not torch.optim.Optimizer and name not in NOT_HERE
)


def built(name, parameters):
    return getattr(torch.optim, name)(parameters, lr=0.01, **OPTIONS.get(name, {}))


def test_every_optimizer_of_torch_is_here():
    assert {
        "SGD",
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "Adamax",
        "Adadelta",
        "Adagrad",
        "Adafactor",
        "ASGD",
        "RMSprop",
    } < set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_with_the_identity_as_one_factor_the_other_goes_on_as_the_weight_would(name):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(ROWS, COLS, dtype=torch.float64))
    dense = nn.Sequential(nn.Identity(), nn.Linear(COLS, ROWS, bias=False).double())
    dense[1].weight = weight
    twin = nn.Parameter(weight.detach().clone())
    gradients = torch.randn(9, ROWS, COLS, dtype=torch.float64)
    mine, theirs = built(name, [weight]), built(name, [twin])
    for gradient in gradients[:5]:
        for parameter, optimizer in ((weight, mine), (twin, theirs)):
            parameter.grad = gradient.clone()
            optimizer.step()

    replacements = apply_plan(dense, fxrank.plan_of(_full(dense)))
    pair = dense[1]
    pair.fill(torch.eye(COLS, dtype=torch.float64)[None], weight.detach()[None].clone())
    notes = swap_parameters(mine, replacements)
    if name == "Rprop":
        assert notes == ["1: optimizer state 'step_size' of Rprop has no known projection; its factors start fresh"]
        return
    assert notes == []
    pair.u.weight.requires_grad_(False)
    for gradient in gradients[5:]:
        pair.v.weight.grad, twin.grad = gradient.clone(), gradient.clone()
        mine.step()
        theirs.step()
        torch.testing.assert_close(pair.v.weight, twin, rtol=1e-9, atol=1e-12)


def _full(dense):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # full rank is above break-even
        return fxrank.factorize(dense, torch.randn(2, COLS, dtype=torch.float64), rank=1.0, include="1")


def a_pair(seed=0):
    torch.manual_seed(seed)
    dense = nn.Linear(COLS, ROWS).double()
    pair = LowRankLinear(dense, RANK)
    pair.fill_from(dense.weight)
    return dense.weight.shape, pair, pair.u.weight.detach(), pair.v.weight.detach()


def test_squares_of_updates_and_maxima_of_magnitudes():
    shape, pair, u, v = a_pair()
    m = torch.rand(shape, dtype=torch.float64)
    new_u, new_v = projected({"acc_delta": m, "exp_inf": m, "step": torch.tensor(4.0)}, shape, pair)
    torch.testing.assert_close(new_u["acc_delta"], v.square().T @ m)
    torch.testing.assert_close(new_v["acc_delta"], m @ u.square().T)
    torch.testing.assert_close(new_u["exp_inf"], (v.square().T @ m.square()).sqrt())
    torch.testing.assert_close(new_v["exp_inf"], (m.square() @ u.square().T).sqrt())
    assert new_u["step"] == new_v["step"] == 4.0


@pytest.mark.parametrize(
    ("row", "column", "kept"), [("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False)]
)
def test_means_of_squares_are_those_of_the_projected_squares(row, column, kept):
    shape, pair, u, v = a_pair()
    r, c = torch.rand(ROWS, 1, dtype=torch.float64), torch.rand(1, COLS, dtype=torch.float64)
    squares = r @ c / r.mean()
    state = {row: r if kept else r[:, 0], column: c if kept else c[0], "step": 3}
    for new, expected in zip(
        projected(state, shape, pair), (v.square().T @ squares, squares @ u.square().T), strict=True
    ):
        assert set(new) == {row, column, "step"}
        torch.testing.assert_close(new[row], expected.mean(1, keepdim=kept))
        torch.testing.assert_close(new[column], expected.mean(0, keepdim=kept))


def test_an_average_of_the_weight_stays_one():
    shape, pair, u, v = a_pair()
    near = (v + 1e-3 * torch.randn_like(v)) @ (u + 1e-3 * torch.randn_like(u))
    new_u, new_v = projected({"ax": near}, shape, pair)
    before, after = (v @ u - near).norm(), (new_v["ax"] @ new_u["ax"] - near).norm()
    assert after < before / 20


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from(["exp_avg", "momentum_buffer"]))
def test_linear_memory_is_the_sum_of_the_factors_own_gradients(seed, key):
    shape, pair, u, v = a_pair(seed)
    gradients = torch.randn(4, *shape, dtype=torch.float64)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    memory = torch.einsum("k,kij->ij", weights, gradients)
    new_u, new_v = projected({key: memory}, shape, pair)
    torch.testing.assert_close(new_u[key], sum(w * (v.T @ g) for w, g in zip(weights, gradients, strict=True)))
    torch.testing.assert_close(new_v[key], sum(w * (g @ u.T) for w, g in zip(weights, gradients, strict=True)))


def test_unknown_entries_are_named():
    shape, pair, _, _ = a_pair()
    for state in ({"preconditioner": torch.zeros(shape)}, {"exp_avg": torch.zeros(3, 3)}):
        with pytest.raises(NoProjectionError, match=f"^{next(iter(state))}$"):
            projected(state, shape, pair)


def test_half_precision_memory_stays_in_half_precision():
    shape, pair, u, _ = a_pair()
    memory = torch.randn(shape, dtype=torch.bfloat16)
    new_u, new_v = projected({"exp_avg": memory}, shape, pair)
    assert new_u["exp_avg"].dtype == new_v["exp_avg"].dtype == torch.bfloat16
    torch.testing.assert_close(new_v["exp_avg"].double(), memory.double() @ u.T, rtol=1e-2, atol=1e-2)
