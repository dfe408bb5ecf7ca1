"""Tokenized examples, with counts that show whether the data is what the user meant, and mixtures of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from onecard.config import DataConfig
from onecard.data.chat.mask import Example
from onecard.data.classes import ordered
from onecard.data.examples import Examples
from onecard.data.mixture import mixed
from onecard.data.records import Record
from onecard.errors import UserError

SHOWN_CLASSES = 12


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

    examples: Sequence[Example]
    format: str
    max_seq_length: int
    num_unsupervised: int = 0
    num_dropped: int = 0
    num_lost: int = 0  # rows without a supervised token because they were cut
    mapping: str = ""
    shares: list[Share] = field(default_factory=list)
    bad: list[UserError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.examples = Examples.of(self.examples)

    def first(self, count: int) -> list[Example]:
        """Return the first examples to show: of a mixture, those of each source in turn."""
        sizes = [share.taken for share in self.shares] or [len(self.examples)]
        starts = [0, *accumulate(sizes)]
        turns = [start + k for k in range(count) for start, size in zip(starts, sizes) if k < size]
        return [self.examples[at] for at in turns[:count]]

    @property
    def stored(self) -> Examples:
        """The examples, with their columns."""
        assert isinstance(self.examples, Examples)
        return self.examples

    @property
    def records(self) -> Iterator[Record]:
        """The records of the examples. The pieces of a long text have the same one."""
        return map(self.stored.record, range(len(self.examples)))

    @property
    def num_records(self) -> int:
        """Number of rows read: kept, dropped as too long, without a supervised token, and bad."""
        return self.num_documents + self.num_unsupervised + self.num_dropped + self.num_skipped

    @property
    def num_documents(self) -> int:
        """Number of rows that the examples are of. A long text is several examples, and a mixture may repeat a row."""
        return len(np.unique(self.stored.rows))

    @property
    def num_skipped(self) -> int:
        return len(self.bad)

    @property
    def row_tokens(self) -> int:
        """The most tokens in a packed row: those of one example."""
        return self.max_seq_length * (len(self.examples[0].lengths) if self.examples else 1)

    @property
    def num_tokens(self) -> int:
        return int(self.stored.lengths.sum(dtype=np.int64))

    @property
    def num_supervised_tokens(self) -> int:
        return int(self.stored.num_supervised.sum(dtype=np.int64))

    @property
    def num_truncated(self) -> int:
        return int(self.stored.column("truncated").to_numpy().sum()) + self.num_lost

    @property
    def num_cut(self) -> int:
        """Number of examples that have lost supervised tokens."""
        return int(self.stored.column("answer_cut").to_numpy().sum())

    def summary(self) -> dict[str, int | str]:
        """Return the counts for the screen and the report."""
        return {
            "format": self.format,
            "examples": len(self.examples),
            **self.judged(),
            **self.told_classes(),
            "tokens": self.num_tokens,
            "supervised tokens": self.num_supervised_tokens,
            "truncated": self.num_truncated,
            "of them with an answer cut": self.num_cut,
            "without anything to learn": self.num_unsupervised,
            "bad rows skipped": len(self.bad),
            **({"long rows dropped": self.num_dropped} if self.num_dropped else {}),
            **({"columns": self.mapping} if self.mapping else {}),
        }

    def judged(self) -> dict[str, int]:
        """Return the numbers of desirable and undesirable answers; nothing if none is undesirable."""
        count = len(self.examples) - int(self.stored.column("label").to_numpy().sum())
        return {"desirable": len(self.examples) - count, "undesirable": count} if count else {}

    @cached_property
    def classes(self) -> dict[str, int]:
        """The number of examples of each class, by its name, in the order of the classes; empty without labels."""
        counts = self.stored.column("class_name").drop_null().value_counts().to_pylist()
        found = {each["values"]: each["counts"] for each in counts}
        return {name: found[name] for name in ordered(found)}

    def told_classes(self) -> dict[str, str]:
        """Return the number of examples of each class, of some if they are many."""
        shown = [f"{name}: {count:,}" for name, count in list(self.classes.items())[:SHOWN_CLASSES]]
        more = len(self.classes) - len(shown)
        return {"classes": ", ".join([*shown, *([f"and {more:,} more"] if more else [])])} if shown else {}

    def fingerprint(self) -> str:
        """Return the sha256 of all tokens and labels, which shows whether a resumed run has the same data."""
        digest = hashlib.sha256(self.stored.digest.encode())
        if self.stored.chosen is not None:
            digest.update(np.ascontiguousarray(self.stored.chosen).data)
        return digest.hexdigest()

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Split the examples at random, by seed, into (rest, share). Each side has at least one row.

        All examples of a row are on one side, so that the held ones are not in the training.
        """
        order = torch.randperm(self.num_documents, generator=torch.Generator().manual_seed(seed)).numpy()
        if len(order) < 2:
            raise UserError("a validation split needs two examples", f"{len(order)}", "leave it out")
        num_held = min(len(order) - 1, max(1, round(share * len(order))))
        is_held = np.isin(self.stored.rows, order[:num_held])
        counts = {"num_unsupervised": 0, "num_dropped": 0, "num_lost": 0, "bad": []}  # only the rest keeps these
        rest, held = (self.take(np.flatnonzero(side)) for side in (~is_held, is_held))
        return rest, replace(held, **counts)

    def take(self, indices: Iterable[int]) -> Dataset:
        """Return the dataset with the examples at `indices` only."""
        return replace(self, examples=self.stored.take(indices))

    def check_fits(self, vocab_size: int | None, max_positions: int | None) -> None:
        """Raise UserError if a token is outside the vocabulary or an example has more tokens than max_positions."""
        largest = self.stored.column("largest").to_numpy()
        top, at = int(largest.max()), self.examples[int(largest.argmax())].where
        if vocab_size is not None and top >= vocab_size:
            raise UserError(
                "every token must be in the model's vocabulary",
                f"token {top}, {vocab_size:,} in the vocabulary",
                "use the tokenizer that belongs to the model, or resize its embeddings first",
                at,
            )
        lengths = self.stored.longest_documents
        length, at = int(lengths.max()), self.examples[int(lengths.argmax())].where
        if max_positions is not None and length > max_positions:
            raise UserError(
                "an example must fit in the model's max_position_embeddings",
                f"{length:,} tokens for {max_positions:,} positions",
                f"pass --max-seq-length {max_positions}, or scale the rope in a copy of config.json",
                at,
            )


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
        Examples.joined([each.stored.take(taken) for each, taken in zip(found, chosen)]),
        ", ".join(formats),
        config.max_seq_length,
        sum(each.num_unsupervised for each in found),
        sum(each.num_dropped for each in found),
        sum(each.num_lost for each in found),
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
