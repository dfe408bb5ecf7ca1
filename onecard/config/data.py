"""Settings of the data: how rows are read, and how long they are."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from onecard.config.strict import Strict

DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"]


class RowConfig(Strict):
    """Rows of tokens."""

    max_seq_length: int = Field(default=1024, ge=8, description="tokens; longer examples are cut, and counted")
    packing: bool = Field(default=True, description="several examples a row; they never attend to each other")


class ReadConfig(Strict):
    """Reading of a data file."""

    format: DataFormat = Field(default="auto", description="format of the data file's rows; auto recognises it")
    on_bad_rows: Literal["error", "skip"] = Field(default="error", description="rows that cannot be read")
    on_long_rows: Literal["cut", "drop", "error"] = Field(default="cut", description="rows longer than max_seq_length")


class DataConfig(RowConfig, ReadConfig):
    """Data: rows to tokens and labels."""
