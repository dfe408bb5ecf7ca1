"""The frozen base in pages: one per decoder layer and one for the output head. Embeddings are read row by row.

Codes and scales are in files: the 4-bit checkpoint itself, or a file that is written while a 16-bit checkpoint is
quantized. The pager keeps as many pages in memory as the budget permits. The scales of double quantization's scales,
biases and norms stay resident.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onecard.nn.embedding import Head
from onecard.nn.experts import StackedWeight, weights_of
from onecard.nn.linear import Linear4bit
from onecard.paging.files import Segment, Spill, page_layout, read_into, read_page
from onecard.paging.pager import Page, Pager
from onecard.quant.state import QuantState

SLICE_ROWS = 4096  # of an embedding, read at a time
Holder = Linear4bit | StackedWeight  # of a 4-bit weight


@dataclass
class PagedWeight:
    """A 4-bit weight whose codes and scales are in a page. `state.absmax` is empty."""

    pager: Pager
    page: Page
    codes: slice
    absmax: slice
    state: QuantState
    absmax_dtype: torch.dtype

    def __call__(self) -> tuple[Tensor, QuantState]:
        """Return codes and state, paged in if necessary."""
        page = self.pager.touch(self.page)
        return page[self.codes].view(-1, 1), replace(self.state, absmax=page[self.absmax].view(self.absmax_dtype))


class PagedHead(Head):
    """An output head whose weight, (out_features, in_features), is a page."""

    def __init__(self, head: nn.Linear, pager: Pager, page: Page, file_dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.pager, self.page, self.dtype, self.file_dtype = pager, page, head.weight.dtype, file_dtype
        self.register_parameter("bias", head.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        size = self.out_features * self.in_features * self.file_dtype.itemsize
        stored = self.pager.touch(self.page)[:size].view(self.file_dtype)
        return stored.view(self.out_features, self.in_features).to(self.dtype)


class PagedEmbedding(nn.Module):
    """An embedding that reads the rows it needs from their file and returns them in `compute_dtype`."""

    def __init__(self, embedding: nn.Embedding, segment: Segment, file_dtype: torch.dtype, compute_dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.segment, self.file_dtype, self.compute_dtype = segment, file_dtype, compute_dtype
        device, self.dtype = embedding.weight.device, embedding.weight.dtype
        self.place: Tensor
        self.register_buffer("place", torch.empty(0, dtype=self.dtype, device=device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """An empty tensor with the device and dtype of the embedding, for callers that need these."""
        return self.place

    def forward(self, input_ids: Tensor) -> Tensor:
        ids, places = torch.unique(input_ids.cpu(), return_inverse=True)
        return self.rows(ids.tolist())[places].to(self.place.device, self.compute_dtype)

    def rows(self, ids: list[int]) -> Tensor:
        """Return some rows, (len(ids), embedding_dim), on the host."""
        rows = torch.empty(len(ids), self.embedding_dim, dtype=self.file_dtype)
        for row, number in zip(rows, ids):
            if not 0 <= number < self.num_embeddings:
                raise IndexError(f"token {number} of a vocabulary of {self.num_embeddings}")
            read_into(self.part(number, 1), row.view(torch.uint8))
        return rows.to(self.dtype)

    def part(self, first: int, count: int) -> Segment:
        """Return the segment of `count` rows from row `first` on."""
        size = self.embedding_dim * self.file_dtype.itemsize
        return Segment(self.segment.descriptor, self.segment.begin + first * size, count * size)

    def slices(self) -> Iterator[Tensor]:
        """Yield all rows in order, `SLICE_ROWS` at a time."""
        for first in range(0, self.num_embeddings, SLICE_ROWS):
            count = min(SLICE_ROWS, self.num_embeddings - first)
            rows = torch.empty(count, self.embedding_dim, dtype=self.file_dtype)
            read_into(self.part(first, count), rows.view(torch.uint8).view(-1))
            yield rows.to(self.dtype)


class MovedBase:
    """A model's 4-bit weights that are not in its modules: PagedBase and ShardedBase, which take them while it loads.

    Attributes:
        open: the checkpoint's files, which stay open.
    """

    def __init__(self, folder: Path, device: torch.device):
        """Args: folder: for an unnamed file with what no checkpoint contains."""
        self.folder, self.device = folder, device
        self.spill: Spill | None = None
        self.open: list[Any] = []

    def write(self, tensor: Tensor) -> Segment:
        """Write a tensor's bytes to the unnamed file."""
        self.spill = self.spill or Spill(self.folder)
        return self.spill.write(tensor)

    def empty(self, weight: Holder, state: QuantState) -> None:
        """Leave a weight without codes and absmax."""
        weight.weight = nn.Parameter(torch.empty(0, 1, dtype=torch.uint8, device=self.device), requires_grad=False)
        weight.quant_state = replace(state, absmax=state.absmax.new_empty(0))

    def end_load(self, model: nn.Module) -> None:
        """All weights are taken; forwards follow."""

    def replace_embedding(self, model: Any, segment: tuple[Segment, torch.dtype], compute_dtype: torch.dtype) -> None:
        """Have the model's embedding read the rows it needs, unless it has a class of its own."""
        before = model.get_input_embeddings()
        if type(before) is nn.Embedding:
            model.set_input_embeddings(PagedEmbedding(before, *segment, compute_dtype))


