"""The dense layer's weight and bias, as a pair answers for them."""

from abc import abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn

from fxrank.passes.errors import RankError
from fxrank.passes.model.quantized import numbers_in
from fxrank.passes.pairs.reading.factored_weight import FactoredWeight
from fxrank.passes.pairs.reading.products import factored, whole_product
from fxrank.passes.spectra.exact import check_finite
from fxrank.passes.spectra.refit import refit
from fxrank.torch_private.modules import own_buffers

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class ReadsAsLayer(nn.Module):
    """What of a `FactorPair` other code reads and sets as the dense layer's own: `weight` and `bias`."""

    u: Any
    v: Any
    dense_shape: tuple[int, ...]
    multiplies_when_read: ClassVar[bool]
    basis: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        """See `FactorPair`, as for what follows."""

    @abstractmethod
    def fold_dense(self, matrix: Tensor) -> Tensor:
        """See `FactorPair`."""

    @abstractmethod
    def fold_u(self, u: Tensor) -> Tensor:
        """See `FactorPair`."""

    @abstractmethod
    def fold_v(self, v: Tensor) -> Tensor:
        """See `FactorPair`."""

    @abstractmethod
    def unfold_u(self, tensor: Tensor) -> Tensor:
        """See `FactorPair`."""

    @abstractmethod
    def unfold_v(self, tensor: Tensor) -> Tensor:
        """See `FactorPair`."""

    @abstractmethod
    def fill(self, u: Tensor | None, v: Tensor) -> None:
        """See `FactorPair`."""

    @property
    def weight(self) -> Tensor:
        """The dense weight as the product of the factors, made where its numbers are needed; differentiable. A `norm`
        is not part of it.

        It may be set to a parameter, and written into as a whole (`weight.data = …`, `weight.copy_(…)`), where the factors can
        take that exactly: rows scaled, as BatchNorm is folded in, which is put into `v`, or, without a `norm`, any product of their
        rank. Raises `RankError` else, and changes nothing then.
        """
        u, v = self.unfold_u(numbers_in(self.u)), self.unfold_v(numbers_in(self.v))
        if issubclass(type(u), fx.Proxy):
            return self.fold_dense(v @ u)  # the product in full, while being traced
        if self.multiplies_when_read:
            read: Any = factored(u, v, self.dense_shape)  # or what stands in for one while a graph is compiled
        else:
            read = whole_product(u, v, self.dense_shape, self.fold_dense)
        if isinstance(read, FactoredWeight):
            read.write = self._write
        return cast(Tensor, read)

    @weight.setter
    def weight(self, weight: Tensor) -> None:
        if getattr(weight, "write", None) == self._write:
            return  # `pair.weight *= scale` has written into it
        if not isinstance(weight, nn.Parameter):
            raise TypeError(
                f"the weight of a layer must be a parameter; got a {type(weight).__name__}. Wrap it in nn.Parameter."
            )
        u, v = self._refitted(weight)
        # New ones: other pairs may share those that there are.
        for layer in (self.v,) if u is None else (self.v, self.u):
            layer.weight = nn.Parameter(torch.empty_like(layer.weight), weight.requires_grad)
        buffers = own_buffers(self.v)
        buffers.update({name: held.clone() for name in self.basis if (held := buffers[name]) is not None})
        self.fill(u, v)

    def _write(self, weight: Tensor) -> None:
        """The same in place."""
        self.fill(*self._refitted(weight))

    def _refitted(self, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        if tuple(weight.shape) != self.dense_shape:
            raise RankError(
                f"the weight of this pair must have the layer's shape {self.dense_shape}; got {tuple(weight.shape)}. Make a layer of your own for another."
            )
        check_finite(weight)
        u, v = self.unfold_u(self.u.weight), self.unfold_v(self.v.weight)
        return refit(type(self).unroll(self, weight.detach()), u, v, only_rows=self.extra_norm is not None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As the dense layer's; `weight` and `bias` are the pair's own."""
        if name == "weight" and param is not None:
            object.__setattr__(self, name, param)
        elif name == "bias" and hasattr(self.v, "bias"):
            self.v.bias = param
        else:
            super().register_parameter(name, param)

    @property
    def bias(self) -> Tensor | None:
        """The dense layer's own bias parameter, or None."""
        bias: Tensor | None = numbers_in(self.v, "bias")
        return bias

    @property
    def extra_norm(self) -> Norm | None:
        """The BatchNorm between the factors, if there is one."""
        return cast("Norm | None", self._modules.get("norm"))
