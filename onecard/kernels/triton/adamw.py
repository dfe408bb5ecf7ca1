"""AdamW with 8-bit states for many parameters in one launch.

A row of the table holds one parameter's addresses: w, gradient, and the codes and absmax of m and of v. A program
updates BLOCKS blocks of one parameter. Two more tables, which depend only on sizes, hold its parameter and first block.
The float32 operations and their order are reference.py's, without fusion (enable_fp_fusion=False): bits are the same.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from onecard.kernels.reference import Rates
from onecard.kernels.triton import launch
from onecard.quant.codebook import dynamic_map
from onecard.quant.dynamic import STATE_BLOCKSIZE, midpoints

BLOCKS = 4
LOWEST = (127 - 28) << 7  # the upper 16 bits of 2^-28
CELLS = (127 << 7) - LOWEST + 1  # up to 1.0


@triton.jit
def decode(codes, absmax, at, inside, block, block_inside, levels):
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    return tl.load(levels + code) * tl.load(absmax + block, mask=block_inside, other=0.0)[:, None]


@triton.jit
def encode(x, codes, absmax, at, inside, block, block_inside, below, bounds, LOWEST: tl.constexpr, CELLS: tl.constexpr):
    """Store the nearest levels' codes, ties to the lower: how many of 255 bounds are below. `below` tells how many are
    below a cell of floats, in which there is one bound at most."""
    most = tl.max(tl.where(inside, tl.abs(x), 0.0), axis=1)
    divisor = tl.maximum(most, tl.full(most.shape, 1.1754943508222875e-38, tl.float32))
    scaled = tl.math.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    bits = scaled.to(tl.int32, bitcast=True)
    cell = tl.minimum(tl.maximum(((bits & 0x7FFFFFFF) >> 16) - LOWEST, 0), CELLS - 1)
    found = tl.load(below + tl.where(bits < 0, cell + CELLS, cell)).to(tl.int32)
    found += (scaled > tl.load(bounds + found)).to(tl.int32)
    tl.store(codes + at, found.to(tl.uint8), mask=inside)
    tl.store(absmax + block, most, mask=block_inside)


@triton.jit
def adamw_8bit_kernel(
    addresses, sizes, owners, starts, m_map, m_below, m_bounds, v_map, v_below, v_bounds,
    decay, rate, root, beta1, rest1, beta2, rest2, eps,
    BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr, LOWEST: tl.constexpr, CELLS: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Update BLOCKS blocks of one parameter. ALIGNED: 16 divides all addresses and sizes, so that loads are wide."""
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    size = tl.load(sizes + owner)
    w = tl.load(addresses + owner * 6).to(tl.pointer_type(tl.float32))
    grad = tl.load(addresses + owner * 6 + 1).to(tl.pointer_type(tl.float32))
    m_codes = tl.load(addresses + owner * 6 + 2).to(tl.pointer_type(tl.uint8))
    m_absmax = tl.load(addresses + owner * 6 + 3).to(tl.pointer_type(tl.float32))
    v_codes = tl.load(addresses + owner * 6 + 4).to(tl.pointer_type(tl.uint8))
    v_absmax = tl.load(addresses + owner * 6 + 5).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        size, w, grad = tl.multiple_of(size, 16), tl.multiple_of(w, 16), tl.multiple_of(grad, 16)
        m_codes, m_absmax = tl.multiple_of(m_codes, 16), tl.multiple_of(m_absmax, 16)
        v_codes, v_absmax = tl.multiple_of(v_codes, 16), tl.multiple_of(v_absmax, 16)
    block = tl.load(starts + tl.program_id(0)) + tl.arange(0, BLOCKS).to(tl.int64)
    at = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside, block_inside = at < size, block * BLOCKSIZE < size
    g = tl.load(grad + at, mask=inside, other=0.0)
    m = decode(m_codes, m_absmax, at, inside, block, block_inside, m_map)
    v = decode(v_codes, v_absmax, at, inside, block, block_inside, v_map)
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    update = tl.math.div_rn(m, tl.math.sqrt_rn(v) * root + eps) * rate
    tl.store(w + at, tl.load(w + at, mask=inside, other=0.0) * decay - update, mask=inside)
    encode(m, m_codes, m_absmax, at, inside, block, block_inside, m_below, m_bounds, LOWEST, CELLS)
    encode(v, v_codes, v_absmax, at, inside, block, block_inside, v_below, v_bounds, LOWEST, CELLS)


@cache
def search_tables(device: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the number of bounds below each cell, uint8 (2 CELLS,), and the bounds, float32 (256,), the last one Inf.

    A cell has the floats with the same upper 16 bits, those up to 2^-28 in one. The second half has the negative ones.
    """
    bounds = midpoints("cpu", signed)
    edges = ((LOWEST + torch.arange(CELLS + 1, dtype=torch.int32)) << 16).view(torch.float32)
    edges[0] = 0
    positive, negative = torch.searchsorted(bounds, edges), torch.searchsorted(bounds, -edges, right=True)
    assert positive.diff().max() <= 1 and negative.diff().min() >= -1, "a cell must have one bound at most"
    below = torch.cat([positive[:-1], negative[1:]]).to(torch.uint8)
    return below.to(device), torch.cat([bounds, torch.tensor([torch.inf])]).to(device)


@cache
def tables(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sizes, int64 (parameters,), and each program's parameter, int32, and first block, int64.

    A run caches one result for each parameter size if parameters are updated one by one, else one.
    """
    programs = [-(-size // (BLOCKS * STATE_BLOCKSIZE)) for size in sizes]
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(programs))
    starts = torch.cat([BLOCKS * torch.arange(count) for count in programs])
    return torch.tensor(sizes).to(device), owners.to(device), starts.to(device)


def adamw_8bit_(parts: list[tuple[Tensor, ...]], rates: Rates) -> None:
    """Same as reference.adamw_8bit_, in one launch. Addresses are copied without waiting for the device."""
    device = parts[0][0].device
    parts = [(w, grad.contiguous(), *states) for w, grad, *states in parts]
    assert all(x.is_contiguous() for part in parts for x in part)
    rows = [[x.data_ptr() for x in part] for part in parts]
    addresses = torch.tensor(rows, device="cpu", pin_memory=device.type == "cuda")
    is_aligned = all(number % 16 == 0 for part, row in zip(parts, rows) for number in (part[0].numel(), *row))
    sizes, owners, starts = tables(tuple(part[0].numel() for part in parts), device)
    maps = [
        table for signed in (True, False) for table in (dynamic_map(device, signed), *search_tables(device, signed))
    ]
    launch(
        adamw_8bit_kernel, len(owners), addresses.to(device, non_blocking=True), sizes, owners, starts, *maps, *rates,
        BLOCKSIZE=STATE_BLOCKSIZE, BLOCKS=BLOCKS, LOWEST=LOWEST, CELLS=CELLS, ALIGNED=is_aligned,
        enable_fp_fusion=False,
    )  # fmt: skip
