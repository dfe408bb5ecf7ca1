"""What memory there is, and what was really used."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
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
    return min([psutil.virtual_memory().available, *group_limits()])


def group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that each control group (Linux, v2) of this process leaves it: cached files, which it would drop, as free.

    Args:
        root: of the groups' folders.
        own: which tells the group's path, as a line 0::/a/b.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    for folder in (root / path, *(root / path).parents):
        if not folder.is_relative_to(root):
            return
        limit, used, kinds = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
            counts = dict(line.split() for line in kinds.read_text().splitlines()) if kinds.is_file() else {}
            yield int(text) - int(used.read_text()) + int(counts.get("inactive_file", 0))


def begin_peak(device: torch.device) -> int:
    """Have `peak_memory_bytes` count from here, where the system can; the bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held so far, or since `begin_peak`: by a GPU's allocator, graphs included; by a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_bytes(num_bytes: float) -> str:
    """1,536 MiB style; GiB from ten of them on."""
    mib = num_bytes / 2**20
    return f"{mib / 1024:,.2f} GiB" if mib >= 10240 else f"{mib:,.1f} MiB" if mib < 100 else f"{mib:,.0f} MiB"
