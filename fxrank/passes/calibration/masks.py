"""Which positions of a batch are padding, from the masks that a model is given."""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

MASKS = {
    **dict.fromkeys(("attention_mask", "encoder_attention_mask", "decoder_attention_mask"), True),
    **dict.fromkeys(("padding_mask", "key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask"), False),
    "memory_key_padding_mask": False,
}
"""Arguments of models that say which positions are padding, and whether they hold 1 (True) for those that are not. Numbers that are
added to scores say it by themselves.
"""


def paddings(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Masks `(batch, length)`, true where a position is padding, one for each shape: of several masks of a shape, as of an encoder and a
    decoder, what is padding in all of them. Empty if the model is not told.
    """
    given = mask_arguments(model, args, kwargs)
    found: dict[torch.Size, Tensor] = {}
    for name, keeps in MASKS.items():
        padding = _padding(given[name], keeps) if name in given else None
        if padding is not None:
            found[padding.shape] = found[padding.shape] & padding if padding.shape in found else padding
    return list(found.values())


def mask_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that a model is given, by the names of `MASKS`."""
    given = dict(kwargs)
    if args:
        with suppress(TypeError, ValueError):  # the call itself will say what does not fit
            given |= inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    return {name: mask for name in MASKS if isinstance(mask := given.get(name), Tensor)}


def _padding(mask: Tensor, keeps: bool) -> Tensor | None:
    """Of `(batch, length)`, or `(batch, heads, queries, length)`, where a position is padding that no query may see."""
    if mask.ndim not in (2, 4) or mask.is_complex():
        return None
    if mask.is_floating_point() and bool((mask < 0).any()):
        padding = mask < torch.finfo(mask.dtype).min / 2 if mask.ndim == 4 else mask < -1e3
    elif mask.is_floating_point() and (mask.ndim == 4 or not mask.any()):
        return None  # added to scores it leaves nothing out
    else:
        padding = mask == 0 if keeps else mask != 0
    return padding if mask.ndim == 2 else padding.all(2).all(1)
