"""Double quantization: each scale minus their mean in 8 bits, with one float32 scale for each 256 of them.

    absmax[i] ~ dynamic_map[code[i]] * nested_absmax[i // 256] + offset         (arXiv 2305.14314, section 3)

At blocksize 64 a weight costs 4 + 8/64 + 32/(64 * 256) = 4.127 bits instead of 4.5.

Two details follow bitsandbytes, so that a code means the same in both: a scale is rounded to a grid of 65,536 points
before its nearest code is looked up, and a group of 256 zeros gets code 0. One detail differs: bitsandbytes' mean
depends on the number of threads. Ours is a float64 sum in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.config import NESTED_BLOCKSIZE
from onecard.quant.codebook import GRID, dynamic_lookup, dynamic_map


def fixed_order_mean(x: Tensor) -> Tensor:
    """Return a float32 vector's mean, float32 (). It adds halves in float64; the thread count does not change it."""
    total = x.double()
    while total.numel() > 1:
        if total.numel() % 2:
            total = torch.cat([total, total.new_zeros(1)])
        half = total.numel() // 2
        total = total[:half] + total[half:]
    return (total[0] / x.numel()).float()


def quantize_absmax(absmax: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize scales to 8 bits.

    Args:
        absmax: float32 (num_blocks,), finite.
        offset: float32 (), subtracted from the scales. None: the fixed-order mean.

    Returns:
        Codes, uint8 (num_blocks,), nested_absmax, float32 (ceil(num_blocks/256),), and offset, float32 ().
    """
    if offset is None:
        offset = fixed_order_mean(absmax)
    num_blocks = absmax.numel()
    num_groups = -(-num_blocks // NESTED_BLOCKSIZE)
    padded = absmax.new_zeros(num_groups * NESTED_BLOCKSIZE)
    padded[:num_blocks] = absmax - offset
    groups = padded.view(num_groups, NESTED_BLOCKSIZE)
    nested_absmax = groups.abs().amax(dim=1)
    scaled = groups * (1.0 / nested_absmax)[:, None]  # 0 * inf is NaN: the lowest grid point, code 0
    scaled = scaled.nan_to_num(nan=-1.0).clamp(-1, 1)
    grid = ((scaled + 1) * 0.5 * (GRID - 1) + 0.5).to(torch.int64)
    codes = dynamic_lookup(absmax.device)[grid].view(-1)[:num_blocks]
    return codes.contiguous(), nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """Dequantize scales to float32 (num_blocks,). The product is rounded before the offset is added."""
    group = torch.arange(codes.numel(), device=codes.device) // NESTED_BLOCKSIZE
    return dynamic_map(codes.device)[codes.long()] * nested_absmax[group] + offset
