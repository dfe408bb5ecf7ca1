"""The C++ backend: each operation of the protocols in kernels/backend.py calls its kernel in the library."""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from functools import cache

import torch
from torch import Tensor

from onecard.kernels import reference
from onecard.kernels.cpu import allocator
from onecard.kernels.cpu.library import AdamW8bit, Attention, Linear, call, library
from onecard.kernels.reference import Lora
from onecard.quant.blockwise import not_finite
from onecard.quant.codebook import decision_bounds, dynamic_map, quant_map
from onecard.quant.dynamic import midpoints
from onecard.quant.scales import SHIFTED, scale_tensors
from onecard.quant.state import PackedWeight

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Largest M at which the product directly from the codes is faster than dequantize-and-multiply (benchmarks/kernels.py).
LARGEST_M = {torch.float32: 16, torch.bfloat16: 16, torch.float16: 8}


def new(dtype: torch.dtype, *shape: int) -> Tensor:
    """Allocate memory for a kernel to fill, independent of torch's default dtype and device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def quantize_blocks(W: Tensor, quant_type: str, blocksize: int, name: str) -> tuple[Tensor, Tensor]:
    """Same as quant.blockwise.quantize_blocks."""
    flat = W.detach().reshape(-1).contiguous()
    packed = new(torch.uint8, (flat.numel() + 1) // 2, 1)
    absmax = new(torch.float32, -(-flat.numel() // blocksize))
    sizes = (DTYPES[flat.dtype], flat.numel(), blocksize)
    finite = call("onecard_quantize", flat, *sizes, *coding(quant_type), packed, absmax)
    if not finite:
        raise not_finite(flat, W.shape, name)
    return packed, absmax


@cache
def coding(quant_type: str) -> tuple[Tensor, Tensor]:
    """Return the bounds, float32 (15,), and the code of each interval, uint8 (16,)."""
    bounds, order = decision_bounds(quant_type, "cpu")
    return bounds.contiguous(), order.to(torch.uint8)


def weight_tensors(weight: PackedWeight) -> tuple:
    """Return the arguments that describe a weight to every kernel."""
    return weight.codes, *scale_tensors(weight), quant_map(weight.quant_type, "cpu"), int(weight.quant_type in SHIFTED)


def dequantize_into(weight: PackedWeight, out: Tensor) -> None:
    """Same as reference.dequantize_into."""
    if out.dtype not in DTYPES:
        return reference.dequantize_into(weight, out)
    call("onecard_dequantize", *weight_tensors(weight), out.numel(), weight.blocksize, out, DTYPES[out.dtype])


def can_multiply(x_MK: Tensor, blocksize: int) -> bool:
    """Whether `multiply` accepts this x."""
    M, K = x_MK.shape
    return LARGEST_M.get(x_MK.dtype, 0) >= M and K % 64 == 0 and K % blocksize == 0


def multiply(x_MK: Tensor, weight: PackedWeight, lora: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
    """Return x W^T, float32 (M, N), directly from the codes. Weights and sums are float32, not rounded to x's dtype.

    With lora = (x A^T, B, s), add s (x A^T) B^T.
    """
    M, (N, K) = len(x_MK), weight.shape
    y_MN = new(torch.float32, M, N)
    sizes = (N, K, weight.blocksize)
    call("onecard_product", *weight_tensors(weight), *sizes, x_MK.contiguous(), DTYPES[x_MK.dtype], M, y_MN)
    if lora is not None:
        y_MN.addmm_(lora[0].float(), lora[1].float().T, alpha=lora[2])
    return y_MN


def tiled_rows() -> int:
    """Return the number of rows of x that `linear` copies at a time."""
    native = library()
    assert native is not None
    return native.onecard_constant(b"tiled rows")


def has_tiles() -> bool:
    """Whether this CPU and this build have `linear`, which needs AMX."""
    return library() is not None and bool(call("onecard_has_linear"))


def can_fuse(x_MK: Tensor, num_outputs: int, lora: Lora | None = None) -> bool:
    """Whether `linear` and `linear_backward` accept this x: bfloat16 on a CPU with tiles (AMX)."""
    whole = x_MK.shape[1] % 32 == 0 and num_outputs % 32 == 0
    dtypes = set() if lora is None else {lora.A_RK.dtype, lora.B_NR.dtype}
    known = len(dtypes) <= 1 and dtypes <= DTYPES.keys()
    return x_MK.dtype == torch.bfloat16 and whole and known and has_tiles()


def linear(
    x_MK: Tensor,
    weight: PackedWeight | Tensor,
    bias: Tensor | None,
    lora: Lora | None = None,
    x_lora_MK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return x W^T + bias + s (x_lora A^T) B^T with one rounding, bfloat16 (M, N), and x_lora A^T, bfloat16 (M, R).

    Args:
        weight: (N, K), in 4 bits or in bfloat16.
        x_lora_MK: bfloat16, the input of A. None: x.
    """
    M, (N, K) = len(x_MK), weight.shape
    x_MK, bias = x_MK.contiguous(), None if bias is None else bias.float().contiguous()
    y_MN = allocator.empty((M, N), x_MK.dtype)
    A, B, scaling = contiguous(lora)
    seen = None if lora is None else x_MK if x_lora_MK is None else x_lora_MK.contiguous()
    xA_MR = x_MK.new_empty(0) if A is None else x_MK.new_empty(M, len(A))
    struct = Linear(
        M, N, K, 0 if A is None else len(A), x_MK.data_ptr(), address(seen), address(bias),
        0 if A is None else DTYPES[A.dtype], address(A), address(B), scaling, xA_MR.data_ptr(), y_MN.data_ptr(),
    )  # fmt: skip
    call("onecard_linear", *weight_arguments(weight), ctypes.byref(struct))
    return y_MN, xA_MR


