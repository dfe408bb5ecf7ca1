"""8-bit optimizer states: blocks of 256 values with a float32 scale, in the dynamic map (arXiv 2110.02861, section 2).

    x[i] ~ map[code[i]] * absmax[i // 256],    code[i] is the nearest level's

The values of a state span orders of magnitude, and the map's levels are denser towards 0. 0 and 1 are levels, so a
block's largest magnitude has no error if it is positive; -1 is no level, and a negative one has an error below 1%.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from onecard.quant.codebook import dynamic_map

STATE_BLOCKSIZE = 256


@cache
def midpoints(device: torch.device | str, signed: bool) -> Tensor:
    """Return the midpoints between neighbouring levels: float32 (255,)."""
    levels = dynamic_map(device, signed)
    return (levels[:-1] + levels[1:]) / 2


def quantize_8bit(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize a float32 vector to codes, uint8 (n,), and absmax, float32 (ceil(n/256),). Ties go low."""
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % STATE_BLOCKSIZE)).view(-1, STATE_BLOCKSIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, midpoints(x.device, signed), out_int32=True).to(torch.uint8)
    return codes.view(-1)[: x.numel()].contiguous(), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """Dequantize the values to float32."""
    x = dynamic_map(codes.device, signed)[codes.long()]
    scale = absmax.repeat_interleave(STATE_BLOCKSIZE)[: codes.numel()]
    return x * scale


def zeros_8bit(size: int, device: torch.device | str, signed: bool) -> tuple[Tensor, Tensor]:
    """Return what quantize_8bit returns for `size` zeros."""
    code, _ = quantize_8bit(torch.zeros(1, device=device), signed)
    absmax = torch.zeros(-(-size // STATE_BLOCKSIZE), dtype=torch.float32, device=device)
    return code.expand(size).contiguous(), absmax
