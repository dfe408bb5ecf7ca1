"""Weights in 4 bits with one scale and one zero per group of a row, as in GPTQ's and AWQ's files.

    w = scale (code - zero)        code 0 ... 15, zero 0 ... 15, scale in 16 bits

A scale is rounded to its dtype before it is used to choose codes, so that they fit what a reader computes.
Shapes: N outputs, K inputs, G groups of g inputs in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from onecard.errors import UserError

IN_LAYER = re.compile(r"\.\d+\.")  # in the name of a module of a layer
LEVELS = 15  # the largest code
GROUP_SIZES = (128, 64, 32)
SMALLEST = 2.0**-24  # float16's, subnormal


@dataclass
class Grouped:
    """One linear's weight.

    Attributes:
        codes_NK: uint8.
        scales_NG: float16, or bfloat16 where the format stores that.
        zeros_NG: uint8.
        group_K: int32, the group of each input.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor
    group_K: Tensor

    def dequantize(self) -> Tensor:
        """Return the float32 weight (N, K) as a reader computes it."""
        index = self.group_K.long()
        return (self.codes_NK.float() - self.zeros_NG.float()[:, index]) * self.scales_NG.float()[:, index]


def choose_scales(
    W: Tensor, sym: bool, first_zero: int = 0, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero that cover each group's range: (..., g) -> dtype (..., 1) and float32 (..., 1).

    Args:
        sym: zero is 8, and the levels cover the largest magnitude.
        first_zero: the smallest zero; GPTQ's files hold zero - 1, so that they cannot hold a zero of 0.

    Raises:
        UserError: a scale does not fit the dtype.
    """
    low, high = W.amin(-1, keepdim=True).clamp(max=0), W.amax(-1, keepdim=True).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    elif first_zero:
        low = torch.minimum(low, -high * first_zero / (LEVELS - first_zero))
    scale = ((high - low) / LEVELS).clamp(min=SMALLEST).to(dtype)
    if not torch.isfinite(scale).all():
        must = f"a group's scale must fit {str(dtype).removeprefix('torch.')}"
        raise UserError(must, "a weight beyond it", "check the checkpoint", "weights")
    zero = torch.full_like(low, (LEVELS + 1) // 2) if sym else (-low / scale.float()).round().clamp(first_zero, LEVELS)
    return scale, zero


def encode(W: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the nearest codes, float32 in W's shape."""
    return ((W / scale.float()).round_() + zero).clamp_(0, LEVELS)


def round_to_nearest(
    W_NK: Tensor,
    group_size: int,
    sym: bool,
    shrink_NG: Tensor | None = None,
    first_zero: int = 0,
    dtype: torch.dtype = torch.float16,
) -> Grouped:
    """Round every weight of float32 W to its nearest level. Groups are consecutive inputs.

    Args:
        shrink_NG: the share of its range that each group's levels cover; None: the whole range.
        first_zero, dtype: same as in `choose_scales`.
    """
    W = W_NK.view(W_NK.shape[0], -1, group_size)
    scale, zero = choose_scales(W if shrink_NG is None else W * shrink_NG[..., None], sym, first_zero, dtype)
    codes = encode(W, scale, zero).to(torch.uint8).view_as(W_NK)
    group_K = torch.arange(W_NK.shape[1], device=W.device, dtype=torch.int32) // group_size
    return Grouped(codes, scale[..., 0], zero[..., 0].to(torch.uint8), group_K)


def pick_group_size(widths: Iterable[int], largest: int) -> int:
    """Return the group size that divides most numbers of inputs, up to `largest`; in a tie, the larger size."""
    sizes, widths = [size for size in GROUP_SIZES if size <= largest], list(widths)
    return max(sizes, key=lambda size: (sum(K % size == 0 for K in widths), size))


def pack_int32(codes: Tensor) -> Tensor:
    """Pack uint8 codes (..., 8) into int32 (...), the first in the lowest four bits."""
    pairs = codes[..., 0::2] | codes[..., 1::2] << 4
    return pairs.contiguous().view(torch.int32)[..., 0]
