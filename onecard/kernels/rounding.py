"""Weights rounded to levels with the least error, for a base that is calibrated (export/calibrated/feedback.py).

This module is the specification, in torch. It runs on every device; the C++ kernels replace it on CPUs.

Shape suffixes: P columns of a weight that are rounded together, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.quant.blockwise import dequantize_blocks, quantize_blocks


def round_columns_(
    target_PN: Tensor, W_PN: Tensor, scale_PN: Tensor, U_PP: Tensor, levels: Tensor, D_PN: Tensor, index_PN: Tensor
) -> None:
    """Round columns of a weight to levels, the last one first. Column p becomes the levels nearest to

        (target[p] + sum over the later columns j of U[p, j] D[j]) / scale[p],    D = W - level * scale.

    Args:
        target_PN, W_PN, scale_PN: float32, contiguous. Where a scale is 0, the level is that nearest to 0.
        U_PP: float32; above its diagonal.
        levels: ascending, float32, at most 16.
        D_PN: float32, filled with the errors; index_PN: uint8, filled with the numbers of the levels.
    """
    bounds = (levels[:-1] + levels[1:]) / 2
    inverse_PN = torch.where(scale_PN == 0, 0.0, 1 / scale_PN)
    index_N = torch.empty_like(index_PN[0], dtype=torch.int32)
    for p in range(len(W_PN) - 1, -1, -1):
        w = torch.addmv(target_PN[p], D_PN[p + 1 :].T, U_PP[p, p + 1 :])
        torch.bucketize(w.mul_(inverse_PN[p]), bounds, out=index_N, out_int32=True)
        torch.addcmul(W_PN[p], levels.index_select(0, index_N), scale_PN[p], value=-1, out=D_PN[p])
        index_PN[p] = index_N


def choose_scales(values: Tensor, weights: Tensor, quant_type: str, shares: Tensor) -> Tensor:
    """Return the scale of each block, float32 (num_blocks,): the share of its largest absolute value with the least sum
    of weighted squared errors. Larger values are clipped.

    Args:
        values, weights: float32 (num_blocks, blocksize), contiguous.
        shares: float32.
    """
    largest, found = values.abs().amax(1), torch.empty_like(values)
    scales, least = largest.clone(), torch.full_like(largest, float("inf"))
    for share in shares:
        limit = share * largest
        clipped = torch.minimum(torch.maximum(values, -limit[:, None]), limit[:, None])
        packed, absmax = quantize_blocks(clipped, quant_type, values.shape[1], "values")
        dequantize_blocks(packed, absmax, quant_type, values.shape[1], found)
        error = found.sub_(values).square_().mul_(weights).sum(1)
        scales[error < least] = limit[error < least]
        least = torch.minimum(least, error)
    return scales
