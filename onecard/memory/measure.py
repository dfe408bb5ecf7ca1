"""What memory there is, and what was really used."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import psutil
import torch

from onecard.kernels.cpu import blocks

M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def return_large_blocks() -> None:
    """Have malloc give every freed block of 1 MiB or more back to the system at once, where malloc is glibc's.

    By itself it keeps blocks of up to 32 MiB in its heap, where a tensor that stays splits the hole that others left: a
    step grows by 5 %, one that recomputes by such a hole a layer, on an 8B shape 1 GB in all. What is made over and
    over does not come from malloc (kernels/cpu/blocks.py), so the new pages cost little.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, blocks.SMALLEST)


def available_bytes(device: torch.device) -> int:
    """Memory that a run may still take: free on the GPU, or available to this process under its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_bytes(num_bytes: float) -> str:
    """1,536 MiB style; GiB from ten of them on."""
    mib = num_bytes / 2**20
    return f"{mib / 1024:,.2f} GiB" if mib >= 10240 else f"{mib:,.1f} MiB" if mib < 100 else f"{mib:,.0f} MiB"
