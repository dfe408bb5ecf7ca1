"""Offloaded optimizer states: on the device while there is room, else in host memory or a file.

They are offloaded when an allocation fails. If the plan finds no room for them next to the activations, they are
offloaded after every update. They come back for the next one, bit-identical. On a GPU they move to pinned host memory,
on a CPU to an unnamed file.
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
    """A tensor that is not on the device: its place, dtype and shape."""

    place: Tensor | Segment
    dtype: torch.dtype
    shape: torch.Size


class PagedStates:
    """Offloads a parameter's states and brings them back. "step" always stays.

    Attributes:
        crowded: whether they have no room next to a step's activations, and are offloaded after every update.
    """

    def __init__(self, folder: Path, crowded: bool = False):
        self.folder, self.crowded = folder, crowded
        self.spill: Spill | None = None
        self.offloaded: dict[Any, dict[str, OffloadedState]] = {}  # the offloaded states
        self.places: dict[tuple[Any, str], Tensor | Segment] = {}  # of all states that were ever offloaded
        self.statistics = Statistics()

    def send(self, p: Tensor, state: dict[str, Tensor]) -> int:
        """Offload a parameter's states. Return the freed bytes. A failure loses no state."""
        offloaded, freed = self.offloaded.setdefault(p, {}), 0
        for key, tensor in state.items():
            if key == "step" or key in offloaded:
                continue
            here = tensor.new_empty(0)
            offloaded[key] = OffloadedState(self.put(p, key, tensor), tensor.dtype, tensor.shape)
            state[key] = here
            freed += tensor.nbytes
        self.statistics.bytes_out += freed
        return freed

    def put(self, p: Tensor, key: str, tensor: Tensor) -> Tensor | Segment:
        """Copy a tensor to its place, which the first copy creates."""
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
        """Bring a parameter's states back to its device. A state that fails to load stays offloaded."""
        start, offloaded = time.perf_counter(), self.offloaded.get(p, {})
        for key in list(offloaded):
            state[key] = self.read(offloaded[key]).to(p.device)
            del offloaded[key]
            self.statistics.bytes_in += state[key].nbytes
        self.statistics.stall_seconds += time.perf_counter() - start

    def look(self, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a parameter's states on the host without moving them. States in a file are mapped, not read."""
        offloaded = self.offloaded.get(p, {})
        return {key: self.mapped(offloaded[key]) if key in offloaded else tensor.cpu() for key, tensor in state.items()}

    def mapped(self, state: OffloadedState) -> Tensor:
        if isinstance(state.place, Tensor):
            return state.place
        view = np.memmap(self.spill.file, np.uint8, "c", state.place.begin, (state.place.num_bytes,))  # type: ignore
        return torch.from_numpy(view).view(state.dtype).view(state.shape)

    def read(self, state: OffloadedState) -> Tensor:
        if isinstance(state.place, Tensor):
            return state.place
        tensor = torch.empty(state.shape, dtype=state.dtype)
        read_into(state.place, tensor.view(-1).view(torch.uint8))
        return tensor
