"""An endless, resumable stream of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from typing import Any

import torch

from onecard.config import ROW_MULTIPLE
from onecard.data.chat.mask import Example
from onecard.data.packing import collate, pack


class Loader:
    """Micro-batches of one epoch after another. The order of an epoch depends only on (seed, epoch).

    A micro-batch is `batch_size` packed rows (without packing: examples), concatenated into one row. The position is
    two integers, so a resumed run reads the same micro-batches as an uninterrupted run.

    Args:
        row_tokens: the most tokens in a packed row.
    """

    def __init__(self, examples: list[Example], row_tokens: int, packing: bool, batch_size: int, seed: int):
        assert examples, "a loader needs examples"
        self.examples, self.row_tokens, self.packing = examples, row_tokens, packing
        self.batch_size, self.seed = batch_size, seed
        self.epoch = self.batch = 0
        self.batches = lru_cache(maxsize=2)(self._batches)

    def _batches(self, epoch: int) -> list[list[int]]:
        """Return the epoch's micro-batches as lists of example indices."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        rows = [[index] for index in order]
        if self.packing:
            lengths = [len(self.examples[index].input_ids) for index in order]
            rows = [[order[i] for i in row] for row in pack(lengths, self.row_tokens)]
        starts = range(0, len(rows), self.batch_size)
        return [list(chain(*rows[start : start + self.batch_size])) for start in starts]

    def num_batches(self, epoch: int) -> int:
        return len(self.batches(epoch))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield micro-batches without end, from the current position."""
        while True:
            yield self.next_batch()

    def next_batch(self) -> dict[str, Any]:
        """Return the next micro-batch, in the form of `collate`, with the `indices` of its examples."""
        if self.batch >= self.num_batches(self.epoch):
            self.epoch, self.batch = self.epoch + 1, 0
        indices = self.batches(self.epoch)[self.batch]
        batch = {**collate([self.examples[index] for index in indices], ROW_MULTIPLE), "indices": indices}
        self.batch += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]
