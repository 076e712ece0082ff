"""Factor pairs of convolutions, in one, two and three dimensions, and of their transposes."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrank.passes.pairs.base import FactorPair, Layers, Norm, fill_dense
from fxrank.passes.model.weights import weight_of

_GEOMETRY = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "transposed",
    "output_padding",
)
_POINTWISE = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "padding_mode": "zeros"}


class SamePadConv2d(nn.Conv2d):
    """A convolution that pads its input itself so that the output has `ceil(size / stride)` places, as TensorFlow's
    "SAME" does: more after than before.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`(n, in, h, w)` to `(n, out, ceil(h / stride), ceil(w / stride))`."""
        pads: list[int] = []
        for size, kernel, stride, dilation in zip(
            input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [total // 2, total - total // 2]
        out: Tensor = self._conv_forward(F.pad(input, pads) if any(pads) else input, self.weight, self.bias)
        return out


class _LowRankConv(FactorPair):
    """What the convolutions share. Unrolled matrix per group `(n/g, m/g · k)` with `k` places of the kernel."""

    geometry = _GEOMETRY
    conv_type: ClassVar[type[Any]]
    norm_type: ClassVar[type[Any]]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    output_padding: tuple[int, ...]
    same_pad: bool

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        groups = dense.groups
        assert isinstance(groups, int)
        return tensor.reshape(groups, tensor.shape[0] // groups, -1)

    @classmethod
    def spectral_view(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            tensor = tensor.permute(0, 2, 3, 1)
        return cls.unroll(dense, tensor)

    def _conv(self, place: dict[str, Any], **changes: Any) -> nn.Module:
        options = {name: getattr(self, name) for name in _GEOMETRY[:8]} | {"bias": False} | changes
        kind = SamePadConv2d if self.same_pad and "kernel_size" not in changes else type(self).conv_type
        conv: nn.Module = nn.utils.skip_init(kind, **options, **place)
        return conv

    def _layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        self.same_pad = bool(getattr(dense, "same_pad", False))
        width = self.groups * self.rank
        first = self._conv(place, out_channels=width)
        second = self._conv(place, in_channels=width, **_POINTWISE)
        weight = weight_of(dense)
        if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
            first.to(memory_format=torch.channels_last)
            second.to(memory_format=torch.channels_last)
        return first, type(self).norm_type(width, **place) if extra_bn else None, second

    def fold_u(self, u: Tensor) -> Tensor:
        return u.reshape(self.groups * self.rank, self.in_channels // self.groups, *self.kernel_size)

    def fold_v(self, v: Tensor) -> Tensor:
        return v.reshape(self.out_channels, self.rank, *[1] * len(self.kernel_size))

    def unfold_u(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, self.rank, -1)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, -1, self.rank)

    def fold_dense(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.dense_shape)

    def to_dense(self) -> nn.Module:
        v, u = self.unfold_v(self.v.weight.detach()), self.unfold_u(self.u.weight.detach())
        bias = self.bias
        if self.norm is not None:
            norm = self.norm
            assert norm.running_mean is not None and norm.running_var is not None
            scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
            shift = (norm.bias - norm.running_mean * scale).detach().reshape(self.groups, self.rank, 1)
            v_shift = (v @ shift).reshape(-1)
            u = u * scale.reshape(self.groups, self.rank, 1)
            trained = self.v.weight.requires_grad if bias is None else bias.requires_grad
            bias = nn.Parameter(v_shift if bias is None else bias.detach() + v_shift, trained)
        weight = self.fold_dense(v @ u)
        return fill_dense(self._conv({"device": weight.device, "dtype": weight.dtype}), self, weight, bias)


class LowRankConv1d(_LowRankConv):
    """`Conv1d(m, n, k)` as `Conv1d(m, g·r, k)` then `Conv1d(g·r, n, 1)`; see `LowRankConv2d`."""

    kind = "conv1d"
    conv_type = nn.Conv1d
    norm_type = nn.BatchNorm1d


class LowRankConv2d(_LowRankConv):
    """`Conv2d(m, n, k)` as `Conv2d(m, g·r, k)` then `Conv2d(g·r, n, 1)`, both with the layer's `g` groups and rank
    `r` in each.

    Unrolled matrix per group `(n/g, m/g·kh·kw)`. Break-even rank `m·n·kh·kw / (m·kh·kw + n·g)` for `g = 1`; see
    `Layer.break_even_rank`. Stride, padding (numbers or `same`), padding mode and dilation stay with the first. A
    weight-standardized convolution is standardized once, at the split; a convolution that pads by itself goes on to.
    """

    kind = "conv2d"
    conv_type = nn.Conv2d
    norm_type = nn.BatchNorm2d


class LowRankConv3d(_LowRankConv):
    """`Conv3d(m, n, k)` as `Conv3d(m, g·r, k)` then `Conv3d(g·r, n, 1)`; see `LowRankConv2d`."""

    kind = "conv3d"
    conv_type = nn.Conv3d
    norm_type = nn.BatchNorm3d


class _LowRankConvTranspose(_LowRankConv):
    """`ConvTranspose(m, n, k)` as a pointwise `Conv(m, g·r, 1)`, then `ConvTranspose(g·r, n, k)` with the layer's
    geometry, bias and output padding.

    The thin product comes first, at the input's few places. Unrolled matrix per group `(n/g · k, m/g)`; the pair's MACs
    are the layer's times `r (rows + cols) / (rows · cols)`, exactly as for a convolution. `extra_bn` is not available:
    a BatchNorm there could not be folded back where the output is cut at its border.
    """

    geometry = _GEOMETRY
    pointwise_type: ClassVar[type[Any]]

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        groups = dense.groups
        assert isinstance(groups, int)
        return tensor.reshape(groups, tensor.shape[0] // groups, -1).mT

    @classmethod
    def spectral_view(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return cls.unroll(dense, tensor)

    def _layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        self.same_pad = False
        width = self.groups * self.rank
        pointwise = type(self).pointwise_type
        first = nn.utils.skip_init(pointwise, self.in_channels, width, 1, groups=self.groups, bias=False, **place)
        second = self._conv(place, in_channels=width)
        return first, None, second

    def _conv(self, place: dict[str, Any], **changes: Any) -> nn.Module:
        return super()._conv(place, **({"output_padding": self.output_padding} | changes))

    def fold_u(self, u: Tensor) -> Tensor:
        return u.reshape(self.groups * self.rank, -1, *[1] * len(self.kernel_size))

    def fold_v(self, v: Tensor) -> Tensor:
        return v.mT.reshape(self.groups * self.rank, self.out_channels // self.groups, *self.kernel_size)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, self.rank, -1).mT

    def fold_dense(self, matrix: Tensor) -> Tensor:
        return matrix.mT.reshape(self.dense_shape)

    def _factored(self, u: Tensor, v: Tensor) -> Tensor:
        return self.fold_dense(v @ u)  # nobody multiplies with such a kernel outside of its layer

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the dense layer's, `output_size` included."""
        x: Tensor = self.u(input)
        out: Tensor = self.v(x) if output_size is None else self.v(x, output_size)
        return out


class LowRankConvTranspose1d(_LowRankConvTranspose):
    """`ConvTranspose1d`; see `LowRankConvTranspose2d`."""

    kind = "conv_transpose1d"
    conv_type = nn.ConvTranspose1d
    pointwise_type = nn.Conv1d
    norm_type = nn.BatchNorm1d


class LowRankConvTranspose2d(_LowRankConvTranspose):
    """`ConvTranspose2d(m, n, k)` as `Conv2d(m, g·r, 1)` then `ConvTranspose2d(g·r, n, k)`, rank `r` in each group.

    Unrolled matrix per group `(n/g·kh·kw, m/g)`.
    """

    kind = "conv_transpose2d"
    conv_type = nn.ConvTranspose2d
    pointwise_type = nn.Conv2d
    norm_type = nn.BatchNorm2d


class LowRankConvTranspose3d(_LowRankConvTranspose):
    """`ConvTranspose3d`; see `LowRankConvTranspose2d`."""

    kind = "conv_transpose3d"
    conv_type = nn.ConvTranspose3d
    pointwise_type = nn.Conv3d
    norm_type = nn.BatchNorm3d


__all__ = [
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "Norm",
    "SamePadConv2d",
]
