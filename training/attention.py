"""Attention for packed blocks on a CPU: one causal call per document instead of one masked call per block.

softmax(Q K^T / sqrt(d)) V is computed for each document alone, so documents cannot see each other by
construction, and the work is the sum of the squared document lengths, not the square of the block's. bfloat16 is
widened to float32 for it: torch's backward pass for bfloat16 on a CPU takes up to three times as long. Registered
with transformers as `per_document`; documents begin where `position_ids` is 0. Same result as the block-diagonal
mask transformers derives (tests/training/test_packing.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "per_document"
# Plain softmax attention without soft-capping, sinks or sliding windows in the layers.
MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral")


def per_document_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each document of each row.

    Args:
        query: (batch, heads, length, head_dim); key, value: (batch, kv_heads, length, head_dim).
        position_ids: int64 (batch or 1, length), 0 at the first token of every document.

    Returns:
        (batch, length, heads, head_dim), and None for the attention weights, which are not kept.
    """
    if position_ids is None or attention_mask is not None:
        raise ValueError("per_document attention needs position ids and no mask")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    dtype = query.dtype
    if dtype == torch.bfloat16:
        query, key, value = query.float(), key.float(), value.float()
    rows = []
    for row in range(query.shape[0]):
        starts = (position_ids[row % position_ids.shape[0]] == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], query.shape[2]], strict=True)]
        parts = [
            F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
            for q, k, v in zip(
                *(tensor[row : row + 1].split(lengths, dim=2) for tensor in (query, key, value)), strict=True
            )
        ]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows).to(dtype).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Documents are separated by the call itself; there is no mask to build."""


def choose(config: Any, device: str, cutoff: int) -> str:
    """`per_document` where it is right and faster (CPU, plain attention), else `sdpa`."""
    window = getattr(config, "sliding_window", None)
    plain = config.model_type in MODEL_TYPES and (not window or window >= cutoff)
    if device != "cpu" or not plain:
        return "sdpa"
    AttentionInterface.register(NAME, per_document_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME
