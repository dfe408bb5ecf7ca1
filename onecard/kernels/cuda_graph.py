"""What recording a CUDA graph needs around it: a stream of its own, and the certainty that nothing waits for the
device, since a recording that is broken off by that leaves torch's allocator and generators as if it went on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_side_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Work on another stream, after what the current one has to do and before what that is given next."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def forbid_device_sync(mode: str = "error") -> Iterator[None]:
    """Inside, what waits for the device raises RuntimeError; nothing does with mode "default"."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
