"""Weights that are read where no layer of torch's own applies them: `F.linear(x, self.w)`, `x @ self.w`, the packed
projection of `nn.MultiheadAttention`, the gates of `nn.LSTM` and `nn.GRU`, stacks of expert matrices, and the weights
of layers with a forward of their own.

There the pair takes the parameter's name in its module. It stands for the tensor: torch's functions accept it, and
multiply through the factors (see `products`).
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair, Layers, whole_number
from fxrank.passes.pairs.reading.recurrent import steps
from fxrank.passes.pairs.registry import register_pair
from fxrank.torch_private import pytree
from fxrank.torch_private.compile import compiles_recurrent
from fxrank.torch_private.modules import own_parameters

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
KERNELS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
"""What `torch.compile` leaves to Python unless `torch._dynamo.config.allow_rnn` is set, in a dense model by the layer's class, here
by the call. In a graph they would be taken apart step by step: one compilation for each length, each as long as its
sequence. And by whatever torch last took them apart with: an ONNX export leaves a form behind that is meant for it alone.
"""


def gates(owner: nn.Module, attribute: str) -> int:
    """How many matrices a weight of a recurrent layer holds, one below the other; 1 for any other weight."""
    recurrent = isinstance(owner, nn.RNNBase) and attribute.startswith(("weight_ih", "weight_hh"))
    return GATES[str(owner.mode)] if recurrent else 1


class RawWeight(nn.Module):
    """A raw parameter dressed as a layer, so that it goes the same ways as one. `weight` is the very parameter.

    `gates` is how many matrices lie below each other in it; `recurrent` whether its owner is a recurrent layer; `stacked`
    whether it is used as a stack of matrices.
    """

    def __init__(self, owner: nn.Module, attribute: str) -> None:
        """The parameter `attribute` of `owner`; neither is changed."""
        super().__init__()
        self.weight = own_parameters(owner)[attribute]
        self.gates = gates(owner, attribute)
        self.stacked = False
        self.recurrent = isinstance(owner, nn.RNNBase)
        self.training = owner.training

    def forward(self, input: Tensor) -> Tensor:
        """`x @ Wᵀ`, or the convolution with a kernel; for timing."""
        assert self.weight is not None
        return multiply(input, self.weight, self.stacked)


def form_when_read(weight: Tensor, kernel: bool) -> str:
    """The form of a parameter: one of three dimensions is a stack of matrices, unless a convolution takes it for a kernel."""
    return "stack" if weight.ndim == 3 and not kernel else "channel"


def multiply(x: Tensor, weight: Tensor, stacked: bool) -> Tensor:
    """See `RawWeight.forward`."""
    if stacked:
        return x @ weight.mT
    if weight.ndim == 2:
        return F.linear(x, weight)
    convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return convolve(x, weight, padding=tuple(size // 2 for size in weight.shape[2:]))


class _Factor(nn.Module):
    """A parameter by itself."""

    def __init__(self, shape: tuple[int, ...], place: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, **place))

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))


class LowRankWeight(FactorPair):
    """A raw parameter as a product: `u.weight` `(r, cols)` and `v.weight` `(rows, r)`, with a leading dimension for the gates
    of a recurrent layer, one matrix below the other. All but the first dimension of a convolution's kernel are columns.

    The pair sits at the parameter's own name and can be used as the tensor it was: in products, slices, `chunk`, `.t()`,
    `.shape`. Recurrent layers are explained in `recurrent`.
    """

    kind = "parameter"
    geometry = ("gates", "recurrent")
    is_parameter = True
    multiplies_when_read = True
    takes_bias = False
    stacked: ClassVar[bool] = False
    gates: int
    recurrent: bool

    @classmethod
    def suits(cls, dense: nn.Module) -> bool:
        return False  # how the weight is used says which form it has

    @classmethod
    def blocks(cls, dense: nn.Module) -> int:
        """How many matrices lie below each other in the weight."""
        return whole_number(dense, "gates")

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        rows, blocks = weight_of(dense).shape[0], cls.blocks(dense)
        return f"in {blocks} blocks: it has {rows} rows" if rows % blocks else None

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        blocks = cls.blocks(dense)
        return tensor.reshape(blocks, tensor.shape[0] // blocks, -1)

    def make_layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        groups, rows, cols = self.unroll(dense, weight_of(dense)).shape
        self.place: tuple[str, ...] = ()
        lead = (groups,) if groups > 1 or self.stacked else ()
        return _Factor((*lead, self.rank, cols), place), None, _Factor((*lead, rows, self.rank), place)

    def __init__(self, dense: nn.Module, rank: int, extra_bn: bool = False) -> None:
        """See `FactorPair`; there is no BatchNorm."""
        super().__init__(dense, rank)
        self.__dict__.pop("norm", None)  # `.norm()` is the tensor's

    def unfold_u(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 3 else tensor[None]

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.ndim == 3 else tensor[None]

    @property
    def bias(self) -> Tensor | None:
        """A parameter has none."""
        return None

    @property
    def data(self) -> Tensor:
        """The tensor's: what is assigned is written into the factors."""
        return self.weight.data

    @data.setter
    def data(self, data: Tensor) -> None:
        self.weight.data = data

    def forward(self, input: Tensor) -> Tensor:
        """The product of `RawWeight.forward`, for timing."""
        fused = self.recurrent and not steps(input.device, self.dense_shape[0] // self.gates)
        weight = self.fold_dense(self.unfold_v(self.v.weight) @ self.unfold_u(self.u.weight)) if fused else self.weight
        return multiply(input, weight, self.stacked)

    def empty_dense(self, place: dict[str, Any]) -> nn.Module:
        owner = nn.Module()
        owner.weight = nn.Parameter(torch.empty(self.dense_shape, **place))
        dense = RawWeight(owner, "weight")
        dense.gates, dense.recurrent, dense.stacked = self.gates, self.recurrent, self.stacked
        return dense

    # -- standing for the tensor; `model.to(…)` and its like reach the factors another way, through `_apply`

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in KERNELS and torch.compiler.is_dynamo_compiling() and not compiles_recurrent():
            return torch.compiler.disable(_with_weights)(func, args, kwargs or {})
        return _with_weights(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in self.geometry or "u" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.weight, name)

    def __getitem__(self, index: Any) -> Tensor:
        part: Tensor = self.weight[index]
        return part

    def __len__(self) -> int:
        return self.dense_shape[0]

    def __bool__(self) -> bool:
        return True

    def __matmul__(self, other: Any) -> Tensor:
        product: Tensor = self.weight @ other
        return product

    def __rmatmul__(self, other: Any) -> Tensor:
        product: Tensor = other @ self.weight
        return product


class LowRankFusedWeight(LowRankWeight):
    """A raw fused projection of queries, keys and values as three products, each with a subspace of its own."""

    automatic = True

    @classmethod
    def blocks(cls, dense: nn.Module) -> int:
        return 3

    @classmethod
    def suits(cls, dense: nn.Module) -> bool:
        weight = weight_of(dense)
        plain = weight.ndim == 2 and whole_number(dense, "gates") == 1
        return plain and weight.shape[0] == 3 * weight.shape[1]


class LowRankStack(LowRankWeight):
    """A raw stack of matrices `(groups, rows, cols)`, of experts say, as a product for each."""

    stacked = True

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        ndim = weight_of(dense).ndim
        return None if ndim == 3 else f"as a stack of matrices: it has {ndim} dimensions"

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return tensor

    @classmethod
    def shape_when_read(cls, dense: nn.Module, positions: float) -> tuple[int, ...]:
        return (weight_of(dense).shape[0], *super().shape_when_read(dense, positions))


def _with_weights(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    args, kwargs = pytree.tree_map_only(LowRankWeight, lambda pair: pair.weight, (args, dict(kwargs)))
    return func(*args, **kwargs)


def _of_the_tensor(name: str) -> Callable[..., Any]:
    def operate(self: LowRankWeight, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.weight, name)(*args, **kwargs)

    return operate


_BINARY = ("add", "sub", "mul", "truediv", "pow")
_TENSOR_METHODS = (
    *("to", "float", "half", "double", "bfloat16", "cpu", "cuda", "type"),
    *("__neg__", "__abs__", "__lt__", "__le__", "__gt__", "__ge__", "__floordiv__"),
    *(f"__{side}{name}__" for name in _BINARY for side in ("", "r")),
)
for _name in _TENSOR_METHODS:
    setattr(LowRankWeight, _name, _of_the_tensor(_name))

register_pair(RawWeight, LowRankWeight)
register_pair(RawWeight, LowRankFusedWeight, form="qkv")
register_pair(RawWeight, LowRankStack, form="stack")
