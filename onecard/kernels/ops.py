"""torch operators: schema, fake and gradient of each.

    qlora_linear:   y = x W^T + bias + s (x_lora A^T) B^T,     W = dequantize(packed, scales)

W exists only inside the operator, in a scratch buffer that the next call reuses; what is saved for the backward
is x_lora and x_lora A^T, never W. With g = dL/dy the backward is

    dx = g W        dx_lora = s (g B) A        dA = s (g B)^T x_lora        dB = s g^T (x_lora A^T)

and nothing for W (arXiv 2305.14314, equation 5). Without LoRA dropout x_lora is x and the two dx are summed. Where a
layer is recomputed and memory allows, the W that the recompute makes stays for the backward (`saved_weights`).

Shape suffixes: M rows of x (tokens), N outputs, K inputs, R the LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.kernels import reference
from onecard.kernels.cpu_info import product_dtype
from onecard.kernels.dequantize import (
    backend,
    dequantize_anew,
    dequantize_to_scratch,
    forward_weight,
    pop_saved_weight,
)
from onecard.kernels.operator import Operator
from onecard.quant.blockwise import check_quantizable, make_state
from onecard.quant.state import QuantState


def quantize_4bit(
    W: Tensor,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    name: str = "tensor",
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor of any shape to 4 bits a weight (quant/blockwise.py), on the fastest backend.

    Args:
        W: float32, bfloat16 or float16, any shape with at least one element, every element finite.
        quant_type: "nf4", "fp4" or "int4".
        blocksize: weights that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        name: the tensor's name in an error.

    Returns:
        The codes, uint8 (ceil(numel/2), 1), and the QuantState that dequantize_4bit needs. Scales are computed in
        float32.

    Raises:
        UserError: an unknown quant_type or blocksize, another dtype, an empty tensor, NaN or Inf (with its index).
    """
    check_quantizable(W, quant_type, blocksize, name)
    packed, absmax = backend(W.device).quantize_blocks(W, quant_type, blocksize, name)
    return packed, make_state(absmax, W.shape, W.dtype, quant_type, blocksize, double_quant)


