"""The scales of each storage, in the one form that kernels read.

    none nested     absmax[i]                                                     float32, also of uint4 (hf/int4.py)
    nested          map[absmax[i]] * nested_absmax[i // 256] + offset             map: the dynamic map (nested.py)
    mxfp4           map[absmax[i]], map: 2^(e-127)                                absmax: exponents (mxfp4.py)
    nvfp4           map[absmax[i]], map: 256 values of the weight's own           absmax: E4M3's bytes (nvfp4.py)
    uint4_zeros     absmax[2 i], and absmax[2 i + 1] is added to each product     float32

Kernels know the first two. For them, the next two are nested scales with another map, 1 for nested_absmax and no
offset. That changes no value, and no scale exists in float32. The last one is integers with zeros, (q - z) s =
(q - 8) s + (8 - z) s: with s in 16 bits, both terms and their sum are exact in float32. Kernels that
dequantize a block add the shift; the products of few rows do not read such codes.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from onecard.config import NESTED_BLOCKSIZE
from onecard.quant.codebook import dynamic_map
from onecard.quant.mxfp4 import exponent_map
from onecard.quant.nested import dequantize_absmax
from onecard.quant.state import PackedWeight, QuantState

SHIFTED = ("uint4_zeros",)  # the quant_types whose absmax has a scale and a shift of each block


def per_block(quant_type: str) -> int:
    """Return the number of values that absmax has of each block."""
    return 2 if quant_type in SHIFTED else 1


class Storage(NamedTuple):
    """How the codes of a checkpoint's weight stay in memory as they are stored: of a QuantState."""

    quant_type: str
    blocksize: int

    def scale_bytes(self, numel: int) -> tuple[int, int]:
        """Return the bytes of absmax, and of the map of a weight of `numel`."""
        blocks = -(-numel // self.blocksize)
        return (blocks, 4 * 256) if self.quant_type == "nvfp4" else (4 * per_block(self.quant_type) * blocks, 0)


def own_map(weight: PackedWeight | QuantState) -> Tensor | None:
    """Return the scale of each byte of absmax, float32 (256,); None for scales that are not mapped, or nested."""
    if weight.quant_type == "mxfp4" and weight.absmax.dtype == torch.uint8:
        return exponent_map(weight.absmax.device)
    return weight.nested_absmax if weight.quant_type == "nvfp4" else None


def state_absmax(state: QuantState | PackedWeight) -> Tensor:
    """Return a weight's scales, float32 (num_blocks,); of SHIFTED, absmax as it is."""
    table = own_map(state)
    if table is not None:
        return table[state.absmax.long()]
    if state.nested_absmax is None or state.nested_offset is None:
        return state.absmax
    return dequantize_absmax(state.absmax, state.nested_absmax, state.nested_offset)


def scale_tensors(weight: PackedWeight) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Return a weight's scales for kernels: absmax, nested_absmax, the map of nested scales, nested_offset."""
    absmax, device, table = weight.absmax, weight.codes.device, own_map(weight)
    if table is not None:
        groups = -(-absmax.numel() // NESTED_BLOCKSIZE)
        return absmax, ones(groups, device), table, zero(device)
    return absmax, weight.nested_absmax, dynamic_map(device), weight.nested_offset


@cache
def ones(count: int, device: torch.device) -> Tensor:
    """Return float32 (count,) of ones. It is kept, because a captured CUDA graph may hold its address."""
    return torch.ones(count, dtype=torch.float32, device=device)


@cache
def zero(device: torch.device) -> Tensor:
    """Return float32 () of 0, which is kept (`ones`)."""
    return torch.zeros((), dtype=torch.float32, device=device)
