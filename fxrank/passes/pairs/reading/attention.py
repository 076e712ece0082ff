"""Multi-head attention with weights that are products.

`nn.MultiheadAttention` hands its weights to `torch.nn.functional.multi_head_attention_forward`, which multiplies with
them itself. If one of them is a `FactoredWeight`, torch hands the whole call over to us, and this function does it: the
same result for every option, each projection through its factors.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Arguments, shapes, masks and results of `torch.nn.functional.multi_head_attention_forward`: `query` `(L, N, E)`
    or `(L, E)`, result `(L, N, E)` and the weights `(N, L, S)`, `(N, heads, L, S)` if not averaged, or None.

    Raises `NotImplementedError` for `static_k` and `static_v`, which `nn.MultiheadAttention` never passes.
    """
    if static_k is not None or static_v is not None:
        raise NotImplementedError(
            "a factorized attention takes no static_k or static_v; call it without them, or merge it."
        )
    batched = query.ndim == 3
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    head = width // num_heads
    q, k, v = _project_in(
        query, key, value, in_proj_weight, in_proj_bias, (q_proj_weight, k_proj_weight, v_proj_weight)
    )
    mask = _additive(attn_mask, q.dtype)
    padding = _additive(key_padding_mask, q.dtype)
    if is_causal and mask is None and need_weights is False and padding is None:
        mask = torch.full((length, k.shape[0]), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (batch, num_heads))
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.expand(1, batch, -1)]), torch.cat([v, bias_v.expand(1, batch, -1)])
        mask, padding = _one_more(mask), _one_more(padding)
    q, k, v = (x.reshape(x.shape[0], batch, num_heads, head).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        zero = k.new_zeros(batch, num_heads, 1, head)
        k, v = torch.cat([k, zero], 2), torch.cat([v, zero], 2)
        mask, padding = _one_more(mask), _one_more(padding)
    if padding is not None:
        padding = padding[:, None, None, :]
        mask = padding if mask is None else mask + padding
    dropout_p = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = (q * head**-0.5) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout_p) if dropout_p else weights
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
    out = F.linear(out.permute(2, 0, 1, 3).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    return (out if batched else out.squeeze(1)), weights


def _project_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    if packed is None:
        biases: Any = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(  # type: ignore[return-value]
            F.linear(x, w, b) for x, w, b in zip((query, key, value), separate, biases, strict=True) if w is not None
        )
    if query is key and key is value:
        q, k, v = F.linear(query, packed, bias).chunk(3, -1)
        return q, k, v
    weights = packed.chunk(3)
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A boolean mask (True: left out) as numbers to add."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _one_more(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, 1))
