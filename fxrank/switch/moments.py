"""What an optimizer remembers of a weight, as the same memory of its factors.

With `W = V U` the gradients are `∂U = Vᵀ G`, `∂V = G Uᵀ` (`G` the gradient of `W`), linear in `G`. So what is a weighted
sum of past gradients, `M`, becomes `Vᵀ M` and `M Uᵀ` exactly. A running mean of squares `S` becomes `(V∘V)ᵀ S` and `S
(U∘U)ᵀ`: exact if the entries of `G` were uncorrelated, an approximation otherwise. Every other memory that has a
projection is brought to one of the two first:

- a mean kept beside the squares (centered RMSprop): it is the variance that is projected, so that the square stays above it;
- the squares of past updates (Adadelta): a step of one size for all entries would change the factors by `Vᵀ ΔW` and `ΔW Uᵀ`;
- a running maximum of magnitudes (Adamax): the root of its square's projection;
- squares kept as the means of rows and columns (Adafactor; Shazeer & Stern 2018): their rank-one product is projected and its
  means taken;
- an average of the weight itself (ASGD, Lookahead): fitted from the factors, as other averages are.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fxrank.passes.pairs.base import FactorPair
from fxrank.switch.averages import fitted
from fxrank.torch_private.dtensor import placed_like, whole

State = dict[str, Any]
_LINEAR = {"momentum_buffer", "exp_avg", "grad_avg", "prev"}
_SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"}
_MAGNITUDE = {"exp_inf"}
_AVERAGED = {"ax", "lookahead_slow_buff"}
_MEANS = (("row_var", "col_var", True), ("exp_avg_sq_row", "exp_avg_sq_col", False))
"""Names of the means of squares over rows and over columns, and whether their dimension is kept: torch's, transformers'."""


@torch.no_grad()
def gradients(gradient: Tensor, pair: FactorPair) -> tuple[Tensor, Tensor]:
    """The gradients of `u.weight` and `v.weight` of a pair from that of the dense weight: `Vᵀ G` and `G Uᵀ`."""
    gradient = whole(gradient.to_dense() if gradient.is_sparse else gradient)
    u, v = pair.unfold_u(whole(pair.u.weight.detach())), pair.unfold_v(whole(pair.v.weight.detach()))
    of_u, of_v = (
        torch.empty_like(factor, requires_grad=False).copy_(placed_like(part, factor))
        for factor, part in zip((pair.u.weight, pair.v.weight), _linear(gradient, pair, u, v), strict=True)
    )
    return of_u, of_v


class NoProjectionError(Exception):
    """An entry of the state has no known projection; the text is its name."""


@torch.no_grad()
def projected(state: State, shape: torch.Size, pair: FactorPair, smallest: int = 0) -> tuple[State, State]:
    """The states of `u.weight` and `v.weight` of a pair from that of the dense weight of this `shape`.

    Moments have the shape of their parameter; numbers and one-element tensors (step counts) are copied. `smallest`: up to
    this size of a dimension the optimizer keeps all squares, where it else keeps the means of rows and columns. Raises
    `NoProjectionError`.
    """
    for key, value in state.items():
        if _holds_tensors(value):
            raise NoProjectionError(key)
    state = {key: whole(value) if isinstance(value, Tensor) else value for key, value in state.items()}
    u, v = pair.unfold_u(whole(pair.u.weight.detach())), pair.unfold_v(whole(pair.v.weight.detach()))
    left = dict(state)
    for row, column, kept in _MEANS:
        if isinstance(state.get(row), Tensor) and isinstance(state.get(column), Tensor):
            of_rows, of_columns = (*shape[:-1], *([1] * kept)), (*shape[:-2], *([1] * kept), shape[-1])
            if (
                state[row].shape != of_rows or state[column].shape != of_columns
            ):  # of other dimensions than the last two
                raise NoProjectionError(row)
            if min(*pair.u.weight.shape, *pair.v.weight.shape) <= smallest:
                raise NoProjectionError(row)
            left[row] = _from_means(left.pop(row), left.pop(column), kept)
    new_u: State = {}
    new_v: State = {}
    for key, value in left.items():
        if not isinstance(value, Tensor) or (value.numel() == 1 and value.shape != shape):
            duplicate = torch.clone if isinstance(value, Tensor) else copy.deepcopy
            new_u[key], new_v[key] = duplicate(value), duplicate(value)
            continue
        if value.shape != shape or key not in _PROJECTIONS:
            raise NoProjectionError(key)
        moment = value
        if key == "square_avg" and "grad_avg" in state:
            moment = (value - state["grad_avg"].square()).clamp_(min=0)
        for new, factor, part in zip(
            (new_u, new_v), (pair.u.weight, pair.v.weight), _PROJECTIONS[key](moment, pair, u, v), strict=True
        ):
            # the strides of its parameter, the dtype of the old state
            new[key] = torch.empty_like(factor, dtype=value.dtype, requires_grad=False).copy_(placed_like(part, factor))
    for new in (new_u, new_v):
        if "square_avg" in new and "grad_avg" in new:
            new["square_avg"] += new["grad_avg"].square()
        for row, column, kept in _MEANS:
            if row in new and column in state:
                squares = new[row]
                new[row], new[column] = squares.mean(-1, keepdim=kept), squares.mean(-2, keepdim=kept)
    return new_u, new_v


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (list, tuple, set)) and any(isinstance(v, Tensor) or _holds_tensors(v) for v in value)


def _from_means(row: Tensor, column: Tensor, kept: bool) -> Tensor:
    if not kept:
        row, column = row.unsqueeze(-1), column.unsqueeze(-2)
    return row @ column / row.mean(-2, keepdim=True).clamp(min=torch.finfo(row.dtype).tiny)


def _linear(moment: Tensor, pair: FactorPair, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    moment = pair.unroll(pair, moment).to(u.dtype)
    return pair.fold_u(v.mT @ moment), pair.fold_v(moment @ u.mT)


def _squared(moment: Tensor, pair: FactorPair, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _linear(moment, pair, u.square(), v.square())


def _magnitude(moment: Tensor, pair: FactorPair, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    of_u, of_v = _squared(moment.square(), pair, u, v)
    return of_u.sqrt_(), of_v.sqrt_()


def _averaged(average: Tensor, pair: FactorPair, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    near_u, near_v = pair.in_basis(*fitted(pair.unroll(pair, average), u, v))
    return pair.fold_u(near_u), pair.fold_v(near_v)


_PROJECTIONS: dict[str, Callable[[Tensor, FactorPair, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    **dict.fromkeys(_LINEAR, _linear),
    **dict.fromkeys({*_SQUARED, *(row for row, _, _ in _MEANS)}, _squared),
    **dict.fromkeys(_MAGNITUDE, _magnitude),
    **dict.fromkeys(_AVERAGED, _averaged),
}
