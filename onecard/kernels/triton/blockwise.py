"""Quantize and dequantize on a GPU, in one launch each. The same launch dequantizes nested scales.

The float32 operations and their order are those of quant/blockwise.py: division rounds to nearest, and a product is
rounded before its sum (enable_fp_fusion=False). Therefore codes, scales and weights are bit-identical.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from onecard.config import NESTED_BLOCKSIZE
from onecard.kernels.triton import launch
from onecard.quant.blockwise import not_finite
from onecard.quant.codebook import decision_bounds, quant_map
from onecard.quant.scales import SHIFTED, scale_tensors
from onecard.quant.state import PackedWeight

WEIGHTS_A_PROGRAM = {"quantize": 1024, "dequantize": 4096}  # measured on an H200 (LOG.md)


@triton.jit
def look_up(table, codes):
    """Return the table's entries from shared memory, which is faster than global memory, even if that is cached."""
    flat = tl.gather(table, tl.reshape(codes, [codes.numel]), 0)
    return tl.reshape(flat, codes.shape)


@triton.jit
def interval_of(x, bounds):
    """Return how many of 15 ascending bounds are below x, by a binary search in registers: 0 for NaN."""
    b0, b1, b2, b3, b4 = (
        tl.load(bounds),
        tl.load(bounds + 1),
        tl.load(bounds + 2),
        tl.load(bounds + 3),
        tl.load(bounds + 4),
    )
    b5, b6, b7, b8, b9 = (
        tl.load(bounds + 5), tl.load(bounds + 6), tl.load(bounds + 7), tl.load(bounds + 8), tl.load(bounds + 9)
    )  # fmt: skip
    b10, b11, b12, b13, b14 = (
        tl.load(bounds + 10), tl.load(bounds + 11), tl.load(bounds + 12), tl.load(bounds + 13), tl.load(bounds + 14)
    )  # fmt: skip
    first = x > b7
    second = x > tl.where(first, b11, b3)
    third = x > tl.where(first, tl.where(second, b13, b9), tl.where(second, b5, b1))
    upper = tl.where(second, tl.where(third, b14, b12), tl.where(third, b10, b8))
    lower = tl.where(second, tl.where(third, b6, b4), tl.where(third, b2, b0))
    fourth = x > tl.where(first, upper, lower)
    found = (first.to(tl.int32) << 3) | (second.to(tl.int32) << 2) | (third.to(tl.int32) << 1)
    return found | fourth.to(tl.int32)


