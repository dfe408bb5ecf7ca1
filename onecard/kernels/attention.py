"""Causal attention over the documents of a packed row, as one torch operator on the CPU's C++ kernels.

    O = softmax(s Q K^T + mask) V, and from P: dV = P^T dO, dS = s P (dO V^T - rowsum(dO O)), dQ = dS K, dK = dS^T Q

The probabilities are never stored: the backward recomputes them from the log-sum-exp of each row (FlashAttention,
arXiv 2205.14135). All values between inputs and outputs are float32. The bits do not depend on the number of threads.

Shape suffixes: H query heads, G key heads, T tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.kernels.backend import backend
from onecard.kernels.cpu import allocator, native
from onecard.kernels.operator import Operator


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` accepts these: (1, H, T, D) and (1, G, T, D) on the CPU, one dtype, D a multiple of 16."""
    D = q.shape[-1]
    return (
        backend(q.device).attention is not None
        and q.dtype in native.DTYPES
        and q.dtype == k.dtype == v.dtype
        and D % 16 == 0
        and v.shape[-1] == D
    )


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float, window: int | None) -> Tensor:
    """Compute the causal attention of each document.

    Args:
        q: (1, H, T, D); k, v: (1, G, T, D), H a multiple of G; see `supports`.
        cu_seqlens: 0, then the end of each document; the last is T.
        window: number of tokens that a query sees, itself included. None: itself and all before it.

    Returns:
        (1, T, H, D), q's dtype.
    """
    out, _ = _attention(q, k, v, cu_seqlens, scale, window or 0)
    return out


def heads(x: Tensor) -> Tensor:
    """Convert (1, H, T, D) to (H, T, D) with a dense last dimension."""
    return x[0] if x.stride(-1) == 1 else x[0].contiguous()


def _compute_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    _, H, T, D = q.shape
    out = allocator.empty((1, T, H, D), q.dtype)
    lse_HT = native.new(torch.float32, H, T)
    native.attention(heads(q), heads(k), heads(v), cu_seqlens, scale, window, out, lse_HT)
    return out, lse_HT


_attention = Operator("attention", _compute_attention)


@_attention.register_fake
def _(q, k, v, cu_seqlens, scale, window):
    _, H, T, D = q.shape
    return q.new_empty(1, T, H, D), q.new_empty(H, T, dtype=torch.float32)


def _compute_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_HT: Tensor,
    cu_seqlens: list[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _, H, T, D = q.shape
    grad_q = allocator.empty((1, T, H, D), q.dtype)
    parts_k, parts_v = allocator.empty((2, H, T, D), torch.float32)
    grad_k, grad_v = allocator.empty_like(k), allocator.empty_like(v)
    grads = (grad_out.contiguous(), grad_q, parts_k, parts_v, grad_k, grad_v)
    native.attention(heads(q), heads(k), heads(v), cu_seqlens, scale, window, out, lse_HT, grads)
    return grad_q.transpose(1, 2), grad_k, grad_v


_attention_backward = Operator("attention_backward", _compute_attention_backward)


@_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse_HT, cu_seqlens, scale, window):
    _, H, T, D = q.shape
    return q.new_empty(1, T, H, D).transpose(1, 2), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.cu_seqlens, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, grad_out, _):
    arguments = (ctx.cu_seqlens, ctx.scale, ctx.window)
    return *_attention_backward(grad_out, *ctx.saved_tensors, *arguments), None, None, None


_attention.register_autograd(_backward, _setup_context)
