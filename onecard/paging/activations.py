"""Inputs of recomputed layers that wait outside the device: out in the forward, back in the backward's order.

A decoder layer keeps its activations, or makes them again in the backward from its input (torch's checkpoint), or makes
them again from an input that has left the device meanwhile: then d values a token and layer are outside, and two
layers' inputs here. What the layer between would keep is some twenty times as much; making it again costs less time
than moving it. transformers calls `Offload.checkpoint` where it would call torch's.

On a GPU an input goes to pinned host memory on a stream of its own, on a CPU to a file without a name. It comes back
with the bits that it left with; when the graph that it belongs to is gone, so are its host memory or its file.
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
    2  # inputs on their way out at a time; and on the device for the backward, one in use and one coming
)


@dataclass(eq=False)
class OffloadedActivation:
    """A layer's input that is outside, or on its way.

    Attributes:
        left: done when it is outside: the place, or on a GPU the event to wait for.
        earlier: the input that left before it, which the backward wants after it.
        coming: on its way back: the tensor, and on a GPU the event after which it is there.
    """

    shape: torch.Size
    dtype: torch.dtype
    left: Future[tuple[Spill, Segment]] | tuple[Tensor, torch.cuda.Event]
    earlier: weakref.ref[OffloadedActivation] | None
    coming: Future[Tensor] | tuple[Tensor, torch.cuda.Event] | None = None


class Offload:
    """Sends inputs away and brings them back, two ahead. Not for use from several threads at once."""

    def __init__(self, device: torch.device, folder: Path):
        """Args: folder: where, on a CPU, files without a name go."""
        self.device, self.folder = device, folder
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.worker = ThreadPoolExecutor(1, "offload")
        self.leaving: deque[tuple[OffloadedActivation, Tensor]] = deque()  # with the tensors, until they have left
        self.begun: deque[Any] = deque()  # on a GPU: where it begins with each of those that came back
        self.last: weakref.ref[OffloadedActivation] | None = None
        self.statistics = Statistics()

    def checkpoint(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """torch.utils.checkpoint.checkpoint with the first tensor that learns, the layer's input, sent away.

        Args:
            kwargs: context_fn as there, and the function's own.
        """
        entered = next((arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad), None)
        if entered is None or not torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        place, shape = entered.data_ptr(), entered.shape  # autograd keeps `pack` as long as the graph: not the tensor

        def pack(tensor: Tensor) -> Tensor | OffloadedActivation:
            return self.send(tensor) if tensor.data_ptr() == place and tensor.shape == shape else tensor

        def unpack(packed: Tensor | OffloadedActivation) -> Tensor:
            return packed if isinstance(packed, Tensor) else self.bring(packed)

        # The layer's own tensors go by checkpoint's inner hooks; only what checkpoint itself saves comes to these.
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return checkpoint(function, *args, use_reentrant=False, **kwargs)

    def send(self, tensor: Tensor) -> OffloadedActivation:
        """Start a tensor on its way out; waits for an earlier one where `ACTIVATIONS_AHEAD` are on theirs."""
        tensor = tensor.detach()
        while len(self.leaving) >= ACTIVATIONS_AHEAD:
            self.wait_for(self.leaving.popleft()[0])
        if self.stream is None:
            left: Any = self.worker.submit(self.write, tensor)
        else:
            left = self.copy_out(tensor, self.stream)
        away = OffloadedActivation(tensor.shape, tensor.dtype, left, self.last)
        self.leaving.append((away, tensor))
        self.last = weakref.ref(away)
        self.statistics.bytes_out += tensor.nbytes
        return away

    def wait_for(self, away: OffloadedActivation) -> None:
        """Until it has left. Raises what kept it from leaving."""
        start = time.perf_counter()
        if isinstance(away.left, Future):
            away.left.result()
        else:
            away.left[1].synchronize()
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

    def bring(self, away: OffloadedActivation) -> Tensor:
        """The tensor, waiting for it; the one that left before it starts on its way back."""
        start = time.perf_counter()
        self.statistics.touches += 1
        self.statistics.hits += away.coming is not None
        while self.leaving:  # the forward is over
            self.wait_for(self.leaving.popleft()[0])
        self.last = None
        tensor = self.taken(away)
        if self.stream is not None:  # the host runs ahead, and would have more of them come than are used up
            self.begun.append(torch.cuda.current_stream(self.device).record_event())
            if len(self.begun) > ACTIVATIONS_AHEAD:
                self.begun.popleft().synchronize()
        earlier = away.earlier and away.earlier()
        if earlier is not None:
            self.start(earlier)
        self.statistics.bytes_in += tensor.nbytes
        self.statistics.stall_seconds += time.perf_counter() - start
        return tensor

    def start(self, away: OffloadedActivation) -> None:
        """Have a tensor come back, if it is not on its way."""
        if away.coming is None:
            away.coming = (
                self.worker.submit(self.read, away) if self.stream is None else self.copy_in(away, self.stream)
            )

    def taken(self, away: OffloadedActivation) -> Tensor:
        """A tensor that has come back; a second backward has it come again."""
        self.start(away)
        coming, away.coming = away.coming, None
        if isinstance(coming, Future):
            return coming.result()
        assert coming is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(coming[1])
        coming[0].record_stream(current)
        return coming[0]

    def read(self, away: OffloadedActivation) -> Tensor:
        assert isinstance(away.left, Future)
        _, segment = away.left.result()  # done: the worker takes one thing after another
        tensor = torch.empty(away.shape, dtype=away.dtype)
        read_into(segment, tensor.view(-1).view(torch.uint8))
        return tensor

    def copy_in(self, away: OffloadedActivation, stream: torch.cuda.Stream) -> tuple[Tensor, Any]:
        assert not isinstance(away.left, Future)
        with torch.cuda.stream(stream):  # after the copy out, which went before it on this stream
            tensor = away.left[0].to(self.device, non_blocking=True)
        return tensor, stream.record_event()
