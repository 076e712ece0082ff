"""A matrix that is known by its factors, and multiplies through them.

Some code reads a layer's weight and multiplies with it itself: `F.linear(x, self.qkv.weight, bias)` in Swin, BEiT and
EVA, `nn.MultiheadAttention`, expert stacks. There a pair answers with a `FactoredWeight`. It looks like the dense
tensor (shape, dtype, device, `isinstance`), but a product with it is made factor by factor, so that what the pair
saves is saved there too, without a change of that code. Transposing, slicing and indexing keep it factored. Whatever
needs the numbers themselves gets the dense product, built on the spot. What is written into a pair's whole weight its
factors take, if a product of their rank can be that; other assignments are refused.

`torch.compile` and `torch.jit.trace` cannot make a tensor of a class of ours in a graph. While they read the code, a
`CompiledWeight` stands in: the same factors and the same products, without being a tensor; nothing of it is left in the
graph.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fxrank.torch_private import pytree
from fxrank.torch_private.compile import leave_to_python
from fxrank.torch_private.kernels import NN_FUNCTIONS, tensor_without_numbers, without_torch_function

PRODUCTS: dict[Any, Callable[..., Any]] = {}
"""What is done through the factors, by torch's own function; filled by `products`. A function here may answer
`NotImplemented`, then the dense product is used.
"""


def in_torchscript_trace() -> bool:
    """Whether `torch.jit.trace` is at work."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


_ASSIGNING = {"__setitem__", "__delitem__"} | {
    f"__i{name}__"
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
}
_WRITERS = {
    getattr(place, name): name
    for place in (Tensor, torch, torch.nn.functional, torch.nn.init, NN_FUNCTIONS)
    for name in dir(place)
    if name in _ASSIGNING or (name.endswith("_") and not name.endswith("__"))
}
"""What writes into its first operand. A table, because dynamo (of torch 2.14) cannot read the name of a function."""
_FITTING = {"copy_", "mul_", "div_", "__imul__", "__itruediv__"}
"""Writers after which a weight may be a product of its rank still: BatchNorm is folded into rows with them."""
_NAMES = {"input", "self", "tensor", "other", "mat1", "mat2", "vec", "dims", "weight"}
"""Names that torch gives to leading arguments, here taken by position."""


def _by_position(product: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a product of ours, whatever names torch's own function has for its operands."""
    if kwargs:
        own = {n for n, p in inspect.signature(product).parameters.items() if p.kind is not p.VAR_POSITIONAL}
        strange = [name for name in kwargs if name not in own and name in _NAMES]
        args = (*args, *(kwargs[name] for name in strange))
        kwargs = {name: value for name, value in kwargs.items() if name not in strange}
        try:
            inspect.signature(product).bind(*args, **kwargs)
        except TypeError:
            return NotImplemented  # a form of the call that is not known here: the dense product does it
    return product(*args, **kwargs)


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
_LOOKS = {
    *map(_getter, ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_meta", "is_sparse")),
    *map(_getter, ("is_cpu", "is_quantized", "is_nested", "is_leaf", "itemsize", "nbytes")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.element_size),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.__len__, Tensor.__hash__),
    *(torch.is_floating_point, torch.is_complex, torch.numel, Tensor.is_contiguous, Tensor.is_signed),
}
"""Questions that need no numbers."""


class Factored:
    """`W = V U` of `shape`, stacked: `U` `(groups, r, cols)`, `V` `(groups, rows, r)`.

    For a matrix, the groups are blocks of rows, `W = [V₁U₁; V₂U₂; …]`; for three dimensions they are the first one.
    With more dimensions (a kernel) all but the first are columns. `flipped` means the transpose, of the last two
    dimensions. Gradients flow to `U` and `V`.
    """

    u: Tensor
    v: Tensor
    flipped: bool
    shape: Any
    ndim: int
    dtype: torch.dtype
    device: torch.device
    write: Callable[[Tensor], None] | None = None
    """Where this is the whole weight of a pair: gives the pair other numbers, or raises."""
    products: ClassVar[dict[Any, Callable[..., Any]]] = PRODUCTS
    """What is done through the factors, by torch's own function."""

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies as a matrix, or a stack of them; a kernel of a convolution does not."""
        rows, cols = (self.v.shape[1], self.u.shape[2])[:: -1 if self.flipped else 1]
        return self.ndim == 2 or (self.ndim == 3 and tuple(self.shape) == (len(self.u), rows, cols))

    def dense(self) -> Tensor:
        """The product, a plain tensor; differentiable in the factors."""
        shape = tuple(self.shape)
        if self.flipped:
            return (self.v @ self.u).reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-2, -1)
        return (self.v @ self.u).reshape(shape)

    def written(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What writes into the weight, done to a copy whose numbers the pair then takes."""
        assert self.write is not None
        if func != _SET_DATA and torch.is_grad_enabled() and self.u.requires_grad:
            raise RuntimeError(
                "a weight that requires gradients must be changed without recording it; got an in-place operation in grad mode. Use torch.no_grad()."
            )
        with torch.no_grad():
            numbers = self.dense().detach().clone()
            func(numbers, *args, **kwargs)
            self.write(numbers)
        return self

    def __repr__(self, **_: Any) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, rank={self.u.shape[1]}, groups={self.u.shape[0]})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if issubclass(cls, Tensor) and func in _LOOKS:  # in this order: dynamo of torch 2.8 cannot look into sets
            with without_torch_function():
                return func(*args, **kwargs)
        product = cls.products.get(func)
        if product is not None:
            result = _by_position(product, args, kwargs)
            if result is not NotImplemented:
                return result
        writer = _WRITERS.get(func)
        if writer is None and issubclass(cls, Tensor) and getattr(func, "__name__", "") == "__set__":
            writer = "__set__"  # of any attribute
        first = args[0] if args else next(iter(kwargs.values()), None)
        if (writer is not None and isinstance(first, cls)) or isinstance(kwargs.get("out"), cls):
            if isinstance(first, cls) and first.write is not None and (writer in _FITTING or func == _SET_DATA):
                return first.written(func, *args[1:], **kwargs)
            raise RuntimeError(
                f"a factored weight is the product of two parameters, so {writer or 'out='} cannot write into it; "
                "change the pair's u.weight and v.weight, or merge the pair first."
            )
        dense_args, dense_kwargs = pytree.tree_map_only(cls, cls.dense, (args, kwargs))
        return func(*dense_args, **dense_kwargs)


