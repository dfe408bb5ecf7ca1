"""Lets threads share cores while other processes are busy (csrc/contention.cpp, docs/busy.md)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onecard.kernels.cpu.library import library


@contextmanager
def sharing_cores() -> Iterator[None]:
    """Allow threads to gather on fewer cores while other processes are busy. The body must start no process."""
    kernels = library()
    if kernels is None:
        yield
        return
    kernels.onecard_allow_gathering(1)
    try:
        yield
    finally:
        kernels.onecard_allow_gathering(-1)
