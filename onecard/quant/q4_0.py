"""Q4_0 of GGUF: codes 0 ... 15 in blocks of 32 with a float16 scale each.

    w[i] = d (code[i] - 8),    d = -w / 8 for the block's weight w of the largest magnitude

A code is chosen with d before d is rounded to float16, as in ggml's reference (ggml-quants.c): the bytes of a file are
those of the gguf package. Of several largest magnitudes the first one counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def quantize_q4_0(W_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a float32 weight (N, K) to Q4_0; K is a multiple of 32.

    Returns:
        Codes, uint8 (N, K), and scales, float16 (N, K / 32).
    """
    x = W_NK.reshape(len(W_NK), -1, BLOCK)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    peak = torch.where(high > -low, high, low)
    if (ties := (high == -low)[..., 0]).any():
        some = x[ties]
        peak[ties] = some.gather(-1, some.abs().argmax(-1, keepdim=True))
    d = peak / -8
    inverse = torch.where(d.abs() < torch.finfo(torch.float32).tiny, 0.0, 1 / d)  # of a subnormal it would be Inf
    codes = (x * inverse).add_(8.5).to(torch.uint8).clamp_(max=15)
    return codes.view_as(W_NK), d[..., 0].half()


def dequantize_q4_0(codes_NK: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 weight (N, K) as a reader computes it."""
    codes = codes_NK.view(*scales.shape, BLOCK).float() - 8
    return (codes * scales.float()[..., None]).view_as(codes_NK)
