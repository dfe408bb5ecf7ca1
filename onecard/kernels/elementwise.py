"""RMSNorm, SwiGLU and rotary positions as one operator each. The backward needs only x (or gate and up, or the angles).
Also the head's product for few rows, whose cost is to read the weight once.

    rms_norm: y = w * round(x r), r = (mean(x^2) + eps)^-1/2;   dx = r (g - n mean(g n)) with n = r x, g = w dy
    residual_norm: t = x + delta and y = rms_norm(t);           d delta = dx = dt + that of rms_norm
    rope:     y = x cos + turn(x) sin, turn(x) = (-x2, x1) of x's halves (arXiv 2104.09864); dx = g cos - turn(g sin)
    swiglu:   y = g s u, s = sigmoid(g);   dg = dy u s (1 + g (1 - s)), du = dy g s

All values between the loads and the stores are float32. w is a constant.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from onecard.kernels.backend import Elementwise, FusedLinear, backend
from onecard.kernels.cpu import native
from onecard.kernels.operator import Operator

LARGEST_ROW = 16384  # elements that a GPU kernel can hold in registers


def supports(*tensors: Tensor) -> bool:
    """Whether `swiglu` accepts these: on one device that has kernels, and of one dtype that the kernels support."""
    first = tensors[0]
    return are_alike(*tensors) and first.dtype in native.DTYPES and backend(first.device).elementwise is not None


def are_alike(*tensors: Tensor) -> bool:
    """Whether tensors are on one device and of one dtype."""
    first = tensors[0]
    return all(x.device == first.device and x.dtype == first.dtype for x in tensors)


def supports_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` accepts these: same as `supports`, and no row is too long."""
    return supports(x, weight) and weight.shape[0] <= widest_norm(x.device.type)


def widest_norm(device: str) -> float:
    """Return the longest row that `rms_norm` accepts on a device type."""
    return math.inf if device == "cpu" else LARGEST_ROW


def kernels_of(x: Tensor) -> Elementwise:
    found = backend(x.device).elementwise
    assert found is not None, "supports() was not asked"
    return found


def _compute_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y like x, and r, float32 (rows,), for x of any shape and weight (D,) for its last dimension."""
    return kernels_of(x).rms_norm(x.contiguous(), None, weight, eps)[1:]


rms_norm = Operator("rms_norm", _compute_rms_norm)


@rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _compute_rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_total: Tensor | None = None
) -> Tensor:
    grad_total = None if grad_total is None else grad_total.contiguous()
    return kernels_of(x).rms_norm_backward(grad_y.contiguous(), x.contiguous(), weight, rstd, grad_total)


rms_norm_backward = Operator("rms_norm_backward", _compute_rms_norm_backward)


@rms_norm_backward.register_fake
def _(grad_y, x, weight, rstd, grad_total=None):
    return x.new_empty(x.shape)


def _norm_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _norm_backward(ctx, grad_y, _):
    return rms_norm_backward(grad_y, *ctx.saved_tensors), None, None


rms_norm.register_autograd(_norm_backward, _norm_context)


def _compute_add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return kernels_of(x).rms_norm(x.contiguous(), delta.contiguous(), weight, eps)


_add_norm = Operator("add_norm", _compute_add_norm)


@_add_norm.register_fake
def _(x, delta, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


class _ResidualNorm(torch.autograd.Function):
    """An autograd Function, not an Operator, because its first output may be its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if delta is None:
            total, (y, rstd) = x.view_as(x), rms_norm(x, weight, eps)
        else:
            total, y, rstd = _add_norm(x, delta, weight, eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if delta is None else total, weight, rstd)
        ctx.adds = delta is not None
        return total, y

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_y: Tensor | None):  # type: ignore[override]
        grad = grad_total if grad_y is None else rms_norm_backward(grad_y, *ctx.saved_tensors, grad_total)
        return grad, grad if ctx.adds else None, None, None


