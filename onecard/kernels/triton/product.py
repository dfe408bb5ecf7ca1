"""y = x W^T for few rows of x, directly from the codes. For decoding, where reading the weight is the whole cost.

Weights of even and of odd index are decoded separately and multiplied by the even and odd columns of x, so that a byte
is never spread over neighbouring lanes. A block's scale is loaded once. Sums are float32. For one row, each lane
multiplies and adds, and scales the sum of its two products. Up to 16 rows fill a tensor core's tile; there a decoded
weight is rounded to x's dtype, the same as in dequantize_into.

Shape suffixes: M rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from onecard.config import NESTED_BLOCKSIZE
from onecard.kernels.triton import launch
from onecard.kernels.triton.blockwise import block_scale, is_nested, look_up, weight_tensors
from onecard.quant.state import PackedWeight

LARGEST_M = 16  # rows of a tensor core's tile; fewer rows are padded to it
LARGEST_RANK = 128  # of a LoRA term whose B fits in registers together with the sums
# Rows of W and inputs per step of a program: for one row of x; for more, by itemsize, as float32 needs more registers.
ONE_ROW = {"BLOCK_N": 4, "BLOCK_K": 1024}
# One stage: a pipeline of several stages copies the looked-up levels asynchronously, 4 bytes each.
ROWS = {2: {"BLOCK_N": 32, "BLOCK_K": 256, "num_stages": 1}, 4: {"BLOCK_N": 16, "BLOCK_K": 64, "num_stages": 1}}
ROWS_ON_AMD = {2: ROWS[2] | {"BLOCK_N": 16}, 4: ROWS[4]}  # 32 rows of W do not fit in the registers of gfx1100


@triton.jit
def load_pairs(x, pair, mask):
    """Load elements 2 i and 2 i + 1 of x for every i of `pair`. Two elements of 16 bits are one load."""
    if x.dtype.element_ty.primitive_bitwidth == 16:
        both = tl.load(x.to(tl.pointer_type(tl.uint32)) + pair, mask=mask, other=0)
        low, high = (both & 0xFFFF).to(tl.uint16), (both >> 16).to(tl.uint16)
        return low.to(x.dtype.element_ty, bitcast=True), high.to(x.dtype.element_ty, bitcast=True)
    else:
        return tl.load(x + 2 * pair, mask=mask, other=0.0), tl.load(x + 2 * pair + 1, mask=mask, other=0.0)


@triton.jit
def row_kernel(
    x, packed, absmax, nested_absmax, dynamic, offset, levels, xA, lora_B, scaling, y, N, R, K: tl.constexpr,
    RANK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N outputs for one row of x. A step covers BLOCK_K inputs, in parts that have one scale."""
    STEP: tl.constexpr = min(BLOCK_K, BLOCKSIZE)
    n = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    table = tl.load(levels + tl.arange(0, 16))
    sums = tl.zeros([BLOCK_N, BLOCK_K // STEP, STEP // 2], tl.float32)
    for start in range(0, K, BLOCK_K):
        first = start + STEP * tl.arange(0, BLOCK_K // STEP)
        here = (n < N) & (first < K)[None, :]
        block = (n * K + first[None, :]) // BLOCKSIZE
        scale = block_scale(block, here, absmax, nested_absmax, dynamic, offset, NESTED, NESTED_BLOCKSIZE)[:, :, None]
        pair = (first // 2)[:, None] + tl.arange(0, STEP // 2)[None, :]
        byte = tl.load(packed + (n * (K // 2))[:, :, None] + pair[None, :, :], mask=here[:, :, None], other=0)
        x_even, x_odd = load_pairs(x, pair, (first < K)[:, None])
        part = look_up(table, (byte >> 4).to(tl.int32)) * x_even.to(tl.float32)[None, :, :]
        part = tl.fma(look_up(table, (byte & 15).to(tl.int32)), x_odd.to(tl.float32)[None, :, :], part)
        sums = tl.fma(part, scale, sums)
    out = tl.sum(tl.sum(sums, axis=2), axis=1)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if RANK > 0:
        r = tl.arange(0, RANK)
        a = tl.load(xA + r, mask=r < R, other=0.0).to(tl.float32)
        b = tl.load(lora_B + n[:, None] * R + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
        out += scaling * tl.sum(b.to(xA.dtype.element_ty).to(tl.float32) * a[None, :], axis=1)
    tl.store(y + n, out, mask=n < N)


@triton.jit
def rows_kernel(
    x, packed, absmax, nested_absmax, dynamic, offset, levels, xA, lora_B, scaling, y, M, N, R, K: tl.constexpr,
    RANK: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    LARGEST_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = min(BLOCK_K, BLOCKSIZE)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, LARGEST_M)
    table = tl.load(levels + tl.arange(0, 16))
    sums = tl.zeros([LARGEST_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        pair = start // 2 + tl.arange(0, BLOCK_K // 2)
        inside = (n[:, None] < N) & (pair < K // 2)[None, :]
        byte = tl.load(packed + n[:, None] * (K // 2) + pair[None, :], mask=inside, other=0).to(tl.int32)
        first = start + STEP * tl.arange(0, BLOCK_K // STEP)
        block, whole = (n[:, None] * K + first[None, :]) // BLOCKSIZE, (n[:, None] < N) & (first[None, :] < K)
        scale = block_scale(block, whole, absmax, nested_absmax, dynamic, offset, NESTED, NESTED_BLOCKSIZE)
        scale = tl.broadcast_to(scale[:, :, None], [BLOCK_N, BLOCK_K // STEP, STEP // 2])
        scale = tl.reshape(scale, [BLOCK_N, BLOCK_K // 2])
        even = (look_up(table, byte >> 4) * scale).to(x.dtype.element_ty)
        odd = (look_up(table, byte & 15) * scale).to(x.dtype.element_ty)
        seen = (m[:, None] < M) & (pair < K // 2)[None, :]
        x_even, x_odd = load_pairs(x, m[:, None] * (K // 2) + pair[None, :], seen)
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
    """Whether `multiply` accepts this x and is faster than dequantize_into and torch's product."""
    most = LARGEST_M if pays_in_tiles(x_MK.device) else 1
    return x_MK.shape[0] <= most and x_MK.shape[1] % blocksize == 0


@cache
def pays_in_tiles(device: torch.device) -> bool:
    """Whether to decode a weight for tiles costs less than to write it in 16 bits and read it again. It costs more
    where the memory is fast (H200: 83 against 58 to 120 us, depending on the shape, LOG.md)."""
    if device.type != "cuda":
        return True
    major, _ = torch.cuda.get_device_capability(device)
    return has_tiles(major) and major not in (9, 10)


def has_tiles(major: int) -> bool:
    """Whether Triton multiplies on tensor cores. It does not on NVIDIA's before Ampere: a tile takes four times as many
    instructions there, and more registers than there are."""
    return major >= 8


def row_sizes(itemsize: int) -> dict[str, int]:
    """Return the sizes of a tile and the launch settings, for several rows of x with elements of 2 or 4 bytes."""
    return (ROWS if torch.version.hip is None else ROWS_ON_AMD)[itemsize]


def multiply(x_MK: Tensor, weight: PackedWeight, lora: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
    """Return x W^T, float32 (M, N). Add s (x A^T) B^T for lora = (x A^T, B, s), in one launch up to LARGEST_RANK."""
    M, (N, K) = len(x_MK), weight.shape
    R = 0 if lora is None else lora[0].shape[1]
    xA_MR, lora_B_NR, scaling = lora if lora is not None and R <= LARGEST_RANK else (x_MK, x_MK, 0.0)
    fused_rank = max(16, triton.next_power_of_2(R)) if 0 < R <= LARGEST_RANK else 0
    y_MN = torch.empty(M, N, dtype=torch.float32, device=x_MK.device)
    x_MK = x_MK.contiguous()
    if x_MK.data_ptr() % 4:  # a pair of 16-bit elements is loaded at once
        x_MK = x_MK.clone()
    kernel, sizes, rows = row_kernel, ONE_ROW, ()
    if M > 1:
        kernel, sizes, rows = rows_kernel, {**row_sizes(x_MK.dtype.itemsize), "LARGEST_M": LARGEST_M}, (M,)
    launch(
        kernel, triton.cdiv(N, sizes["BLOCK_N"]),
        x_MK, *weight_tensors(weight), xA_MR.contiguous(), lora_B_NR.contiguous(), scaling, y_MN, *rows, N, R, K=K,
        RANK=fused_rank, BLOCKSIZE=weight.blocksize, NESTED=is_nested(weight),
        NESTED_BLOCKSIZE=NESTED_BLOCKSIZE, **sizes, enable_fp_fusion=False,
    )  # fmt: skip
    if lora is not None and R > LARGEST_RANK:
        y_MN.addmm_(lora[0].float(), lora[1].float().T, alpha=lora[2])
    return y_MN
