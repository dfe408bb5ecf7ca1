"""Tokenized documents in Arrow: in memory, or in a file that is mapped into memory.

A file of any size takes no memory but the pages that are read, which the system may drop. Only a few numbers an example
are arrays. Which tokens are learned takes one bit a token. The record that an example was made of is stored as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from onecard.data.chat.mask import IGNORE, Example
from onecard.data.records import Record

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.uint32()),
        "learned": pa.list_(pa.bool_()),
        "where": pa.string(),
        "truncated": pa.bool_(),
        "answer_cut": pa.bool_(),
        "second": pa.int32(),
        "label": pa.bool_(),
        "class_name": pa.string(),
        "record": pa.string(),  # null for the later pieces of a long text
        "prompt": pa.string(),  # mask.prompt_form of the record
        "num_supervised": pa.int32(),
        "largest": pa.int64(),  # token
    }
)
FIELDS = ("where", "truncated", "answer_cut", "second", "label", "class_name")
BATCH_TOKENS = 1 << 20  # of a record batch, about 4 MB


class Stored(NamedTuple):
    """An example as it is stored, which processes exchange in a fraction of the time that an `Example` takes.

    Attributes:
        ids, learned: the tokens, uint32 (T,), and whether each is learned, bool (T,).
        fields: values of FIELDS.
        record, prompt: columns of SCHEMA.
    """

    ids: NDArray[np.uint32]
    learned: NDArray[np.bool_]
    fields: tuple[Any, ...]
    record: str | None = None
    prompt: str | None = None

    @staticmethod
    def of(example: Example, record: Record | None = None, prompt: str | None = None) -> Stored:
        ids, learned = np.array(example.input_ids, np.uint32), np.array(example.labels, np.int64) != IGNORE
        fields = tuple(getattr(example, name) for name in FIELDS)
        return Stored(ids, learned, fields, None if record is None else to_json(record), prompt)


@dataclass
class Turns:
    """The learned turns of examples.

    Attributes:
        ends: how often each token ends a turn. The last turn of a truncated example has no end.
        inside: tokens that occur in a turn before its end.
    """

    ends: Counter[int]
    inside: set[int]

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the turns of a record batch. A turn is a run of learned tokens inside an example."""
        ids, ends = batch.column("input_ids").flatten().to_numpy(), batch.column("input_ids").offsets.to_numpy()
        is_learned = batch.column("learned").flatten().to_numpy(zero_copy_only=False)
        ends = ends[1:] - ends[0] - 1
        goes_on = np.append(is_learned[1:], False)
        goes_on[ends] = False
        is_end = is_learned & ~goes_on
        is_end[ends[batch.column("truncated").to_numpy(zero_copy_only=False)]] = False
        self.inside.update(np.unique(ids[is_learned & ~is_end]).tolist())
        tokens, counts = np.unique(ids[is_end], return_counts=True)
        self.ends.update(dict(zip(tokens.tolist(), counts.tolist())))


class Batch(NamedTuple):
    """Views of a record batch: where each example's tokens start, the tokens, whether each is learned, the rest."""

    offsets: NDArray[np.int32]
    ids: NDArray[np.uint32]
    learned: pa.BooleanArray
    columns: dict[str, pa.Array]

    @staticmethod
    def of(batch: pa.RecordBatch) -> Batch:
        ids, learned = batch.column("input_ids"), batch.column("learned")
        columns = {name: batch.column(name) for name in (*FIELDS, "record")}
        return Batch(ids.offsets.to_numpy(), ids.values.to_numpy(), learned.values, columns)