class FactoredWeight(Factored, Tensor):  # type: ignore[misc]
    """The tensor; see `Factored`."""

    @staticmethod
    def __new__(cls, u: Tensor, v: Tensor, shape: tuple[int, ...], flipped: bool = False) -> "FactoredWeight":
        self: FactoredWeight = tensor_without_numbers(
            cls, shape, dtype=u.dtype, device=u.device, requires_grad=u.requires_grad or v.requires_grad
        )
        self.u, self.v, self.flipped = u, v, flipped
        return self

    def __init__(self, u: Tensor, v: Tensor, shape: tuple[int, ...], flipped: bool = False) -> None:
        """See `__new__`; a tensor is made there."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        dense_args, dense_kwargs = pytree.tree_map_only(cls, cls.dense, (args, dict(kwargs or {})))
        return func(*dense_args, **dense_kwargs)


class ProductWeight(FactoredWeight):
    """Of a pair whose matrices lie in the weight in an order of their own: only its dense product is used, which `fold` makes."""

    products: ClassVar[dict[Any, Callable[..., Any]]] = {}
    fold: Callable[[Tensor], Tensor]

    def dense(self) -> Tensor:
        return self.fold(self.v @ self.u).contiguous()


class CompiledWeight(Factored):
    """What `torch.compile` and `torch.jit.trace` see in the place of the tensor; see the module."""

    def __init__(self, u: Tensor, v: Tensor, shape: tuple[int, ...], flipped: bool = False) -> None:
        """See `Factored`."""
        self.u, self.v, self.shape, self.flipped = u, v, torch.Size(shape), flipped
        self.ndim, self.dtype, self.device = len(shape), u.dtype, u.device

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.matmul, Tensor.__matmul__) and torch.compiler.is_dynamo_compiling():
            args = _in_order(*args)
        return super().__torch_function__(func, types, args, kwargs)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """The number of dimensions."""
        return self.ndim

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def T(self) -> Any:
        """The transpose."""
        return self.t()

    @property
    def mT(self) -> Any:
        """The transpose of the last two dimensions."""
        return self.transpose(-2, -1)

    @property
    def data(self) -> Any:
        """Without gradients."""
        return self.detach()

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name)
        if not callable(method):
            return getattr(self.dense(), name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self.__torch_function__(method, (), (self, *args), kwargs)

        return call


def _in_order(left: Any, right: Any) -> tuple[Any, Any]:
    """The operands of `@` as the code has them. The compiler hands `w @ x` over as `x @ w` where `w` is no tensor; the
    shapes tell them apart. Where they do not, the product is left out of the graph, and Python makes it.
    """
    if isinstance(left, Factored) or not isinstance(right, Factored):
        return left, right
    as_given = left.shape[-1] == right.shape[-2]
    swapped = right.shape[-1] == left.shape[-2 if left.ndim > 1 else -1]
    if as_given and swapped:
        leave_to_python("x @ w or w @ x? Both are square; write torch.matmul(x, w), which says so")
    return (left, right) if as_given else (right, left)


def _operator(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def operate(self: CompiledWeight, *args: Any) -> Any:
        return self.__torch_function__(method, (), (self, *args))

    return operate


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    setattr(CompiledWeight, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(CompiledWeight, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("neg", "abs", "lt", "le", "gt", "ge", "getitem"):
    setattr(CompiledWeight, f"__{_name}__", _operator(f"__{_name}__"))
