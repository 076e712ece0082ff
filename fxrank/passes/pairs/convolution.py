"""Factor pairs of convolutions, in one, two and three dimensions, and of their transposes.

In form "channel", stride, padding, dilation, padding mode and groups belong to `u`; `v` is pointwise. `u` then `v` is what
Pufferfish §2 and Cuttlefish §3 use: thin k×k, then 1×1. In form "spatial", `u` runs down and `v` across.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxrank.passes.model.weights import weight_of
from fxrank.passes.pairs.base import FactorPair, Layers, whole_number
from fxrank.passes.pairs.registry import register_pair

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
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
_POINTWISE = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "padding_mode": "zeros"}


def _pads(conv: nn.Conv2d) -> list[int]:
    """What the layer pads with, as `F.pad` takes it: the last direction first."""
    pads: list[int] = []
    for direction in (1, 0):
        if isinstance(conv.padding, str):
            total = conv.dilation[direction] * (conv.kernel_size[direction] - 1) if conv.padding == "same" else 0
            pads += [total // 2, total - total // 2]
        else:
            pads += [conv.padding[direction]] * 2
    return pads


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
    takes_norm = True
    multiplies_when_read = True
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
        groups = whole_number(dense, "groups")
        return tensor.reshape(groups, tensor.shape[0] // groups, -1)

    @classmethod
    def side(cls, dense: nn.Module) -> str | None:
        return "outputs"

    @classmethod
    def seen(cls, dense: nn.Module, side: str, input: Tensor, output: Tensor) -> Tensor:
        places = len(weight_of(dense).shape) - 2
        batched = output if output.ndim == places + 2 else output[None]
        bias = getattr(dense, "bias", None)
        found = batched.movedim(1, -1) if bias is None else batched.movedim(1, -1) - bias
        return found.reshape(*found.shape[:-1], whole_number(dense, "groups"), -1)

    @classmethod
    def spectral_view(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            tensor = tensor.permute(0, 2, 3, 1)
        return cls.unroll(dense, tensor)

    def unfold_u(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, self.rank, -1)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, -1, self.rank)

    def _conv(self, place: dict[str, Any], **changes: Any) -> nn.Module:
        options = {name: getattr(self, name) for name in _GEOMETRY[:8]} | {"bias": False} | changes
        kind = SamePadConv2d if self.same_pad and options["kernel_size"] != 1 else type(self).conv_type
        conv: nn.Module = nn.utils.skip_init(kind, **options, **place)
        return conv

    def make_layers(self, dense: nn.Module, place: dict[str, Any], extra_bn: bool) -> Layers:
        self.same_pad = bool(getattr(dense, "same_pad", False))
        width = self.groups * self.rank
        first, second = self._factors(place, width)
        weight = weight_of(dense)
        if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
            first.to(memory_format=torch.channels_last)
            second.to(memory_format=torch.channels_last)
        return first, type(self).norm_type(width, **place) if extra_bn else None, second

    def _factors(self, place: dict[str, Any], width: int) -> tuple[nn.Module, nn.Module]:
        """`u` and `v` with so many channels between them."""
        return self._conv(place, out_channels=width), self._conv(place, in_channels=width, **_POINTWISE)

    def empty_dense(self, place: dict[str, Any]) -> nn.Module:
        return self._conv(place)


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


class LowRankSpatialConv2d(_LowRankConv):
    """`Conv2d(m, n, kh×kw)` as `Conv2d(m, g·r, kh×1)` then `Conv2d(g·r, n, 1×kw)`, both with the layer's `g` groups and rank
    `r` in each (Jaderberg, Vedaldi & Zisserman 2014, scheme 2).

    Unrolled matrix per group `(n/g·kw, m/g·kh)`. Each direction's stride, padding (numbers or `same`) and dilation go to the factor
    that runs along it, the padding mode to both: padding along one direction commutes with a convolution along the other. Break-even
    rank `m·n·kh·kw / (m·kh + n·kw)` in parameters for `g = 1`; in MACs it is lower where the second factor has a stride, for the
    first one runs over the whole width. For a kernel of width 1 it is the channel pair. `extra_bn` is not available: the
    second factor pads what comes out of it.
    """

    kind = "conv2d"
    conv_type = nn.Conv2d
    norm_type = nn.BatchNorm2d
    takes_norm = False
    multiplies_when_read = False

    @classmethod
    def suits(cls, dense: nn.Module) -> bool:
        return weight_of(dense).shape[-1] > 1

    @classmethod
    def side(cls, dense: nn.Module) -> str | None:
        return "patches" if type(dense).forward is nn.Conv2d.forward else None  # else it pads in a way of its own

    @classmethod
    def seen(cls, dense: nn.Module, side: str, input: Tensor, output: Tensor) -> Tensor:
        assert isinstance(dense, nn.Conv2d)
        x = F.pad(input if input.ndim == 4 else input[None], _pads(dense), mode=_PAD_MODES[dense.padding_mode])
        for direction, (size, stride, gap) in enumerate(
            zip(dense.kernel_size, dense.stride, dense.dilation, strict=True), 2
        ):
            x = x.unfold(direction, (size - 1) * gap + 1, stride)[..., ::gap]
        x = x.movedim(1, 3)  # all views; a reshape that splits a dimension is one too
        return x.reshape(*x.shape[:3], dense.groups, -1, *x.shape[4:])

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        groups, (n, m, kh, kw) = whole_number(dense, "groups"), tensor.shape
        by_group = tensor.reshape(groups, n // groups, m, kh, kw)
        return by_group.permute(0, 1, 4, 2, 3).reshape(groups, n // groups * kw, m * kh)

    @classmethod
    def spectral_view(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return cls.unroll(dense, tensor)

    def fold_dense(self, matrix: Tensor) -> Tensor:
        n, m, kh, kw = self.dense_shape
        by_group = matrix.reshape(self.groups, n // self.groups, kw, m, kh)
        return by_group.permute(0, 1, 3, 4, 2).reshape(self.dense_shape)

    def fold_v(self, v: Tensor) -> Tensor:
        n, _, _, kw = self.dense_shape
        by_group = v.reshape(self.groups, n // self.groups, kw, self.rank)
        return by_group.transpose(2, 3).reshape(n, self.rank, 1, kw)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        n, _, _, kw = self.dense_shape
        by_group = tensor.reshape(self.groups, n // self.groups, self.rank, kw)
        return by_group.transpose(2, 3).reshape(self.groups, n // self.groups * kw, self.rank)

    @classmethod
    def uses(
        cls, dense: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int]
    ) -> tuple[float, float, float]:
        places = math.prod(output_shape) / weight_of(dense).shape[0]
        return places, places * input_shape[-1] / output_shape[-1], places

    def _factors(self, place: dict[str, Any], width: int) -> tuple[nn.Module, nn.Module]:
        return self._along(0, place, out_channels=width), self._along(1, place, in_channels=width)

    def _along(self, direction: int, place: dict[str, Any], **channels: int) -> nn.Module:
        """The factor that runs along one direction, with all of the layer's geometry there and none across it."""

        def here(values: tuple[int, ...], across: int) -> tuple[int, ...]:
            return tuple(value if i == direction else across for i, value in enumerate(values))

        geometry = {
            "kernel_size": here(self.kernel_size, 1),
            "stride": here(self.stride, 1),
            "padding": self.padding if isinstance(self.padding, str) else here(self.padding, 0),
            "dilation": here(self.dilation, 1),
        }
        return self._conv(place, **geometry, **channels)


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

    takes_norm = False
    takes_bias = False  # the mean of what a place becomes differs by the place in the kernel
    multiplies_when_read = False  # nobody multiplies with such a kernel outside of its layer
    is_turned = True
    pointwise_type: ClassVar[type[Any]]

    @classmethod
    def side(cls, dense: nn.Module) -> str | None:
        """Its `"inputs"`, where what they become does not overlap in the output, and none of it is cut off; else the `"patches"` of inputs
        that make one place of the output.
        """
        assert isinstance(dense, _TRANSPOSED)
        spans = ((size - 1) * gap + 1 for size, gap in zip(dense.kernel_size, dense.dilation, strict=True))
        apart = all(span <= stride for span, stride in zip(spans, dense.stride, strict=True))
        return "inputs" if apart and not any(dense.padding) else "patches"

    @classmethod
    def seen(cls, dense: nn.Module, side: str, input: Tensor, output: Tensor) -> Tensor:
        """A patch is what a kernel of this size that is turned round sees of the inputs with zeros between them."""
        assert isinstance(dense, _TRANSPOSED)
        places = len(weight_of(dense).shape) - 2
        x, out = (t if t.ndim == places + 2 else t[None] for t in (input, output))
        if side == "patches":
            spread = x.new_zeros(
                *x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], dense.stride, strict=True))
            )
            between = spread
            for direction, stride in enumerate(dense.stride, 2):
                between = between.unfold(direction, 1, stride)[..., 0]
            between.copy_(x)
            reaches = [(size - 1) * gap for size, gap in zip(dense.kernel_size, dense.dilation, strict=True)]
            pads: list[int] = []
            for reach, cut, wanted, there in zip(reaches, dense.padding, out.shape[2:], spread.shape[2:], strict=True):
                assert isinstance(cut, int)
                pads = [reach - cut, wanted + cut - there, *pads]
            x = F.pad(spread, pads)
            for direction, (reach, gap) in enumerate(zip(reaches, dense.dilation, strict=True), 2):
                x = x.unfold(direction, reach + 1, 1)[..., ::gap]
        moved = x.movedim(1, places + 1)
        groups = whole_number(dense, "groups")
        return moved.reshape(*moved.shape[: places + 1], groups, x.shape[1] // groups, *moved.shape[places + 2 :])

    @classmethod
    def width(cls, dense: nn.Module) -> int:
        return math.prod(weight_of(dense).shape[2:])

    @classmethod
    def unroll(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        groups = whole_number(dense, "groups")
        return tensor.reshape(groups, tensor.shape[0] // groups, -1).mT

    @classmethod
    def spectral_view(cls, dense: nn.Module, tensor: Tensor) -> Tensor:
        return cls.unroll(dense, tensor)

    @classmethod
    def uses(
        cls, dense: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int]
    ) -> tuple[float, float, float]:
        places = math.prod(input_shape) / weight_of(dense).shape[0]
        return places, places, places

    def _factors(self, place: dict[str, Any], width: int) -> tuple[nn.Module, nn.Module]:
        pointwise = type(self).pointwise_type
        first = nn.utils.skip_init(pointwise, self.in_channels, width, 1, groups=self.groups, bias=False, **place)
        return first, self._conv(place, in_channels=width)

    def _conv(self, place: dict[str, Any], **changes: Any) -> nn.Module:
        return super()._conv(place, **({"output_padding": self.output_padding} | changes))

    def fold_v(self, v: Tensor) -> Tensor:
        return super().fold_v(v.mT)

    def unfold_v(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.groups, self.rank, -1).mT

    def fold_dense(self, matrix: Tensor) -> Tensor:
        return super().fold_dense(matrix.mT)

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


register_pair(nn.Conv1d, LowRankConv1d)
register_pair(nn.Conv2d, LowRankConv2d)
register_pair(nn.Conv2d, LowRankSpatialConv2d, form="spatial")
register_pair(nn.Conv3d, LowRankConv3d)
register_pair(nn.ConvTranspose1d, LowRankConvTranspose1d)
register_pair(nn.ConvTranspose2d, LowRankConvTranspose2d)
register_pair(nn.ConvTranspose3d, LowRankConvTranspose3d)
