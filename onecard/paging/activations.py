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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from onecard.paging.mover import Mover, Statistics, Stored, Transfer, new_tier

ACTIVATIONS_AHEAD = (
    2  # inputs in transfer out at a time; in the backward, inputs on the device: one in use, one on its way
)


@dataclass(eq=False)
class OffloadedActivation:
    """A layer's input that is offloaded, or in transfer.

    Attributes:
        sent: its transfer off the device.
        earlier: the input that was offloaded before it, which the backward needs after it.
        coming: its transfer back, if that has begun.
    """

    sent: Transfer[Stored]
    earlier: weakref.ref[OffloadedActivation] | None
    coming: Transfer[Tensor] | None = None


class Offload:
    """Offloads inputs and brings each back before its use. Not thread-safe."""

    def __init__(self, device: torch.device, folder: Path):
        """Args: folder: for the unnamed files, on a CPU."""
        self.device, self.folder = device, folder
        self.mover = Mover(device)
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
        sent = self.mover.send(tensor, new_tier(self.device, self.folder))  # a tier each: it is freed with the graph
        offloaded = OffloadedActivation(sent, self.last)
        self.leaving.append((offloaded, tensor))
        self.last = weakref.ref(offloaded)
        self.statistics.bytes_out += tensor.nbytes
        return offloaded

    def wait_for(self, offloaded: OffloadedActivation) -> None:
        """Wait until an input is offloaded. Raises the error of its transfer."""
        start = time.perf_counter()
        offloaded.sent.wait()
        self.statistics.stall_seconds += time.perf_counter() - start

    def bring(self, offloaded: OffloadedActivation) -> Tensor:
        """Wait for a tensor and return it. Start to bring back the one that was offloaded before it."""
        start = time.perf_counter()
        self.statistics.touches += 1
        self.statistics.hits += offloaded.coming is not None
        while self.leaving:  # the forward is over
            self.wait_for(self.leaving.popleft()[0])
        self.last = None
        self.start(offloaded)  # a second backward brings it back again
        coming, offloaded.coming = offloaded.coming, None
        assert coming is not None
        tensor = self.mover.take(coming)
        if tensor.is_cuda:  # the host runs ahead, and would bring back inputs long before their use
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
            offloaded.coming = self.mover.bring(offloaded.sent)
