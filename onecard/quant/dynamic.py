"""8-bit optimizer states: blocks of 256 values, a float32 scale each, in the dynamic map (arXiv 2110.02861, section 2).

    x[i] ~ map[code[i]] * absmax[i // 256],    code[i] the nearest level's

A state's values span orders of magnitude; the map's levels are denser towards 0 and end at exactly 0 and 1, so the
largest value of a block is kept without error.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from onecard.quant.codebook import dynamic_map

STATE_BLOCKSIZE = 256


@cache
def midpoints(device: torch.device | str, signed: bool) -> Tensor:
    """Where one level's neighbourhood ends and the next one's begins: float32 (255,)."""
    levels = dynamic_map(device, signed)
    return (levels[:-1] + levels[1:]) / 2


def quantize_8bit(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """A float32 vector to codes, uint8 of its length, and absmax, float32 (ceil(n/256),); ties go low."""
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % STATE_BLOCKSIZE)).view(-1, STATE_BLOCKSIZE)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(scaled, midpoints(x.device, signed), out_int32=True).to(torch.uint8)
    return codes.view(-1)[: x.numel()].contiguous(), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The values back, float32."""
    x = dynamic_map(codes.device, signed)[codes.long()]
    scale = absmax.repeat_interleave(STATE_BLOCKSIZE)[: codes.numel()]
    return x * scale


def zeros_8bit(size: int, device: torch.device | str, signed: bool) -> tuple[Tensor, Tensor]:
    """What quantize_8bit gives for `size` zeros."""
    code, _ = quantize_8bit(torch.zeros(1, device=device), signed)
    absmax = torch.zeros(-(-size // STATE_BLOCKSIZE), dtype=torch.float32, device=device)
    return code.expand(size).contiguous(), absmax