def quantize_stack(
    parts: Iterable[Tensor],
    shape: torch.Size,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    name: str = "tensor",
) -> tuple[Tensor, QuantState]:
    """As quantize_4bit of the parts stacked to `shape`, (E, ...), with one part at a time in memory.

    Raises:
        UserError: as quantize_4bit, naming the part; a part that is not whole blocks.
    """
    numel = prod(shape[1:])
    if numel % blocksize:
        found = f"{numel:,} weights of shape {list(shape[1:])}, blocks of {blocksize}"
        raise UserError("an expert's weights must be whole blocks", found, "use a smaller blocksize", name)
    packed = absmax = dtype = None
    for number, W in enumerate(parts):
        codes, state = quantize_4bit(W, quant_type, blocksize, False, f"{name}, expert {number}")
        if packed is None or absmax is None:
            packed, absmax = codes.new_empty(shape[0], len(codes)), state.absmax.new_empty(shape[0], numel // blocksize)
        packed[number], absmax[number], dtype = codes[:, 0], state.absmax, W.dtype
    assert packed is not None and absmax is not None and dtype is not None
    return packed.view(-1, 1), make_state(absmax.view(-1), shape, dtype, quant_type, blocksize, double_quant)


def dequantize_4bit(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """Return a weight from its 4-bit codes, on the fastest backend.

    Args:
        packed: the codes, uint8 (ceil(numel/2), 1), as quantize_4bit returns them.
        state: their QuantState.
        dtype: dtype of the result. None takes the state's.

    Returns:
        The weight, of state.shape. Each product of level and scale is in float32 and is rounded once.
    """
    return _dequantize_4bit(
        packed,
        state.absmax,
        state.nested_absmax,
        state.nested_offset,
        state.quant_type,
        state.blocksize,
        list(state.shape),
        dtype or state.dtype,
    )


def cross_entropy_(z_PV: Tensor, target_P: Tensor) -> Tensor:
    """The losses logsumexp(z) - z[target], float32 (P,), of logits of any float dtype and int64 targets.

    In place: z becomes its gradient, softmax(z) - onehot(target). Computed in float32.
    """
    return backend(z_PV.device).cross_entropy_(z_PV, target_P)


def adamw_8bit_(parts: list[tuple[Tensor, ...]], rates: reference.Rates) -> None:
    """As reference.adamw_8bit_, on the fastest backend for float32 parameters."""
    narrow = [part for part in parts if any(x.dtype != torch.float32 for x in part[:2])]
    wide = [part for part in parts if all(x.dtype == torch.float32 for x in part[:2])]
    if wide:
        backend(wide[0][0].device).adamw_8bit_(wide, rates)
    reference.adamw_8bit_(narrow, rates)


def qlora_linear(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    bias: Tensor | None = None,
    lora_A_RK: Tensor | None = None,
    lora_B_NR: Tensor | None = None,
    scaling: float = 1.0,
    x_lora: Tensor | None = None,
) -> Tensor:
    """A 4-bit linear with its LoRA term.

    Args:
        x: (..., K) in the compute dtype (float32, bfloat16 or float16); y is (..., N) in the same.
        packed, state: the frozen weight of shape (N, K).
        bias: (N,), any float dtype, or None.
        lora_A_RK, lora_B_NR: the adapter, any float dtype; cast to x's for the products. None for no adapter.
        scaling: the LoRA term's factor.
        x_lora: (..., K), what the adapter sees where that is not x (dropout).
    """
    y, _ = _qlora_linear(
        x,
        packed,
        state.absmax,
        state.nested_absmax,
        state.nested_offset,
        state.quant_type,
        state.blocksize,
        list(state.shape),
        bias,
        lora_A_RK,
        lora_B_NR,
        scaling,
        x_lora,
    )
    return y


_dequantize_4bit = Operator("dequantize_4bit", dequantize_anew)


@_dequantize_4bit.register_fake
def _(packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


def qlora_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    bias: Tensor | None,
    lora_A_RK: Tensor | None,
    lora_B_NR: Tensor | None,
    scaling: float,
    x_lora: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """qlora_linear on a weight's parts, without a graph: y, and x_lora A^T (M, R) for the backward."""
    pop_saved_weight()  # what a call without a graph has left
    N, K = shape
    work = product_dtype(x.dtype, x.device.type)
    x_MK = x.reshape(-1, K).to(work)
    weight = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    few = backend(x.device).can_multiply(x_MK, blocksize)
    if not few and backend(x.device).can_fuse(x_MK, N, lora_A_RK, lora_B_NR):
        lora_input = x_MK if x_lora is None else x_lora.reshape(-1, K).to(work)
        terms = None if lora_A_RK is None else (lora_input, lora_A_RK, lora_B_NR, scaling)
        y_MN, xA_MR = backend(x.device).linear(x_MK, weight, N, bias, terms)
        return y_MN.resize_(*x.shape[:-1], N), xA_MR  # not a view: some models add to it in place
    lora = None
    if lora_A_RK is not None and lora_B_NR is not None:
        x_lora_MK = x_MK if x_lora is None else x_lora.reshape(-1, K).to(work)
        lora = (x_lora_MK @ lora_A_RK.to(work).T, lora_B_NR, scaling)
    if few:
        y_MN = backend(x.device).multiply(x_MK, *weight, N, lora)
    else:
        y_MN = x_MK @ forward_weight(weight, shape, work).T
        if lora is not None:
            y_MN.addmm_(lora[0], lora[1].to(work).T, alpha=scaling)
    if bias is not None:
        y_MN += bias.to(y_MN.dtype)
    return y_MN.resize_(*x.shape[:-1], N).to(x.dtype), x.new_empty(0) if lora is None else lora[0]


_qlora_linear = Operator("qlora_linear", qlora_forward)


@_qlora_linear.register_fake
def _(x, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, bias, A, B, scaling, x_lora):
    y = x.new_empty(*x.shape[:-1], shape[0])
    if A is None:
        return y, x.new_empty(0)
    work = product_dtype(x.dtype, x.device.type)
    return y, x.new_empty(x.numel() // shape[1], A.shape[0], dtype=work)


def qlora_backward(
    grad_y: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    lora_A_RK: Tensor | None,
    lora_B_NR: Tensor | None,
    scaling: float,
    lora_input: Tensor | None,
    xA_MR: Tensor,
    has_own_lora_input: bool,
    needed_grads: list[bool],
    W_NK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of qlora_forward with respect to x (M, K), x_lora (M, K), A and B.

    `needed_grads` says which are wanted. An empty tensor stands for each of the others.

    `lora_input` is the adapter's input. Without `has_own_lora_input` it is x, and grad_x includes the LoRA term's part.
    W_NK is the dequantized weight, if the forward has kept it.
    """
    N, K = shape
    work = product_dtype(grad_y.dtype, grad_y.device.type)
    g_MN = grad_y.reshape(-1, N).to(work)
    weight = (packed, absmax, nested_absmax, nested_offset, quant_type, blocksize)
    seen_MK = None if lora_input is None else lora_input.reshape(-1, K).to(work)
    if backend(grad_y.device).can_fuse(g_MN, K, lora_A_RK, lora_B_NR):
        terms = None if lora_A_RK is None else (seen_MK, xA_MR, lora_A_RK, lora_B_NR, scaling)
        grads = backend(grad_y.device).linear_backward(g_MN, weight, K, needed_grads, terms, has_own_lora_input)
    else:

        def dequantized() -> Tensor:
            return dequantize_to_scratch(*weight, shape, g_MN.dtype) if W_NK is None else W_NK

        grads = plain_backward(
            g_MN, dequantized, lora_A_RK, lora_B_NR, scaling, seen_MK, xA_MR, has_own_lora_input, needed_grads
        )
    grad_x, grad_x_lora, grad_A, grad_B = (grad_y.new_empty(0) if grad is None else grad for grad in grads)
    lora_dtype = grad_y.dtype if lora_A_RK is None else lora_A_RK.dtype
    return grad_x.to(grad_y.dtype), grad_x_lora.to(grad_y.dtype), grad_A.to(lora_dtype), grad_B.to(lora_dtype)


def plain_backward(
    g_MN: Tensor,
    weight: Callable[[], Tensor],
    lora_A_RK: Tensor | None,
    lora_B_NR: Tensor | None,
    scaling: float,
    seen_MK: Tensor | None,
    xA_MR: Tensor,
    has_own_lora_input: bool,
    needed_grads: list[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients as torch's products, in g's dtype; `weight` gives the dequantized one, and is called if need be."""
    needs_x, needs_x_lora, needs_A, needs_B = needed_grads
    grad_x = grad_x_lora = grad_A = grad_B = None
    if lora_A_RK is not None and lora_B_NR is not None and seen_MK is not None:
        gB_MR = g_MN.new_empty(len(g_MN), lora_B_NR.shape[1])
        gB_MR.addmm_(g_MN, lora_B_NR.to(g_MN.dtype), beta=0, alpha=scaling)
        grad_A = wide_product(gB_MR.T, seen_MK) if needs_A else None
        grad_B = wide_product(g_MN.T, xA_MR).mul_(scaling) if needs_B else None
        if needs_x_lora if has_own_lora_input else needs_x:
            grad_x_lora = gB_MR @ lora_A_RK.to(g_MN.dtype)
    if needs_x:
        if grad_x_lora is None or has_own_lora_input:
            grad_x = g_MN @ weight()
        else:
            grad_x = grad_x_lora.addmm_(g_MN, weight())
    return grad_x, grad_x_lora if has_own_lora_input else None, grad_A, grad_B


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b, in float32 as it is summed where the device gives it so."""
    wide = a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16)
    return torch.mm(a, b, out_dtype=torch.float32) if wide else a @ b


_qlora_linear_backward = Operator("qlora_linear_backward", qlora_backward)


@_qlora_linear_backward.register_fake
def _(grad_y, packed, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape, A, B, scaling, lora_input, xA,
      has_own_lora_input, needed_grads, W=None):  # fmt: skip
    M, K = grad_y.numel() // shape[0], shape[1]
    whole = [
        needed_grads[0],
        has_own_lora_input and A is not None and needed_grads[1],
        A is not None and needed_grads[2],
        B is not None and needed_grads[3],
    ]
    made = [grad_y.new_empty(M, K), grad_y.new_empty(M, K), A, B]
    return tuple(torch.empty_like(x) if wanted else grad_y.new_empty(0) for wanted, x in zip(whole, made))


def _setup_context(ctx, inputs, output):
    (x, packed, absmax, nested_absmax, nested_offset, *rest) = inputs
    (quant_type, blocksize, shape, bias, lora_A_RK, lora_B_NR, scaling, x_lora) = rest
    ctx.weight = (quant_type, blocksize, shape)
    ctx.scaling, ctx.x_shape, ctx.has_own_lora_input = scaling, x.shape, x_lora is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    lora_input = None
    if lora_A_RK is not None:
        lora_input = x if x_lora is None else x_lora
    ctx.mark_non_differentiable(output[1])
    weight = (packed, absmax, nested_absmax, nested_offset)
    ctx.save_for_backward(*weight, lora_A_RK, lora_B_NR, lora_input, output[1], pop_saved_weight())


def _backward(ctx, grad_y, _):
    packed, absmax, nested_absmax, nested_offset, lora_A_RK, lora_B_NR, lora_input, xA_MR, W_NK = ctx.saved_tensors
    needed_grads = [ctx.needs_input_grad[i] for i in (0, 12, 9, 10)]
    grads = _qlora_linear_backward(
        grad_y, packed, absmax, nested_absmax, nested_offset, *ctx.weight,
        lora_A_RK, lora_B_NR, ctx.scaling, lora_input, xA_MR, ctx.has_own_lora_input, needed_grads, W_NK,
    )  # fmt: skip
    grad_x, grad_x_lora, grad_A, grad_B = (grad if grad.numel() else None for grad in grads)
    grad_x, grad_x_lora = (None if grad is None else grad.view(ctx.x_shape) for grad in (grad_x, grad_x_lora))
    grad_bias = None
    if ctx.needs_input_grad[8]:
        grad_bias = grad_y.reshape(-1, ctx.weight[2][0]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (grad_x, *[None] * 7, grad_bias, grad_A, grad_B, None, grad_x_lora)


_qlora_linear.register_autograd(_backward, _setup_context)
