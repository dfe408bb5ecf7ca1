"""Tokenize sources to examples, with counts that show whether the data is what the user meant.

Each source is a Dataset of its own. With several sources, the examples are a mixture of theirs (`mixture.py`).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from onecard.config import FORMATS_OF, Data, DataConfig
from onecard.data.chat.mask import IGNORE, Example, encode
from onecard.data.columns import KEYS, LOSSES
from onecard.data.files import BadRow, Reading
from onecard.data.mixture import mixed
from onecard.data.records import Record, Records, counted, raise_bad_rows, read_records, row_error, unpaired
from onecard.data.sources import sources_of
from onecard.errors import UserError

WHOLE = 1 << 40  # tokens, more than any document has


@dataclass(frozen=True)
class Share:
    """What a source gives to a mixture, for the screen and the report.

    Attributes:
        mapping: of its columns, as its flag takes it.
        weight: its share of the examples; None if all sources are taken whole.
        rows, examples, tokens, supervised_tokens: of the source; taken: examples in the mixture, with repeated ones.
    """

    path: str
    format: str
    mapping: str
    rows: int
    examples: int
    tokens: int
    supervised_tokens: int
    weight: float | None
    taken: int

    def cells(self) -> dict[str, str]:
        """Return the row of the table of sources, by the names of its columns."""
        return {
            "source": self.path,
            "format": self.format,
            "columns": self.mapping,
            "rows": f"{self.rows:,}",
            "examples": f"{self.examples:,}",
            "tokens": f"{self.tokens:,}",
            "supervised": f"{self.supervised_tokens / self.tokens:.1%}",
            "weight": "all" if self.weight is None else f"{self.weight:.3g}",
            "taken": f"{self.taken:,}",
        }


@dataclass
class Dataset:
    """Tokenized examples with at least one supervised token each. Of a long text, several are of one record."""

    examples: list[Example]
    records: list[Record]
    format: str
    max_seq_length: int
    num_truncated: int = 0
    num_unsupervised: int = 0
    num_dropped: int = 0
    mapping: str = ""
    shares: list[Share] = field(default_factory=list)
    bad: list[UserError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def num_records(self) -> int:
        """Number of rows read: kept, dropped as too long, without a supervised token, and bad."""
        return self.num_documents + self.num_unsupervised + self.num_dropped + self.num_skipped

    @property
    def num_documents(self) -> int:
        """Number of rows that the examples are of. A long text is several examples, and a mixture may repeat a row."""
        return len({example.where for example in self.examples})

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
            **({"columns": self.mapping} if self.mapping else {}),
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
        """Split the examples at random, by seed, into (rest, share). Each side has at least one row.

        All examples of a row are on one side, so that the held ones are not in the training.
        """
        rows = list(dict.fromkeys(example.where for example in self.examples))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        if len(order) < 2:
            raise UserError("a validation split needs two examples", f"{len(order)}", "leave it out")
        num_held = min(len(order) - 1, max(1, round(share * len(order))))
        held = {rows[index] for index in order[:num_held]}
        sides = [[i for i, e in enumerate(self.examples) if (e.where in held) == is_held] for is_held in (False, True)]
        counts = {"num_unsupervised": 0, "num_dropped": 0, "bad": []}  # only the rest keeps these
        return self.take(sides[0]), replace(self.take(sides[1]), **counts)

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


def load_dataset(data: Data, tokenizer: Any, config: DataConfig, loss: str | None = "sft") -> Dataset:
    """Read, check and tokenize data. Several sources become a mixture.

    Args:
        loss: the loss that learns the data. "kto" makes two examples of a pair. None: any, to show the data.

    Raises:
        UserError: same as sources_of, read_records and prepare; a format that the loss does not learn;
            text_is_templated, and no source is text.
    """
    sources, found = sources_of(data, config), []
    formats = tuple(KEYS) if loss is None else FORMATS_OF[loss]
    for source in sources:
        if source.format is not None and source.format not in ("auto", *formats):
            must = f"the rows must have a format that is learned with loss {loss}: {', '.join(formats)}"
            raise UserError(must, source.format, f"train on such rows with {LOSSES[source.format]}", "format")
    for source in sources:
        reading = Reading(source.encoding, config.sample_by, source.split)
        read = read_records(source, on_bad_rows="skip", formats=formats, reading=reading)
        found.append(prepare(unpaired(read) if loss == "kto" else read, tokenizer, config))
    if config.text_is_templated and all(dataset.format != "text" for dataset in found):
        must = "text_is_templated is for rows of text, which the chat template has written"
        raise UserError(must, f"rows of {found[0].format}", "leave it out", sources[0].path)
    if len(found) == 1:
        return found[0]
    weights = [source.weight for source in sources]
    return mix(found, [source.path for source in sources], weights, config)


def mix(found: list[Dataset], paths: list[str], weights: list[float | None], config: DataConfig) -> Dataset:
    """Return the mixture of the sources' examples, in the order of the sources. The loader shuffles it."""
    if len({len(each.examples[0].lengths) for each in found}) > 1:
        kinds = ", ".join(each.format for each in found)
        raise UserError("preferences cannot be mixed with other rows", kinds, "give them to a run of their own", "data")
    shares = [weight / sum(filter(None, weights)) for weight in weights if weight is not None]
    chosen = mixed([len(each.examples) for each in found], shares, config.stopping_strategy, config.seed)
    formats = dict.fromkeys(each.format for each in found)
    rows = [
        Share(
            path,
            each.format,
            each.mapping,
            each.num_records,
            len(each.examples),
            each.num_tokens,
            each.num_supervised_tokens,
            share,
            len(taken),
        )
        for path, each, share, taken in zip(paths, found, shares or weights, chosen)
    ]
    return Dataset(
        [each.examples[index] for each, taken in zip(found, chosen) for index in taken],
        [each.records[index] for each, taken in zip(found, chosen) for index in taken],
        ", ".join(formats),
        config.max_seq_length,
        sum(each.examples[index].truncated for each, taken in zip(found, chosen) for index in taken),
        sum(each.num_unsupervised for each in found),
        sum(each.num_dropped for each in found),
        shares=rows,
        bad=[error for each in found for error in each.bad],
        notices=[f"{path}: {line}" for path, each in zip(paths, found) for line in each.notices]
        + told_mixture(rows, config),
    )


