"""torch operators: the schema, fake kernel and gradient of each.

    qlora_linear:   y = x W^T + bias + s (x_lora A^T) B^T,     W = dequantize(packed, scales)

W exists only inside the operator, in a scratch buffer that the next weight overwrites. The forward saves x_lora and
x_lora A^T for the backward, but not W. With g = dL/dy, the backward is

    dx = g W        dx_lora = s (g B) A        dA = s (g B)^T x_lora        dB = s g^T (x_lora A^T)

W has no gradient (arXiv 2305.14314, equation 5). Without LoRA dropout, x_lora is x and the two dx are summed. If a
layer is recomputed and memory allows, the recomputation saves its W, too (`dequantize.weights_saved`).

Shape suffixes: M rows of x (tokens), N outputs, K inputs, R the LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from onecard.kernels import dequantize as weights
from onecard.kernels import reference
from onecard.kernels.backend import CodeProduct, FusedLinear, backend
from onecard.kernels.cpu_info import product_dtype
from onecard.kernels.operator import Operator
from onecard.kernels.reference import Lora
from onecard.quant.blockwise import check_quantizable, check_stack, make_state, quantize_mxfp4
from onecard.quant.scales import SHIFTED
from onecard.quant.state import PackedWeight, QuantState


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
        quant_type: "nf4", "fp4", "int4" or "mxfp4".
        blocksize: weights that share a scale: a power of two from 32 to 4096; 32 for mxfp4.
        double_quant: store the scales in 8 bits; False for mxfp4.
        name: the tensor's name in an error.

    Returns:
        The codes, uint8 (ceil(numel/2), 1), and the QuantState that dequantize_4bit needs. Scales are computed in
        float32.

    Raises:
        UserError: an unknown quant_type or blocksize, another dtype, an empty tensor, NaN or Inf (with its index).
    """
    check_quantizable(W, quant_type, blocksize, double_quant, name)
    if quant_type == "mxfp4":
        return quantize_mxfp4(W, name)
    packed, absmax = backend(W.device).codec.quantize_blocks(W, quant_type, blocksize, name)
    return packed, make_state(absmax, W.shape, W.dtype, quant_type, blocksize, double_quant)


