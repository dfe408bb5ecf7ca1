"""Memory for large results on the CPU. It is reused, as by torch's caching allocator on a GPU.

Each step allocates results of the same few sizes. malloc either returns their memory to the system, and new pages then
cost a tenth to a quarter of a step (LOG.md), or keeps it in a heap that fragments. Here, when a result's tensor is
freed, its block is kept for the next result of its size.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; smaller results come from malloc

_free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by size


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Same as torch.empty on the CPU."""
    count = prod(shape)
    num_bytes = count * dtype.itemsize
    if num_bytes < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    step = 1 << (num_bytes.bit_length() - 3)
    size = -(-num_bytes // step) * step  # four sizes per power of two; untouched pages take no memory
    try:
        block = _free[size].pop()
    except IndexError:
        block = torch.empty(size, dtype=torch.uint8, device="cpu")
    lease = lease_type(size).from_address(block.data_ptr())
    lease.block = block
    return torch.frombuffer(lease, dtype=dtype, count=count).resize_(shape)  # a view could not be changed in place


def empty_like(x: Tensor) -> Tensor:
    """Same as `empty` with x's shape and dtype."""
    return empty(x.shape, x.dtype)


def release() -> None:
    """Return the free blocks to malloc."""
    _free.clear()


@cache
def lease_type(size: int) -> Any:
    """Return a buffer type whose buffers tensors refer to. When the last such tensor is freed, the block is free."""

    def end(self: Any, free: dict = _free) -> None:  # bound here: Python deletes module names first at exit
        free[size].append(self.block)

    return type("Lease", (ctypes.c_char * size,), {"__del__": end})