class PagedBase(MovedBase):
    """Collects a model's 4-bit weights while it loads, and pages them afterwards."""

    def __init__(self, budget_bytes: int, folder: Path, device: torch.device):
        super().__init__(folder, device)
        self.budget_bytes = budget_bytes
        self.segments: dict[Holder, tuple[Segment, Segment]] = {}

    def take(self, linear: Holder, segments: tuple[Segment, Segment] | None = None) -> None:
        """Move codes and absmax out of memory. `segments` are their places if a file already contains them."""
        packed, state = linear.weight, linear.loaded_state
        self.segments[linear] = segments or (self.write(packed), self.write(state.absmax))
        self.empty(linear, state)
        linear.fetch = lambda: self.read(linear, state.absmax.dtype)

    def read(self, linear: Holder, absmax_dtype: torch.dtype) -> tuple[Tensor, QuantState]:
        """Read one weight from its file, without keeping it. Used until `start` makes pages."""
        segments = list(self.segments[linear])
        page, (codes, absmax) = read_page(segments).to(self.device), page_layout(segments)[0]
        return page[codes].view(-1, 1), replace(linear.loaded_state, absmax=page[absmax].view(absmax_dtype))

    def start(
        self,
        model: Any,
        compute_dtype: torch.dtype,
        embedding: tuple[Segment, torch.dtype],
        head: tuple[Segment, torch.dtype],
    ) -> Pager:
        """Page the model's weights. `embedding` and `head` are the segment and dtype of their values in a file."""
        groups = weights_by_layer(model)
        pages = {name: self.page(name, [s for m in linears for s in self.segments[m]])
                 for name, linears in groups.items()}  # fmt: skip
        last = model.get_output_embeddings()
        paged_head = self.page("head", [head[0]]) if isinstance(last, Head) else None
        pager = Pager(self.device, self.budget_bytes, [*pages.values(), *([paged_head] if paged_head else [])])
        for name, linears in groups.items():
            places, _ = page_layout([s for m in linears for s in self.segments[m]])
            for number, linear in enumerate(linears):
                codes, absmax = places[2 * number : 2 * number + 2]
                dtype = linear.loaded_state.absmax.dtype
                linear.fetch = PagedWeight(pager, pages[name], codes, absmax, linear.loaded_state, dtype)
        if paged_head is not None:
            model.set_output_embeddings(PagedHead(last, pager, paged_head, head[1]))
        self.replace_embedding(model, embedding, compute_dtype)
        model.get_input_embeddings().register_forward_pre_hook(lambda *_: pager.begin_pass())
        model.pager, model.paged_base = pager, self
        return pager

    def page(self, name: str, segments: list[Segment]) -> Page:
        pinned = self.device.type == "cuda"
        return Page(name, page_layout(segments)[1], lambda: read_page(segments, pinned))


def weights_by_layer(model: nn.Module) -> dict[str, list[Holder]]:
    """Return the 4-bit weights of each decoder layer, in the model's order."""
    groups: dict[str, list[Holder]] = {}
    for name, module in model.named_modules():
        for _, weight in weights_of(module):
            groups.setdefault(layer_of(name), []).append(weight)
    return groups


def layer_of(name: str) -> str:
    """Return the decoder layer of a module: its name up to the first number, else its own name."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name
