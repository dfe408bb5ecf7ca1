"""RMSNorm, SwiGLU and rotary positions with their gradients on a GPU. Each reads its inputs once and writes its outputs
once.

The formulas are those of kernels/elementwise.py. All values between the loads and the stores are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onecard.kernels.triton import launch

BLOCK = 1024  # elements of SwiGLU per program


@triton.jit
def rms_norm_kernel(x, delta, w, total, y, rstd, eps, ADDS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Each program computes one row."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < D
    x_row = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x_row += tl.load(delta + row * D + at, mask=inside, other=0.0).to(tl.float32)
        x_row = x_row.to(x.dtype.element_ty)
        tl.store(total + row * D + at, x_row, mask=inside)
        x_row = x_row.to(tl.float32)
    r = tl.rsqrt(tl.sum(x_row * x_row, axis=0) / D + eps)
    normed = (x_row * r).to(x.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + at, scaled.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def rms_norm_backward_kernel(
    grad_y, x, w, rstd, grad_total, grad_x, ADDS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < D
    x_row = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_y + row * D + at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    back = tl.sum(g * x_row, axis=0) * r * r * r / D
    grad = g * r - x_row * back
    if ADDS:
        grad += tl.load(grad_total + row * D + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + row * D + at, grad.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate, up, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(grad_y, gate, up, grad_gate, grad_up, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    dy = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(grad_gate + at, (dy * u * s * (1 + g * (1 - s))).to(gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + at, (dy * g * s).to(up.dtype.element_ty), mask=inside)


@triton.jit
def rope_kernel(
    x, cos, sin, y, H, P, D: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS heads of a token. A lane has one element of each half of a head."""
    HALF: tl.constexpr = D // 2
    token, d = (tl.program_id(0) // GROUPS).to(tl.int64), tl.arange(0, BLOCK)
    head = tl.program_id(0) % GROUPS * HEADS + tl.arange(0, HEADS)
    half = d < HALF
    angle = token % P * D + d
    cos1, cos2 = tl.load(cos + angle, half, 0.0).to(tl.float32), tl.load(cos + angle + HALF, half, 0.0).to(tl.float32)
    sin1, sin2 = tl.load(sin + angle, half, 0.0).to(tl.float32), tl.load(sin + angle + HALF, half, 0.0).to(tl.float32)
    at, inside = token * H * D + head[:, None] * D + d[None, :], (head < H)[:, None] & half[None, :]
    x1, x2 = tl.load(x + at, inside, 0.0).to(tl.float32), tl.load(x + at + HALF, inside, 0.0).to(tl.float32)
    if BACK:
        y1, y2 = x1 * cos1[None, :] + x2 * sin2[None, :], x2 * cos2[None, :] - x1 * sin1[None, :]
    else:
        y1, y2 = x1 * cos1[None, :] - x2 * sin1[None, :], x2 * cos2[None, :] + x1 * sin2[None, :]
    tl.store(y + at, y1.to(y.dtype.element_ty), inside)
    tl.store(y + at + HALF, y2.to(y.dtype.element_ty), inside)


def row_launch(D: int) -> dict[str, int]:
    """Return launch settings: a program holds one row in registers, at most 32 elements a thread up to D = 16384."""
    block = triton.next_power_of_2(D)
    return {"D": D, "BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}


def rms_norm(x: Tensor, delta: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return t = x + delta (x without a delta), y, contiguous, of t's shape, and r, float32 (rows,)."""
    y, D, adds = torch.empty_like(x), x.shape[-1], delta is not None
    total = torch.empty_like(x) if adds else x
    rstd = torch.empty(x.numel() // D, dtype=torch.float32, device=x.device)
    launch(rms_norm_kernel, rstd.numel(), x, delta if adds else x, w, total, y, rstd, eps, ADDS=adds, **row_launch(D))
    return total, y, rstd


def rms_norm_backward(grad_y: Tensor, x: Tensor, w: Tensor, rstd: Tensor, grad_total: Tensor | None) -> Tensor:
    grad_x, adds = torch.empty_like(x), grad_total is not None
    launch(
        rms_norm_backward_kernel, rstd.numel(), grad_y, x, w, rstd, grad_total if adds else x, grad_x,
        ADDS=adds, **row_launch(x.shape[-1]),
    )  # fmt: skip
    return grad_x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    launch(swiglu_kernel, triton.cdiv(y.numel(), BLOCK), gate, up, y, y.numel(), BLOCK=BLOCK)
    return y


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    num_programs = triton.cdiv(gate.numel(), BLOCK)
    launch(swiglu_backward_kernel, num_programs, grad_y, gate, up, grad_gate, grad_up, gate.numel(), BLOCK=BLOCK)
    return grad_gate, grad_up


def rope_launch(H: int, D: int) -> dict[str, int]:
    """Return launch settings: a program rotates all heads of a token, or as many as have 2,048 pairs."""
    block = triton.next_power_of_2(D // 2)
    heads = min(triton.next_power_of_2(H), max(2048 // block, 1))
    return {"D": D, "GROUPS": triton.cdiv(H, heads), "HEADS": heads, "BLOCK": block}


def rope(x_THD: Tensor, cos_PD: Tensor, sin_PD: Tensor, back: bool) -> Tensor:
    """Rotate each token's heads by its angles, in row t modulo P; with `back`, apply the transpose."""
    T, H, D = x_THD.shape
    y_THD, sizes = torch.empty_like(x_THD), rope_launch(H, D)
    launch(rope_kernel, T * sizes["GROUPS"], x_THD, cos_PD, sin_PD, y_THD, H, len(cos_PD), **sizes, BACK=back)
    return y_THD
