"""Capture and replay of CUDA graphs, for training and for decoding.

A capture needs its own stream, and captured code must not wait for the device. Such a wait aborts the capture, and
torch's allocator and generators stay in capture mode. Therefore, first run the code once in `forbid_device_sync`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onecard.kernels.dequantize import scratch_buffers


@dataclass
class Recording:
    """A captured graph.

    Attributes:
        result: what the captured call returned. Each replay fills its tensors again.
        buffers: the scratch buffers of dequantized weights. The graph uses their addresses.
    """

    graph: torch.cuda.CUDAGraph
    result: Any
    buffers: list[Tensor]

    def replay(self) -> None:
        self.graph.replay()


def record_graph(compute: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> Recording:
    """Capture the launches of `compute` without running them.

    Args:
        pool: memory pool of several graphs that run one at a time. None: a pool of its own.

    Raises:
        RuntimeError: `compute` does something that a graph cannot capture.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = compute()
    return Recording(graph, result, scratch_buffers())


@contextmanager
def on_side_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the body on another stream, after earlier work of the current stream and before later work of it."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def forbid_device_sync(mode: str = "error") -> Iterator[None]:
    """Raise RuntimeError if the body waits for the device. Mode "default" allows the wait."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
