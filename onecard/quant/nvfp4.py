"""NVFP4: E2M1 codes in blocks of 16 with an E4M3 scale each, and one float32 divisor or factor of a tensor's scales.

    w[i] = level[code[i]] * (scale[i // 16] / divisor),    level: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same with a minus

A checkpoint's weight stays in NVFP4 (`from_nvfp4`). The 256 scales that a byte of E4M3 can mean are computed once for
each weight, with the operation of its layout: compressed-tensors divides by the tensor's scale, ModelOpt multiplies.

`quantize_nvfp4` rounds weights for an export, in the layout of compressed-tensors. The divisor gives the largest
magnitude the largest scale. Of the scales that give a block's largest weight the level 6 or 4, the one with the least
squared error is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from onecard.quant.codebook import quant_map
from onecard.quant.mxfp4 import encode_e2m1, swapped_nibbles
from onecard.quant.state import QuantState

E4M3 = torch.float8_e4m3fn
LARGEST, SMALLEST = 448.0, 2.0**-9  # of E4M3
BLOCK = 16
ENDS = (6.0, 4.0)  # levels of E2M1 that the largest weight of a block may have


def quantize_nvfp4(W_NK: Tensor, peak: float) -> tuple[Tensor, Tensor, Tensor]:
    """Round a float32 weight (N, K) to the nearest codes; K is a multiple of 16.

    Args:
        peak: the largest magnitude of all weights that share the divisor; 0 if all are 0.

    Returns:
        Codes, uint8 (N, K); scales of blocks, E4M3 (N, K / 16); the divisor, float32 (1,).
    """
    device = W_NK.device
    divisor = torch.tensor([LARGEST * ENDS[0] / peak if peak > 0 else 1.0], dtype=torch.float32, device=device)
    x = W_NK.view(len(W_NK), -1, BLOCK)
    largest, least = x.abs().amax(-1), torch.full(x.shape[:-1], torch.inf, device=device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=device)
    levels = quant_map("mxfp4", device)
    for end in ENDS:
        scale = (largest / end * divisor).clamp(SMALLEST, LARGEST).to(E4M3).float()
        s = (scale / divisor)[..., None]
        found = encode_e2m1(x / s)
        error = (levels[found.int()] * s - x).square().sum(-1)
        better = error < least
        codes = torch.where(better[..., None], found, codes)
        scales, least = torch.where(better, scale, scales), torch.where(better, error, least)
    return codes.view_as(W_NK), scales.to(E4M3), divisor


def dequantize_nvfp4(codes_NK: Tensor, scales: Tensor, divisor: Tensor) -> Tensor:
    """Return the float32 weight (N, K) as a reader computes it."""
    levels = quant_map("mxfp4", codes_NK.device)[codes_NK.int()]
    return (levels.view(*scales.shape, BLOCK) * (scales.float() / divisor)[..., None]).view_as(codes_NK)


def scale_map(tensor_scale: Tensor, divides: bool) -> Tensor:
    """Return the scale that each byte of E4M3 means, float32 (256,): NaN for the bytes of NaN.

    Args:
        tensor_scale: float32 ().
        divides: the scales are divided by the tensor's, not multiplied.
    """
    values = torch.arange(256, dtype=torch.uint8, device=tensor_scale.device).view(E4M3).float()
    return values / tensor_scale if divides else values * tensor_scale


def from_nvfp4(codes: Tensor, scales: Tensor, table: Tensor, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
    """Return the codes and the state of a checkpoint's tensors. No value changes.

    Args:
        codes: uint8 (N, K / 2), two codes a byte, the first in the low nibble.
        scales: uint8 (N, K / 16), bytes of E4M3.
        table: `scale_map`.
        dtype: dtype of dequantize_4bit's result.

    Returns:
        The codes, uint8 (numel/2, 1), the first in the high nibble, and the QuantState of shape (N, K).
    """
    shape = torch.Size([len(codes), 2 * codes.shape[1]])
    state = QuantState(scales.reshape(-1), shape, dtype, BLOCK, "nvfp4", nested_absmax=table)
    return swapped_nibbles(codes.reshape(-1)).view(-1, 1), state
