"""Offloaded inputs of recomputed layers: out in the forward, back in the backward's order.

A decoder layer keeps its activations, or recomputes them in the backward from its input (torch's checkpoint). Here that
input is offloaded until then: d values per token and layer are off the device, and two layers' inputs are on it. A
layer's activations are about twenty times as large, and recomputing them takes less time than moving them.
transformers calls `Offload.checkpoint` in place of torch's.

On a GPU an input moves to pinned host memory on a separate stream, on a CPU to an unnamed file. It comes back
bit-identical. Its host memory or file is freed with its autograd graph.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from onecard.paging.files import Segment, Spill, read_into
from onecard.paging.pager import Statistics

ACTIVATIONS_AHEAD = (
    2  # inputs in transfer out at a time; in the backward, inputs on the device: one in use, one on its way
)


@dataclass(eq=False)
class OffloadedActivation:
    """A layer's input that is offloaded, or in transfer.

    Attributes:
        left: on a CPU, the future of its place in a file; on a GPU, its host tensor and the event of the copy's end.
        earlier: the input that was offloaded before it, which the backward needs after it.
        coming: on its way back: the future of the tensor, or on a GPU the tensor and the event of the copy's end.
    """

    shape: torch.Size
    dtype: torch.dtype
    left: Future[tuple[Spill, Segment]] | tuple[Tensor, torch.cuda.Event]
    earlier: weakref.ref[OffloadedActivation] | None
    coming: Future[Tensor] | tuple[Tensor, torch.cuda.Event] | None = None


class Offload:
    """Offloads inputs and brings each back before its use. Not thread-safe."""

    def __init__(self, device: torch.device, folder: Path):
        """Args: folder: for the unnamed files, on a CPU."""
        self.device, self.folder = device, folder
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.worker = ThreadPoolExecutor(1, "offload")
        self.leaving: deque[tuple[OffloadedActivation, Tensor]] = deque()  # with their tensors, until the copy ends
        self.begun: deque[Any] = deque()  # on a GPU: an event at the first use of each input that came back
        self.last: weakref.ref[OffloadedActivation] | None = None
        self.statistics = Statistics()

    def checkpoint(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Same as torch.utils.checkpoint.checkpoint, with the layer's input (the first one to require grad) offloaded.

        Args:
            kwargs: context_fn as in torch's, and the function's own.
        """
        entered = next((arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad), None)
        if entered is None or not torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        place, shape = entered.data_ptr(), entered.shape  # autograd keeps `pack`, which must not hold the tensor

        def pack(tensor: Tensor) -> Tensor | OffloadedActivation:
            return self.send(tensor) if tensor.data_ptr() == place and tensor.shape == shape else tensor

        def unpack(packed: Tensor | OffloadedActivation) -> Tensor:
            return packed if isinstance(packed, Tensor) else self.bring(packed)

        # checkpoint's inner hooks handle the layer's own tensors. These hooks get only what checkpoint itself saves.
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def send(self, tensor: Tensor) -> OffloadedActivation:
        """Start to offload a tensor. If `ACTIVATIONS_AHEAD` are in transfer, wait for the oldest first."""
        tensor = tensor.detach()
        while len(self.leaving) >= ACTIVATIONS_AHEAD:
            self.wait_for(self.leaving.popleft()[0])
        if self.stream is None:
            left: Any = self.worker.submit(self.write, tensor)
        else:
            left = self.copy_out(tensor, self.stream)
        offloaded = OffloadedActivation(tensor.shape, tensor.dtype, left, self.last)
        self.leaving.append((offloaded, tensor))
        self.last = weakref.ref(offloaded)
        self.statistics.bytes_out += tensor.nbytes
        return offloaded

    def wait_for(self, offloaded: OffloadedActivation) -> None:
        """Wait until an input is offloaded. Raises the error of its transfer."""
        start = time.perf_counter()
        if isinstance(offloaded.left, Future):
            offloaded.left.result()
        else:
            offloaded.left[1].synchronize()
        self.statistics.stall_seconds += time.perf_counter() - start

    def write(self, tensor: Tensor) -> tuple[Spill, Segment]:
        spill = Spill(self.folder)  # a file each: it is freed with the graph
        return spill, spill.write(tensor)

    def copy_out(self, tensor: Tensor, stream: torch.cuda.Stream) -> tuple[Tensor, Any]:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        return host, stream.record_event()

    def bring(self, offloaded: OffloadedActivation) -> Tensor:
        """Wait for a tensor and return it. Start to bring back the one that was offloaded before it."""
        start = time.perf_counter()
        self.statistics.touches += 1
        self.statistics.hits += offloaded.coming is not None
        while self.leaving:  # the forward is over
            self.wait_for(self.leaving.popleft()[0])
        self.last = None
        tensor = self.taken(offloaded)
        if self.stream is not None:  # the host runs ahead, and would bring back inputs long before their use
            self.begun.append(torch.cuda.current_stream(self.device).record_event())
            if len(self.begun) > ACTIVATIONS_AHEAD:
                self.begun.popleft().synchronize()
        earlier = offloaded.earlier and offloaded.earlier()
        if earlier is not None:
            self.start(earlier)
        self.statistics.bytes_in += tensor.nbytes
        self.statistics.stall_seconds += time.perf_counter() - start
        return tensor

    def start(self, offloaded: OffloadedActivation) -> None:
        """Start to bring a tensor back, unless it is on its way."""
        if offloaded.coming is None:
            on_cpu = self.stream is None
            offloaded.coming = self.worker.submit(self.read, offloaded) if on_cpu else self.copy_in(offloaded)

    def taken(self, offloaded: OffloadedActivation) -> Tensor:
        """Return a tensor that came back. A second backward brings it back again."""
        self.start(offloaded)
        coming, offloaded.coming = offloaded.coming, None
        if isinstance(coming, Future):
            return coming.result()
        assert coming is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(coming[1])
        coming[0].record_stream(current)
        return coming[0]

    def read(self, offloaded: OffloadedActivation) -> Tensor:
        assert isinstance(offloaded.left, Future)
        _, segment = offloaded.left.result()  # done: the one worker has finished the write
        tensor = torch.empty(offloaded.shape, dtype=offloaded.dtype)
        read_into(segment, tensor.view(-1).view(torch.uint8))
        return tensor

    def copy_in(self, offloaded: OffloadedActivation) -> tuple[Tensor, Any]:
        stream = self.stream
        assert stream is not None and not isinstance(offloaded.left, Future)
        with torch.cuda.stream(stream):  # after the copy out, which is earlier on this stream
            tensor = offloaded.left[0].to(self.device, non_blocking=True)
        return tensor, stream.record_event()
