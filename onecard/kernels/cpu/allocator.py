"""Memory for large results, used again: what torch's caching allocator is on a GPU.

A step makes results of the same few sizes over and over. malloc either gives them back to the system, whose new pages
cost a tenth to a quarter of a step (LOG.md), or keeps them in a heap that fills with holes between what stays.
Here a result's block waits, when its tensor is gone, for the next result of its size.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes: what is smaller is malloc's

_free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by size


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """As torch.empty on the CPU."""
    count = prod(shape)
    num_bytes = count * dtype.itemsize
    if num_bytes < SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    step = 1 << (num_bytes.bit_length() - 3)
    size = -(-num_bytes // step) * step  # four sizes an octave; pages that nothing touches take no memory
    try:
        block = _free[size].pop()
    except IndexError:
        block = torch.empty(size, dtype=torch.uint8, device="cpu")
    lease = lease_type(size).from_address(block.data_ptr())
    lease.block = block
    return torch.frombuffer(lease, dtype=dtype, count=count).resize_(shape)  # a view could not be changed in place


def empty_like(x: Tensor) -> Tensor:
    """As `empty` of x's shape and dtype."""
    return empty(x.shape, x.dtype)


def release() -> None:
    """Give the blocks that wait back to malloc."""
    _free.clear()


@cache
def lease_type(size: int) -> Any:
    """A buffer that a tensor holds on to; when the last one does no more, its block is free."""

    def end(self: Any, free: dict = _free) -> None:  # bound here: when Python ends, the module's names go first
        free[size].append(self.block)

    return type("Lease", (ctypes.c_char * size,), {"__del__": end})
