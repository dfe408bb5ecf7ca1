"""Offloaded optimizer states: on the device while there is room, else in host memory or a file.

They are offloaded when an allocation fails. If the plan finds no room for them next to the activations, they are
offloaded after every update. They come back for the next one, bit-identical. On a GPU they move to pinned host memory,
on a CPU to an unnamed file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from torch import Tensor

from onecard.paging.mover import Statistics, Stored, Tier, new_tier


class PagedStates:
    """Offloads a parameter's states and brings them back. "step" always stays.

    Attributes:
        crowded: whether they have no room next to a step's activations, and are offloaded after every update.
    """

    def __init__(self, folder: Path, crowded: bool = False):
        self.folder, self.crowded = folder, crowded
        self.tier: Tier | None = None
        self.offloaded: dict[Any, dict[str, Stored]] = {}  # the offloaded states
        self.places: dict[tuple[Any, str], Stored] = {}  # of all states that were ever offloaded
        self.statistics = Statistics()

    def send(self, p: Tensor, state: dict[str, Tensor]) -> int:
        """Offload a parameter's states. Return the freed bytes. A failure loses no state."""
        offloaded, freed = self.offloaded.setdefault(p, {}), 0
        for key, tensor in state.items():
            if key == "step" or key in offloaded:
                continue
            empty = tensor.new_empty(0)
            self.tier = self.tier or new_tier(tensor.device, self.folder)
            offloaded[key] = self.places[p, key] = self.tier.store(tensor, self.places.get((p, key)))
            state[key] = empty
            freed += tensor.nbytes
        self.statistics.bytes_out += freed
        return freed

    def bring(self, p: Tensor, state: dict[str, Tensor]) -> None:
        """Bring a parameter's states back to its device. A state that fails to load stays offloaded."""
        start, offloaded = time.perf_counter(), self.offloaded.get(p, {})
        for key in list(offloaded):
            state[key] = offloaded[key].read().to(p.device)
            del offloaded[key]
            self.statistics.bytes_in += state[key].nbytes
        self.statistics.stall_seconds += time.perf_counter() - start

    def look(self, p: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a parameter's states on the host without moving them. States in a file are mapped, not read."""
        offloaded = self.offloaded.get(p, {})
        return {key: offloaded[key].view() if key in offloaded else tensor.cpu() for key, tensor in state.items()}
