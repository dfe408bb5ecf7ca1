"""y = x W^T for few rows of x straight from the codes: for decoding, where the weight's bytes are the whole cost.

A program takes BLOCK_N rows of W and walks along K; the weights of even and of odd index are decoded apart and meet
the even and odd columns of x, so that a byte never has to be spread over neighbouring lanes. A block's scale is
loaded once. A decoded weight is rounded to x's dtype, as dequantize_into would, and the sums are float32.

Shape suffixes: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from onecard.config import NESTED_BLOCKSIZE
from onecard.kernels.triton import launch
from onecard.kernels.triton.blockwise import block_scale
from onecard.quant.codebook import dynamic_map, quant_map

LARGEST_M = 16  # rows of a tensor core's tile: fewer are padded up to it
LARGEST_RANK = 128  # of a LoRA term whose B fits in registers beside the sums
BLOCK_N, BLOCK_K = 32, {2: 256, 4: 64}  # by bytes of x: float32, which no tensor core multiplies, takes more registers


@triton.jit
def product_kernel(
    x, packed, absmax, nested_absmax, dynamic, offset, levels, xA, lora_B, scaling, y, M, N, R, K: tl.constexpr,
    RANK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    STEP: tl.constexpr = min(BLOCK_K, BLOCKSIZE)  # weights of a row that share a scale
    for start in range(0, K, BLOCK_K):
        k = start + 2 * tl.arange(0, BLOCK_K // 2)
        inside = (n[:, None] < N) & (k[None, :] < K)
        at = n[:, None] * K + k[None, :]
        byte = tl.load(packed + at // 2, mask=inside, other=0).to(tl.int32)
        first = start + STEP * tl.arange(0, BLOCK_K // STEP)
        block, whole = (n[:, None] * K + first[None, :]) // BLOCKSIZE, (n[:, None] < N) & (first[None, :] < K)
        scale = block_scale(block, whole, absmax, nested_absmax, dynamic, offset, NESTED, NESTED_BLOCKSIZE)
        scale = tl.broadcast_to(scale[:, :, None], [BLOCK_N, BLOCK_K // STEP, STEP // 2])
        scale = tl.reshape(scale, [BLOCK_N, BLOCK_K // 2])
        even = (tl.load(levels + (byte >> 4)) * scale).to(x.dtype.element_ty)
        odd = (tl.load(levels + (byte & 15)) * scale).to(x.dtype.element_ty)
        seen = (m[:, None] < M) & (k[None, :] < K)
        x_even = tl.load(x + m[:, None] * K + k[None, :], mask=seen, other=0.0)
        x_odd = tl.load(x + m[:, None] * K + k[None, :] + 1, mask=seen, other=0.0)
        sums = tl.dot(x_even, tl.trans(even), sums, input_precision="ieee")
        sums = tl.dot(x_odd, tl.trans(odd), sums, input_precision="ieee")
    if RANK > 0:
        r = tl.arange(0, RANK)
        a = tl.load(xA + m[:, None] * R + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0)
        b = tl.load(lora_B + n[:, None] * R + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
        term = tl.dot(a, tl.trans(b.to(a.dtype)), input_precision="ieee")
        sums += scaling * term
    tl.store(y + m[:, None] * N + n[None, :], sums, mask=(m[:, None] < M) & (n[None, :] < N))


def can_multiply(x_MK: Tensor, blocksize: int) -> bool:
    """Whether `multiply` takes this x."""
    return x_MK.shape[0] <= LARGEST_M and x_MK.shape[1] % blocksize == 0


def multiply(
    x_MK: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    blocksize: int,
    num_outputs: int,
    lora: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """x W^T, float32 (M, N); with lora = (x A^T, B, s) plus s (x A^T) B^T, in the same launch up to LARGEST_RANK."""
    M, K = x_MK.shape
    R = 0 if lora is None else lora[0].shape[1]
    xA_MR, lora_B_NR, scaling = lora if lora is not None and R <= LARGEST_RANK else (x_MK, x_MK, 0.0)
    fused_rank = max(16, triton.next_power_of_2(R)) if 0 < R <= LARGEST_RANK else 0
    y_MN = torch.empty(M, num_outputs, dtype=torch.float32, device=x_MK.device)
    nested = nested_absmax is not None
    launch(
        product_kernel,
        triton.cdiv(num_outputs, BLOCK_N),
        x_MK.contiguous(),
        packed,
        absmax,
        nested_absmax if nested else absmax,
        dynamic_map(packed.device),
        nested_offset if nested else absmax,
        quant_map(quant_type, packed.device),
        xA_MR.contiguous(),
        lora_B_NR.contiguous(),
        scaling,
        y_MN,
        M,
        num_outputs,
        R,
        K,
        RANK=fused_rank,
        BLOCKSIZE=blocksize,
        NESTED=nested,
        NESTED_BLOCKSIZE=NESTED_BLOCKSIZE,
        ROWS=LARGEST_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K[x_MK.dtype.itemsize],
        enable_fp_fusion=False,
    )
    if lora is not None and R > LARGEST_RANK:
        y_MN.addmm_(lora[0].float(), lora[1].float().T, alpha=lora[2])
    return y_MN
