"""The products of a factored weight (see `factored_weight`): what is done through the factors instead of with the dense matrix.

Operations of torch with one factored operand, and views that stay factored. What is not here, or answers
`NotImplemented`, is done with the dense product.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxrank.passes.pairs.reading.factored_weight import (
    PRODUCTS,
    CompiledWeight,
    Factored,
    FactoredWeight,
    ProductWeight,
    in_torchscript_trace,
)
from fxrank.torch_private.kernels import GROUPED


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


def factored(u: Tensor, v: Tensor, shape: tuple[int, ...], flipped: bool = False) -> FactoredWeight | CompiledWeight:
    """`V U`, stacked, as something that multiplies through the factors; see `Factored` for the shapes."""
    if torch.compiler.is_dynamo_compiling() or in_torchscript_trace():
        return CompiledWeight(u, v, shape, flipped)
    return FactoredWeight(u, v, shape, flipped)


def whole_product(u: Tensor, v: Tensor, shape: tuple[int, ...], fold: Callable[[Tensor], Tensor]) -> Tensor:
    """`fold(V U)`, which knows that it is a product."""
    if torch.compiler.is_dynamo_compiling() or in_torchscript_trace():
        return fold(v @ u)
    result = ProductWeight(u, v, shape)
    result.fold = fold
    return result


def _times(x: Tensor, w: Factored) -> Tensor:
    """`x @ W`, factor by factor."""
    if x.ndim == 1 and w.ndim == 3:
        return _times(x[None], w).squeeze(-2)
    return _rows(x, w.u, w.v, w.ndim == 2) if not w.flipped else _columns(x, w.u, w.v, w.ndim == 2)


def _rows(x: Tensor, u: Tensor, v: Tensor, blocks: bool) -> Tensor:
    """`x @ [V₁U₁; V₂U₂; …]`, or for a stack `x @ (V U)`."""
    if not blocks:
        return (x @ v) @ u
    if len(u) == 1:
        return (x @ v[0]) @ u[0]
    parts = torch.einsum("...go,gor->...gr", x.unflatten(-1, (len(v), -1)), v)
    return parts.flatten(-2) @ u.flatten(0, 1)


def _columns(x: Tensor, u: Tensor, v: Tensor, blocks: bool) -> Tensor:
    """`x @ [V₁U₁; V₂U₂; …]ᵀ`, or for a stack `x @ (V U)ᵀ`."""
    if not blocks:
        return (x @ u.mT) @ v.mT
    if len(u) == 1:
        return F.linear(F.linear(x, u[0]), v[0])
    parts = F.linear(x, u.flatten(0, 1)).unflatten(-1, (len(u), -1))
    return torch.einsum("...gr,gor->...go", parts, v).flatten(-2)


def _before(w: Factored, x: Tensor) -> Tensor:
    """`W @ x`, with the result in memory as torch's own lies: dropout, say, draws in that order."""
    if w.ndim == 2 and len(w.u) > 1:
        return _times(x.mT, _flip(w)).mT.contiguous()
    u, v = (w.u[0], w.v[0]) if w.ndim == 2 else (w.u, w.v)
    return u.mT @ (v.mT @ x) if w.flipped else v @ (u @ x)


def _linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, Factored) or isinstance(input, Factored) or weight.ndim != 2:
        return NotImplemented
    if not weight.flipped and len(weight.u) == 1:
        return F.linear(F.linear(input, weight.u[0]), weight.v[0], bias)
    out = _times(input, _flip(weight))
    return out if bias is None else out + bias


def _matmul(left: Any, right: Any, *, out: Any = None, **named: Any) -> Any:
    if out is not None or named or any(isinstance(w, Factored) and not w.is_matrix for w in (left, right)):
        return NotImplemented
    if isinstance(right, Factored) and not isinstance(left, Factored):
        return _times(left, right)
    if isinstance(left, Factored) and not isinstance(right, Factored):
        return _times(right, _flip(left)) if right.ndim == 1 else _before(left, right)
    return NotImplemented


def _rmatmul(right: Any, left: Any) -> Any:
    return _matmul(left, right)


def _addmm(bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None) -> Any:
    if isinstance(bias, Factored) or beta != 1 or alpha != 1:
        return NotImplemented
    product = _matmul(left, right, out=out)
    return product if product is NotImplemented else bias + product


def _grouped_mm(x: Any, weight: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """`x[group g] @ W[g]` for stacked experts."""
    if not isinstance(weight, Factored) or isinstance(x, Factored) or not weight.is_matrix or bias is not None:
        return NotImplemented
    first, second = (weight.u.mT, weight.v.mT) if weight.flipped else (weight.v, weight.u)
    rank = weight.u.shape[1]
    # The kernel wants rows of a multiple of 16 bytes.
    missing = -rank % (16 // weight.u.element_size())
    if missing:
        first, second = F.pad(first, (0, missing)), F.pad(second, (0, 0, 0, missing))
    middle = GROUPED[0](x, first, offs=offs)
    return GROUPED[0](middle, second, offs=offs, out_dtype=out_dtype)


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not isinstance(weight, Factored) or weight.flipped or max_norm is not None or weight.ndim != 2:
        return NotImplemented
    if len(weight.u) != 1 or scale_grad_by_freq:
        return NotImplemented
    out = F.embedding(input, weight.v[0], padding_idx, None, norm_type, False, sparse) @ weight.u[0]
    if padding_idx is None:
        return out
    return torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), out.detach(), out)


