"""RMSNorm and SwiGLU with their gradients on a GPU: each reads its inputs once and writes its outputs once.

The formulas are kernels/rows.py's; everything between the loads and the stores is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onecard.kernels.triton import launch

BLOCK = 1024  # elements of SwiGLU a program


@triton.jit
def rms_norm_kernel(x, w, y, rstd, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < D
    x_row = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x_row * x_row, axis=0) / D + eps)
    normed = (x_row * r).to(x.dtype.element_ty).to(tl.float32)
    scaled = normed * tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + at, scaled.to(y.dtype.element_ty), mask=inside)
    tl.store(rstd + row, r)


@triton.jit
def rms_norm_backward_kernel(grad_y, x, w, rstd, grad_x, D: tl.constexpr, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < D
    x_row = tl.load(x + row * D + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_y + row * D + at, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(rstd + row)
    back = tl.sum(g * x_row, axis=0) * r * r * r / D
    tl.store(grad_x + row * D + at, (g * r - x_row * back).to(grad_x.dtype.element_ty), mask=inside)


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


def row_launch(D: int) -> dict[str, int]:
    """A whole row in the registers of a program: at most 32 elements a thread up to D = 16384."""
    block = triton.next_power_of_2(D)
    return {"D": D, "BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}


def rms_norm(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y like x, contiguous, and r float32 (rows,)."""
    y, D = torch.empty_like(x), x.shape[-1]
    rstd = torch.empty(x.numel() // D, dtype=torch.float32, device=x.device)
    launch(rms_norm_kernel, rstd.numel(), x, w, y, rstd, eps, **row_launch(D))
    return y, rstd


def rms_norm_backward(grad_y: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    grad_x = torch.empty_like(x)
    launch(rms_norm_backward_kernel, rstd.numel(), grad_y, x, w, rstd, grad_x, **row_launch(x.shape[-1]))
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
