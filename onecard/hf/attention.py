"""Attention over rows of several documents that never see each other, through transformers' AttentionInterface.

A packed row is (1, T) with `cu_seqlens`, the documents' boundaries, handed through the model's forward as a
keyword. Each document is attended to on its own, so no T x T mask exists and no padding is computed. Without
`cu_seqlens` (generation) transformers' own SDPA runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from onecard.kernels import attention as kernel

NAME = "onecard_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: list[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention in each document.

    Args:
        query: (1, H, T, D); key: (1, H_kv, T, D), value: (1, H_kv, T, D_v), H a multiple of H_kv.
        cu_seqlens: 0, the ends of the documents, T last.
        sliding_window: tokens a query sees, itself included; None for all before it.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: (H,) attention sinks, a score for each head that takes part in the softmax and has no value.

    Returns:
        (1, T, H, D_v) and None.
    """
    assert cu_seqlens is not None and cu_seqlens[-1] == query.shape[2], "a packed row needs its cu_seqlens"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if softcap is None and s_aux is None and dropout == 0.0 and kernel.supports(query, key, value):
        return kernel.attention(query, key, value, cu_seqlens, scale, sliding_window), None
    out = None if query.requires_grad else query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[3])
    pieces = []
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        q, k, v = (t[:, :, start:end] for t in (query, key, value))
        piece = attend(q, k, v, scale, dropout, sliding_window, softcap, s_aux).transpose(1, 2)
        if out is None:
            pieces.append(piece)
        else:
            out[:, start:end] = piece
    return (torch.cat(pieces, dim=1) if out is None else out), None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of one document: (1, H, S, D) with grouped keys and values."""
    length = q.shape[2]
    mask = band_mask(length, window, q.device) if window is not None and window < length else None
    if softcap is None and sinks is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * (scale if softcap is None else scale / softcap)
    scores = scores if softcap is None else softcap * torch.tanh(scores)
    mask = mask if mask is not None else band_mask(length, length, q.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    probabilities = scores.softmax(-1, dtype=torch.float32)[..., :length].to(q.dtype)
    return F.dropout(probabilities, dropout) @ v


def band_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool (length, length): query i sees keys i - window + 1 ... i."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(NAME, packed_attention)  # and no mask under this name: transformers then makes none


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether the model's layers are causal or sliding ones that go through the AttentionInterface."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    return bool(model._supports_attention_backend) and kinds <= {"full_attention", "sliding_attention"}


@contextmanager
def use_packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention is `packed_attention`; outside, what it was."""
    before: Any = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
