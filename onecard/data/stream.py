"""Data that is streamed: rows are read and tokenized a buffer at a time, and nothing is stored.

Each buffer is shuffled and packed by itself. A position is the pass over the data, the first row of the buffer and the
micro-batch in it, so a resumed run skips the rows before its buffer and reads the same micro-batches.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch

from onecard.config import TrainConfig
from onecard.data.dataset import Dataset
from onecard.data.files import BadRow, Reading
from onecard.data.load import check_templated, learned_sources
from onecard.data.loader import Loader
from onecard.data.records import Records, begin_rows, converted, counted
from onecard.data.sources import local_files
from onecard.data.tokens import prepare
from onecard.errors import UserError

MOST_CHARACTERS = 1 << 26  # of a buffer, where rows are long


class Stream:
    """The rows of a source, a buffer at a time.

    Args:
        size: of the vocabulary, and the most positions, as `Dataset.check_fits` has them.

    Attributes:
        first: the first buffer, and the row behind it.
        held: the rows of validation_split, which are of the first buffer; None without it.
        counts: what each buffer of a pass has, by its first row.

    Raises:
        UserError: same as `load_dataset`, for the rows of the first buffer.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, size: tuple[int | None, int | None]):
        (self.source,), self.formats = learned_sources(config.data, config, config.loss)
        self.config, self.tokenizer, self.size = config, tokenizer, size
        self.held: Dataset | None = None
        self.counts: dict[int, dict[str, int | str]] = {}
        self.begin(0)
        first = self.next()
        assert first is not None, "a source without rows is refused"
        check_templated(config, [first.format], self.source)
        first.notices.append(f"streamed: the numbers and the example are those of the first {counted(self.row)}")
        if config.validation_split > 0:
            first, self.held = first.split(config.validation_split, config.seed)
        self.first = first, self.row

    def begin(self, row: int) -> None:
        """Open the source at a row."""
        config, source = self.config, self.source
        self.reading = Reading(source.encoding, config.sample_by, source.split, streaming=True)
        self.layout, self.rows = begin_rows(source, self.formats, self.reading)
        self.row = sum(1 for _ in islice(self.rows, row))

    def read(self, row: int) -> tuple[Dataset, int] | None:
        """Return the buffer that begins at a row, and the row behind it; None if no row is left.

        Raises:
            UserError: bad rows, unless they are skipped; no row of the buffer has a token to learn.
        """
        if row == 0:
            return self.first
        if row != self.row:
            self.begin(row)
        found = self.next()
        return None if found is None else (found, self.row)

    def next(self) -> Dataset | None:
        """Return the next buffer. Once the model is loaded, this process alone tokenizes."""
        begin, first = self.row, next(self.rows, None)
        if first is None:
            return None
        read = Records([], self.layout, source=self.source.path)
        read.records = converted(self.buffer(chain([first], self.rows)), read, self.reading)
        found = prepare(read, self.tokenizer, self.config, num_processes=1 if begin else None)
        found.check_fits(*self.size)
        self.counts[begin] = found.summary()
        return found

    def buffer(self, rows: Iterator[tuple[str, int, Any]]) -> Iterator[tuple[str, int, Any]]:
        """Yield as many rows as fit in a buffer."""
        characters = 0
        for row in islice(rows, self.config.buffer_size):
            self.row += 1
            yield row
            characters += 0 if isinstance(row[2], BadRow) else length_of(row[2])
            if characters >= MOST_CHARACTERS:
                return

    def fingerprint(self) -> str:
        """Return the sha256 of the first buffer's tokens, and of the files' names and sizes."""
        files = [(file.name, file.stat().st_size) for file in local_files(self.source) or ()]
        return hashlib.sha256(f"{self.first[0].fingerprint()} {files}".encode()).hexdigest()

    def summary(self) -> dict[str, int | str]:
        """Return the counts of the buffers that this process has read, with the rows of validation_split."""
        total = Counter[str]()
        for counts in self.counts.values():
            total.update({name: value for name, value in counts.items() if isinstance(value, int)})
        return {**self.first[0].summary(), **total, "buffers read": len(self.counts)}


class StreamLoader(Loader):
    """Micro-batches of a stream, one buffer after another. The arguments are Loader's, with a stream."""

    def __init__(self, stream: Stream, row_tokens: int, packing: bool, batch_size: int, seed: int):
        super().__init__(stream.first[0].examples, row_tokens, packing, batch_size, seed)
        self.stream, self.row, self.next_row, self.before = stream, 0, stream.first[1], 0

    def generator(self, epoch: int) -> torch.Generator:
        """Return the generator of a buffer's order, which depends on seed, pass and first row."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch + 7_368_787 * self.row) % 2**63)

    def advance(self) -> None:
        """Go to the next buffer: behind the last row, to the first one of the next pass."""
        found, row = self.stream.read(self.next_row), self.next_row
        self.before, self.batch = self.before + self.num_batches(self.epoch), 0
        if found is None:
            found, row, self.epoch = self.stream.first, 0, self.epoch + 1
        self.take(row, found)

    def take(self, row: int, found: tuple[Dataset, int]) -> None:
        self.row, (dataset, self.next_row) = row, found
        self.examples = dataset.stored
        self.batches.cache_clear()

    @property
    def num_batches_done(self) -> int:
        return self.before + self.batch

    @property
    def num_epochs_done(self) -> int:
        return self.epoch

    @property
    def epochs(self) -> float:
        return float(self.epoch)

    def state_dict(self) -> dict[str, int]:
        return {**super().state_dict(), "row": self.row, "before": self.before}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position. Raises UserError if its row is not in the data."""
        if state["row"] != self.row:
            found = self.stream.read(state["row"])
            if found is None:
                must = f"a resumed run must have the data it began with, of more than {counted(state['row'])}"
                raise UserError(must, "fewer", "put the old data back, or start a new run", self.stream.source.path)
            self.take(state["row"], found)
        super().load_state_dict(state)
        self.before = state["before"]


def length_of(value: Any) -> int:
    """Return the number of characters in the texts of a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(length_of, value.values()))
    return sum(map(length_of, value)) if isinstance(value, list | tuple) else 0