class Examples(Sequence[Example]):
    """A sequence of examples.

    Args:
        table: of SCHEMA.
        digest: sha256 of what is learned, as `Digest` has it; default: computed when it is asked for.
        turns: default: computed when they are asked for.
        chosen: rows of the table, int64; default: all in order.
    """

    def __init__(
        self,
        table: pa.Table,
        digest: str | None = None,
        turns: Turns | None = None,
        chosen: NDArray[np.int64] | None = None,
    ):
        self.table, self.chosen, self.given = table, chosen, (digest, turns)
        self.batches = [Batch.of(batch) for batch in table.to_batches()]
        self.starts = np.cumsum([0, *(len(batch.offsets) - 1 for batch in self.batches)])

    @staticmethod
    def of(examples: Iterable[Example]) -> Examples:
        """Return the examples in memory, without their records."""
        if isinstance(examples, Examples):
            return examples
        batches = list(record_batches(map(Stored.of, examples)))
        return Examples(pa.Table.from_batches(batches, SCHEMA))

    @staticmethod
    def joined(parts: list[Examples]) -> Examples:
        """Return the examples of several sequences, one after another."""
        digest = hashlib.sha256("".join(part.digest for part in parts).encode()).hexdigest()
        turns = Turns(Counter(), set())
        for part in parts:
            turns.ends.update(part.turns.ends)
            turns.inside |= part.turns.inside
        sizes = np.cumsum([0, *(part.table.num_rows for part in parts)])
        rows = [np.arange(len(part)) if part.chosen is None else part.chosen for part in parts]
        chosen = np.concatenate([start + each for start, each in zip(sizes, rows)])
        return Examples(pa.concat_tables([part.table for part in parts]), digest, turns, chosen)

    def __len__(self) -> int:
        return self.table.num_rows if self.chosen is None else len(self.chosen)

    def place(self, index: int) -> tuple[int, int]:
        """Return the batch of an example, and its row in that batch."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = index % len(self) if self.chosen is None else int(self.chosen[index])
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return number, row - int(self.starts[number])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        number, row = self.place(index)
        batch = self.batches[number]
        start, end = batch.offsets[row : row + 2].tolist()
        ids = batch.ids[start:end].astype(np.int64)
        learned = batch.learned.slice(start, end - start).to_numpy(zero_copy_only=False)
        fields = {name: batch.columns[name][row].as_py() for name in FIELDS}
        return Example(ids.tolist(), np.where(learned, ids, IGNORE).tolist(), **fields)

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def record(self, index: int) -> Record:
        """Return the record of an example. The pieces of a long text share one, stored with the first."""
        number, row = self.place(index)
        while not (found := self.batches[number].columns["record"][row]).is_valid:
            number, row = (number, row - 1) if row else (number - 1, len(self.batches[number - 1].offsets) - 2)
        return to_record(json.loads(found.as_py()))

    def take(self, indices: Iterable[int]) -> Examples:
        """Return the examples at `indices`, in that order; one may occur more than once."""
        found = np.fromiter(indices, dtype=np.int64)
        return Examples(self.table, *self.given, found if self.chosen is None else self.chosen[found])

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of the chosen examples."""
        values = self.table.column(name)
        return values if self.chosen is None else values.take(pa.array(self.chosen))

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """The tokens of each example, int32 (len,)."""
        lengths = np.concatenate([np.empty(0, np.int32), *(np.diff(batch.offsets) for batch in self.batches)])
        return lengths if self.chosen is None else lengths[self.chosen]

    @cached_property
    def longest_documents(self) -> NDArray[np.int32]:
        """The tokens of the longest document of each example, int32 (len,). A pair of answers is two documents."""
        second = self.column("second").to_numpy()
        return np.where(second > 0, np.maximum(second, self.lengths - second), self.lengths)

    @cached_property
    def num_supervised(self) -> NDArray[np.int32]:
        """The supervised tokens of each example, int32 (len,)."""
        return self.column("num_supervised").to_numpy()

    @cached_property
    def rows(self) -> NDArray[np.int32]:
        """The number of the row that each example is of, int32 (len,), in the order in which rows occur."""
        places = self.column("where").combine_chunks()
        return places.dictionary_encode().indices.to_numpy() if len(self) else np.empty(0, np.int32)

    @cached_property
    def digest(self) -> str:
        """The sha256 of all tokens, labels and pairs of the whole table."""
        if self.given[0] is not None:
            return self.given[0]
        digest = Digest()
        for batch in self.table.to_batches():
            digest.add(batch)
        return digest.hexdigest()

    @cached_property
    def turns(self) -> Turns:
        """The learned turns of the whole table."""
        if self.given[1] is not None:
            return self.given[1]
        turns = Turns(Counter(), set())
        for batch in self.table.to_batches():
            turns.add(batch)
        return turns

    def count(self, tokens: list[int]) -> list[int]:
        """Return how often each of some tokens occurs in the chosen examples."""
        times = np.ones(self.table.num_rows, np.int64)
        if self.chosen is not None:
            times = np.bincount(self.chosen, minlength=self.table.num_rows)
        found = np.zeros(max(tokens, default=-1) + 1, np.int64)
        for start, batch in zip(self.starts, self.batches):
            ids = batch.ids[batch.offsets[0] : batch.offsets[-1]]
            repeated = np.repeat(times[start : start + len(batch.offsets) - 1], np.diff(batch.offsets))
            is_counted = np.isin(ids, tokens)
            np.add.at(found, ids[is_counted], repeated[is_counted])
        return found[tokens].tolist()

    @property
    def prompts(self) -> Counter[str]:
        """How many examples have each form of prompt."""
        counts = self.column("prompt").drop_null().value_counts().to_pylist()
        return Counter({each["values"]: each["counts"] for each in counts})