def quantize_stack(
    parts: Iterable[Tensor],
    shape: torch.Size,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    name: str = "tensor",
) -> tuple[Tensor, QuantState]:
    """Same as quantize_4bit of the parts stacked to `shape`, (E, ...), but with one part at a time in memory.

    Raises:
        UserError: same as quantize_4bit, with the part's name; a part that is not whole blocks.
    """
    numel = check_stack(shape, blocksize, name)
    assert quant_type != "mxfp4" or not double_quant
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
        dtype: dtype of the result. None: the state's.

    Returns:
        The weight, of state.shape. Each product of level and scale is in float32 and is rounded once.
    """
    return _dequantize_4bit(*PackedWeight.of(packed, state), dtype or state.dtype)


def cross_entropy_(z_PV: Tensor, target_P: Tensor) -> Tensor:
    """Return the losses logsumexp(z) - z[target], float32 (P,), of logits of any float dtype and int64 targets.

    Replace z with its gradient, softmax(z) - onehot(target). The computation is in float32.
    """
    return backend(z_PV.device).codec.cross_entropy_(z_PV, target_P)


def adamw_8bit_(parts: list[tuple[Tensor, ...]], rates: reference.Rates) -> None:
    """Same as reference.adamw_8bit_, on the fastest backend for float32 parameters."""
    narrow = [part for part in parts if any(x.dtype != torch.float32 for x in part[:2])]
    wide = [part for part in parts if all(x.dtype == torch.float32 for x in part[:2])]
    if wide:
        backend(wide[0][0].device).codec.adamw_8bit_(wide, rates)
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
    """Compute a 4-bit linear with its LoRA term.

    Args:
        x: (..., K) in the compute dtype (float32, bfloat16 or float16); y is (..., N) in the same.
        packed, state: the frozen weight of shape (N, K).
        bias: (N,), any float dtype, or None.
        lora_A_RK, lora_B_NR: the adapter, any float dtype, cast to x's dtype for the products. None: no adapter.
        scaling: the LoRA term's factor.
        x_lora: (..., K), the adapter's input if that is not x (dropout).
    """
    weight = PackedWeight.of(packed, state)
    y, _, _ = _qlora_linear(x, *weight, bias, lora_A_RK, lora_B_NR, scaling, x_lora, weights.saving())
    return y


def linear_forward(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    lora: Lora | None,
    x_lora: Tensor | None = None,
    save: int = weights.SAVE_NOTHING,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute qlora_linear without an autograd graph.

    Returns:
        y; x_lora A^T (M, R) for the backward; and the dequantized W (N, K) to save for the backward, as `save` says
        (dequantize.SAVE_...). A result that is not computed is an empty tensor.
    """
    N, K = weight.shape
    work = product_dtype(x.dtype, x.device.type)
    x_MK = x.reshape(-1, K).to(work)
    x_lora_MK = x_MK if x_lora is None else x_lora.reshape(-1, K).to(work)
    few_rows, fused = pick_product(x_MK, weight, lora)
    if fused is not None:
        y_MN, xA_MR = fused.linear(x_MK, weight, bias, lora, x_lora_MK)
        return y_MN.resize_(*x.shape[:-1], N), xA_MR, x.new_empty(0)  # not a view: some models add to it in place
    xA_MR = x.new_empty(0) if lora is None else x_lora_MK @ lora.A_RK.to(work).T
    saved = x.new_empty(0)
    if few_rows is not None:
        y_MN = few_rows.multiply(x_MK, weight, None if lora is None else (xA_MR, lora.B_NR, lora.scaling))
    else:
        copies = save == weights.SAVE_COPY
        held = nullcontext(weights.dequantize(weight, work)) if copies else weights.dequantize_to_scratch(weight, work)
        with held as W_NK:
            if save != weights.SAVE_NOTHING:
                saved = W_NK if copies else weights.shape_of(W_NK)
            y_MN = x_MK @ W_NK.T
        if lora is not None:
            y_MN.addmm_(xA_MR, lora.B_NR.to(work).T, alpha=lora.scaling)
    if bias is not None:
        y_MN += bias.to(y_MN.dtype)
    return y_MN.resize_(*x.shape[:-1], N).to(x.dtype), xA_MR, saved


def pick_product(
    x_MK: Tensor, weight: PackedWeight, lora: Lora | None
) -> tuple[CodeProduct | None, FusedLinear | None]:
    """Return the kernel that multiplies x without a dequantized weight, if any: of the first kind, or of the second."""
    kernels, shifted = backend(x_MK.device), weight.quant_type in SHIFTED
    few_rows, fused = kernels.code_product, kernels.fused_linear
    if few_rows is not None and not shifted and few_rows.can_multiply(x_MK, weight.blocksize):
        return few_rows, None
    return None, fused if fused is not None and fused.can_fuse(x_MK, weight.shape[0], lora) else None


