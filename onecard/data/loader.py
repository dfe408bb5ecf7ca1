"""An endless, resumable stream of micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from onecard.config import ROW_MULTIPLE
from onecard.data.chat.mask import Example
from onecard.data.examples import Examples
from onecard.data.packing import collate, pack


class Batches(Sequence[list[int]]):
    """The micro-batches of an epoch, each as the indices of its examples.

    Args:
        order: indices of the examples, in the order in which they are read, int64.
        starts: where each micro-batch starts in `order`, and its end, int64 (batches + 1,).
    """

    def __init__(self, order: NDArray[np.int64], starts: NDArray[np.int64]):
        self.order, self.starts = order, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.order[self.starts[index] : self.starts[index + 1]].tolist()

    def sums(self, values: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the sum of the examples' values in each micro-batch, int64 (batches,)."""
        return np.add.reduceat(values[self.order], self.starts[:-1], dtype=np.int64)


class Loader:
    """Micro-batches of one epoch after another. The order of an epoch depends only on (seed, epoch).

    A micro-batch is `batch_size` packed rows (without packing: examples), concatenated into one row. The position is
    two integers, so a resumed run reads the same micro-batches as an uninterrupted run.

    Args:
        row_tokens: the most tokens in a packed row.
    """

    def __init__(self, examples: Iterable[Example], row_tokens: int, packing: bool, batch_size: int, seed: int):
        self.examples, self.row_tokens, self.packing = Examples.of(examples), row_tokens, packing
        assert len(self.examples), "a loader needs examples"
        self.batch_size, self.seed = batch_size, seed
        self.epoch = self.batch = 0
        self.batches = lru_cache(maxsize=2)(self._batches)

    def generator(self, epoch: int) -> torch.Generator:
        """Return the generator of the epoch's order."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)

    def _batches(self, epoch: int) -> Batches:
        """Return the epoch's micro-batches."""
        order = torch.randperm(len(self.examples), generator=self.generator(epoch)).numpy()
        rows = np.arange(len(order))
        if self.packing:
            row_of = pack(self.examples.lengths[order], self.row_tokens)
            first = np.argsort(row_of, kind="stable")  # row by row, each in the order of arrival
            order, rows = order[first], row_of[first]
        starts = np.searchsorted(rows, np.arange(0, rows[-1] + 1, self.batch_size))
        return Batches(order, np.append(starts, len(order)))

    def num_batches(self, epoch: int) -> int:
        return len(self.batches(epoch))

    @property
    def num_batches_done(self) -> int:
        """Micro-batches before the position."""
        return sum(self.num_batches(epoch) for epoch in range(self.epoch)) + self.batch

    @property
    def num_epochs_done(self) -> int:
        """Complete passes over the data before the position."""
        return self.epoch + (self.batch == self.num_batches(self.epoch))

    @property
    def epochs(self) -> float:
        """Passes over the data before the position."""
        return self.epoch + self.batch / self.num_batches(self.epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield micro-batches without end, from the current position."""
        while True:
            yield self.next_batch()

    def next_batch(self) -> dict[str, Any]:
        """Return the next micro-batch, in the form of `collate`, with the `indices` of its examples."""
        if self.batch >= self.num_batches(self.epoch):
            self.advance()
        indices = self.batches(self.epoch)[self.batch]
        batch = {**collate([self.examples[index] for index in indices], ROW_MULTIPLE), "indices": indices}
        self.batch += 1
        return batch

    def advance(self) -> None:
        """Go to the first micro-batch of the next epoch."""
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]