def residual_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return t = x + delta (x without a delta) and rms_norm(t), in one pass each way. See supports_norm."""
    return _ResidualNorm.apply(x, delta, weight, eps)  # type: ignore[return-value]


def _compute_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up for two tensors of one shape."""
    return kernels_of(gate).swiglu(gate.contiguous(), up.contiguous())


swiglu = Operator("swiglu", _compute_swiglu)


@swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


def _compute_swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return kernels_of(gate).swiglu_backward(grad_y.contiguous(), gate.contiguous(), up.contiguous())


swiglu_backward = Operator("swiglu_backward", _compute_swiglu_backward)


@swiglu_backward.register_fake
def _(grad_y, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _swiglu_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad_y):
    return swiglu_backward(grad_y, *ctx.saved_tensors)


swiglu.register_autograd(_swiglu_backward, _swiglu_context)


def _compute_rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    B, H, T, D = x.shape
    x_THD = x.transpose(1, 2).contiguous().view(-1, H, D)
    cos_PD, sin_PD = (part.reshape(-1, D).contiguous() for part in (cos, sin))
    return kernels_of(x).rope(x_THD, cos_PD, sin_PD, back).view(B, T, H, D).transpose(1, 2)


_rope = Operator("rope", _compute_rope)


@_rope.register_fake
def _(x, cos, sin, back):
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def _rope_context(ctx, inputs, output):
    ctx.back = inputs[3]
    ctx.save_for_backward(*inputs[1:3])


def _rope_backward(ctx, grad):
    return _rope(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_rope.register_autograd(_rope_backward, _rope_context)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads x (B, H, T, D) by cos and sin, (B or 1, T, D), constants of x's dtype. See `supports`."""
    return _rope(x, cos, sin, False)


FEW_ROWS = 4  # up to this many, dense_product is faster than torch's linear in bfloat16 (benchmarks/generate.py)


def has_dense_product(x: Tensor, W_NK: Tensor) -> bool:
    """Whether `dense_product` accepts x (..., K) and is faster than torch: x has few rows."""
    if torch.compiler.is_compiling() or x.numel() > FEW_ROWS * W_NK.shape[1] or not are_alike(x, W_NK):
        return False
    return x.dtype in native.DTYPES and backend(x.device).dense_product is not None


def dense_product(x: Tensor, W_NK: Tensor) -> Tensor:
    """Return x W^T for x (..., K) in x's dtype, with sums in float32. It has no gradient."""
    kernels = backend(x.device).dense_product
    assert kernels is not None, "has_dense_product() was not asked"
    y_MN = kernels.dense_product(x.reshape(-1, x.shape[-1]).contiguous(), W_NK)
    return y_MN.to(x.dtype).view(*x.shape[:-1], len(W_NK))


def has_tiles(x: Tensor, W_NK: Tensor) -> bool:
    """Whether `tiled_product` and `tiled_product_back` accept x and an unquantized W: bfloat16 on a CPU with AMX, where
    they are faster than torch's product. They have no gradient."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not are_alike(x, W_NK):
        return False
    fused = backend(x.device).fused_linear
    return fused is not None and fused.can_fuse(W_NK, len(W_NK))


def fused_linear(x: Tensor) -> FusedLinear:
    found = backend(x.device).fused_linear
    assert found is not None, "has_tiles() was not asked"
    return found


def tiled_product(x: Tensor, W_NK: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias for x (..., K), with one rounding."""
    N, K = W_NK.shape
    y_MN, _ = fused_linear(x).linear(x.reshape(-1, K), W_NK, bias)
    return y_MN.view(*x.shape[:-1], N)


def tiled_product_back(g: Tensor, W_NK: Tensor) -> Tensor:
    """Return g W for g (..., N)."""
    N, K = W_NK.shape
    grad_x, *_ = fused_linear(g).linear_backward(g.reshape(-1, N), W_NK, [True, False, False, False])
    assert grad_x is not None
    return grad_x.view(*g.shape[:-1], K)
