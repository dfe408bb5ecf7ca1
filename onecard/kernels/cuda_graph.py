"""Recording and replaying CUDA graphs, for training and for decoding.

A recording needs a stream of its own, and the certainty that nothing waits for the device: one that such a wait breaks
off leaves torch's allocator and generators as if it went on. So a first run with `forbid_device_sync` comes before it.
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
    """A recorded graph.

    Attributes:
        result: what the recorded call has returned; every replay fills its tensors again.
        buffers: the scratch of dequantized weights, whose addresses the graph holds.
    """

    graph: torch.cuda.CUDAGraph
    result: Any
    buffers: list[Tensor]

    def replay(self) -> None:
        self.graph.replay()


def record_graph(compute: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None) -> Recording:
    """Record what `compute` launches, without running it.

    Args:
        pool: memory that several graphs share, of which one runs at a time; None: memory of its own.

    Raises:
        RuntimeError: it does what a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        result = compute()
    return Recording(graph, result, scratch_buffers())


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
