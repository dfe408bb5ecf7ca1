"""Pages within a byte budget: paged in before their use, evicted by the farthest next use.

A pass over a model touches its pages in the same order every time. The pager records the order of each pass. In the
next pass, a thread reads ahead in that order. To make room, the pager evicts the page whose next use is farthest away.
No other rule is better (Belady, IBM Systems Journal 5, 1966). Eviction only drops a page: pages are never written, and
a tensor that autograd still references stays valid.

A page is read from a file, which the system caches in host memory as far as possible. On a GPU, it is then copied from
a pinned buffer on a separate stream. There is no managed memory, so no page fault stalls a kernel.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.kernels.cpu import allocator
from onecard.paging.mover import Mover, Statistics, Transfer

PAGES_AHEAD = 3  # pages in transfer at a time


@dataclass(eq=False)
class Page:
    """Bytes that are paged in and evicted together. `read` returns them as a uint8 tensor in host memory."""

    name: str
    num_bytes: int
    read: Callable[[], Tensor]
    tensor: Tensor | None = field(default=None, repr=False)


class Pager:
    """Keeps pages on a device within `budget_bytes`.

    Not thread-safe. Raises UserError if the two largest pages exceed the budget: one is in use while the other is
    paged in.
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
        self.touched: list[Page] = []  # in this pass so far
        self.uses: dict[Page, list[int]] = {}  # positions in the expected order
        self.at = -1  # the current page's position in it
        self.coming: dict[Page, Transfer[Tensor]] = {}
        self.places: dict[int, Page] = {}  # by address
        self.statistics = Statistics()
        on_gpu = device.type == "cuda"
        self.mover = Mover(device, num_threads=2 if on_gpu else 1)  # on a GPU, one reads while the other one copies
        self.expect([*pages, *reversed(pages)])

    def expect(self, order: list[Page]) -> None:
        """Set the order of the next pass: that of the previous pass, or at first all pages forward and back."""
        self.order = order
        self.uses = {}
        for position, page in enumerate(order):
            self.uses.setdefault(page, []).append(position)

    def begin_pass(self) -> None:
        """Begin a forward. The pages touched since the last forward are the expected order."""
        if self.touched:
            self.expect(self.touched)
            self.touched = []
        self.at = -1
        if self.current is not None and self.order:
            self.follow(self.current)
        self.read_ahead()

    def touch(self, page: Page) -> Tensor:
        """Return a page's bytes, uint8, on the device. They stay valid while the caller references them."""
        if page is not self.current:
            self.touched.append(page)
            self.follow(page)
            self.statistics.touches += 1
            self.statistics.hits += page.tensor is not None or page in self.coming
            self.current = None  # the previous page may be evicted, and this one may fail to load
            if page.tensor is None:
                self.bring(page)
            self.current = page
            self.read_ahead()
        assert page.tensor is not None
        return page.tensor

    def follow(self, page: Page) -> None:
        """Move to the page's next place in the expected order. A page outside the order changes nothing."""
        places = self.uses.get(page)
        if places:
            next_place = bisect_right(places, self.at)
            self.at = places[next_place if next_place < len(places) else 0]

    def distance(self, page: Page) -> int:
        """Count the uses of pages until this page's next use."""
        places = self.uses.get(page)
        if not places:
            return len(self.order)
        next_place = bisect_right(places, self.at)
        if next_place < len(places):
            return places[next_place] - self.at
        return places[0] + len(self.order) - self.at

    @property
    def held_bytes(self) -> int:
        """Bytes of the pages that are on the device or in transfer."""
        return sum(page.num_bytes for page in self.pages if page.tensor is not None or page in self.coming)

    def evict_for(self, num_bytes: int, distance: int) -> bool:
        """Evict pages with a next use beyond `distance` until num_bytes fit. If they cannot, return False."""
        excess = self.held_bytes + num_bytes - self.budget_bytes
        there = [page for page in self.pages if page.tensor is not None and page is not self.current]
        evicted = []
        for page in sorted(there, key=self.distance, reverse=True):
            if excess <= 0 or self.distance(page) <= distance:
                break
            evicted.append(page)
            excess -= page.num_bytes
        if excess <= 0:
            for page in evicted:
                self.evict(page)
            if any(page.num_bytes != num_bytes for page in evicted):
                allocator.release()  # the new page cannot reuse their blocks
        return excess <= 0

    def evict(self, page: Page) -> None:
        """Evict a page."""
        assert page.tensor is not None
        del self.places[page.tensor.data_ptr()]
        page.tensor = None

    def bring(self, page: Page) -> None:
        """Page in a page and wait for it."""
        start = time.perf_counter()
        if page not in self.coming:
            self.coming = {other: page_in for other, page_in in self.coming.items() if not page_in.future.cancel()}
            for other in list(self.coming):
                self.arrive(other)
            fits = self.evict_for(page.num_bytes, -1)
            assert fits, "the two largest pages fit, and only one is in use"
            self.coming[page] = self.mover.fetch(page.read)
        self.arrive(page)
        self.statistics.stall_seconds += time.perf_counter() - start

    def arrive(self, page: Page) -> None:
        """Wait for a page in transfer and register it."""
        page.tensor = self.mover.take(self.coming.pop(page))
        self.places[page.tensor.data_ptr()] = page
        self.statistics.bytes_in += page.num_bytes

    def read_ahead(self) -> None:
        """Start to load the next pages, as far as there is room."""
        for step in range(1, len(self.order)):
            if len(self.coming) >= PAGES_AHEAD:
                return
            page = self.order[(self.at + step) % len(self.order)]
            if page.tensor is not None or page in self.coming:
                continue
            if not self.evict_for(page.num_bytes, step):
                return
            self.coming[page] = self.mover.fetch(page.read)

    def saved_as_pages(self) -> AbstractContextManager:
        """Make autograd save a reference to a tensor's page, not the tensor. The backward touches that page."""

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
        """Return what was counted since the last call."""
        found, self.statistics = self.statistics, Statistics()
        return found

    def release(self) -> None:
        """Evict all pages. A later touch pages them in again."""
        for page in list(self.coming):
            self.arrive(page)
        for page in [page for page in self.pages if page.tensor is not None]:
            self.evict(page)
        self.current = None
        allocator.release()