class Digest:
    """A hash of examples that does not depend on their batches."""

    def __init__(self) -> None:
        self.parts = [hashlib.sha256() for _ in range(5)]

    def add(self, batch: pa.RecordBatch) -> None:
        ids, learned = batch.column("input_ids"), batch.column("learned")
        values = [
            np.diff(ids.offsets.to_numpy()),
            ids.flatten().to_numpy(),
            *(part.to_numpy(zero_copy_only=False) for part in (learned.flatten(), batch.column("label"))),
            batch.column("second").to_numpy(),
        ]
        for part, value in zip(self.parts, values):
            part.update(np.ascontiguousarray(value).data)
        for name in batch.column("class_name").drop_null().to_pylist():  # other rows have the hash of before
            self.parts[-1].update(f"{len(name)} {name}".encode())

    def hexdigest(self) -> str:
        return hashlib.sha256("".join(part.hexdigest() for part in self.parts).encode()).hexdigest()


def record_batches(stored: Iterable[Stored]) -> Iterator[pa.RecordBatch]:
    """Yield examples as record batches of about BATCH_TOKENS tokens."""
    rows: list[Stored] = []
    tokens = 0
    for row in stored:
        rows.append(row)
        tokens += len(row.ids)
        if tokens >= BATCH_TOKENS:
            yield record_batch(rows)
            rows, tokens = [], 0
    if rows:
        yield record_batch(rows)


def record_batch(rows: list[Stored]) -> pa.RecordBatch:
    offsets = pa.array(np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int32))
    columns: dict[str, Any] = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.ids for row in rows]))),
        "learned": pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([row.learned for row in rows]))),
        "record": [row.record for row in rows],
        "prompt": [row.prompt for row in rows],
        "num_supervised": [int(row.learned.sum()) for row in rows],
        "largest": [int(row.ids.max(initial=0)) for row in rows],
        **dict(zip(FIELDS, zip(*(row.fields for row in rows)))),
    }
    return pa.record_batch([pa.array(columns[name], SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA)


def to_json(record: Record) -> str:
    return json.dumps(vars(record), default=lambda value: vars(value) if isinstance(value, Record) else str(value))


def to_record(fields: dict[str, Any]) -> Record:
    tuples = {name: tuple(value) for name in ("messages", "unlearned", "fields") if (value := fields[name]) is not None}
    rejected = None if fields["rejected"] is None else to_record(fields["rejected"])
    return Record(**{**fields, **tuples, "rejected": rejected})
