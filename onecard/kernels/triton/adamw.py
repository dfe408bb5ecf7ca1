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


@triton.jit
def decode(codes, absmax, at, inside, block, block_inside, levels):
    code = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
    return tl.load(levels + code) * tl.load(absmax + block, mask=block_inside, other=0.0)[:, None]


@triton.jit
def encode(x, codes, absmax, at, inside, block, block_inside, bounds):
    """Store the nearest levels' codes, ties to the lower: a binary search counts how many of 255 bounds are below."""
    most = tl.max(tl.where(inside, tl.abs(x), 0.0), axis=1)
    divisor = tl.maximum(most, tl.full(most.shape, 1.1754943508222875e-38, tl.float32))
    scaled = tl.math.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    found = tl.zeros(x.shape, tl.int32)
    for halving in tl.static_range(8):
        step = 128 >> halving
        found += tl.where(scaled > tl.load(bounds + found + (step - 1)), step, 0)
    tl.store(codes + at, found.to(tl.uint8), mask=inside)
    tl.store(absmax + block, most, mask=block_inside)


@triton.jit
def adamw_8bit_kernel(
    addresses, sizes, owners, starts, m_map, m_bounds, v_map, v_bounds,
    decay, rate, root, beta1, rest1, beta2, rest2, eps, BLOCKSIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    owner = tl.load(owners + tl.program_id(0)).to(tl.int64)
    size = tl.load(sizes + owner)
    w = tl.load(addresses + owner * 6).to(tl.pointer_type(tl.float32))
    grad = tl.load(addresses + owner * 6 + 1).to(tl.pointer_type(tl.float32))
    m_codes = tl.load(addresses + owner * 6 + 2).to(tl.pointer_type(tl.uint8))
    m_absmax = tl.load(addresses + owner * 6 + 3).to(tl.pointer_type(tl.float32))
    v_codes = tl.load(addresses + owner * 6 + 4).to(tl.pointer_type(tl.uint8))
    v_absmax = tl.load(addresses + owner * 6 + 5).to(tl.pointer_type(tl.float32))
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
    encode(m, m_codes, m_absmax, at, inside, block, block_inside, m_bounds)
    encode(v, v_codes, v_absmax, at, inside, block, block_inside, v_bounds)


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
    sizes, owners, starts = tables(tuple(part[0].numel() for part in parts), device)
    maps = [table for signed in (True, False) for table in (dynamic_map(device, signed), midpoints(device, signed))]
    launch(
        adamw_8bit_kernel, len(owners), addresses.to(device, non_blocking=True), sizes, owners, starts, *maps, *rates,
        BLOCKSIZE=STATE_BLOCKSIZE, BLOCKS=BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip
