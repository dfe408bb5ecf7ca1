"""Attention over packed rows, whose documents never attend to each other, through transformers' AttentionInterface.

A packed row is (1, T). Its `cu_seqlens`, the documents' boundaries, pass through the model's forward as a keyword. Each
document has its own attention, so no T x T mask exists and no padding is computed. Generation uses transformers' SDPA,
`cached_attention` with a cache of fixed length, or `together_attention` for a token of each of several answers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from onecard.kernels import attention as kernel

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.9
    varlen_attn = None
VARLEN = set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)
LARGEST_HEAD = 256  # of FlashAttention
NAME, CACHED, TOGETHER = "onecard_packed", "onecard_cached", "onecard_together"


class NotPacked(Exception):
    """A model does not compute packed rows. The message says why, after the model's name."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: list[int] | Tensor | None = None,
    longest: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the causal attention of each document.

    Args:
        query: (1, H, T, D); key: (1, H_kv, T, D), value: (1, H_kv, T, D_v), H a multiple of H_kv.
        cu_seqlens: 0, then the end of each document; the last is T. For a CUDA graph, an int32 tensor on the device.
        longest: tokens that a document has at most, if cu_seqlens is a tensor. None: T.
        sliding_window: number of tokens that a query sees, itself included. None: itself and all before it.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: (H,) attention sinks: a score for each head that is part of the softmax and has no value.

    Returns:
        (1, T, H, D_v) and None.
    """
    if cu_seqlens is None:
        raise NotPacked("does not hand the documents' ends on to its attention")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    plain = softcap is None and s_aux is None and dropout == 0.0
    several = isinstance(cu_seqlens, Tensor) or len(cu_seqlens) > 2 or sliding_window is not None
    if plain and several and takes_varlen(query, key, value):
        return attend_varlen(query, key, value, cu_seqlens, longest, scale, sliding_window), None
    if isinstance(cu_seqlens, Tensor):
        raise RuntimeError("this attention needs the documents' ends on the host")
    if plain and kernel.supports(query, key, value):
        return kernel.attention(query, key, value, cu_seqlens, scale, sliding_window), None
    assert cu_seqlens[-1] == query.shape[2], (cu_seqlens, query.shape)
    out = None if query.requires_grad else query.new_empty(*query.transpose(1, 2).shape[:3], value.shape[3])
    pieces = []
    for start, end in zip(cu_seqlens, cu_seqlens[1:]):
        if start == end:
            continue
        q, k, v = (t[:, :, start:end] for t in (query, key, value))
        piece = attend(q, k, v, scale, dropout, sliding_window, softcap, s_aux).transpose(1, 2)
        if out is None:
            pieces.append(piece)
        else:
            out[:, start:end] = piece
    return (torch.cat(pieces, dim=1) if out is None else out), None


def takes_varlen(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch's attention over all documents at once accepts these: 16 bits on NVIDIA GPUs since Ampere."""
    return (
        q.device.type == "cuda"
        and {"scale", "window_size"} <= VARLEN
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] == v.shape[-1] <= LARGEST_HEAD
        and q.shape[-1] % 8 == 0
    )


def attend_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: list[int] | Tensor,
    longest: int | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """Compute all documents' causal attention in one launch, (1, T, H, D)."""
    longest = longest or q.shape[2]
    if not isinstance(cu_seqlens, Tensor):
        longest = max(end - start for start, end in zip(cu_seqlens, cu_seqlens[1:]))
        cu_seqlens = on_device(tuple(cu_seqlens), q.device)
    grouped = {"enable_gqa": True} if "enable_gqa" in VARLEN else {}
    if not grouped and q.shape[1] != k.shape[1]:
        k, v = spread(q, k, v)
    left = -1 if window is None else window - 1
    assert varlen_attn is not None
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    settings: dict[str, Any] = {"scale": scale, "window_size": (left, 0), **grouped}
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **settings)
    return out[None]


@lru_cache(maxsize=4)
def on_device(ends: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy `ends` to the device as int32, once for all layers of a row, without waiting for the device."""
    return torch.tensor(ends, dtype=torch.int32, device="cpu").pin_memory().to(device, non_blocking=True)


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
    """Compute the causal attention of one document, (1, H, S, D), with grouped keys and values."""
    length = q.shape[2]
    banded = window is not None and window < length
    masked = banded or softcap is not None or sinks is not None
    mask = band_mask(torch.arange(length, device=q.device), length, window) if masked else None
    return weigh(q, k, v, mask, scale, dropout, softcap, sinks)


def weigh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute attention, (1, H, T, D_v), with a mask (T, keys). None: causal attention."""
    plain, grouped = softcap is None and sinks is None, q.shape[1] != k.shape[1]
    masked = mask is not None and q.device.type == "cuda"  # whose kernels accept a mask or groups, not both
    takes = takes_groups(q.device, q.dtype, q.shape[-1]) and q.shape[-1] == v.shape[-1]
    if grouped and (masked or not plain or not takes):
        k, v = spread(q, k, v)
        grouped = False
    if plain:
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    assert mask is not None
    scores = q @ k.transpose(2, 3) * (scale if softcap is None else scale / softcap)
    scores = scores if softcap is None else softcap * torch.tanh(scores)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    probabilities = scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]].to(q.dtype)
    return F.dropout(probabilities, dropout) @ v


