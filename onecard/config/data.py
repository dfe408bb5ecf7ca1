"""Settings of the data: how rows are read, and how long they are."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator

from onecard.config.strict import Strict

TrainOn = Literal["completion", "last", "all"]
DataFormat = Literal[
    "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "preference", "unpaired_preference"
]
SFT_FORMATS = ("messages", "prompt_completion", "alpaca", "sharegpt", "text")
PAIRS = ("preference",)
FORMATS_OF: dict[str, tuple[str, ...]] = {  # the formats that a loss reads
    "sft": SFT_FORMATS,
    **dict.fromkeys(("dpo", "ipo", "orpo", "simpo"), PAIRS),
    "kto": ("unpaired_preference", *PAIRS),
}


class RowConfig(Strict):
    """Rows of tokens."""

    max_seq_length: int = Field(default=1024, ge=8, description="tokens; longer examples are cut, and counted")
    packing: bool = Field(default=True, description="several examples a row; they never attend to each other")


class ReadConfig(Strict):
    """Reading of a data file."""

    format: DataFormat = Field(default="auto", description="format of the data file's rows; auto recognises it")
    on_bad_rows: Literal["error", "skip"] = Field(default="error", description="rows that cannot be read")
    on_long_rows: Literal["cut", "drop", "error"] = Field(default="cut", description="rows longer than max_seq_length")
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


class DataConfig(RowConfig, ReadConfig):
    """Data: rows to tokens and labels."""
