"""What is multiplied with weights that are read as tensors, seen while a model runs.

Attention hands its weights to one function, recurrent layers to one kernel, and a model's own code multiplies with raw parameters. A
mode of torch sees each function that gets such a weight, or a view of it: where a view lies in the weight its offset and strides say. Of a
copy in another dtype it keeps the view that was copied.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fxrank.passes.pairs.reading.attention import multi_head_attention
from fxrank.passes.pairs.reading.recurrent import step_by_step
from fxrank.torch_private import pytree
from fxrank.torch_private.kernels import GROUPED
from fxrank.torch_private.modules import times_written

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Reading:
    """One product with a block of a matrix, or with some matrices of a stack.

    `vectors` `(…, groups, size)` is the other operand. Of `side` `"inputs"` it is multiplied with the rows of the weight, `x Wᵀ`, of
    `"rows"` with its columns, `x W`: `kept` are these rows (columns, or matrices of a stack), `summed` the columns (rows) that the
    product sums over. Of `"lookups"` it is which of the rows `kept` are looked up, `(…, 1, 1)`; of `"outputs"` what a convolution gives
    before the bias.
    """

    side: str
    kept: range
    summed: range
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
        self._copied: WeakIdKeyDictionary = WeakIdKeyDictionary()
        """Of each copy of a part of a weight the view that it is a copy of, and how often it had been written into then."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if not any(map(self._found, _tensors(args, kwargs))):
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        if func in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu):
            with self:
                return step_by_step(func, *args)
        out = func(*args, **kwargs)
        if func in _COPIES:
            if self._found(args[0]) is None:
                return out  # `x.to(weight)` asks for its dtype only
            self._follow(out, args[0], args[0])
        if args and isinstance(args[0], Tensor) and args[0] in self._copied and func in _VIEWS:
            self._follow(out, args[0], func(self._copied[args[0]][0], *args[1:], **kwargs))
        if getattr(func, "__name__", "") == "__get__":
            return out
        if (product := _PRODUCTS.get(func)) is not None:
            views, options = pytree.tree_map_only(Tensor, self._uncopied, (args, kwargs))
            if product(self, views, options, out):
                return out
        if any(self._found(t) is None for t in _tensors((out,), {})):
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

    def _found(self, tensor: Tensor) -> tuple[K, Tensor, Tensor] | None:
        """The weight that a tensor is a part of, by its key, and the part: a view of it, which the tensor is or is a copy of."""
        view, written = self._copied.get(tensor, (tensor, None))
        if view.layout != torch.strided or view.is_meta:
            return None
        try:
            near = self._at.get(view.untyped_storage().data_ptr(), ())
        except RuntimeError:  # a tensor without numbers
            return None
        for key, weight in near:
            if 0 <= view.storage_offset() - weight.storage_offset() < weight.numel():
                if written is not None and written != _writes(tensor):
                    self._miss(key, "a copy of it is written into")
                return key, weight, view
        return None

    def _uncopied(self, tensor: Tensor) -> Tensor:
        view: Tensor = self._copied.get(tensor, (tensor, None))[0]
        return view

    def _follow(self, out: Any, source: Any, views: Any) -> None:
        """Know these parts of a copy, or this copy, of `source` as what it is of."""
        found = self._found(source) if isinstance(source, Tensor) else None
        if found is None:
            return
        views = [found[2]] if views is source else _tensors((views,), {})
        for part, view in zip(_tensors((out,), {}), views, strict=True):
            if part.is_floating_point() and part.shape == view.shape and self._found(part) is None:
                self._copied[part] = view, _writes(part)

    def product(self, view: Any, summed: int, x: Any, stack: int | None = None) -> bool:
        """Take in `x` `(…, size)`, or `(…, matrices, size)` for a view with a dimension `stack`, multiplied along the dimension `summed` of a
        view of a weight. False if the view is of none.
        """
        if not isinstance(view, Tensor) or not isinstance(x, Tensor) or (found := self._found(view)) is None:
            return False
        key, weight, view = found
        if self._found(x) is not None:
            return False
        place = _place(weight, view, summed, stack)
        if place is None:
            self._miss(key, "a part of it is multiplied that is no block of rows and columns")
        else:
            self._see(key, Reading(*place, x if stack is not None else x.unsqueeze(-2)))
        return True

    def looked_up(self, view: Any, indices: Any) -> bool:
        """Take in which rows of a view of a weight are looked up. False if the view is of none."""
        if not isinstance(view, Tensor) or not isinstance(indices, Tensor) or (found := self._found(view)) is None:
            return False
        key, weight, view = found
        place = _place(weight, view, -1, None) if weight.ndim == 2 and view.ndim == 2 else None
        if place is None or place[0] != "inputs":
            self._miss(key, "a part of it is looked up that is no block of rows and columns")
        else:
            self._see(key, Reading("lookups", *place[1:], indices[..., None, None]))
        return True

    def convolved(self, weight: Any, out: Tensor, bias: Tensor | None) -> bool:
        """Take in what a convolution with a whole weight gives, `(batch, rows, …)`."""
        found = self._found(weight)
        if found is None or weight.shape != found[1].shape:
            return False
        batched = out if out.ndim == weight.ndim else out[None]
        vectors = batched.movedim(1, -1)
        vectors = vectors if bias is None else vectors - bias
        whole = range(weight.shape[0]), range(weight.shape[1:].numel())
        self._see(found[0], Reading("outputs", *whole, vectors.unsqueeze(-2)))
        return True


