"""An optimizer's states in pages: on the device while there is room, in host memory or a file when there is not.

They leave when an allocation fails, or, where the plan finds no room for them beside the activations, after every
update; they come back for the next one. On a GPU they go to pinned host memory, on a CPU to a file without a name. A
state that comes back has the bits that it left with.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onecard.paging.files import Segment, Spill, read_into
from onecard.paging.pager import Statistics


@dataclass
class OffloadedState:
    """A tensor that is not on the device: where it is, and how it looked."""

    place: Tensor | Segment
    dtype: torch.dtype
    shape: torch.Size


class PagedStates:
    """Sends a parameter's states away and brings them back; "step" always stays.

    Attributes:
        crowded: whether there is no room for them beside a step's activations: they leave after every update.
    """

    def __init__(self, folder: Path, crowded: bool = False):
        self.folder, self.crowded = folder, crowded
        self.spill: Spill | None = None
        self.away: dict[Any, dict[str, OffloadedState]] = {}  # those that are away
        self.places: dict[tuple[Any, str], Tensor | Segment] = {}  # of all that ever were
        self.statistics = Statistics()

    def send(self, p: Tensor, state: dict[str, Tensor]) -> int:
        """Take a parameter's states off the device; the bytes that this freed. Whatever fails, none is lost."""
        away, freed = self.away.setdefault(p, {}), 0
        for key, tensor in state.items():
            if key == "step" or key in away:
                continue
            here = tensor.new_empty(0)
            away[key] = OffloadedState(self.put(p, key, tensor), tensor.dtype, tensor.shape)
            state[key] = here
            freed += tensor.nbytes
        self.statistics.bytes_out += freed
        return freed

    def put(self, p: Tensor, key: str, tensor: Tensor) -> Tensor | Segment:
        """Copy a tensor to its place, made at its first time."""
        place = self.places.get((p, key))
        if tensor.device.type == "cuda":
            if not isinstance(place, Tensor):
                place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            place.copy_(tensor)
        elif isinstance(place, Segment):
            assert self.spill is not None
            self.spill.overwrite(place, tensor)
        else:
            self.spill = self.spill or Spill(self.folder)
            place = self.spill.write(tensor)
        self.places[p, key] = place
        return place

    def bring(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Have a parameter's states on its device; what fails to come stays away."""
        start, away = time.perf_counter(), self.away.get(p, {})
        for key in list(away):
            state[key] = self.read(away[key]).to(p.device)
            del away[key]
            self.statistics.bytes_in += state[key].nbytes
        self.statistics.stall_seconds += time.perf_counter() - start

    def look(self, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A parameter's states to look at on the host, left where they are: in a file, they are mapped, not read."""
        away = self.away.get(p, {})
        return {key: self.mapped(away[key]) if key in away else tensor.cpu() for key, tensor in state.items()}

    def mapped(self, away: OffloadedState) -> Tensor:
        if isinstance(away.place, Tensor):
            return away.place
        view = np.memmap(self.spill.file, np.uint8, "c", away.place.begin, (away.place.num_bytes,))  # type: ignore
        return torch.from_numpy(view).view(away.dtype).view(away.shape)

    def read(self, away: OffloadedState) -> Tensor:
        if isinstance(away.place, Tensor):
            return away.place
        tensor = torch.empty(away.shape, dtype=away.dtype)
        read_into(away.place, tensor.view(-1).view(torch.uint8))
        return tensor
