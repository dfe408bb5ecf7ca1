"""Weights in 4 bits with one scale and one zero for a group of a row, as GPTQ's and AWQ's files hold them.

    w = scale (code - zero)        code 0 ... 15, zero 0 ... 15, scale float16

A scale is rounded to float16 before codes are chosen with it, so what is chosen is what a reader computes.
Shapes: N outputs, K inputs, G groups of g inputs in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.errors import UserError

LEVELS = 15  # the largest code
SMALLEST = 2.0**-24  # float16's, subnormal


@dataclass
class Grouped:
    """One linear's weight.

    Attributes:
        codes_NK: uint8.
        scales_NG: float16.
        zeros_NG: uint8.
        group_K: int32, the group that each input is in.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor
    group_K: Tensor

    def dequantize(self) -> Tensor:
        """Float32 (N, K), as a reader computes it."""
        index = self.group_K.long()
        return (self.codes_NK.float() - self.zeros_NG.float()[:, index]) * self.scales_NG.float()[:, index]


def choose_scales(W: Tensor, sym: bool, first_zero: int = 0) -> tuple[Tensor, Tensor]:
    """Scale and zero for groups, (..., g) -> float16 (..., 1) and float32 (..., 1), that cover their range.

    Args:
        sym: zero is 8, and the levels reach as far as the largest magnitude.
        first_zero: the smallest zero; GPTQ's files hold zero - 1 and so have none of 0.

    Raises:
        UserError: a scale beyond float16.
    """
    low, high = W.amin(-1, keepdim=True).clamp(max=0), W.amax(-1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    elif first_zero:
        low = torch.minimum(low, -high * first_zero / (LEVELS - first_zero))
    scale = ((high - low) / LEVELS).clamp(min=SMALLEST).half()
    if not torch.isfinite(scale).all():
        raise UserError("a group's scale must fit float16", "a weight beyond it", "check the checkpoint", "weights")
    zero = torch.full_like(low, (LEVELS + 1) // 2) if sym else (-low / scale.float()).round().clamp(first_zero, LEVELS)
    return scale, zero


def encode(W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest codes, in W's shape, float32."""
    return ((W / scale.float()).round_() + zero).clamp_(0, LEVELS)


def round_to_nearest(W_NK: Tensor, group_size: int, sym: bool, shrink_NG: Tensor | None = None) -> Grouped:
    """Every weight of float32 W at the level nearest to it; groups of inputs in order.

    Args:
        shrink_NG: the share of its range that each group's levels cover; all of it if not given.
    """
    W = W_NK.view(W_NK.shape[0], -1, group_size)
    scale, zero = choose_scales(W if shrink_NG is None else W * shrink_NG[..., None], sym)
    codes = encode(W, scale, zero).to(torch.uint8).view_as(W_NK)
    group_K = torch.arange(W_NK.shape[1], device=W.device, dtype=torch.int32) // group_size
    return Grouped(codes, scale[..., 0], zero[..., 0].to(torch.uint8), group_K)


def pack_int32(codes: Tensor) -> Tensor:
    """uint8 codes (..., 8) -> int32 (...), the first in the lowest four bits."""
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    return pairs.contiguous().view(torch.int32)[..., 0]
