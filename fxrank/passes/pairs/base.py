"""What a factor pair is: two thin layers in the place of one dense layer, and all that is particular to a kind or a form.

A pair class is one *form* for one *kind* of layer. It says how the dense weight is read as a stack of matrices `W`
`(groups, rows, cols)` (`unroll`), and how the factors `U` `(groups, r, cols)` and `V` `(groups, rows, r)` of `W ≈ V
U` are folded into the weights of its two layers `u` (first) and `v` (second); what both cost; and how it is timed. Everything
else (splitting, optimizer state, Frobenius decay, merging, checking, plans, files) is written once against this class, so a new
kind or a new form is one class and one `register_pair`.

The dense layer's bias belongs to `v`: a bias on `u` would be redundant, `V(Ux + b) + c = VUx + (Vb + c)`.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fxrank.passes.errors import RankError
from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.reading.weight import Norm, ReadsAsLayer
from fxrank.passes.spectra.exact import truncated_factors
from fxrank.torch_private.modules import own_buffers

Layers = tuple[nn.Module, Norm | None, nn.Module]


@dataclass(frozen=True)
class Unrolled:
    """One weight as a pair class reads it: `groups` matrices of `(rows, cols)`, in this `form`.

    `positions` is how often each number of `U`, and of `V`, is used in one call of the model at the example's sizes, and `whole`
    how many multiply-adds are made with the whole matrix even so.
    """

    pair: "type[FactorPair] | None" = None
    form: str = "channel"
    groups: int = 1
    rows: int = 0
    cols: int = 0
    positions: tuple[float, float] = (0.0, 0.0)
    whole: int = 0

    @property
    def full_rank(self) -> int:
        return min(self.rows, self.cols)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """`(groups, rows, cols)`."""
        return self.groups, self.rows, self.cols

    def also_used(self, again: "Unrolled") -> "Unrolled":
        """The same weight, used at another site too."""
        of_u, of_v = (a + b for a, b in zip(self.positions, again.positions, strict=True))
        return replace(self, positions=(of_u, of_v), whole=self.whole + again.whole)


_OF_TORCH = {*vars(nn.Module()), "_compiled_call_impl", "_reversed_padding_repeated_twice"}
"""What torch puts on modules for itself."""


def whole_number(dense: nn.Module, name: str) -> int:
    """An attribute of a layer that is a whole number."""
    value = getattr(dense, name)
    assert isinstance(value, int)
    return value


class FactorPair(ReadsAsLayer):
    """Two thin layers, `v(u(x))`, in the place of one dense layer.

    Children: `u`, `v`, and `norm`, a BatchNorm between them if it was asked for. The state dict has only their
    plain keys (`u.weight`, `v.weight`, `v.bias`, …). For code that reads the layer's weight and geometry itself, they
    are there under the dense layer's own names; `weight` is a `FactoredWeight`, which multiplies through the factors.

    A subclass must have `kind` and `geometry`, and define `make_layers` and `empty_dense`. What else it may define has a default
    that is right for a layer that multiplies with one matrix: the `weight` `(out, …)`, all but its first dimension as columns.
    """

    kind: ClassVar[str]
    """What plans and tables call the dense layer."""
    geometry: ClassVar[tuple[str, ...]]
    """Attributes of the dense layer that a reader may ask the pair for; layers that share them, and the shapes of weight
    and input, take the same time.
    """
    children_in_order: ClassVar[tuple[str, ...]] = ("u", "norm", "v")
    """The children as the forward calls them."""
    takes_norm: ClassVar[bool] = False
    """Whether a BatchNorm may stand between the factors."""
    is_table: ClassVar[bool] = False
    """Whether the weight is looked up rather than multiplied with. A table stays dense unless it is asked for."""
    is_parameter: ClassVar[bool] = False
    """Whether the pair takes the place of a parameter, under its name, and not of a module."""
    multiplies_when_read: ClassVar[bool] = False
    """Whether its `weight`, read by other code, multiplies through the factors; else it is the dense product. True only where the
    matrices lie in the weight as `FactoredWeight` has them: rows of one below those of another, or one after another.
    """
    takes_bias: ClassVar[bool] = True
    """Whether a pair of a layer without a bias may gain one."""
    automatic: ClassVar[bool] = False
    """Whether a policy's `form="auto"` may choose this form by itself, which costs one more decomposition of each weight."""
    saves_time: ClassVar[bool] = True
    """Whether fewer multiply-adds take less time in this form. Else one-shot `form="auto"` takes it only to save parameters."""
    is_turned: ClassVar[bool] = False
    """Whether a patch under the kernel is seen the other way round, last place first."""
    basis: ClassVar[tuple[str, ...]] = ()
    """Buffers of `v` that say which part of `V` the form fixes, where it fixes one: `V U = (V T⁻¹)(T U)` leaves that free. They go
    where the factors go.
    """

    u: Any
    v: Any
    norm: Norm | None

    def __init__(self, dense: nn.Module, rank: int, extra_bn: bool = False) -> None:
        """Empty factors of rank `rank` (columns of `V` per group) with the geometry, dtype, device and training
        mode of `dense`.

        Raises `RankError` if `rank` is not in 1 … full rank.
        """
        super().__init__()
        full = self.full_rank_of(dense)
        if not 1 <= rank <= full:
            raise RankError(f"a rank must be in 1 … {full}, the full rank of the layer; got {rank}.")
        self.rank = rank
        weight = weight_of(dense)
        self.dense_shape: tuple[int, ...] = tuple(weight.shape)
        for name in self.geometry:
            self.__dict__[name] = getattr(dense, name)
        self.carried = self._carry(dense)
        place = {"device": weight.device, "dtype": weight.dtype}
        self.u, self.norm, self.v = self.make_layers(dense, place, extra_bn and self.takes_norm)
        self.train(dense.training)
        norm = () if self.norm is None else self.norm.parameters()
        for parameter in (self.u.weight, self.v.weight, *norm):  # what else there is may be shared with the layer
            parameter.requires_grad_(weight.requires_grad)
        if getattr(dense, "bias", None) is not None:
            # The very parameter: its gradient, optimizer state and flags go on.
            self.v.bias = cast(nn.Parameter, dense.bias)

    def _carry(self, dense: nn.Module) -> tuple[str, ...]:
        """Answer for what the user has put on the layer, `layer.gain = 0.5` say. Returns the names."""
        taken = [n for n in vars(dense) if n not in _OF_TORCH and n not in vars(self) and not hasattr(type(self), n)]
        self.__dict__.update({name: vars(dense)[name] for name in taken})
        return tuple(taken)

    # -- whether

    @classmethod
    def refusal(cls, dense: nn.Module) -> str | None:
        """Why this very layer, of the class that the pair is registered for, has no such pair: a clause that follows its
        class's name, "has no factor pair …"; None if it has one.
        """
        return None

    @classmethod
    def suits(cls, dense: nn.Module) -> bool:
        """Whether the layer has this form where it is asked for, beside the one that it has first."""
        return True

    # -- the matrices

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        """A tensor of the dense weight's shape (weight, gradient, moment) as a stack `(groups, rows, cols)`. `dense` is the layer,
        or the pair in its place: ask it for `geometry` only.
        """
        return tensor[None] if tensor.ndim == 2 else tensor.reshape(1, tensor.shape[0], -1)

    @classmethod
    def spectral_view(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        """As `unroll`, rows and columns in whatever order needs no copy: same singular values."""
        return cls.unroll(dense, tensor)

    @classmethod
    def full_rank_of(cls, dense: nn.Module) -> int:
        """`min(rows, cols)` of one group's matrix."""
        shape = torch.empty(weight_of(dense).shape, device="meta")
        return min(cls.unroll(dense, shape).shape[1:])

    def fold_dense(self, matrix: Tensor) -> Tensor:
        """Inverse of `unroll`."""
        return matrix.reshape(self.dense_shape)

    def fold_u(self, u: Tensor) -> Tensor:
        """`U` `(groups, r, cols)` in the shape of `u.weight`."""
        return u.reshape(self.u.weight.shape)

    def fold_v(self, v: Tensor) -> Tensor:
        """`V` `(groups, rows, r)` in the shape of `v.weight`, without what the form fixes of it. Gradients and moments of all of `V`
        become those of `v.weight` so.
        """
        return v.reshape(self.v.weight.shape)

    def unfold_u(self, tensor: Tensor) -> Tensor:
        """Inverse of `fold_u`."""
        return tensor.reshape(1, self.rank, -1)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        """Inverse of `fold_v`: all of `V` from `v.weight`."""
        return tensor.reshape(1, -1, self.rank)

    # -- what it costs

    @classmethod
    def uses(
        cls, dense: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int]
    ) -> tuple[float, float, float]:
        """How often each number of the dense weight, of `U` and of `V` is multiplied with in one call of the layer."""
        places = math.prod(output_shape) / weight_of(dense).shape[0]
        return places, places, places

    @classmethod
    def pair_parameters(cls, weight: Unrolled, rank: int) -> int:
        """Numbers in both factors: `groups · r · (rows + cols)`."""
        return weight.groups * rank * (weight.rows + weight.cols)

    @classmethod
    def pair_macs(cls, weight: Unrolled, rank: int) -> int:
        """Multiply-adds of both factors in one call of the model at the example's sizes."""
        of_u, of_v = weight.positions
        return weight.whole + round(weight.groups * rank * (weight.cols * of_u + weight.rows * of_v))

    @classmethod
    def break_even_rank(cls, weight: Unrolled) -> float:
        """`rows·cols / (rows + cols)`: a pair of this rank has as many parameters as the layer (Pufferfish Table 1)."""
        return weight.rows * weight.cols / (weight.rows + weight.cols) if weight.rows else 0.0

    # -- what calibration sees

    @classmethod
    def side(cls, dense: nn.Module) -> str | None:
        """What is watched of a layer to make factors that know the data: its `"outputs"`, each a vector of `rows` numbers in
        each group before the bias, its `"inputs"` of `cols` numbers, the `"lookups"` of a table, the `"patches"` under a kernel; None if its factors are made of the
        weight alone.
        """
        return None

    @classmethod
    def seen(cls, dense: nn.Module, side: str, input: Tensor, output: Tensor) -> Tensor:
        """The vectors of one call, `(…, groups, size)`, of patches `(…, groups, channels, height, width)` with as many last dimensions as the
        kernel has: the call's own dimensions come first. They are what the weight itself takes or gives, `output = W · input + bias`: what else
        the layer does to either, a scale say, is in them already.
        """
        raise NotImplementedError(f"{cls.__name__} watches nothing")

    @classmethod
    def width(cls, dense: nn.Module) -> int:
        """How many places of a kernel whose patches are seen the second factor runs over: the last ones of a patch, and of a row of `W`."""
        return int(weight_of(dense).shape[-1])

    @classmethod
    def reads_as(cls, other: "type[FactorPair] | None") -> bool:
        """Whether another form reads the weight as the same matrices, if these are of the same sizes, and watches the same."""
        if other is None:
            return False
        ways = [[getattr(pair, name) for name in ("unroll", "side", "seen")] for pair in (cls, other)]
        return all(getattr(a, "__func__", a) is getattr(b, "__func__", b) for a, b in zip(*ways, strict=True))

    # -- how it is timed

    @classmethod
    def shape_when_read(cls, dense: nn.Module, positions: float) -> tuple[int, ...]:
        """The shape of an input to time the layer with where only its weight was read, which is used at so many positions."""
        return (max(1, round(positions)), weight_of(dense).shape[-1])

    @classmethod
    def probe_input(cls, dense: nn.Module, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A random input of the layer, in the memory format of its weight."""
        x = torch.randn(shape, device=device, dtype=dtype)
        if x.ndim == 4 and not weight_of(dense).is_contiguous():
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    # -- the layers

    @abstractmethod
    def make_layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        """`u`, the BatchNorm or None, and `v`, without numbers and without a bias, on the device and of the dtype in `place`."""

    @abstractmethod
    def empty_dense(self, place: dict[str, Any]) -> nn.Module:
        """The dense layer again, without numbers and without a bias."""

    def dense_layer(self) -> nn.Module:
        """The dense layer with the product of the factors as its weight (exact up to rounding; a `norm` is folded
        in with its running statistics).
        """
        v, u = self.unfold_v(self.v.weight.detach()), self.unfold_u(self.u.weight.detach())
        bias = self.bias
        if (norm := self.extra_norm) is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
            shift = (norm.bias - norm.running_mean * scale).detach().reshape(len(u), self.rank, 1)
            v_shift = (v @ shift).reshape(-1)
            u = u * scale.reshape(len(u), self.rank, 1)
            trained = self.v.weight.requires_grad if bias is None else bias.requires_grad
            bias = nn.Parameter(v_shift if bias is None else bias.detach() + v_shift, trained)
        weight = self.fold_dense(v @ u)
        return self._filled(self.empty_dense({"device": weight.device, "dtype": weight.dtype}), weight, bias)

    def _filled(self, dense: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The layer with this weight and bias, and the pair's mode, gradient flag and memory format."""
        source: Tensor = self.u.weight
        with torch.no_grad():
            weight_of(dense).copy_(weight)
        if weight.ndim == 4 and not source.is_contiguous():
            dense.to(memory_format=torch.channels_last)
        weight_of(dense).requires_grad_(source.requires_grad)
        if bias is not None:
            dense.bias = cast(nn.Parameter, bias)  # not `register_parameter`: the layer may have noted None
        vars(dense).update({name: vars(self)[name] for name in self.carried if name not in vars(dense)})
        return dense.train(self.training)

    def fill_from(self, weight: Tensor) -> None:
        """Fill the factors with the best rank-r approximation of the dense `weight`, split by √Σ (Cuttlefish §3.3)."""
        if not weight.is_meta:
            self.fill(*truncated_factors(type(self).unroll(self, weight), self.rank))

    @torch.no_grad()
    def fill(self, u: Tensor | None, v: Tensor, like: "FactorPair | None" = None) -> None:
        """Fill the factors with `U` `(groups, r, cols)`, None for the one that is there, and `V` `(groups, rows, r)`, or with factors
        of the same product if the form fixes a part of `V`: which part, it chooses, or takes from a pair that is `like` this one.
        """
        if like is None:
            self.choose_basis(v)
        else:
            for mine, theirs in zip(self.held[2:], like.held[2:], strict=True):
                mine.copy_(theirs)
        if self.basis:
            u, v = self.in_basis(self.unfold_u(self.u.weight) if u is None else u, v)
        if u is not None:
            self.u.weight.copy_(self.fold_u(u))
        self.v.weight.copy_(self.fold_v(v))

    def choose_basis(self, v: Tensor) -> None:
        """Where the form fixes a part of `V`: choose it so that this `V` is well conditioned there."""

    def in_basis(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the same product with that part of `V` as the form has it."""
        return u, v

    @property
    def held(self) -> tuple[Tensor, ...]:
        """All that says what the factors are."""
        return self.u.weight, self.v.weight, *(cast(Tensor, own_buffers(self.v)[name]) for name in self.basis)

    def share(self, other: "FactorPair") -> None:
        """Have the very factors of another pair of this class and rank."""
        self.u.weight, self.v.weight = other.u.weight, other.v.weight
        own_buffers(self.v).update({name: own_buffers(other.v)[name] for name in self.basis})

    def gain_bias(self) -> None:
        """A bias of zeros, where the dense layer has none."""
        weight = self.v.weight
        self.v.bias = nn.Parameter(weight.new_zeros(self.dense_shape[0]), weight.requires_grad)

    def forward(self, input: Tensor) -> Tensor:
        """`v(u(x))`; shapes in and out, and the argument's name, as the dense layer's."""
        x: Tensor = self.u(input)
        if self.norm is not None:
            x = self.norm(x)
        out: Tensor = self.v(x)
        return out

    # -- what a reader sees

    @property
    def splits_products(self) -> bool:
        """Whether `x @ weight` is two products with `u.weight` and `v.weight` as they lie there."""
        as_they_lie = self.multiplies_when_read and len(self.unfold_u(self.u.weight)) == 1
        return as_they_lie and len(self.dense_shape) == 2 and not self.is_table

    def extra_repr(self) -> str:
        return f"{self.kind} {self.dense_shape}, rank={self.rank}"
