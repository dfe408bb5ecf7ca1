"""What our own loops let the threads do beside other busy processes (csrc/contention.cpp, docs/busy.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onecard.kernels.cpu.library import library


@contextmanager
def sharing_cores() -> Iterator[None]:
    """Around work that starts no other process: beside a busy one, threads may gather on fewer cores."""
    kernels = library()
    if kernels is None:
        yield
        return
    kernels.onecard_allow_gathering(1)
    try:
        yield
    finally:
        kernels.onecard_allow_gathering(-1)
