"""Available memory, and the memory that was really used."""

from __future__ import annotations

import ctypes
import errno
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from onecard.kernels.cpu import allocator

STATM = Path("/proc/self/statm")  # pages: all that is mapped, ..., data and stack
V1 = ("limit_in_bytes", "usage_in_bytes", "total_inactive_file")  # a group's files, and a field of its memory.stat
V2 = ("max", "current", "inactive_file")
M_MMAP_THRESHOLD = -3  # of glibc's mallopt


def return_large_blocks() -> None:
    """Make glibc's malloc return every freed block of 1 MiB or more to the system at once.

    By default it keeps blocks of up to 32 MiB in its heap, and tensors that stay split the free space there. A step
    grows by 5 %. A step that recomputes grows by such a hole per layer, by 1 GB in all for an 8B shape. Recurring
    blocks do not come from malloc (kernels/cpu/allocator.py), so the new pages cost little.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, allocator.SMALLEST)


def return_free_memory() -> None:
    """Return to the system what is free in our allocator, in glibc's heaps and in torch's cache of a GPU."""
    allocator.release()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def apart() -> Iterator[None]:
    """Give work with blocks of other sizes, such as answers beside a training, the memory that is free: what each of
    the two keeps for its own next block is returned to the system before and after."""
    return_free_memory()
    try:
        yield
    finally:
        return_free_memory()


def available_bytes(device: torch.device) -> int:
    """Return the memory that a run may use: free on the GPU, or within this process's control groups and limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min([psutil.virtual_memory().available, *group_limits(), *process_limits()]))


def group_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield the bytes that each control group (Linux, v1 and v2) leaves this process. Cached files count as free, since
    they can be dropped.

    Args:
        root: parent of the groups' folders: version 1's are in its `memory`, version 2's in itself, or in its
            `unified` if both are mounted.
        own: file with the groups' paths, in lines 0::/a/b (v2) and 4:memory:/a/b (v1).
    """
    for line in own.read_text().splitlines() if own.is_file() else ["0::/"]:
        number, kinds, path = line.split(":", 2)
        if "memory" in kinds.split(","):
            yield from hierarchy_limits(root / "memory", path, V1)
        elif number == "0":
            yield from hierarchy_limits(root, path, V2)
            yield from hierarchy_limits(root / "unified", path, V2)


def hierarchy_limits(top: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """Yield the bytes that the group at `path` below `top` and its parents leave. In a container, the path may lie
    outside: then `top` is the process's own group."""
    limit, used, cached = names
    group = top / path.lstrip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(top):
            return
        files = [folder / f"memory.{name}" for name in (limit, used, "stat")]
        with suppress(OSError, ValueError):  # no limit here: the file is missing, or contains "max"
            most, now = (int(file.read_text()) for file in files[:2])
            lines = files[2].read_text().splitlines() if files[2].is_file() else []
            yield most - now + int(dict(line.split() for line in lines).get(cached, 0))


def process_limits() -> Iterator[int]:
    """Yield the bytes that RLIMIT_AS and RLIMIT_DATA (ulimit -v, -d) leave this process. They count mapped memory, not
    resident memory."""
    with suppress(OSError, ValueError, IndexError):
        mapped, _, _, _, _, data, _ = (int(word) * resource.getpagesize() for word in STATM.read_text().split())
        for limit, used in ((resource.RLIMIT_AS, mapped), (resource.RLIMIT_DATA, data)):
            most = resource.getrlimit(limit)[0]
            if most != resource.RLIM_INFINITY:
                yield most - used


def begin_peak(device: torch.device) -> int:
    """Restart the peak of `peak_memory_bytes`, where the system can. Return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_reserved(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far, or since `begin_peak`: of a GPU's allocator with graphs, or of a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError, StopIteration):  # Linux, whose ru_maxrss begins at the size of the parent process
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_bytes(num_bytes: float) -> str:
    """Format bytes like 1,536 MiB, from 10 GiB on in GiB."""
    mib = num_bytes / 2**20
    return f"{mib / 1024:,.2f} GiB" if mib >= 10240 else f"{mib:,.1f} MiB" if mib < 100 else f"{mib:,.0f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM  # an anonymous mapping
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    reasons = ("DefaultCPUAllocator", "failed to allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return any(reason in str(error) for reason in reasons)