def _place(weight: Tensor, view: Tensor, summed: int, stack: int | None) -> tuple[str, range, range] | None:
    """Where in the weight a view lies, all of whose `summed` dimension a product sums over: the side, what is kept and what is summed."""
    if weight.ndim not in (2, 3) or view.ndim not in (2, 3) or not weight.is_contiguous():
        return None
    rows, cols = weight.shape[-2:]
    summed %= view.ndim
    free = [d for d in range(view.ndim) if d not in (summed, stack)]
    if len(free) != 1:
        return None
    matrix, within = divmod(int(view.storage_offset()) - int(weight.storage_offset()), rows * cols)
    row, col = divmod(within, cols)
    inner, outer = ((view.shape[d], view.stride(d)) for d in (summed, free[0]))
    side = "inputs"
    across, down = _along(col, *inner, 1, cols), _along(row, *outer, cols, rows)
    if across is None or down is None:
        side = "rows"
        across, down = _along(row, *inner, cols, rows), _along(col, *outer, 1, cols)
    if across is None or down is None:
        return None
    if weight.ndim == 2:
        return (side, down, across) if stack is None else None
    if (down, across) not in ((range(rows), range(cols)), (range(cols), range(rows))):
        return None
    matrices = _along(
        matrix, *((1, 0) if stack is None else (view.shape[stack], view.stride(stack))), rows * cols, len(weight)
    )
    return None if matrices is None else (side, matrices, across)


def _along(first: int, count: int, stride: int, unit: int, end: int) -> range | None:
    """So many places from the first on, as far apart as the stride says in this unit; None if they are not whole, or go past the end."""
    step, rest = divmod(stride, unit) if count > 1 else (1, 0)
    last = first + (count - 1) * step
    return range(first, last + 1, step) if step > 0 and not rest and count > 0 and last < end else None


def _writes(tensor: Tensor) -> int:
    """How often a tensor was written into; of one that was made in inference mode nobody counts it."""
    return 0 if tensor.is_inference() else times_written(tensor)


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


def _embedding(reads: Reads[Any], args: Any, kwargs: Any, out: Tensor) -> bool:
    indices, weight = _named(args, kwargs, "input", "weight")
    return reads.looked_up(weight, indices)


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


_COPIES: set[Any] = {
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.double,
    Tensor.cpu,
    Tensor.cuda,
}
_VIEWS: set[Any] = {
    *(torch.t, torch.transpose, torch.permute, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.detach),
    *(
        Tensor.t,
        Tensor.transpose,
        Tensor.permute,
        Tensor.chunk,
        Tensor.split,
        Tensor.unbind,
        Tensor.narrow,
        Tensor.detach,
    ),
    *(Tensor.swapaxes, Tensor.__getitem__, Tensor.T.__get__, Tensor.mT.__get__, Tensor.data.__get__),  # type: ignore[attr-defined]
}
_PRODUCTS: dict[Any, Callable[[Reads[Any], Any, Any, Any], bool]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: _rmatmul,
    torch.einsum: _einsum,
    F.embedding: _embedding,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys(GROUPED, _grouped),
}
