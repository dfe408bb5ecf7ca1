"""Moves tensors off a device and back. Pages of the base, layer inputs and optimizer states use it.

A tensor off the device is `Stored` in one of two tiers. `HostTier` is pinned host memory, for a GPU. `FileTier` is an
unnamed file, for a CPU. Both return the same bits.

A `Transfer` overlaps with computation. On a GPU it runs on a separate stream, on a CPU on a thread. Pages are read from
files on both: there, a thread reads the file, and on a GPU it copies the bytes on that stream.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from onecard.paging.files import Segment, Spill, read_into

T = TypeVar("T")


@dataclass
class Statistics:
    """Counts of transfers since the last reset.

    Attributes:
        bytes_in, bytes_out: moved to the device, and off it.
        touches, hits: uses that may need a transfer, and those that found their tensor on the device or in transfer.
        stall_seconds: the time that uses waited.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    touches: int = 0
    hits: int = 0
    stall_seconds: float = 0.0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class Stored:
    """A tensor off the device: its tier, its place there, its dtype and its shape."""

    tier: Tier
    place: Any
    dtype: torch.dtype
    shape: torch.Size

    def read(self) -> Tensor:
        """Return the tensor in host memory. The caller must not change it."""
        return self.tier.read(self)

    def view(self) -> Tensor:
        """Same as `read`, but a file is mapped instead of read."""
        return self.tier.view(self)


class Tier(Protocol):
    """Memory off the device. `Stored` states what its methods return."""

    def store(self, tensor: Tensor, before: Stored | None = None, non_blocking: bool = False) -> Stored:
        """Copy a tensor here. If `before` is given, its place is used again. Its dtype and shape must be the same."""
        ...

    def read(self, stored: Stored) -> Tensor: ...

    def view(self, stored: Stored) -> Tensor: ...


class HostTier:
    """Pinned host memory. A tensor's memory is freed with its `Stored`."""

    def store(self, tensor: Tensor, before: Stored | None = None, non_blocking: bool = False) -> Stored:
        place = before.place if before else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        place.copy_(tensor, non_blocking=non_blocking)
        return before or Stored(self, place, tensor.dtype, tensor.shape)

    def read(self, stored: Stored) -> Tensor:
        return stored.place

    view = read


class FileTier:
    """An unnamed file. The first tensor creates it, and the last reference to the tier or a `Stored` deletes it.

    Raises UserError if the disk is full or the file cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.spill: Spill | None = None

    def store(self, tensor: Tensor, before: Stored | None = None, non_blocking: bool = False) -> Stored:
        self.spill = self.spill or Spill(self.folder)
        if before is None:
            return Stored(self, self.spill.write(tensor), tensor.dtype, tensor.shape)
        self.spill.overwrite(before.place, tensor)
        return before

    def read(self, stored: Stored) -> Tensor:
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        read_into(stored.place, tensor.view(-1).view(torch.uint8))
        return tensor

    def view(self, stored: Stored) -> Tensor:
        segment: Segment = stored.place
        assert self.spill is not None
        view = np.memmap(self.spill.file, np.uint8, "c", segment.begin, (segment.num_bytes,))
        return torch.from_numpy(view).view(stored.dtype).view(stored.shape)


def new_tier(device: torch.device, folder: Path) -> Tier:
    """Return a tier for what a device offloads. Args: folder: for the unnamed file, on a CPU."""
    return HostTier() if device.type == "cuda" else FileTier(folder)


@dataclass(eq=False)
class Transfer(Generic[T]):
    """A transfer that has begun: the future of its result, and on a GPU of the event at the copy's end."""

    future: Future[tuple[T, Any]]

    def wait(self) -> T:
        """Wait on the host until the transfer ends. Return its result. Raises the error of the transfer."""
        result, event = self.future.result()
        if event is not None:
            event.synchronize()
        return result


class Mover:
    """Starts transfers between a device and the tiers. They end in the order of their start if `num_threads` is 1."""

    def __init__(self, device: torch.device, num_threads: int = 1):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.threads = ThreadPoolExecutor(num_threads, "mover")

    def send(self, tensor: Tensor, tier: Tier) -> Transfer[Stored]:
        """Start to store a tensor. The caller must keep the tensor until the transfer ends."""
        if self.stream is None:
            return Transfer(self.threads.submit(lambda: (tier.store(tensor), None)))
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            stored = tier.store(tensor, non_blocking=True)
        return self.on_stream(stored, self.stream)

    def bring(self, sent: Transfer[Stored]) -> Transfer[Tensor]:
        """Start to bring back a tensor from host memory, or on a CPU from its file."""
        stream = self.stream
        if stream is None:  # the one thread has finished the transfer to the file before it runs this
            return Transfer(self.threads.submit(lambda: (sent.future.result()[0].read(), None)))
        with torch.cuda.stream(stream):  # after the transfer to the host, which is earlier on this stream
            tensor = sent.future.result()[0].read().to(self.device, non_blocking=True)
        return self.on_stream(tensor, stream)

    def on_stream(self, result: T, stream: torch.cuda.Stream) -> Transfer[T]:
        """Return the transfer that was started last on the stream."""
        future: Future[tuple[T, Any]] = Future()
        future.set_result((result, stream.record_event()))
        return Transfer(future)

    def fetch(self, read: Callable[[], Tensor]) -> Transfer[Tensor]:
        """Start to call `read` on a thread, and to copy the host tensor that it returns to the device."""
        released = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        return Transfer(self.threads.submit(self.load, read, released))

    def load(self, read: Callable[[], Tensor], released: Any) -> tuple[Tensor, Any]:
        """Return a tensor on the device, and on a GPU the event of the copy's end.

        Args:
            released: on a GPU, the event after which no kernel uses the memory that the caller has freed.
        """
        host = read()
        if self.stream is None:
            return host, None
        released.synchronize()  # else the freed memory and this tensor would be allocated together
        with torch.cuda.stream(self.stream):
            tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
            tensor.copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
            event.synchronize()  # `host` may be a buffer that the next call of `read` fills
        return tensor, event

    def take(self, transfer: Transfer[Tensor]) -> Tensor:
        """Return a tensor that comes back. The kernels that the caller starts next wait for it, on a CPU the caller."""
        tensor, event = transfer.future.result()
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            tensor.record_stream(stream)
        return tensor