def told_mixture(rows: list[Share], config: DataConfig) -> list[str]:
    """Return the notices about the examples that a weighted mixture leaves out or repeats."""
    if rows[0].weight is None:
        return []
    left, again = (sum(max(0, sign * (row.examples - row.taken)) for row in rows) for sign in (1, -1))
    if config.stopping_strategy == "first_exhausted":
        do = "; --stopping-strategy all_exhausted takes every one, some again"
        return [f"the weights leave out {left:,} examples, since none is taken twice{do}"] if left else []
    return [f"the weights take {again:,} examples again"] if again else []


def prepare(read: Records, tokenizer: Any, config: DataConfig) -> Dataset:
    """Tokenize records.

    Raises:
        UserError: bad rows, from reading and tokenizing in one list, unless they are skipped and other rows remain;
            no example has a supervised token.
    """
    dataset = Dataset([], [], read.format, config.max_seq_length, mapping=read.layout.mapping, bad=list(read.bad))
    notes: Counter[str] = Counter()
    num_split = 0
    for record in read.records:
        try:
            if config.text_is_templated and record.text is not None:
                record = replace(record, templated=True)
            examples = encode_row(record, tokenizer, config)
        except UserError as error:
            field = (error.where or "").removeprefix(f"{record.where}:")
            if field == error.where or error.where is None:
                raise
            where = f"{record.where}:{read.layout.in_file(field)}"
            dataset.bad.append(UserError(error.must, error.found, error.do, where))
            continue
        if examples[0].truncated and config.on_long_rows == "drop":
            dataset.num_dropped += 1
            continue
        num_split += len(examples) > 1
        dataset.num_truncated += examples[0].truncated
        notes.update(examples[0].notes)
        if all(example.num_supervised == 0 for example in examples):
            dataset.num_unsupervised += 1
            continue
        dataset.examples += examples
        dataset.records += [record] * len(examples)
    read.sort_bad(dataset.bad)
    dataset.notices = read.notices + [f"{note}: {counted(count)}" for note, count in sorted(notes.items())]
    dataset.notices += told_lengths(dataset, num_split)
    if config.on_bad_rows == "error" or not (dataset.examples or dataset.num_unsupervised or dataset.num_dropped):
        raise_bad_rows(dataset.bad)
    if not dataset.examples:
        raise UserError(
            "an example must have a token to learn",
            f"none in {dataset.num_unsupervised} examples cut to {config.max_seq_length} tokens"
            + f", {dataset.num_dropped} dropped as longer" * bool(dataset.num_dropped),
            "raise --max-seq-length, or shorten the prompts",
            read.source,
        )
    return dataset


def encode_row(record: Record, tokenizer: Any, config: DataConfig) -> list[Example]:
    """Encode a record: one example, or the pieces of a long text. Raises UserError, same as mask.encode."""
    how, most = config.on_long_rows, config.max_seq_length
    is_text = record.text is not None
    splits = is_text and (how == "split" or (how == "auto" and not record.templated))
    example = encode(record, tokenizer, WHOLE if splits else most, config.train_on)
    if min(example.lengths) < 2:
        short = BadRow("row", "an example must have two tokens", str(min(example.lengths)))
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


def told_lengths(dataset: Dataset, num_split: int) -> list[str]:
    """Return the notices about rows longer than max_seq_length."""
    lines, most = [], f"{dataset.max_seq_length:,} tokens"
    if num_split:
        more = len(dataset.examples) - dataset.num_documents
        lines.append(f"split into pieces of {most}: {counted(num_split)} of text, {more:,} examples more")
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
