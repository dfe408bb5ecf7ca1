"""Pages in files: parts of a checkpoint, or of an unnamed file that is deleted with the process."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.kernels.cpu import allocator

ALIGNMENT = 64  # bytes; of each part in its page


@dataclass(frozen=True)
class Segment:
    """`num_bytes` bytes from `begin` of an open file."""

    descriptor: int
    begin: int
    num_bytes: int


def read_into(segment: Segment, out: Tensor) -> None:
    """Fill `out`, uint8, contiguous, on the CPU. Raises UserError if the file cannot be read or has become shorter."""
    view, at = out.numpy().data, 0
    while at < segment.num_bytes:
        try:
            count = os.preadv(segment.descriptor, [view[at:]], segment.begin + at)
        except OSError as error:
            raise unreadable(str(error)) from None
        if count == 0:
            raise unreadable("it ends early")
        at += count


def unreadable(found: str) -> UserError:
    return UserError(
        "a paged file must stay unchanged while it is in use",
        found,
        "restore it, and pass --resume to continue from the last checkpoint",
        "paging",
    )


def page_layout(segments: list[Segment]) -> tuple[list[slice], int]:
    """Return each segment's slice of its page, and the page's size in bytes."""
    places, at = [], 0
    for segment in segments:
        places.append(slice(at, at + segment.num_bytes))
        at += -(-segment.num_bytes // ALIGNMENT) * ALIGNMENT
    return places, at


def read_page(segments: list[Segment], pinned: bool = False) -> Tensor:
    """Read the segments of a page into one uint8 tensor in host memory."""
    places, num_bytes = page_layout(segments)
    if pinned:
        page = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    else:
        page = allocator.empty((num_bytes,), torch.uint8)
    for segment, place in zip(segments, places):
        read_into(segment, page[place])
    return page


class Spill:
    """An unnamed file for pages that no checkpoint contains. The system deletes it at any end of the process."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  kept open
        self.end = 0

    def write(self, tensor: Tensor) -> Segment:
        """Append a tensor's bytes. Raises UserError if the disk is full."""
        segment = Segment(self.file.fileno(), self.end, tensor.nbytes)
        self.overwrite(segment, tensor)
        self.end += tensor.nbytes
        return segment

    def overwrite(self, segment: Segment, tensor: Tensor) -> None:
        """Replace a segment's bytes with a tensor's. Raises UserError if the disk is full."""
        data, at = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, 0
        try:
            while at < segment.num_bytes:
                at += os.pwrite(segment.descriptor, data[at:], segment.begin + at)
        except OSError as error:
            raise UserError(
                "the disk must have room for offloaded data",
                str(error),
                "free some space and --resume",
                str(self.folder),
            ) from None
