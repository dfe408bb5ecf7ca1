"""Pages within a byte budget: brought in before they are needed, let go where they are needed latest.

A pass over a model touches its pages in the same order every time. The pager notes the order of each pass and, in the
next, reads ahead by it on a thread of its own; room is made by letting go of the page whose next use is farthest
away, which no other rule beats (Belady, IBM Systems Journal 5, 1966). A page let go is only forgotten: pages are
never written, and a tensor that autograd still holds stays valid until it is dropped.

A page comes from a file, which the system keeps in host memory as far as that goes; on a GPU then by a pinned buffer,
on a stream of its own. No managed memory, no page faults that stall a kernel.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.kernels.cpu import allocator

PAGES_AHEAD = 3  # pages on their way at a time


@dataclass(eq=False)
class Page:
    """Bytes that come and go as one: `read` gives them as a uint8 tensor in host memory."""

    name: str
    num_bytes: int
    read: Callable[[], Tensor]
    tensor: Tensor | None = field(default=None, repr=False)


@dataclass
class Statistics:
    """What was paged since it was last asked.

    Attributes:
        bytes_in, bytes_out: brought to the device, and taken off it.
        touches, hits: uses of a page after another, and those that found it there or on its way.
        stall_seconds: the time that a use had to wait.
    """

    bytes_in: int = 0
    bytes_out: int = 0
    touches: int = 0
    hits: int = 0
    stall_seconds: float = 0.0

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class Pager:
    """Keeps pages on a device within `budget_bytes`.

    Not for use from several threads at once. Raises UserError if the two largest pages exceed the budget: one is in
    use while the other comes.
    """

    def __init__(self, device: torch.device, budget_bytes: int, pages: list[Page]):
        self.device, self.budget_bytes, self.pages = device, budget_bytes, pages
        needed = sum(sorted((page.num_bytes for page in pages), reverse=True)[:2])
        if needed > budget_bytes:
            raise UserError(
                "the weights' budget must hold the two largest pages",
                f"{budget_bytes:,} bytes; they take {needed:,}",
                "give it more",
                "weights_budget",
            )
        self.current: Page | None = None
        self.seen: list[Page] = []  # in this pass so far
        self.uses: dict[Page, list[int]] = {}  # positions in the order to expect
        self.at = -1  # of the current page in it
        self.coming: dict[Page, Future[tuple[Tensor, Any]]] = {}
        self.places: dict[int, Page] = {}  # by address
        self.statistics = Statistics()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reader = ThreadPoolExecutor(2 if self.stream else 1, "pager")  # one reads while the other one copies
        self.expect([*pages, *reversed(pages)])

    def expect(self, order: list[Page]) -> None:
        """The order of the next pass: that of the one before; of the first one, through the model and back."""
        self.order = order
        self.uses = {}
        for position, page in enumerate(order):
            self.uses.setdefault(page, []).append(position)

    def begin_pass(self) -> None:
        """A forward begins: what was touched since the last one is the order to expect."""
        if self.seen:
            self.expect(self.seen)
            self.seen = []
        self.at = -1
        if self.current is not None and self.order:
            self.follow(self.current)
        self.read_ahead()

    def touch(self, page: Page) -> Tensor:
        """The page's bytes, uint8, on the device; valid as long as the caller holds them."""
        if page is not self.current:
            self.seen.append(page)
            self.follow(page)
            self.statistics.touches += 1
            self.statistics.hits += page.tensor is not None or page in self.coming
            self.current = None  # the one before may make room, and this one may fail to come
            if page.tensor is None:
                self.bring(page)
            self.current = page
            self.read_ahead()
        assert page.tensor is not None
        return page.tensor

    def follow(self, page: Page) -> None:
        """Move to the page's next place in the expected order; a pass of another kind stays where it is."""
        places = self.uses.get(page)
        if places:
            next_place = bisect_right(places, self.at)
            self.at = places[next_place if next_place < len(places) else 0]

    def distance(self, page: Page) -> int:
        """Uses of other pages until this one's next."""
        places = self.uses.get(page)
        if not places:
            return len(self.order)
        next_place = bisect_right(places, self.at)
        if next_place < len(places):
            return places[next_place] - self.at
        return places[0] + len(self.order) - self.at

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that are there or on their way."""
        return sum(page.num_bytes for page in self.pages if page.tensor is not None or page in self.coming)

    def make_room(self, num_bytes: int, distance: int) -> bool:
        """Whether num_bytes fit without pages that are needed later than in `distance`; if so, let go of those."""
        excess = self.held_bytes + num_bytes - self.budget_bytes
        there = [page for page in self.pages if page.tensor is not None and page is not self.current]
        given = []
        for page in sorted(there, key=self.distance, reverse=True):
            if excess <= 0 or self.distance(page) <= distance:
                break
            given.append(page)
            excess -= page.num_bytes
        if excess <= 0:
            for page in given:
                self.forget(page)
            if any(page.num_bytes != num_bytes for page in given):
                allocator.release()  # of no use to the page that comes, they would wait beside it
        return excess <= 0

    def forget(self, page: Page) -> None:
        """Let go of a page that is there."""
        assert page.tensor is not None
        del self.places[page.tensor.data_ptr()]
        page.tensor = None

    def bring(self, page: Page) -> None:
        """Have the page there, waiting for it."""
        start = time.perf_counter()
        if page not in self.coming:
            self.coming = {other: future for other, future in self.coming.items() if not future.cancel()}
            for other in list(self.coming):
                self.arrive(other)
            fits = self.make_room(page.num_bytes, -1)
            assert fits, "the two largest pages fit, and only one is in use"
            self.send(page)
        self.arrive(page)
        self.statistics.stall_seconds += time.perf_counter() - start

    def send(self, page: Page) -> None:
        let_go = None if self.stream is None else torch.cuda.current_stream(self.device).record_event()
        self.coming[page] = self.reader.submit(self.load, page, let_go)

    def arrive(self, page: Page) -> None:
        """Take a page that is on its way."""
        tensor, event = self.coming.pop(page).result()
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            tensor.record_stream(stream)
        page.tensor = tensor
        self.places[tensor.data_ptr()] = page
        self.statistics.bytes_in += page.num_bytes

    def load(self, page: Page, let_go: Any) -> tuple[Tensor, Any]:
        """On the reader's thread: the bytes on the device, and the event after which they are there.

        Args:
            let_go: on a GPU, the event after which it no longer works on the pages that have made room.
        """
        host = page.read()
        if self.stream is None:
            return host, None
        let_go.synchronize()  # till then their memory is not free: the pages would stand beside each other
        with torch.cuda.stream(self.stream):
            tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
            tensor.copy_(host, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
            event.synchronize()  # `host` may be a buffer that the next page's read fills
        return tensor, event

    def read_ahead(self) -> None:
        """Start on the pages that come next, as far as there is room."""
        for step in range(1, len(self.order)):
            if len(self.coming) >= PAGES_AHEAD:
                return
            page = self.order[(self.at + step) % len(self.order)]
            if page.tensor is not None or page in self.coming:
                continue
            if not self.make_room(page.num_bytes, step):
                return
            self.send(page)

    def saved_as_pages(self) -> AbstractContextManager:
        """Inside, autograd notes which page a tensor lies in instead of holding it, and the backward touches it."""

        def pack(tensor: Tensor) -> Any:
            page = self.places.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
            if page is None:
                return tensor
            return page, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            page, dtype, shape, stride, offset = packed
            return self.touch(page).view(dtype).as_strided(shape, stride, offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def take_statistics(self) -> Statistics:
        """What was counted since the last call."""
        found, self.statistics = self.statistics, Statistics()
        return found

    def release(self) -> None:
        """Let go of everything; a later touch brings it back."""
        for page in list(self.coming):
            self.arrive(page)
        for page in [page for page in self.pages if page.tensor is not None]:
            self.forget(page)
        self.current = None
        allocator.release()