def linear_backward(
    grad_y: Tensor,
    weight: PackedWeight,
    lora: Lora | None,
    lora_input: Tensor | None,
    xA_MR: Tensor,
    needed_grads: list[bool],
    has_own_lora_input: bool = False,
    W_NK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of linear_forward with respect to x (M, K), x_lora (M, K), A and B.

    Args:
        lora_input: the LoRA term's input. Without `has_own_lora_input` it is x, and grad_x includes the term's part.
        needed_grads: which of the four to compute. Each of the others is an empty tensor.
        W_NK: the dequantized weight, if the forward has saved it.
    """
    N, K = weight.shape
    work = product_dtype(grad_y.dtype, grad_y.device.type)
    g_MN = grad_y.reshape(-1, N).to(work)
    fused = backend(grad_y.device).fused_linear
    lora_input_MK = None if lora_input is None else lora_input.reshape(-1, K).to(work)
    if fused is not None and fused.can_fuse(g_MN, K, lora):
        grads = fused.linear_backward(g_MN, weight, needed_grads, lora, lora_input_MK, xA_MR, has_own_lora_input)
    else:
        scratch = partial(weights.dequantize_to_scratch, weight, g_MN.dtype)
        held = scratch if W_NK is None else partial(nullcontext, W_NK)
        grads = plain_backward(g_MN, held, lora, lora_input_MK, xA_MR, needed_grads, has_own_lora_input)
    grad_x, grad_x_lora, grad_A, grad_B = (grad_y.new_empty(0) if grad is None else grad for grad in grads)
    lora_dtype = grad_y.dtype if lora is None else lora.A_RK.dtype
    return grad_x.to(grad_y.dtype), grad_x_lora.to(grad_y.dtype), grad_A.to(lora_dtype), grad_B.to(lora_dtype)


def plain_backward(
    g_MN: Tensor,
    weight: Callable[[], AbstractContextManager[Tensor]],
    lora: Lora | None,
    lora_input_MK: Tensor | None,
    xA_MR: Tensor,
    needed_grads: list[bool],
    has_own_lora_input: bool = False,
) -> tuple[Tensor | None, ...]:
    """Compute linear_backward with torch's products in g's dtype. `weight` gives the dequantized W, if it is needed."""
    needs_x, needs_x_lora, needs_A, needs_B = needed_grads
    grad_x = grad_x_lora = grad_A = grad_B = None
    if lora is not None and lora_input_MK is not None:
        gB_MR = g_MN.new_empty(len(g_MN), lora.B_NR.shape[1])
        gB_MR.addmm_(g_MN, lora.B_NR.to(g_MN.dtype), beta=0, alpha=lora.scaling)
        grad_A = wide_product(gB_MR.T, lora_input_MK) if needs_A else None
        grad_B = wide_product(g_MN.T, xA_MR).mul_(lora.scaling) if needs_B else None
        if needs_x_lora if has_own_lora_input else needs_x:
            grad_x_lora = gB_MR @ lora.A_RK.to(g_MN.dtype)
    if needs_x:
        with weight() as W_NK:
            grad_x = g_MN @ W_NK if grad_x_lora is None or has_own_lora_input else grad_x_lora.addmm_(g_MN, W_NK)
    return grad_x, grad_x_lora if has_own_lora_input else None, grad_A, grad_B


def lora_term(A_RK: Tensor | None, B_NR: Tensor | None, scaling: float) -> Lora | None:
    return None if A_RK is None or B_NR is None else Lora(A_RK, B_NR, scaling)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b. On a GPU, the product of 16-bit tensors is in float32, as it is summed. ROCm has that since torch
    2.10; before, the sum is rounded to 16 bits, as peft's gradients are."""
    wide = a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16)
    wide = wide and (torch.version.hip is None or TorchVersion(torch.__version__) >= "2.10")
    return torch.mm(a, b, out_dtype=torch.float32) if wide else a @ b


