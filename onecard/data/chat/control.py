"""Control tokens: the chat template's become tokens, a person's words that spell one stay text.

"<|im_end|>" in a user's message must not end the turn. `as_text` puts BREAK, which no text holds, behind the
spelling's first character before the template is rendered; `encode_text` tokenizes what stands around it apart and
leaves it out. So the message keeps its characters, and the tokens are those of "<" and "|im_end|>".

Control tokens are the tokenizer's special ones and those of END_NAMES that it has. Other added tokens, such as
"<think>" or runs of spaces, are words that a message may hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from onecard.data.calls import strings_in
from onecard.data.records import FIX, Record
from onecard.errors import UserError
from onecard.hf.load import tokenizing

BREAK = "\ufdd0"  # a noncharacter of Unicode, never in text that is exchanged
END_NAMES = (  # of tokens that end a turn, for templates whose special tokens do not tell it by their place
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
    """A tokenizer's control tokens: their names, a pattern that finds one, and their ids less the unknown token's."""

    names: frozenset[str]
    pattern: re.Pattern[str]
    ids: frozenset[int]


def specials_of(tokenizer: Any) -> Specials:
    return cached_specials(tokenizer, len(tokenizer), tuple(tokenizer.all_special_tokens))


@lru_cache(maxsize=4)
def cached_specials(tokenizer: Any, size: int, named: tuple[str, ...]) -> Specials:
    """specials_of; `size` and `named` tell a tokenizer that was changed from the one that is cached."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in added if token.special or str(token) in END_NAMES} | set(named) - {""}
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in longest_first) or "(?!)"
    ids = {tokenizer.convert_tokens_to_ids(name) for name in names} - {tokenizer.unk_token_id, None}
    return Specials(frozenset(names), re.compile(pattern), frozenset(ids))


def as_text(text: str, tokenizer: Any) -> str:
    """The text with every control token's spelling broken, for a template's rendering and encode_text."""
    pattern = specials_of(tokenizer).pattern
    return pattern.sub(lambda found: found.group()[0] + BREAK + found.group()[1:], text.replace(BREAK, ""))


def messages_as_text(messages: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {key: as_text(value, tokenizer) if isinstance(value, str) else value for key, value in turn.items()}
        for turn in messages
    ]


def encode_text(
    text: str, tokenizer: Any, where: str, cuts: tuple[int, ...] = ()
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens and their character spans (none of a tokenizer that knows no offsets), no token across a cut or BREAK.

    The cuts are where generation begins: a tokenizer that would join the prompt's last characters with the answer's
    first ones must not, since the model never sees that token after a prompt.

    Raises:
        UserError: a text that the tokenizer fails at; a control token that nothing spells, such as one that its
            normalizer makes.
    """
    specials, num_spelled = specials_of(tokenizer), 0
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end in pieces(text, cuts):
        with tokenizing("the tokenizer must turn the text into tokens", FIX, f"{where}:row"):
            coded, spans = encode_piece(text[start:end], start > 0, tokenizer)
        ids += coded
        offsets += [(start + a, start + b) for a, b in spans]
        num_spelled += len(specials.pattern.findall(text, start, end))
    if sum(token in specials.ids for token in ids) > num_spelled:
        must = "text must not become the tokenizer's control tokens"
        raise UserError(must, "one that comes from other characters", FIX, f"{where}:row")
    return ids, offsets


def pieces(text: str, cuts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, end) of what is tokenized apart."""
    start = 0
    for edge in sorted({*cuts, *(found.start() for found in re.finditer(BREAK, text)), len(text)}):
        if edge > start:
            yield start, edge
        start = edge + text.startswith(BREAK, edge)


def encode_piece(piece: str, goes_on: bool, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens and spans of a text, or of one that goes on.

    That one is tokenized behind a line break, which is taken off again: SentencePiece tokenizers begin every text
    with a space. Where the break joins the piece's first token, the piece is tokenized as it is.
    """
    if goes_on:
        head, _ = encode_piece("\n", False, tokenizer)
        ids, spans = encode_piece("\n" + piece, False, tokenizer)
        if ids[: len(head)] == head:
            return ids[len(head) :], [(max(a - 1, 0), b - 1) for a, b in spans[len(head) :]]
    coded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    return list(coded["input_ids"]), coded.get("offset_mapping", [])


def refuse_control_tokens(record: Record, tokenizer: Any) -> None:
    """Raise UserError if what is learned, or a row of raw text, spells a control token.

    The model would learn to write the token in letters; mostly the row has been through a chat template already.
    """
    pattern = specials_of(tokenizer).pattern
    for field, text in learned_texts(record):
        match = pattern.search(text)
        if match is not None:
            raise UserError(
                "learned text, and rows of raw text, must not spell control tokens",
                f"{match.group()!r} at {match.start()}",
                FIX,
                f"{record.where}:{field}",
            )


def learned_texts(record: Record) -> Iterator[tuple[str, str]]:
    """(field, text) of a record but for what others say to the assistant; tool calls' names and arguments too."""
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