def _conv(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def conv(
        input: Any,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not isinstance(weight, Factored) or groups != 1 or len(weight.u) != 1 or weight.flipped:
            return NotImplemented
        kernel = weight.u[0].reshape(-1, *weight.shape[1:])
        middle = function(input, kernel, None, stride, padding, dilation)
        return function(middle, weight.v[0].reshape(*weight.v.shape[1:], *[1] * (weight.ndim - 2)), bias)

    return conv


def _einsum(equation: Any, *operands: Any) -> Any:
    """One factored operand of two, whose rows or columns are summed against the other: its letters are shared out to the factors,
    with a new letter for the rank.
    """
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    factored = [i for i, o in enumerate(operands) if isinstance(o, Factored)]
    if not isinstance(equation, str) or len(operands) != 2 or len(factored) != 1 or "." in equation:
        return NotImplemented
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    weight, other = operands[factored[0]], operands[1 - factored[0]]
    letters, rest = terms[factored[0]], terms[1 - factored[0]]
    stacked = weight.ndim == 3
    if not arrow or not weight.is_matrix or (not stacked and len(weight.u) != 1) or len(set(letters)) < weight.ndim:
        return NotImplemented
    batch, row, col = list(letters) if stacked else ["", *letters]
    if weight.flipped:
        row, col = col, row
    if (row in rest) == (col in rest) or {row, col} & set(rest) & set(output):
        return (
            NotImplemented  # nothing is multiplied with its rows or columns: numbers are picked, or matrices are mixed
        )
    rank = next(c for c in "zyxwvutsrqponmlkjihgfedcba" if c not in equation)
    u, v = (weight.u, weight.v) if stacked else (weight.u[0], weight.v[0])
    factors = [(f"{batch}{row}{rank}", v), (f"{batch}{rank}{col}", u)]
    if row not in rest:
        factors.reverse()  # the factor that shares the summed letter goes first, so that the middle is thin
    (first, one), (second, two) = factors
    # Two at a time: torch has its own order for three.
    middle = "".join(c for c in dict.fromkeys(rest + first) if c in output + second)
    return torch.einsum(f"{middle},{second}->{output}", torch.einsum(f"{rest},{first}->{middle}", other, one), two)


# -- views: what stays factored


def _flip(w: Factored) -> Any:
    shape = tuple(w.shape)
    return factored(w.u, w.v, (*shape[:-2], shape[-1], shape[-2]), not w.flipped)


def _t(w: Any) -> Any:
    return _flip(w) if w.ndim == 2 else NotImplemented


def _mt(w: Any) -> Any:
    return _flip(w) if w.is_matrix else NotImplemented


def _transpose(w: Any, dim0: int, dim1: int) -> Any:
    last = {w.ndim - 2, w.ndim - 1}
    return _flip(w) if w.is_matrix and {dim0 % w.ndim, dim1 % w.ndim} == last else NotImplemented


def _permute(w: Any, *dims: Any) -> Any:
    order = [int(d) % w.ndim for d in (dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims)]
    return _flip(w) if w.is_matrix and order == [*range(w.ndim - 2), w.ndim - 1, w.ndim - 2] else NotImplemented


def _cast(func: Callable[..., Tensor]) -> Callable[..., Any]:
    def cast(w: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(w, Factored):  # `x.to(W)`: its dtype and device are asked for
            like = next(a for a in (*args, *kwargs.values()) if isinstance(a, Factored))
            return w.to(dtype=like.dtype, device=like.device)
        return factored(func(w.u, *args, **kwargs), func(w.v, *args, **kwargs), tuple(w.shape), w.flipped)

    return cast


def _narrow(w: Factored, dim: int, start: int, length: int) -> Any:
    """A range of rows or columns, or of the stack."""
    shape = list(w.shape)
    dim %= w.ndim
    if not w.is_matrix or isinstance(start, Tensor):
        return NotImplemented
    start += w.shape[dim] if start < 0 else 0
    shape[dim] = length
    stop = start + length
    if w.ndim == 3 and dim == 0:
        return factored(w.u[start:stop], w.v[start:stop], tuple(shape), w.flipped)
    rows = (dim == w.ndim - 2) != w.flipped
    if not rows:
        return factored(w.u[..., start:stop], w.v, tuple(shape), w.flipped)
    if w.ndim == 3 or len(w.u) == 1:
        return factored(w.u, w.v[:, start:stop], tuple(shape), w.flipped)
    size = w.v.shape[1]  # rows of a block
    if start % size or stop % size or not length:
        return NotImplemented
    blocks = slice(start // size, stop // size)
    return factored(w.u[blocks], w.v[blocks], tuple(shape), w.flipped)


def _getitem(w: Any, index: Any) -> Any:
    if not isinstance(w, Factored):
        return NotImplemented
    if isinstance(index, slice) and index.step in (None, 1) and w.is_matrix:
        # by hand: dynamo of torch 2.8 cannot look into slice.indices
        start, stop = (_place(i, w.shape[0], default) for i, default in ((index.start, 0), (index.stop, w.shape[0])))
        return _narrow(w, 0, start, max(0, stop - start))
    whole = isinstance(index, Tensor) and index.ndim <= 1 and not (index.dtype == torch.bool and index.ndim == 0)
    if w.ndim == 3 and w.is_matrix and (whole or (isinstance(index, int) and not isinstance(index, bool))):
        u, v = w.u[index], w.v[index]
        if u.ndim == 2:
            return factored(u[None], v[None], tuple(w.shape[1:]), w.flipped)
        if u.ndim == 3:
            return factored(u, v, (len(u), *w.shape[1:]), w.flipped)
    return NotImplemented


def _place(index: Any, size: int, default: int) -> int:
    """Where a slice's end lies in `size` rows."""
    if index is None:
        return default
    return int(min(size, index) if index >= 0 else max(0, size + index))


def _split(w: Any, split_size: Any, dim: int = 0) -> Any:
    total = w.shape[dim]
    if isinstance(split_size, int):
        sizes = [min(split_size, total - i) for i in range(0, total, split_size)]
    else:
        sizes = list(split_size)
    parts, start = [], 0
    for size in sizes:
        parts.append(_narrow(w, dim, start, size))
        start += size
    return NotImplemented if any(p is NotImplemented for p in parts) else tuple(parts)


def _chunk(w: Any, chunks: int, dim: int = 0) -> Any:
    return _split(w, -(-w.shape[dim] // chunks), dim)


def _unbind(w: Any, dim: int = 0) -> Any:
    return (
        tuple(_getitem(w, i) for i in range(len(w.u))) if w.ndim == 3 and w.is_matrix and dim == 0 else NotImplemented
    )


def _detached(w: Any) -> Any:
    u, v, shape = w.u.detach(), w.v.detach(), tuple(w.shape)
    result = whole_product(u, v, shape, w.fold) if isinstance(w, ProductWeight) else factored(u, v, shape, w.flipped)
    if isinstance(result, FactoredWeight):
        result.write = w.write
    return result


def _attention(*args: Any, **kwargs: Any) -> Any:
    from fxrank.passes.pairs.reading.attention import multi_head_attention

    return multi_head_attention(*args, **kwargs)


def _lstm(*args: Any) -> Any:
    from fxrank.passes.pairs.reading.recurrent import lstm

    return lstm(*args)


def _gru(*args: Any) -> Any:
    from fxrank.passes.pairs.reading.recurrent import gru

    return gru(*args)


PRODUCTS.update(
    {
        F.linear: _linear,
        torch.lstm: _lstm,
        torch.gru: _gru,
        F.multi_head_attention_forward: _attention,
        **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, Tensor.matmul, Tensor.mm, Tensor.bmm), _matmul),
        **dict.fromkeys((Tensor.mv, Tensor.__matmul__), _matmul),
        Tensor.__rmatmul__: _rmatmul,
        **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
        torch.einsum: _einsum,
        F.embedding: _embedding,
        **{conv: _conv(conv) for conv in (F.conv1d, F.conv2d, F.conv3d)},
        **dict.fromkeys((torch.t, Tensor.t, _getter("T")), _t),
        **dict.fromkeys((_getter("mT"), Tensor.adjoint), _mt),
        **dict.fromkeys((torch.transpose, Tensor.transpose, Tensor.swapaxes), _transpose),
        **dict.fromkeys((torch.permute, Tensor.permute), _permute),
        **dict.fromkeys((torch.split, Tensor.split), _split),
        **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
        **dict.fromkeys((torch.unbind, Tensor.unbind), _unbind),
        **dict.fromkeys((torch.narrow, Tensor.narrow), _narrow),
        Tensor.__getitem__: _getitem,
        **dict.fromkeys((torch.detach, Tensor.detach, _getter("data")), _detached),
        **{f: _cast(f) for f in (Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type_as)},
        **{f: _cast(f) for f in (Tensor.cuda, Tensor.cpu)},
    }
)
ProductWeight.products.update(dict.fromkeys((torch.detach, Tensor.detach, _getter("data")), _detached))
PRODUCTS.update(
    dict.fromkeys(GROUPED[:1], _grouped_mm)
    | dict.fromkeys(GROUPED[1:], lambda mat_a, mat_b, **kwargs: _grouped_mm(mat_a, mat_b, **kwargs))
)