def _compute_dequantize(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    weight = PackedWeight(codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape)
    return weights.dequantize(weight, dtype)


_dequantize_4bit = Operator("dequantize_4bit", _compute_dequantize)


@_dequantize_4bit.register_fake
def _(*arguments):
    *weight, dtype = arguments
    return weight[0].new_empty(PackedWeight(*weight).shape, dtype=dtype)


def _compute_linear(
    x: Tensor,
    codes: Tensor,
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
    save: int,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = PackedWeight(codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape)
    return linear_forward(x, weight, bias, lora_term(lora_A_RK, lora_B_NR, scaling), x_lora, save)


_qlora_linear = Operator("qlora_linear", _compute_linear)


@_qlora_linear.register_fake
def _(x, *arguments):
    *fields, _, A, B, scaling, _, save = arguments
    weight = PackedWeight(*fields)
    N, K = weight.shape
    work = product_dtype(x.dtype, x.device.type)
    xA = x.new_empty(0) if A is None else x.new_empty(x.numel() // K, A.shape[0], dtype=work)
    W = x.new_empty(0)
    if save != weights.SAVE_NOTHING:
        product = pick_product(x.new_empty(x.numel() // K, K, dtype=work), weight, lora_term(A, B, scaling))
        if product == (None, None):
            W = x.new_empty(N, K, dtype=work)
            W = W if save == weights.SAVE_COPY else weights.shape_of(W)
    return x.new_empty(*x.shape[:-1], N), xA, W


def _compute_linear_backward(
    grad_y: Tensor,
    codes: Tensor,
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
    needed_grads: list[bool],
    has_own_lora_input: bool,
    W_NK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = PackedWeight(codes, absmax, nested_absmax, nested_offset, quant_type, blocksize, shape)
    lora = lora_term(lora_A_RK, lora_B_NR, scaling)
    return linear_backward(grad_y, weight, lora, lora_input, xA_MR, needed_grads, has_own_lora_input, W_NK)


_qlora_linear_backward = Operator("qlora_linear_backward", _compute_linear_backward)


@_qlora_linear_backward.register_fake
def _(grad_y, *arguments):
    *weight, A, B, _, _, _, needed_grads, has_own_lora_input, _ = arguments
    N, K = PackedWeight(*weight).shape
    M = grad_y.numel() // N
    whole = [
        needed_grads[0],
        has_own_lora_input and A is not None and needed_grads[1],
        A is not None and needed_grads[2],
        B is not None and needed_grads[3],
    ]
    made = [grad_y.new_empty(M, K), grad_y.new_empty(M, K), A, B]
    return tuple(torch.empty_like(x) if wanted else grad_y.new_empty(0) for wanted, x in zip(whole, made))


def _setup_context(ctx, inputs, output):
    x, *weight, bias, lora_A_RK, lora_B_NR, scaling, x_lora, _ = inputs
    weight, (_, xA_MR, W_NK) = PackedWeight(*weight), output
    ctx.meaning = weight[4:]  # the fields that are not tensors
    ctx.scaling, ctx.x_shape, ctx.has_own_lora_input = scaling, x.shape, x_lora is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    lora_input = None
    if lora_A_RK is not None:
        lora_input = x if x_lora is None else x_lora
    ctx.mark_non_differentiable(xA_MR, W_NK)
    ctx.save_for_backward(*weight[:4], lora_A_RK, lora_B_NR, lora_input, xA_MR, W_NK)


def _backward(ctx, grad_y, *_):
    *tensors, lora_A_RK, lora_B_NR, lora_input, xA_MR, W_NK = ctx.saved_tensors
    weight = PackedWeight(*tensors, *ctx.meaning)
    needed_grads = [ctx.needs_input_grad[i] for i in (0, 12, 9, 10)]
    W_NK = W_NK if W_NK.numel() else None
    rest = (lora_A_RK, lora_B_NR, ctx.scaling, lora_input, xA_MR, needed_grads, ctx.has_own_lora_input, W_NK)
    grads = _qlora_linear_backward(grad_y, *weight, *rest)
    grad_x, grad_x_lora, grad_A, grad_B = (grad if grad.numel() else None for grad in grads)
    grad_x, grad_x_lora = (None if grad is None else grad.view(ctx.x_shape) for grad in (grad_x, grad_x_lora))
    grad_bias = None
    if ctx.needs_input_grad[8]:
        grad_bias = grad_y.reshape(-1, weight.shape[0]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return (grad_x, *[None] * 7, grad_bias, grad_A, grad_B, None, grad_x_lora, None)


_qlora_linear.register_autograd(_backward, _setup_context)
