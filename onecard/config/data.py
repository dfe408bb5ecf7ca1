"""Settings of the data: its sources, how their rows are read, and how long rows are."""

from __future__ import annotations

import codecs
import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from onecard.config.strict import Strict, parse_bytes
from onecard.errors import UserError, did_you_mean

TrainOn = Literal["completion", "last", "all"]
DataFormat = Literal[
    "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "preference", "unpaired_preference",
    "classification",
]  # fmt: skip
SFT_FORMATS = ("messages", "prompt_completion", "alpaca", "sharegpt", "text")
PAIRS = ("preference",)
FORMATS_OF: dict[str, tuple[str, ...]] = {  # the formats that a loss, or the task of a head, reads
    "sft": SFT_FORMATS,
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), PAIRS),
    "kto": ("unpaired_preference", *PAIRS),
    "classification": ("classification",),
    "reward": PAIRS,
}
Columns = dict[str, str]
ROLES = ("prompt", "completion", "messages", "text", "system", "chosen", "rejected", "label")


def parse_columns(value: Any) -> Any:
    """Convert "prompt=question,completion=answer", or a list of such texts, to a mapping. Raises ValueError."""
    if isinstance(value, str | list | tuple):
        words = [value] if isinstance(value, str) else list(map(str, value))
        parts = [part for word in words for part in re.split(r",(?=\s*\w+=)", word)]
        pairs = [(role.strip(), column.strip()) for role, _, column in (part.partition("=") for part in parts)]
        value = dict(pairs)
        if len(value) < len(pairs):
            raise ValueError("must map each name once")
    if not isinstance(value, dict) or not value:
        return value
    for role, column in value.items():
        if role not in ROLES:
            raise ValueError(f'must map {", ".join(ROLES)}, not "{role}"{did_you_mean(str(role), ROLES)}')
        if not isinstance(column, str) or not column:
            raise ValueError(f"must name a column, such as {role}=question")
    if len(set(value.values())) < len(value):
        raise ValueError("must map each column once")
    return value


def check_encoding(value: str | None) -> str | None:
    """Raise ValueError unless Python has such an encoding of text."""
    try:
        if value is not None:
            codecs.getincrementaldecoder(value)
            "".encode(value)
    except LookupError:
        raise ValueError("must be an encoding that Python knows, such as cp1252") from None
    return value


class RowConfig(Strict):
    """Rows of tokens."""

    max_seq_length: int = Field(default=1024, ge=8, description="tokens; longer examples: see on_long_rows")
    packing: bool = Field(default=True, description="several examples a row; they never attend to each other")


class Source(Strict):
    """One source of a mixture. What is not set here is as the settings of all sources say."""

    path: str = Field(min_length=1, description="file, folder, pattern such as data/*.jsonl, or hub id[:config]")
    format: DataFormat | None = None
    columns: Columns | None = None
    encoding: str | None = None
    weight: float | None = Field(default=None, gt=0, description="share of the examples of the mixture")
    max_rows: int | None = Field(default=None, ge=1, description="only so many first rows")
    split: str | None = Field(default=None, min_length=1, description="of a hub dataset, a DatasetDict, a .json file")

    _columns = field_validator("columns", mode="before")(parse_columns)
    _encoding = field_validator("encoding")(check_encoding)


def parse_data(value: Any) -> Any:
    """Check data: a path, a source, or a list of these. Raises ValueError, whose text says what is wrong."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("must name a file")
        return [each if isinstance(each, str) else one_source(each) for each in value]
    return value if isinstance(value, str) else [one_source(value)]


def one_source(value: Any) -> Source:
    if isinstance(value, Source):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a path, or a list of paths and of mappings with path, weight and more")
    try:
        return Source(**value)
    except UserError as error:
        raise ValueError(f"{error.must}: found {error.found}") from None


Data = Annotated[str | list[str | Source], BeforeValidator(parse_data)]


class ReadConfig(Strict):
    """Reading of data."""

    columns: Columns | None = Field(
        default=None, description="names of the data's columns, such as prompt=question,completion=answer"
    )
    encoding: str | None = Field(
        default=None, description="encoding of text files, such as cp1252; default: UTF-8, or UTF-16 with its mark"
    )
    sample_by: Literal["paragraph", "document", "line"] = Field(
        default="paragraph", description="what a .txt file is split into; a paragraph ends at a blank line"
    )
    text_is_templated: bool = Field(
        default=False, description="rows of text are written by the chat template: their control tokens are meant"
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = Field(
        default="first_exhausted",
        description="weighted sources: first_exhausted takes no row twice; all_exhausted takes each row, some again",
    )
    seed: int = Field(
        default=42, ge=0, lt=2**63, description="of the start of LoRA, the order of rows, dropout, and weighted sources"
    )
    data_cache: str = Field(
        default="auto",
        description="folder for tokenized data of more than a million tokens; auto: onecard/data in the user's cache",
    )
    data_cache_size: str = Field(
        default="100GB", description="most that data_cache keeps; the least recently used data is removed"
    )
    on_bad_rows: Literal["error", "skip"] = Field(default="error", description="rows that cannot be read")
    on_long_rows: Literal["auto", "cut", "split", "drop", "error"] = Field(
        default="auto", description="rows longer than max_seq_length; auto: split of plain text, cut of others"
    )
    train_on: TrainOn = Field(
        default="completion",
        description="completion: each answer of the assistant; last: the last one of a chat; all: prompts, too",
    )
    chat_template: str | None = Field(
        default=None, description="file of a chat template that replaces the tokenizer's; saved with the adapter"
    )
    chat_template_kwargs: dict[str, Any] | str | None = Field(
        default=None,
        description='variables of the chat template, such as {"enable_thinking": false}; saved with the adapter',
    )

    _columns = field_validator("columns", mode="before")(parse_columns)
    _encoding = field_validator("encoding")(check_encoding)

    @field_validator("data_cache_size")
    @classmethod
    def _a_size(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _an_object(cls, value: dict[str, Any] | str | None) -> dict[str, Any] | None:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"must be a JSON object: {error}") from None
        if value is not None and not isinstance(value, dict):
            raise ValueError("must be a JSON object")
        return value

    @property
    def template_variables(self) -> dict[str, Any]:
        assert not isinstance(self.chat_template_kwargs, str)  # the validator has parsed it
        return self.chat_template_kwargs or {}


class FormatConfig(ReadConfig):
    """Format of data."""

    format: DataFormat = Field(default="auto", description="format of the rows; auto recognises it")


class DataConfig(RowConfig, FormatConfig):
    """Data: rows to tokens and labels."""

    @model_validator(mode="after")
    def _templated_text_is_text(self) -> DataConfig:
        if self.text_is_templated and self.format not in ("auto", "text"):
            raise ValueError("text_is_templated is for format text")
        return self
