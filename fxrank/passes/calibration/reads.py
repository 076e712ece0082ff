"""What is multiplied with weights that are read as tensors, seen while a model runs.

Attention hands its weights to one function, recurrent layers to one kernel, and a model's own code multiplies with raw parameters. A
mode of torch sees each function that gets such a weight, or a view of it: where a view lies in the weight its offset and strides say.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxrank.passes.pairs.reading.attention import multi_head_attention
from fxrank.passes.pairs.reading.recurrent import step_by_step
from fxrank.torch_private import pytree
from fxrank.torch_private.kernels import GROUPED

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Reading:
    """One product with `length` rows (columns, if `side` is `"rows"`) of a matrix from `start` on, or with so many matrices of a stack.

    `vectors` `(…, groups, size)` is the other operand: of `side` `"inputs"` it is multiplied with the rows of the weight, `x Wᵀ`, of
    `"rows"` with its columns, `x W`; of `"outputs"` it is what a convolution gives before the bias.
    """

    side: str
    start: int
    length: int
    vectors: Tensor


class Reads(TorchFunctionMode, Generic[K]):
    """While it is entered, `see(key, reading)` is called for each product with one of the `weights`, by key, and `miss(key, why)` where one
    is used in another way. Attention and recurrent layers are taken apart: the same results up to rounding.
    """

    def __init__(
        self,
        weights: Mapping[K, Tensor],
        see: Callable[[K, Reading], None],
        miss: Callable[[K, str], None],
        padding: Callable[[Tensor | None], Any],
    ) -> None:
        """`padding(mask)` is a context in which the mask `(length, batch)`, if there is one, says which positions are padding."""
        super().__init__()
        self._at: dict[int, list[tuple[K, Tensor]]] = {}
        for key, weight in weights.items():
            self._at.setdefault(weight.untyped_storage().data_ptr(), []).append((key, weight))
        self._see, self._miss, self._padding = see, miss, padding

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") == "__get__" or not any(map(self._found, _tensors(args, kwargs))):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        if func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
            with self:
                return step_by_step(func, *args)
        out = func(*args, **kwargs)
        product = _PRODUCTS.get(func)
        read = None if product is None else product(self, args, kwargs, out)
        if not read and any(self._found(t) is None for t in _tensors((out,), {})):
            for tensor in _tensors(args, kwargs):
                if (found := self._found(tensor)) is not None:
                    self._miss(found[0], f"it is used in {getattr(func, '__name__', func)}")
        return out

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("key_padding_mask")
        key = args[1]
        of_keys = None
        if isinstance(mask, Tensor):
            of_keys = mask if mask.dtype == torch.bool else mask == -math.inf
            of_keys = of_keys.mT if key.ndim == 3 else of_keys
        # Padding of the queries is known where they are the keys.
        with self._padding(of_keys if args[0] is key else None), self:
            return multi_head_attention(*args, **kwargs)

    def _found(self, tensor: Tensor) -> tuple[K, Tensor] | None:
        if tensor.layout != torch.strided or tensor.is_meta:
            return None
        try:
            near = self._at.get(tensor.untyped_storage().data_ptr(), ())
        except RuntimeError:  # a tensor without numbers
            return None
        for key, weight in near:
            if 0 <= tensor.storage_offset() - weight.storage_offset() < weight.numel():
                return key, weight
        return None

    def product(self, view: Any, summed: int, x: Any, stack: int | None = None) -> bool:
        """Take in `x` `(…, size)`, or `(…, matrices, size)` for a view with a dimension `stack`, multiplied along the dimension `summed` of a
        view of a weight. False if the view is of none.
        """
        if not isinstance(view, Tensor) or not isinstance(x, Tensor) or (found := self._found(view)) is None:
            return False
        key, weight = found
        if self._found(x) is not None:
            return False
        place = _place(weight, view, summed, stack)
        if place is None:
            self._miss(key, "a part of it is multiplied that is no block of rows")
        else:
            side, start, length = place
            self._see(key, Reading(side, start, length, x if stack is not None else x.unsqueeze(-2)))
        return True

    def convolved(self, weight: Any, out: Tensor, bias: Tensor | None) -> bool:
        """Take in what a convolution with a whole weight gives, `(batch, rows, …)`."""
        found = self._found(weight)
        if found is None or weight.shape != found[1].shape:
            return False
        batched = out if out.ndim == weight.ndim else out[None]
        vectors = batched.movedim(1, -1)
        vectors = vectors if bias is None else vectors - bias
        self._see(found[0], Reading("outputs", 0, weight.shape[0], vectors.unsqueeze(-2)))
        return True


def _place(weight: Tensor, view: Tensor, summed: int, stack: int | None) -> tuple[str, int, int] | None:
    """Where in the weight a view lies, all of whose `summed` dimension a product sums over: the side, the start and the length."""
    if weight.ndim not in (2, 3) or view.ndim not in (2, 3) or not weight.is_contiguous():
        return None
    rows, cols = weight.shape[-2:]
    summed %= view.ndim
    (kept,) = (d for d in range(view.ndim) if d not in (summed, stack))
    inner, outer = view.stride(summed), view.stride(kept)
    by_cols = (inner == 1 or cols == 1) and (outer == cols or view.shape[kept] == 1) and view.shape[summed] == cols
    by_rows = (inner == cols or rows == 1) and (outer == 1 or view.shape[kept] == 1) and view.shape[summed] == rows
    offset = int(view.storage_offset()) - int(weight.storage_offset())
    matrix, within = divmod(offset, rows * cols)
    if weight.ndim == 3:
        length = 1 if stack is None else view.shape[stack]
        whole = within == 0 and view.shape[kept] == (rows if by_cols else cols)
        if not whole or not (by_cols or by_rows) or (length > 1 and view.stride(stack or 0) != rows * cols):
            return None
        return ("inputs" if by_cols else "rows"), matrix, length
    if stack is not None:
        return None
    if by_cols and within % cols == 0:
        return "inputs", within // cols, view.shape[kept]
    return ("rows", within, view.shape[kept]) if by_rows and within < cols else None


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any], *names: str) -> list[Any]:
    """The arguments of these names, given by position or by name."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _linear(reads: Reads[Any], args: Any, kwargs: Any, out: Tensor) -> bool:
    x, weight = _named(args, kwargs, "input", "weight")
    return reads.product(weight, -1, x)


