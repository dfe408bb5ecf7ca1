"""RMSNorm and SwiGLU as one operator each, on the CPU's C++ kernels; in the backward only x (or gate and up) is kept.
And the head's product for few rows, where reading the weight once is the whole cost.

    rms_norm: y = w * round(x r), r = (mean(x^2) + eps)^-1/2;   dx = r (g - n mean(g n)) with n = r x, g = w dy
    swiglu:   y = g s u, s = sigmoid(g);   dg = dy u s (1 + g (1 - s)), du = dy g s

Everything between the loads and the stores is float32; w is a constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.kernels.cpu import native


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on the CPU, of one dtype of theirs."""
    first = tensors[0]
    return (
        all(x.device.type == "cpu" and x.dtype == first.dtype for x in tensors)
        and first.dtype in native.DTYPES
        and native.library() is not None
    )


@torch.library.custom_op("onecard::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x of any shape with weight (D,) for its last dimension: y like x, and r float32 (rows,)."""
    x, D = x.contiguous(), x.shape[-1]
    y, rstd = torch.empty_like(x), torch.empty(x.numel() // D)
    native.call("onecard_rms_norm", x, weight, y, rstd, native.DTYPES[x.dtype], rstd.numel(), D, eps)
    return y, rstd


@rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("onecard::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    grad_y, x = grad_y.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    sizes = (native.DTYPES[x.dtype], rstd.numel(), x.shape[-1])
    native.call("onecard_rms_norm_backward", grad_y, x, weight, rstd, grad_x, *sizes)
    return grad_x


@rms_norm_backward.register_fake
def _(grad_y, x, weight, rstd):
    return x.new_empty(x.shape)


def _norm_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:2], output[1])


def _norm_backward(ctx, grad_y, _):
    return rms_norm_backward(grad_y, *ctx.saved_tensors), None, None


rms_norm.register_autograd(_norm_backward, setup_context=_norm_context)


@torch.library.custom_op("onecard::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    native.call("onecard_swiglu", gate, up, y, native.DTYPES[y.dtype], y.numel())
    return y


@swiglu.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("onecard::swiglu_backward", mutates_args=())
def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_y, gate, up = grad_y.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    sizes = (native.DTYPES[gate.dtype], gate.numel())
    native.call("onecard_swiglu_backward", grad_y, gate, up, grad_gate, grad_up, *sizes)
    return grad_gate, grad_up


@swiglu_backward.register_fake
def _(grad_y, gate, up):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _swiglu_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad_y):
    return swiglu_backward(grad_y, *ctx.saved_tensors)


swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_context)


FEW_ROWS = 4  # up to which dense_product beats torch's linear in bfloat16 (measured, benchmarks/generate.py)


def dense_product(x: Tensor, W_NK: Tensor) -> Tensor:
    """x W^T for x (..., K), summed in float32, in x's dtype; no gradient."""
    x = x.contiguous()
    (N, K), M = W_NK.shape, x.numel() // x.shape[-1]
    y_MN = torch.empty(M, N)
    native.call("onecard_dense_product", W_NK, x, native.DTYPES[x.dtype], M, N, K, y_MN)
    return y_MN.to(x.dtype).view(*x.shape[:-1], N)