@triton.jit
def quantize_kernel(
    W, bounds, order, packed, absmax, num_weights,
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr, ASCENDING: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCKS blocks. Two neighbouring weights share a byte, the first in the high nibble.

    WHOLE: the last block is whole. Only one that is not needs divisions. ASCENDING: codes are numbers of intervals.
    """
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    x = tl.load(W + at, mask=at < num_weights, other=0.0).to(tl.float32)
    # Compare as integers, so that NaN and Inf are the largest.
    most = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    floor = tl.maximum(most, tl.full([BLOCKS], 1e-38, tl.float32), propagate_nan=tl.PropagateNan.ALL)
    inverse = tl.math.div_rn(tl.full([BLOCKS], 1.0, tl.float32), floor)
    scaled = x * inverse[:, None]
    if not WHOLE:
        whole = (block + 1) * BLOCKSIZE <= num_weights
        divided = tl.math.div_rn(x, tl.broadcast_to(floor[:, None], [BLOCKS, BLOCKSIZE]))
        scaled = tl.where(whole[:, None], scaled, divided)
        most = tl.where(whole, most, floor)
    code = interval_of(scaled, bounds)
    if not ASCENDING:
        code = look_up(tl.load(order + tl.arange(0, 16)), code)
    high, low = tl.split(tl.reshape(code, [BLOCKS, HALF, 2]))
    first = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    tl.store(packed + first, ((high << 4) | low).to(tl.uint8), mask=2 * first < num_weights)
    tl.store(absmax + block, most, mask=block * BLOCKSIZE < num_weights)


@triton.jit
def block_scale(
    block, mask, absmax, nested_absmax, dynamic, offset, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr
):
    """Return the float32 scale of each block number."""
    if NESTED:
        code = tl.load(absmax + block, mask=mask, other=0).to(tl.int32)
        outer = tl.load(nested_absmax + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        return tl.load(dynamic + code) * outer + tl.load(offset)
    else:
        return tl.load(absmax + block, mask=mask, other=0.0)


@triton.jit
def dequantize_kernel(
    packed, absmax, nested_absmax, dynamic, offset, levels, out, num_weights, num_bytes,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """Dequantize BLOCKS blocks, each with one scale. SHIFTED: absmax has a shift after each scale."""
    HALF: tl.constexpr = BLOCKSIZE // 2
    PAIRS: tl.constexpr = BLOCKS * HALF
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first + tl.arange(0, BLOCKS)
    inside = block * BLOCKSIZE < num_weights
    place = 2 * block if SHIFTED else block
    scale = block_scale(place, inside, absmax, nested_absmax, dynamic, offset, NESTED, NESTED_BLOCKSIZE)
    scale = tl.reshape(tl.broadcast_to(scale[:, None], [BLOCKS, HALF]), [PAIRS])
    pair = first * HALF + tl.arange(0, PAIRS)
    byte = tl.load(packed + pair, mask=pair < num_bytes, other=0).to(tl.int32)
    table = tl.load(levels + tl.arange(0, 16))
    high, low = look_up(table, byte >> 4) * scale, look_up(table, byte & 15) * scale
    if SHIFTED:
        shift = tl.load(absmax + 2 * block + 1, mask=inside, other=0.0)
        shift = tl.reshape(tl.broadcast_to(shift[:, None], [BLOCKS, HALF]), [PAIRS])
        high, low = high + shift, low + shift
    at = first * BLOCKSIZE + tl.arange(0, 2 * PAIRS)
    tl.store(out + at, tl.interleave(high, low).to(out.dtype.element_ty), mask=at < num_weights)


@cache
def coding(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor, bool]:
    """Return the bounds, float32 (15,), the code of each interval, int32 (16,), and whether that is its number."""
    bounds, order = decision_bounds(quant_type, device)
    return bounds.contiguous(), order.int(), order.tolist() == list(range(16))


def quantize_blocks(W: Tensor, quant_type: str, blocksize: int, name: str) -> tuple[Tensor, Tensor]:
    """Same as quant.blockwise.quantize_blocks."""
    flat = W.detach().reshape(-1).contiguous()
    num_blocks = triton.cdiv(flat.numel(), blocksize)
    packed = torch.empty((flat.numel() + 1) // 2, 1, dtype=torch.uint8, device=W.device)
    absmax = torch.empty(num_blocks, dtype=torch.float32, device=W.device)
    blocks = max(1, WEIGHTS_A_PROGRAM["quantize"] // blocksize)
    bounds, order, is_ascending = coding(quant_type, W.device)
    launch(
        quantize_kernel, triton.cdiv(num_blocks, blocks),
        flat, bounds, order, packed, absmax, flat.numel(), BLOCKSIZE=blocksize, BLOCKS=blocks,
        WHOLE=flat.numel() % blocksize == 0, ASCENDING=is_ascending, enable_fp_fusion=False,
    )  # fmt: skip
    if not torch.isfinite(absmax).all():
        raise not_finite(flat, W.shape, name)
    return packed, absmax


def weight_tensors(weight: PackedWeight) -> tuple[Tensor, ...]:
    """Return the arguments that describe a weight to every kernel. absmax replaces a tensor that is None."""
    scales = [weight.absmax if tensor is None else tensor for tensor in scale_tensors(weight)]
    return weight.codes, *scales, quant_map(weight.quant_type, weight.codes.device)


def is_nested(weight: PackedWeight) -> bool:
    """Whether kernels read the scales as nested: those of double quantization, and exponents."""
    return weight.absmax.dtype == torch.uint8


def dequantize_into(weight: PackedWeight, out: Tensor) -> None:
    """Same as reference.dequantize_into, in one launch."""
    blocks = max(1, WEIGHTS_A_PROGRAM["dequantize"] // weight.blocksize)
    launch(
        dequantize_kernel,
        triton.cdiv(out.numel(), blocks * weight.blocksize),
        *weight_tensors(weight),
        out,
        out.numel(),
        weight.codes.numel(),
        BLOCKSIZE=weight.blocksize,
        NESTED=is_nested(weight),
        NESTED_BLOCKSIZE=NESTED_BLOCKSIZE,
        BLOCKS=blocks,
        SHIFTED=weight.quant_type in SHIFTED,
        enable_fp_fusion=False,
    )
