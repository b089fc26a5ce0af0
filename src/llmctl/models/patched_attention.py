"""Attention as transformers calls it, without torch's slow case on a CPU.

The backward pass of a short sequence takes torch two to five times as long in bfloat16 as in
float32, so it is computed in float32; inputs and outputs stay in bfloat16.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SHORT = 16_384
"""Tokens times head size up to which float32 is faster; measured for heads of 32 to 128."""

CAUSAL = "sdpa_causal"
"""Name of attention to windows without padding, which never gets a mask."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute scaled dot-product attention, as `sdpa_attention_forward`.

    Args:
        module: the layer.
        query: (B, heads, L, head_size).
        key: (B, kv_heads, L, head_size).
        value: (B, kv_heads, L, head_size).
        attention_mask: boolean or additive; None where attention is causal.
        options: passed on.

    Returns:
        (B, L, heads, head_size), in the dtype that SDPA would give.
    """
    if not in_float32(query):
        mixed, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return mixed, None
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        exact = (part.float() for part in (query, key, value))
        mixed, _ = sdpa_attention_forward(module, *exact, attention_mask, **options)
    return mixed.bfloat16(), None


def in_float32(query: Tensor) -> bool:
    """Whether attention to (B, heads, L, head_size) would be in bfloat16, and slow.

    Under autocast a query that rotary angles turned is still in float32, and SDPA would round it.
    """
    if query.device.type != "cpu":
        return False
    rounded = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    length, size = query.shape[2:]
    return torch.bfloat16 in (query.dtype, rounded) and 1 < length <= SHORT // size


AttentionInterface.register("sdpa", attend)  # of every model that transformers loads with SDPA
