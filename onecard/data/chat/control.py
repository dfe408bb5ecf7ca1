"""Keep control tokens in messages as text: only those of the chat template become tokens.

"<|im_end|>" in a user's message must not end the turn. Before the template is rendered, `as_text` inserts BREAK, which
a text must not contain, after the first character of the spelling. `encode_text` tokenizes the text before and after
BREAK separately and drops BREAK. So the message keeps its characters, and the tokens are those of "<" and "|im_end|>".

Control tokens are the tokenizer's special tokens and those of END_NAMES that it has. Other added tokens, such as
"<think>" or runs of spaces, are words that a message may contain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from onecard.data.calls import strings_in
from onecard.data.files import FIX
from onecard.data.records import Record
from onecard.errors import UserError
from onecard.hf.load import tokenizing

TEMPLATED = "pass --text-is-templated if the chat template wrote the text, or correct the row"
BREAK = "\ufdd0"  # a Unicode noncharacter, which text for exchange does not contain
END_NAMES = (  # tokens that end a turn, for templates where the position of a special token does not show it
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eom_id|>",
    "<|return|>",
    "</s>",
    "<|END_OF_TURN_TOKEN|>",
)


@dataclass(frozen=True)
class Specials:
    """A tokenizer's control tokens: names, a pattern that matches one, and ids without the unknown token's id."""

    names: frozenset[str]
    pattern: re.Pattern[str]
    ids: frozenset[int]


def specials_of(tokenizer: Any) -> Specials:
    return cached_specials(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=4)
def cached_specials(tokenizer: Any, size: int, named: tuple[str, ...]) -> Specials:
    """Compute `specials_of`. `size` and `named` are cache keys: they show that the tokenizer has changed."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special or str(token) in END_NAMES} | set(named) - {""}
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in longest_first) or "(?!)"
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names} - {tokenizer.unk_token_id, None}
    return Specials(frozenset(names), re.compile(pattern), frozenset(ids))


def as_text(text: str, tokenizer: Any) -> str:
    """Insert BREAK into every spelling of a control token, so that `encode_text` keeps it as text.

    Raises:
        UserError: the text contains BREAK.
    """
    refuse_break(text, "text")
    pattern = specials_of(tokenizer).pattern
    return pattern.sub(lambda found: found.group()[0] + BREAK + found.group()[1:], text)


def refuse_break(value: Any, where: str) -> None:
    """Raise UserError if a string of a JSON value contains BREAK, which would be lost."""
    for field, text in strings_in(where, value):
        if BREAK in text:
            must = "text must not contain the noncharacter U+FDD0, which onecard uses to mark control tokens"
            raise UserError(must, f"one at {text.index(BREAK)}", FIX, field)


def messages_as_text(messages: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    refuse_break(messages, "messages")
    return [
        {key: as_text(value, tokenizer) if isinstance(value, str) else value for key, value in turn.items()}
        for turn in messages
    ]


def encode_text(
    text: str, tokenizer: Any, where: str, cuts: tuple[int, ...] = (), with_spans: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return tokens and their character spans ([] if the tokenizer has no offsets). No token crosses a cut or BREAK.

    A cut is where generation begins. There the tokenizer must not join the prompt's last characters with the answer's
    first ones, because the model never sees the joined token after a prompt. Spans take a tenth of the time.

    Raises:
        UserError: the tokenizer fails on the text; a control token that the text does not spell, such as one that the
            normalizer makes.
    """
    specials, num_spelled = specials_of(tokenizer), 0
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in pieces(text, cuts):
        with tokenizing("the tokenizer must turn the text into tokens", FIX, f"{where}:row"):
            coded, spans = encode_piece(text[start:end], start > 0, tokenizer, with_spans)
        ids += coded
        offsets += [(start + a, start + b) for a, b in spans] if start else spans
        num_spelled += len(specials.pattern.findall(text, start, end))
    if not specials.ids.isdisjoint(ids) and sum(token in specials.ids for token in ids) > num_spelled:
        must = "text must not become the tokenizer's control tokens"
        raise UserError(must, "one that comes from other characters", FIX, f"{where}:row")
    return ids, offsets


def pieces(text: str, cuts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each piece that is tokenized separately."""
    start = 0
    for edge in sorted({*cuts, *(found.start() for found in re.finditer(BREAK, text)), len(text)}):
        if edge > start:
            yield start, edge
        start = edge + text.startswith(BREAK, edge)


def encode_ids(text: str, tokenizer: Any, where: str) -> list[int]:
    """Return the tokens of `encode_text`."""
    return encode_text(text, tokenizer, where, with_spans=False)[0]


def encode_piece(
    piece: str, goes_on: bool, tokenizer: Any, with_spans: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the tokens and spans of a piece. `goes_on`: the piece is not the beginning of its text.

    Such a piece is tokenized after a line break, which is then removed, because SentencePiece tokenizers begin every
    text with a space. If the break joins the piece's first token, the piece is tokenized without the break.
    """
    if goes_on:
        head, _ = encode_piece("\n", False, tokenizer, False)
        ids, spans = encode_piece("\n" + piece, False, tokenizer, with_spans)
        if ids[: len(head)] == head:
            return ids[len(head) :], [(max(a - 1, 0), b - 1) for a, b in spans[len(head) :]]
    coded = tokenizer(
        piece,
        add_special_tokens=False,
        return_offsets_mapping=with_spans and tokenizer.is_fast,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return list(coded["input_ids"]), coded.get("offset_mapping", [])


def refuse_control_tokens(record: Record, tokenizer: Any) -> None:
    """Raise UserError if learned text, or a row of raw text, spells a control token, or if any text contains BREAK.

    The model would learn to write the token as letters. Usually a chat template was already applied to the row.
    """
    for name in ("text", "prompt", "completion", "tools"):
        refuse_break(getattr(record, name), f"{record.where}:{name}")
    for i, turn in enumerate(record.messages or ()):
        for key, value in turn.items():
            field = record.field_of(i) if key == "content" else f"messages[{i}].{key}"
            refuse_break(value, f"{record.where}:{field}")
    if record.templated:
        return
    pattern = specials_of(tokenizer).pattern
    for field, text in learned_texts(record):
        match = pattern.search(text)
        if match is not None:
            raise UserError(
                "supervised text must not contain control tokens",
                f"{match.group()!r} at {match.start()}",
                FIX
                if field != "text"
                else "pass --text-is-templated if the chat template wrote the text, or remove it",
                f"{record.where}:{field}",
            )


def learned_texts(record: Record) -> Iterator[tuple[str, str]]:
    """Yield (field, text) of a record, with tool calls and tools, but without the messages to the assistant."""
    for field in ("text", "prompt", "completion"):
        if getattr(record, field) is not None:
            yield field, getattr(record, field)
    for i, turn in enumerate(record.messages or ()):
        if turn["role"] == "assistant":
            yield record.field_of(i), turn["content"]
            for key in turn:
                if key not in ("content", "role"):
                    yield from strings_in(f"messages[{i}].{key}", turn[key])
    yield from strings_in("tools", record.tools)