def takes_groups(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's causal attention takes fewer key heads than query heads without scores of all pairs (T, T). On a
    GPU only FlashAttention does: 16 bits, NVIDIA GPUs since Ampere and AMD's. Without a GPU here, a new one is assumed.
    """
    if device.type != "cuda":
        return True
    recent = not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)
    return recent and dtype in (torch.bfloat16, torch.float16) and head_size <= LARGEST_HEAD


def band_mask(positions: Tensor, num_keys: int, window: int | None) -> Tensor:
    """Return a mask, bool (T, num_keys): the query at position i sees keys i - window + 1 ... i, or all up to i."""
    distance = positions[:, None] - torch.arange(num_keys, device=positions.device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def spread(q: Tensor, *groups: Tensor) -> tuple[Tensor, ...]:
    """Repeat keys or values (1, H_kv, T, D) for each of q's H heads."""
    return tuple(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in groups)


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    key_positions: Tensor | None = None,
    num_keys: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention to the keys and values of a cache of fixed length L.

    Args:
        query: (1, H, T, D); key: (1, H_kv, L, D), value: (1, H_kv, L, D_v), H a multiple of H_kv.
        key_positions: int64 (T,), positions of the queries in the cache. Each query sees the keys up to its own.
        num_keys: number of keys that any query can see. None: all.
        sliding_window, softcap, s_aux: same as in packed_attention.

    Returns:
        (1, T, H, D_v) and None.
    """
    assert key_positions is not None, "a fixed cache needs its queries' positions"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    mask = band_mask(key_positions, key.shape[2], sliding_window)
    _, H, T, D = query.shape
    if T == 1 and softcap is None and s_aux is None:  # heads that share keys become queries: no copy of keys
        shared = query.reshape(1, key.shape[1], -1, D)
        return F.scaled_dot_product_attention(shared, key, value, mask, scale=scale).reshape(1, 1, H, -1), None
    return weigh(query, key, value, mask, scale, 0.0, softcap, s_aux).transpose(1, 2), None


def together_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    caches: list[Any] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Append one token to each of B caches, and compute the attention of each to its own keys and values.

    Args:
        query: (1, H, B, D); key: (1, H_kv, B, D), value: (1, H_kv, B, D_v), H a multiple of H_kv.
        caches: B of them. `caches[b].append(layer, key, value)` returns the keys and values to attend to.
        sliding_window, softcap, s_aux: same as in packed_attention.

    Returns:
        (1, B, H, D_v) and None.
    """
    assert caches is not None and len(caches) == query.shape[2], "each token needs its own cache"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    outs = []
    for b, each in enumerate(caches):
        q, k, v = (x[:, :, b : b + 1] for x in (query, key, value))
        k, v = each.append(module.layer_idx, k, v)
        if sliding_window is not None:
            k, v = k[:, :, -sliding_window:], v[:, :, -sliding_window:]
        if softcap is None and s_aux is None:
            grouped = q.shape[1] != k.shape[1]
            outs.append(F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped))
        else:
            mask = torch.ones(1, k.shape[2], dtype=torch.bool, device=q.device)
            outs.append(weigh(q, k, v, mask, scale, 0.0, softcap, s_aux))
    return torch.cat(outs, dim=2).transpose(1, 2), None


# No mask function is registered under these names, so transformers makes no mask.
AttentionInterface.register(NAME, packed_attention)
AttentionInterface.register(CACHED, cached_attention)
AttentionInterface.register(TOGETHER, together_attention)


def cache_name(model: Any) -> str:
    """Return the name of a forward's cache argument: `cache` since transformers 5.24; mamba has its own name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # the model inside peft's
    known = inspect.signature(base.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in known), "past_key_values")


def supports_packing(model: PreTrainedModel) -> bool:
    """Whether the model's layers have full or sliding causal attention and use the AttentionInterface."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    return bool(model._supports_attention_backend) and kinds <= {"full_attention", "sliding_attention"}


def has_windows(model: PreTrainedModel) -> bool:
    """Whether a layer may have sliding-window attention."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    return "sliding_attention" in kinds or getattr(text, "sliding_window", None) is not None


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use the attention registered as `name` in the body; restore the model's own after it."""
    before: Any = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def use_packed_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Use `packed_attention` in the body."""
    return use_attention(model, NAME)


def use_cached_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Use `cached_attention` in the body."""
    return use_attention(model, CACHED)


def use_together_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Use `together_attention` in the body."""
    return use_attention(model, TOGETHER)
