"""Load data: each source is tokenized to a dataset of its own, or read from disk where it was tokenized before. With
several sources, the examples are a mixture of theirs (`mixture.py`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from onecard.config import FORMATS_OF, Data, DataConfig, Source, parse_bytes
from onecard.data.columns import KEYS, LOSSES
from onecard.data.dataset import Dataset, mix
from onecard.data.files import Reading
from onecard.data.records import Records, counted, open_records
from onecard.data.sources import local_files, sources_of
from onecard.data.store import Store, key_of
from onecard.data.tokens import prepare
from onecard.errors import UserError


def load_dataset(data: Data, tokenizer: Any, config: DataConfig, loss: str | None = "sft") -> Dataset:
    """Read, check and tokenize data. Several sources become a mixture.

    Args:
        loss: the loss that learns the data, or the task of a head. "kto" makes two examples of a pair. None: any, to
            show the data.

    Raises:
        UserError: same as sources_of, read_records and prepare; a format that the loss does not learn;
            text_is_templated, and no source is text.
    """
    sources, formats = learned_sources(data, config, loss)
    found = [load_source(source, tokenizer, config, formats, loss) for source in sources]
    check_templated(config, [dataset.format for dataset in found], sources[0])
    if len(found) == 1:
        return found[0]
    weights = [source.weight for source in sources]
    return mix(found, [source.path for source in sources], weights, config)


def learned_sources(data: Data, config: DataConfig, loss: str | None) -> tuple[list[Source], tuple[str, ...]]:
    """Return the sources and the formats that a loss learns. Raises UserError if a source has another format."""
    sources = sources_of(data, config)
    formats = tuple(KEYS) if loss is None else FORMATS_OF[loss]
    for source in sources:
        if source.format is not None and source.format not in ("auto", *formats):
            what = f"task {loss}" if loss in ("classification", "reward") else f"loss {loss}"
            must = f"the rows must have a format that is learned with {what}: {', '.join(formats)}"
            raise UserError(must, source.format, f"train on such rows with {LOSSES[source.format]}", "format")
    return sources, formats


def check_templated(config: DataConfig, formats: list[str], source: Source) -> None:
    """Raise UserError for text_is_templated if no source is text."""
    if config.text_is_templated and "text" not in formats:
        must = "text_is_templated is for rows of text, which the chat template has written"
        raise UserError(must, f"rows of {formats[0]}", "leave it out", source.path)


def load_source(
    source: Source, tokenizer: Any, config: DataConfig, formats: tuple[str, ...], loss: str | None
) -> Dataset:
    """Tokenize a source, or read it from the disk. Raises UserError, same as open_records and prepare."""
    reading = Reading(source.encoding, config.sample_by, source.split)
    key = key_of(local_files(source), tokenizer, source, config, [*formats, loss])
    store = Store(config.data_cache, key, parse_bytes(config.data_cache_size))
    if (found := store.read()) is not None:
        return found
    try:
        read = open_records(source, formats, reading)
        if loss in ("classification", "reward") or read.format == "classification":
            read = pooled(read)
        return store.keep(prepare(unpaired(read) if loss == "kto" else read, tokenizer, config, store))
    except BaseException:
        store.discard()
        raise


def unpaired(read: Records) -> Records:
    """Make two judged answers of each row of preferences: all chosen ones, then all rejected ones, as trl does."""
    records = list(read.records)
    pairs = [record for record in records if record.rejected is not None]
    if not pairs:
        return replace(read, records=records)
    chosen = [replace(record, rejected=None) for record in records]
    rejected = [replace(record.rejected, label=False) for record in pairs if record.rejected is not None]
    notice = f"each pair is read as a desirable and an undesirable answer: {counted(len(pairs))}"
    return replace(read, records=chosen + rejected, notices=[*read.notices, notice])


def pooled(read: Records) -> Records:
    """Mark the records, also rejected ones, as documents that a classification head reads."""
    read.records = (
        replace(record, is_pooled=True, rejected=record.rejected and replace(record.rejected, is_pooled=True))
        for record in read.records
    )
    return read