def linear_backward(
    grad_y_MN: Tensor,
    weight: PackedWeight | Tensor,
    needed_grads: list[bool],
    lora: Lora | None = None,
    lora_input_MK: Tensor | None = None,
    xA_MR: Tensor | None = None,
    has_own_lora_input: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return grad_x (M, K), grad_x_lora (M, K) if has_own_lora_input, and float32 grad_A (R, K) and grad_B (N, R).

    Args:
        needed_grads: which of the four to return. The others are None.
        lora_input_MK, xA_MR: the input and the output of A, bfloat16.
        has_own_lora_input: whether x_lora is not x (dropout). Its gradient is then a separate output.
    """
    M, (N, K) = len(grad_y_MN), weight.shape
    grad_y_MN = grad_y_MN.contiguous()
    A, B, scaling = contiguous(lora)
    lora_input_MK = None if lora_input_MK is None else lora_input_MK.contiguous()
    grad_x = allocator.empty((M, K), grad_y_MN.dtype) if needed_grads[0] else None
    grad_x_lora = allocator.empty((M, K), grad_y_MN.dtype) if has_own_lora_input and A is not None else None
    grad_A = new(torch.float32, *A.shape) if A is not None and needed_grads[2] else None
    grad_B = new(torch.float32, *B.shape) if B is not None and needed_grads[3] else None
    struct = Linear(
        M, N, K, 0 if A is None else len(A), None, address(lora_input_MK), None,
        0 if A is None else DTYPES[A.dtype], address(A), address(B), scaling, address(xA_MR), None,
        grad_y_MN.data_ptr(), *[address(x) for x in (grad_x, grad_x_lora, grad_A, grad_B)],
    )  # fmt: skip
    call("onecard_linear", *weight_arguments(weight), ctypes.byref(struct))
    return grad_x, grad_x_lora if needed_grads[1] else None, grad_A, grad_B


def contiguous(lora: Lora | None) -> tuple[Tensor | None, Tensor | None, float]:
    """Return contiguous A and B, and s."""
    return (None, None, 1.0) if lora is None else (lora.A_RK.contiguous(), lora.B_NR.contiguous(), lora.scaling)


def weight_arguments(weight: PackedWeight | Tensor) -> tuple:
    """Return the tensors and blocksize of a 4-bit weight; of a bfloat16 weight, itself and blocksize 0."""
    if isinstance(weight, Tensor):
        return weight.contiguous(), None, None, None, None, None, 0, 0
    return *weight_tensors(weight), weight.blocksize


def dense_product(x_MK: Tensor, W_NK: Tensor) -> Tensor:
    """Return x W^T for a contiguous x, float32 (M, N)."""
    M, (N, K) = len(x_MK), W_NK.shape
    y_MN = new(torch.float32, M, N)
    call("onecard_dense_product", W_NK, x_MK, DTYPES[x_MK.dtype], M, N, K, y_MN)
    return y_MN


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def cross_entropy_(z_PV: Tensor, target_P: Tensor) -> Tensor:
    """Same as reference.cross_entropy_."""
    if z_PV.dtype not in DTYPES:
        return reference.cross_entropy_(z_PV, target_P)
    assert target_P.dtype == torch.int64
    losses_P = new(torch.float32, len(target_P))
    call("onecard_cross_entropy", z_PV, DTYPES[z_PV.dtype], *z_PV.shape, target_P, losses_P)
    return losses_P


def rms_norm(x: Tensor, delta: Tensor | None, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return t = x + delta (x without a delta), y, contiguous, of t's shape, and r, float32 (rows,)."""
    y, rstd = allocator.empty_like(x), new(torch.float32, x.numel() // x.shape[-1])
    total = x if delta is None else allocator.empty_like(x)
    call("onecard_rms_norm", x, delta, w, total, y, rstd, DTYPES[x.dtype], rstd.numel(), x.shape[-1], eps)
    return total, y, rstd


def rms_norm_backward(grad_y: Tensor, x: Tensor, w: Tensor, rstd: Tensor, grad_total: Tensor | None) -> Tensor:
    grad_x, sizes = allocator.empty_like(x), (DTYPES[x.dtype], rstd.numel(), x.shape[-1])
    call("onecard_rms_norm_backward", grad_y, x, w, rstd, grad_total, grad_x, *sizes)
    return grad_x


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = allocator.empty_like(gate)
    call("onecard_swiglu", gate, up, y, DTYPES[y.dtype], y.numel())
    return y


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = allocator.empty_like(gate), allocator.empty_like(up)
    call("onecard_swiglu_backward", grad_y, gate, up, grad_gate, grad_up, DTYPES[gate.dtype], gate.numel())
    return grad_gate, grad_up


def rope(x_THD: Tensor, cos_PD: Tensor, sin_PD: Tensor, back: bool) -> Tensor:
    """Rotate each token's heads by its angles, in row t modulo P; with `back`, apply the transpose."""
    y_THD = allocator.empty_like(x_THD)
    sizes = (DTYPES[x_THD.dtype], *x_THD.shape, len(cos_PD), back)
    call("onecard_rope", x_THD, cos_PD, sin_PD, y_THD, *sizes)
    return y_THD


def attention(
    q_HTD: Tensor,
    k_HTD: Tensor,
    v_HTD: Tensor,
    cu_seqlens: list[int],
    scale: float,
    window: int,
    out_THD: Tensor,
    lse_HT: Tensor,
    grads: tuple[Tensor, ...] | None = None,
) -> None:
    """Fill out_THD and lse_HT, or with grads = (grad_out, grad_q, parts_k, parts_v, grad_k, grad_v) its last five.

    Args:
        q_HTD (H, T, D), k_HTD and v_HTD (H_kv, T, D): of one dtype. Only the last dimension must be dense.
        out_THD, grad_out, grad_q: (T, H, D) contiguous, q's dtype; lse_HT: (H, T) float32.
        parts_k, parts_v: float32 (H, T, D), one part per query head; grad_k, grad_v: (H_kv, T, D), their sums.
    """
    H, T, D = q_HTD.shape
    strides = [stride for x in (q_HTD, k_HTD, v_HTD) for stride in x.stride()[:2]]
    pointers = [None if x is None else x.data_ptr() for x in grads or (None,) * 6]
    struct = Attention(
        DTYPES[q_HTD.dtype], T, H, k_HTD.shape[0], D, window, scale,
        q_HTD.data_ptr(), k_HTD.data_ptr(), v_HTD.data_ptr(), *strides,
        out_THD.data_ptr(), lse_HT.data_ptr(), *pointers,
    )  # fmt: skip
    boundaries = (c_int64 * len(cu_seqlens))(*cu_seqlens)
    call("onecard_attention", ctypes.byref(struct), boundaries, len(cu_seqlens) - 1)


def adamw_8bit_(parts: list[tuple[Tensor, ...]], rates: reference.Rates) -> None:
    """Same as reference.adamw_8bit_."""
    maps = [table for signed in (True, False) for table in (dynamic_map("cpu", signed), midpoints("cpu", signed))]
    for w, grad, *states in parts:
        tensors = [w, grad.contiguous(), *states, *maps]
        assert all(x.is_contiguous() for x in tensors)
        struct = AdamW8bit(w.numel(), *[x.data_ptr() for x in tensors], *rates)
        call("onecard_adamw_8bit", ctypes.byref(struct))


def round_columns_(
    target_PN: Tensor, W_PN: Tensor, scale_PN: Tensor, U_PP: Tensor, levels: Tensor, D_PN: Tensor, index_PN: Tensor
) -> None:
    """Same as rounding.round_columns_."""
    bounds = (levels[:-1] + levels[1:]) / 2
    how = (*W_PN.shape, levels, bounds, len(levels), D_PN, index_PN)
    call("onecard_round_columns", target_PN, W_PN, scale_PN, U_PP.contiguous(), *how)


def choose_scales(values: Tensor, weights: Tensor, quant_type: str, shares: Tensor) -> Tensor:
    """Same as rounding.choose_scales."""
    bounds, order = decision_bounds(quant_type, "cpu")
    levels, scales = quant_map(quant_type, "cpu")[order], new(torch.float32, len(values))
    how = (*values.shape, levels, bounds, len(levels), shares, len(shares), scales)
    call("onecard_choose_scales", values, weights, *how)
    return scales