def _matmul(reads: Reads[Any], args: Any, kwargs: Any, out: Tensor) -> bool:
    left, right = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)][-2:]
    if _multiplied(reads, left, right):
        return True
    return left.ndim > 1 and _multiplied(reads, right.mT if right.ndim > 1 else right, left.mT)


def _rmatmul(reads: Reads[Any], args: Any, kwargs: Any, out: Tensor) -> bool:
    return _matmul(reads, args[::-1], kwargs, out)


def _multiplied(reads: Reads[Any], x: Tensor, weight: Tensor) -> bool:
    """`x @ weight`."""
    if weight.ndim == 2:
        return reads.product(weight, 0, x)
    if weight.ndim != 3:
        return False
    x = x[None] if x.ndim == 1 else x
    x = x[None] if x.ndim == 2 else x
    return reads.product(weight, 1, x.expand(*x.shape[:-3], len(weight), *x.shape[-2:]).movedim(-3, -2), 0)


def _einsum(reads: Reads[Any], args: Any, kwargs: Any, out: Tensor) -> bool:
    equation, *operands = args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if len(operands) != 2 or not isinstance(equation, str) or "." in equation or "->" not in equation:
        return False
    terms, _, output = equation.replace(" ", "").partition("->")
    letters = terms.split(",")
    for i in (0, 1):
        own, weight, rest, x = letters[i], operands[i], letters[1 - i], operands[1 - i]
        summed = [c for c in own if c in rest and c not in output]
        shared = [c for c in own if c in rest and c in output]
        free = [c for c in own if c not in rest and c in output]
        if len(set(own)) < len(own) or len(set(rest)) < len(rest) or len(summed) != 1:
            continue
        if any(c not in own + output for c in rest):
            continue  # summed over before the product
        lead = [c for c in rest if c not in own]
        if weight.ndim == 2 and len(free) == 1:
            if reads.product(weight, own.index(summed[0]), x.permute([rest.index(c) for c in (*lead, *summed)])):
                return True
        elif weight.ndim == 3 and len(free) + len(shared) == 2 and len(free) > 0:
            stack = own.index(shared[0]) if shared else min(own.index(c) for c in free)
            order = [rest.index(c) for c in (*lead, *shared, *summed)]
            x = x.permute(order) if shared else x.permute(order).unsqueeze(-2)
            x = x.expand(*x.shape[:-2], weight.shape[stack], x.shape[-1])
            if reads.product(weight, own.index(summed[0]), x, stack):
                return True
    return False


def _grouped(reads: Reads[Any], args: Any, kwargs: Any, out: Tensor) -> bool:
    """Rows of `x` to the matrix of their group, each group up to its offset."""
    x, weight = args[:2]
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    if x.ndim != 2 or weight.ndim != 3 or ends is None:
        return False
    starts = [0, *ends.tolist()]
    parts = [reads.product(w, 0, x[a:b]) for w, a, b in zip(weight.unbind(), starts, starts[1:], strict=False)]
    return all(parts)


def _convolution(reads: Reads[Any], args: Any, kwargs: Any, out: Tensor) -> bool:
    _, weight, bias = _named(args, kwargs, "input", "weight", "bias")
    groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
    return groups == 1 and reads.convolved(weight, out, bias)


_PRODUCTS: dict[Any, Callable[[Reads[Any], Any, Any, Any], bool]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: _rmatmul,
    torch.einsum: _einsum,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys(GROUPED, _grouped),
}
