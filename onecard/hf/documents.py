"""Checks the JSON documents of a checkpoint before transformers reads them.

transformers does not check their values. A number as text or a temperature of NaN would then raise transformers' own
error in the middle of a run, and the construction of a model of 10^9 layers would not end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AllowInfNan, Field, field_validator, model_validator
from torch.nn.modules.module import register_module_parameter_registration_hook

from onecard.documents import Foreign, brief, children, hold, read_object
from onecard.errors import UserError, printable

MAX_COUNT = 100_000  # of layers or experts; classes make lists of this length before they make tensors
COUNTS = re.compile(r"layer|expert|blocks|depth|num_labels", re.IGNORECASE)
LEAST_TEMPERATURE = 1e-6  # logits divided by less overflow float32
FAR_MORE = 8  # factor over what the checkpoint holds
SMALL = (1 << 24, 1000)  # weights and tensors that are always allowed
Size = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=-1, lt=1 << 31)]  # -1 means none in some models
TokenIds = TokenId | list[TokenId] | None
Token = str | dict[str, Any] | None


class GenerationDocument(Foreign):
    """The fields that we check in generation_config.json, and in an older config.json that has them."""

    eos_token_id: TokenIds = None
    bos_token_id: TokenIds = None
    pad_token_id: TokenIds = None
    do_sample: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1e6)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    repetition_penalty: float | None = Field(None, ge=1e-3, le=1e3)

    @field_validator("temperature")
    @classmethod
    def _no_overflow(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"must be 0 or at least {LEAST_TEMPERATURE}")
        return value


class Quantization(Foreign):
    """The quantization_config of a checkpoint in bitsandbytes' 4-bit format."""

    load_in_4bit: Literal[True]
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: str | None = None
    llm_int8_skip_modules: list[str] | None = None


class Mxfp4(Foreign):
    """The quantization_config of a checkpoint whose experts are in MXFP4, such as gpt-oss."""

    quant_method: Literal["mxfp4"]
    modules_to_not_convert: list[str] | None = None


class ModelDocument(GenerationDocument):
    """The fields that we check in config.json before transformers reads it."""

    model_type: str = Field(min_length=1)
    architectures: list[str] | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _counts_that_can_be(cls, content: Any) -> Any:
        for key, value in counts_of(content):
            if abs(value) > MAX_COUNT:
                raise ValueError(f"{key} must be at most {MAX_COUNT:,}, not {brief(value)}")
        return content


def counts_of(content: Any) -> Iterator[tuple[str, int | float]]:
    """Yield the counts of layers, experts and similar parts in a config.json and its nested configs."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, dict):
            yield from counts_of(value)
        elif isinstance(value, int | float) and COUNTS.search(key):
            yield key, value


class TokenDocument(Foreign):
    """A document of tokens. Its keys must be printable: the tokenizers library prints keys that it does not know."""

    @model_validator(mode="before")
    @classmethod
    def _keys_that_may_be_printed(cls, content: Any) -> Any:
        waiting = [content]
        while waiting:
            at = waiting.pop()
            for key in at if isinstance(at, dict) else ():
                if printable(key) != key:
                    raise ValueError(f"a key must be of plain characters, not {brief(key)}")
            waiting += children(at)
        return content


class TokenizerDocument(TokenDocument):
    """The fields that we check in tokenizer_config.json before transformers reads it."""

    tokenizer_class: str | None = None
    model_max_length: Annotated[float, AllowInfNan(True)] | None = Field(None, gt=0)
    chat_template: str | list[Any] | dict[str, str] | None = None
    bos_token: Token = None
    eos_token: Token = None
    pad_token: Token = None
    unk_token: Token = None
    padding_side: Literal["left", "right"] | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None
    additional_special_tokens: list[Token] | None = None


class ProcessorTemplate(Foreign):
    """chat_template.json, in which processors of transformers before 4.52 had the chat template."""

    chat_template: str


def read_model_document(folder: Path) -> dict[str, Any]:
    """Read and check config.json. Raises UserError if it is not a model's."""
    path, do = folder / "config.json", "write it with transformers' save_pretrained"
    config = read_object(path, missing=do, infinities=True)  # mamba2's time_step_limit is infinite
    hold(ModelDocument, config, str(path))
    return config


def read_generation_document(folder: Path) -> GenerationDocument:
    """Read and check generation_config.json, which may be missing. Raises UserError."""
    path, do = folder / "generation_config.json", "correct or remove it"
    return hold(GenerationDocument, read_object(path, do) if path.is_file() else {}, str(path), do)


def read_tokenizer_document(folder: Path) -> TokenizerDocument:
    """Read tokenizer_config.json and check the tokenizer's files, all of which may be missing. Raises UserError."""
    path, special = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    hold(TokenDocument, read_object(special) if special.is_file() else {}, str(special))
    check_added_tokens(folder / "tokenizer.json")
    return hold(TokenizerDocument, read_object(path, infinities=True) if path.is_file() else {}, str(path))


def read_processor_template(folder: Path) -> str | None:
    """Return the template of chat_template.json; None without that file. Raises UserError."""
    path = folder / "chat_template.json"
    return hold(ProcessorTemplate, read_object(path), str(path)).chat_template if path.is_file() else None


def check_added_tokens(path: Path) -> None:
    """Raise UserError for added tokens with unprintable keys. The tokenizers library checks the rest."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # the library reports it, if it reads the file
        return
    added = content.get("added_tokens") if isinstance(content, dict) else None
    if isinstance(added, list):
        hold(TokenDocument, {"added_tokens": added}, str(path))


@contextmanager
def far_more_refused(known: tuple[int, int] | None, where: str) -> Iterator[None]:
    """Limit a model that the body builds to FAR_MORE times the checkpoint's weights and tensors (`known`), plus SMALL.

    This stops the construction of a model that would take hours or all memory. A later check names missing tensors.
    """
    if known is None:
        yield
        return
    num_weights = num_tensors = 0

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal num_weights, num_tensors
        num_weights, num_tensors = num_weights + (0 if parameter is None else parameter.numel()), num_tensors + 1
        if num_weights > known[0] * FAR_MORE + SMALL[0] or num_tensors > known[1] * FAR_MORE + SMALL[1]:
            must = f"config.json must describe the model of the {known[0]:,} weights in {known[1]:,} tensors"
            found = f"one of more than {num_weights:,} in {num_tensors:,}"
            raise UserError(must, found, "correct it, or fetch the checkpoint again", where)

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
