"""Tokenize the records of a source, in several processes where they are many."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from onecard.config import DataConfig
from onecard.data.chat.mask import IGNORE, Example, encode, prompt_form
from onecard.data.chat.pooled import encode_pooled
from onecard.data.chat.rendering import sandbox
from onecard.data.dataset import Dataset
from onecard.data.examples import FIELDS, Stored
from onecard.data.files import BadRow, raise_bad_rows, row_error
from onecard.data.records import Record, Records, counted
from onecard.data.store import Store
from onecard.data.workers import in_processes
from onecard.errors import UserError

WHOLE = 1 << 40  # tokens, more than any document has


def prepare(
    read: Records, tokenizer: Any, config: DataConfig, store: Store | None = None, num_processes: int | None = None
) -> Dataset:
    """Tokenize records.

    Args:
        store: where many examples are written; default: none, they stay in memory.
        num_processes: same as in `in_processes`.

    Raises:
        UserError: bad rows, from reading and tokenizing in one list, unless they are skipped and other rows remain;
            no example has a supervised token.
    """
    counts = Counts()
    examples = (store or Store()).write(tokenized(read, tokenizer, config, counts, num_processes))
    dataset = Dataset(
        examples,
        read.format,
        config.max_seq_length,
        counts.unsupervised,
        counts.dropped,
        counts.lost,
        read.layout.mapping,
        bad=[*read.bad, *counts.bad],
    )
    read.sort_bad(dataset.bad)
    dataset.notices = read.notices + [f"{note}: {counted(count)}" for note, count in sorted(counts.notes.items())]
    dataset.notices += told_lengths(dataset, counts)
    if config.on_bad_rows == "error" or not (len(examples) or counts.unsupervised or counts.dropped):
        raise_bad_rows(dataset.bad)
    if not len(examples):
        raise UserError(
            "an example must have a token to learn",
            f"none in {counts.unsupervised} examples cut to {config.max_seq_length} tokens"
            + f", {counts.dropped} dropped as longer" * bool(counts.dropped),
            "raise --max-seq-length, or shorten the prompts",
            read.source,
        )
    return dataset


@dataclass
class Counts:
    """What became of the rows of a source."""

    unsupervised: int = 0
    dropped: int = 0
    lost: int = 0
    split: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    bad: list[UserError] = field(default_factory=list)


def tokenized(
    read: Records, tokenizer: Any, config: DataConfig, counts: Counts, num_processes: int | None
) -> Iterator[Stored]:
    """Yield the examples of records, tokenized in several processes where they are many, and count the rest."""
    waiting: deque[Record] = deque()

    def records() -> Iterator[Record]:
        for record in read.records:
            if config.text_is_templated and record.text is not None:
                record = replace(record, templated=True)
            waiting.append(record)
            yield record

    def encode(record: Record) -> tuple[list[Stored], tuple[str, ...]] | UserError:
        try:
            first, *more = encode_row(record, tokenizer, config)
        except UserError as error:
            return error
        prompt = prompt_form(record, tokenizer)
        return [Stored.of(first, record, prompt), *(Stored.of(each, None, prompt) for each in more)], first.notes

    for found in in_processes(encode, records(), sandbox.renew, num_processes):
        record = waiting.popleft()
        if isinstance(found, UserError):
            field = (found.where or "").removeprefix(f"{record.where}:")
            if field == found.where or found.where is None:
                raise found
            where = f"{record.where}:{read.layout.in_file(field)}"
            counts.bad.append(UserError(found.must, found.found, found.do, where))
            continue
        examples, notes = found
        is_truncated = examples[0].fields[FIELDS.index("truncated")]
        if is_truncated and config.on_long_rows == "drop":
            counts.dropped += 1
            continue
        counts.split += len(examples) > 1
        counts.notes.update(notes)
        if not any(example.learned.any() for example in examples):
            counts.unsupervised += 1
            counts.lost += is_truncated
            continue
        yield from examples


def encode_row(record: Record, tokenizer: Any, config: DataConfig) -> list[Example]:
    """Encode a record: one example, or the pieces of a long text. Raises UserError, same as mask.encode."""
    how, most = config.on_long_rows, config.max_seq_length
    is_text = record.text is not None and not record.is_pooled
    splits = is_text and (how == "split" or (how == "auto" and not record.templated))
    if record.is_pooled:
        example = encode_pooled(record, tokenizer, most)
    else:
        example = encode(record, tokenizer, WHOLE if splits else most, config.train_on)
    least, must = (
        (2, "an example must have two tokens") if record.class_name is None else (1, "a row must have a token")
    )
    if min(example.lengths) < least:
        short = BadRow("row", must, str(min(example.lengths)))
        raise row_error(record.file, record.line, short)
    if example.truncated and how == "error":
        raise row_error(record.file, record.line, long_row(most))
    if example.truncated and how == "split" and not is_text:
        must, do = "only rows of text can be split", "leave --on-long-rows out: it splits text and cuts other rows"
        raise row_error(record.file, record.line, BadRow("row", must, "a longer row of another format", do))
    return pieces(example, most) if splits else [example]


def pieces(example: Example, most: int) -> list[Example]:
    """Return the example in consecutive pieces of `most` tokens. The last one has at least two tokens."""
    length = len(example.input_ids)
    cuts = [*range(0, length, most), length]
    if length > most and length - cuts[-2] == 1:  # a token without one before it is never predicted
        cuts[-2] -= 1
    return [
        replace(example, input_ids=example.input_ids[start:end], labels=[IGNORE, *example.labels[start + 1 : end]])
        for start, end in zip(cuts, cuts[1:])
    ]


def long_row(max_seq_length: int) -> BadRow:
    do = "raise --max-seq-length, shorten the row, or pass --on-long-rows cut or drop"
    return BadRow("row", f"a row must have at most {max_seq_length} tokens, as --on-long-rows error asks", "more", do)


def told_lengths(dataset: Dataset, counts: Counts) -> list[str]:
    """Return the notices about rows longer than max_seq_length."""
    lines, most = [], f"{dataset.max_seq_length:,} tokens"
    if counts.split:
        more = len(dataset.examples) - dataset.num_documents
        lines.append(f"split into pieces of {most}: {counted(counts.split)} of text, {more:,} examples more")
    cut = dataset.num_cut + counts.unsupervised
    if cut and dataset.num_truncated:
        share = cut / (len(dataset.examples) + counts.unsupervised)
        what = "texts are cut at their ends to" if dataset.classes else "answers are cut at"
        lines.append(
            f"{what} {most} or lost behind them: {counted(cut)}, {share:.1%}; "
            "raise --max-seq-length, or pass --on-long-rows drop"
        )
    if counts.dropped:
        lines.append(f"dropped as longer than {most}: {counted(counts.dropped)}")
    return lines
