"""Tokenize a data file to examples, with counts that show whether the data is what the user meant."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from onecard.config import FORMATS_OF, DataConfig
from onecard.data.chat.mask import Example, encode
from onecard.data.files import BadRow
from onecard.data.records import (
    KEYS,
    LOSSES,
    Record,
    Records,
    counted,
    line_of,
    raise_bad_rows,
    read_records,
    row_error,
    unpaired,
)
from onecard.errors import UserError


@dataclass
class Dataset:
    """Tokenized examples with at least one supervised token each."""

    examples: list[Example]
    records: list[Record]
    format: str
    max_seq_length: int
    num_truncated: int = 0
    num_unsupervised: int = 0
    num_dropped: int = 0
    bad: list[UserError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def num_records(self) -> int:
        """Number of rows read: kept, dropped as too long, without a supervised token, and bad."""
        return len(self.examples) + self.num_unsupervised + self.num_dropped + self.num_skipped

    @property
    def num_skipped(self) -> int:
        return len(self.bad)

    @property
    def row_tokens(self) -> int:
        """The most tokens in a packed row: those of one example."""
        return self.max_seq_length * (len(self.examples[0].lengths) if self.examples else 1)

    @property
    def num_tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def num_supervised_tokens(self) -> int:
        return sum(example.num_supervised for example in self.examples)

    def summary(self) -> dict[str, int | str]:
        """Return the counts for the screen and the report."""
        return {
            "format": self.format,
            "examples": len(self.examples),
            **self.judged(),
            "tokens": self.num_tokens,
            "supervised tokens": self.num_supervised_tokens,
            "truncated": self.num_truncated,
            "of them with an answer cut": sum(example.answer_cut for example in self.examples),
            "without anything to learn": self.num_unsupervised,
            "bad rows skipped": len(self.bad),
            **({"long rows dropped": self.num_dropped} if self.num_dropped else {}),
        }

    def judged(self) -> dict[str, int]:
        """Return the numbers of desirable and undesirable answers; nothing if none is undesirable."""
        count = sum(not example.label for example in self.examples)
        return {"desirable": len(self.examples) - count, "undesirable": count} if count else {}

    def fingerprint(self) -> str:
        """Return the sha256 of all tokens and labels, which shows whether a resumed run has the same data."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(array("q", [len(example.input_ids)]).tobytes())
            digest.update(array("q", example.input_ids).tobytes() + array("q", example.labels).tobytes())
            if example.second or not example.label:
                digest.update(array("q", [example.second, example.label]).tobytes())
        return digest.hexdigest()

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Split the examples at random, by seed, into (rest, share). Each side has at least one."""
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(seed)).tolist()
        if len(order) < 2:
            raise UserError("a validation split needs two examples", f"{len(order)}", "leave it out")
        num_held = min(len(order) - 1, max(1, round(share * len(order))))
        held = replace(
            self.take(sorted(order[:num_held])), num_unsupervised=0, num_dropped=0, bad=[]
        )  # only the rest keeps these
        return self.take(sorted(order[num_held:])), held

    def check_fits(self, vocab_size: int | None, max_positions: int | None) -> None:
        """Raise UserError if a token is outside the vocabulary or an example has more tokens than max_positions."""
        top, at = max((max(example.input_ids), example.where) for example in self.examples)
        if vocab_size is not None and top >= vocab_size:
            raise UserError(
                "every token must be in the model's vocabulary",
                f"token {top}, {vocab_size:,} in the vocabulary",
                "use the tokenizer that belongs to the model, or resize its embeddings first",
                at,
            )
        length, at = max((max(example.lengths), example.where) for example in self.examples)
        if max_positions is not None and length > max_positions:
            raise UserError(
                "an example must fit in the model's max_position_embeddings",
                f"{length:,} tokens for {max_positions:,} positions",
                f"pass --max-seq-length {max_positions}, or scale the rope in a copy of config.json",
                at,
            )

    def take(self, indices: list[int]) -> Dataset:
        examples, records = [self.examples[i] for i in indices], [self.records[i] for i in indices]
        truncated = sum(example.truncated for example in examples)
        return replace(self, examples=examples, records=records, num_truncated=truncated)


def load_dataset(path: str, tokenizer: Any, config: DataConfig, loss: str | None = "sft") -> Dataset:
    """Read, check and tokenize a data file. Raises UserError, same as read_records and prepare.

    Args:
        loss: the loss that learns the data. "kto" makes two examples of a pair. None: any, to show the data.
    """
    formats = tuple(KEYS) if loss is None else FORMATS_OF[loss]
    if config.format not in ("auto", *formats):
        must = f"the rows must have a format that is learned with loss {loss}: {', '.join(formats)}"
        raise UserError(must, config.format, f"train on such rows with {LOSSES[config.format]}", "format")
    read = read_records(path, config.format, "skip", formats)
    return prepare(unpaired(read) if loss == "kto" else read, tokenizer, config)


def prepare(read: Records, tokenizer: Any, config: DataConfig) -> Dataset:
    """Tokenize records.

    Raises:
        UserError: bad rows, from reading and tokenizing in one list, unless they are skipped and other rows remain;
            no example has a supervised token.
    """
    dataset = Dataset([], [], read.format, config.max_seq_length, bad=list(read.bad))
    notes: Counter[str] = Counter()
    for record in read.records:
        try:
            example = encode(record, tokenizer, config.max_seq_length, config.train_on)
            if min(example.lengths) < 2:
                short = BadRow("row", "an example must have two tokens", str(min(example.lengths)))
                raise row_error(record.file, record.line, short)
            if example.truncated and config.on_long_rows == "error":
                raise row_error(record.file, record.line, long_row(config.max_seq_length))
        except UserError as error:
            if error.where is None or not error.where.startswith(f"{record.where}:"):
                raise
            dataset.bad.append(error)
            continue
        if example.truncated and config.on_long_rows == "drop":
            dataset.num_dropped += 1
            continue
        dataset.num_truncated += example.truncated
        notes.update(example.notes)
        if example.num_supervised == 0:
            dataset.num_unsupervised += 1
            continue
        dataset.examples.append(example)
        dataset.records.append(record)
    dataset.bad.sort(key=lambda error: line_of(error, read.file))
    dataset.notices = read.notices + [f"{note}: {counted(count)}" for note, count in sorted(notes.items())]
    dataset.notices += told_lengths(dataset)
    if config.on_bad_rows == "error" or not (dataset.examples or dataset.num_unsupervised or dataset.num_dropped):
        raise_bad_rows(dataset.bad)
    if not dataset.examples:
        raise UserError(
            "an example must have a token to learn",
            f"none in {dataset.num_unsupervised} examples cut to {config.max_seq_length} tokens"
            + f", {dataset.num_dropped} dropped as longer" * bool(dataset.num_dropped),
            "raise --max-seq-length, or shorten the prompts",
            read.file,
        )
    return dataset


def long_row(max_seq_length: int) -> BadRow:
    do = "raise --max-seq-length, shorten the row, or pass --on-long-rows cut or drop"
    return BadRow("row", f"a row must have at most {max_seq_length} tokens, as --on-long-rows error asks", "more", do)


def told_lengths(dataset: Dataset) -> list[str]:
    """Return the notices about rows longer than max_seq_length."""
    lines, most = [], f"{dataset.max_seq_length:,} tokens"
    cut = sum(example.answer_cut for example in dataset.examples) + dataset.num_unsupervised
    if cut and dataset.num_truncated:
        share = cut / (len(dataset.examples) + dataset.num_unsupervised)
        lines.append(
            f"answers are cut at {most} or lost behind them: {counted(cut)}, {share:.1%}; "
            "raise --max-seq-length, or pass --on-long-rows drop"
        )
    if dataset.num_dropped:
        lines.append(f"dropped as longer than {most}: {counted(dataset.num_dropped)}")
    return lines
