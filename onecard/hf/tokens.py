"""Tokens that a run adds to its tokenizer: read and checked, with the pieces that their text had before."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from onecard.errors import UserError
from onecard.hf.load import tokenizing

FILE = ".txt"  # how the name of a file of tokens ends
MOST_TOKENS = 1 << 16


@dataclass(frozen=True)
class NewTokens:
    """What a run adds to a tokenizer.

    Attributes:
        texts: the new tokens by id, in order.
        pieces: ids that each one's text had before, by the new id.
        known: tokens that the tokenizer had already.
    """

    texts: dict[int, str] = field(default_factory=dict)
    pieces: dict[int, list[int]] = field(default_factory=dict)
    known: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def num_rows(self) -> int:
        """Rows that a matrix must have for all of them."""
        return max(self.texts, default=-1) + 1

    def digest(self) -> str:
        """Return the sha256 of ids and texts."""
        return hashlib.sha256(json.dumps(list(self.texts.items())).encode()).hexdigest()

    def counts(self, times: list[int], rows: str = "the training rows") -> str:
        """Return the line that says how often each of them occurs."""
        shown = ", ".join(f"{text} {count:,}" for text, count in zip(self.texts.values(), times))
        return f"new tokens in {rows}: {shown}"

    def notes(self) -> list[str]:
        """Return the lines about tokens that are not added."""
        return [f"the tokenizer has {text} already: it gets no new row" for text in self.known]


def read_tokens(named: list[str] | None) -> list[str]:
    """Return the tokens that a setting lists, or those of the file that it names, one a line.

    Raises:
        UserError: a file that cannot be read; a line that is empty, has white space or is there twice.
    """
    if not named or not named[0].endswith(FILE):
        return named or []  # checked by the config
    path = Path(named[0]).expanduser()
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        must, do = "a file of tokens must be UTF-8 text, one token a line", "correct the path or the file"
        raise UserError(must, str(error), do, str(path)) from None
    counts = Counter(texts)
    for number, text in enumerate(texts, 1):
        if not text or any(char.isspace() for char in text):
            must = "a new token must be text without white space"
            raise UserError(must, repr(text), "correct the line, or remove it", f"{path}:{number}")
        if counts[text] > 1:
            must = "a new token must be listed once"
            raise UserError(must, f"{text!r}, {counts[text]} times", "remove the others", f"{path}:{number}")
    if not texts or len(texts) > MOST_TOKENS:
        must = f"a file of tokens must hold 1 to {MOST_TOKENS:,} tokens"
        raise UserError(must, f"{len(texts):,}", "correct the file", named[0])
    return texts


def add_tokens(tokenizer: Any, plain: list[str] | None, special: list[str] | None) -> NewTokens:
    """Add tokens to a tokenizer.

    Args:
        plain: words that a message may contain and an answer shows, such as <think>; see `read_tokens`.
        special: control tokens, which a message cannot contain.

    Raises:
        UserError: same as `read_tokens`; a token of both lists; a text that the tokenizer turns into no token, or into
            other tokens than the new one; no token is new.
    """
    lists = {"add_tokens": read_tokens(plain)}
    lists["add_special_tokens"] = read_tokens(special)
    both = set(lists["add_tokens"]) & set(lists["add_special_tokens"])
    if both:
        must = "a new token must be in add_tokens or in add_special_tokens"
        raise UserError(must, f"{min(both)!r} in both", "leave it out of one", "add_tokens")
    texts: dict[int, str] = {}
    pieces: dict[int, list[int]] = {}
    known: list[str] = []
    found = {text: pieces_of(tokenizer, text, name) for name, listed in lists.items() for text in listed}
    for name, listed in lists.items():
        for text in listed:
            before = found[text]
            if len(before) == 1 and before[0] != tokenizer.unk_token_id:
                known.append(text)
                continue
            if text in tokenizer.get_vocab():
                must = "a new token must not be a piece of the tokenizer's vocabulary"
                raise UserError(must, f"{text!r}, which its text does not give by itself", "leave it out", name)
            is_special = name == "add_special_tokens"
            added = AddedToken(text, special=is_special, normalized=False)
            tokenizer.add_tokens([added], special_tokens=is_special)
            number = tokenizer.convert_tokens_to_ids(text)
            if pieces_of(tokenizer, text, name) != [number]:
                must, do = "the tokenizer must turn a new token's text into that token", "choose another text"
                raise UserError(must, f"{text!r} becomes other tokens", do, name)
            texts[number], pieces[number] = text, before
    if found and not texts:
        must = "a token to add must be new"
        names = ", ".join(map(repr, known[:8]))
        do = "leave it out: it has its row, and add_tokens trains only new ones"
        raise UserError(must, f"{names}, which the tokenizer has", do, "add_tokens")
    return NewTokens(texts, pieces, tuple(known))


def pieces_of(tokenizer: Any, text: str, setting: str) -> list[int]:
    """Return the tokens of a text by itself. Raises UserError if there are none."""
    with tokenizing("the tokenizer must turn a new token's text into tokens", "choose another text", setting):
        found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not found:
        must = "the tokenizer must turn a new token's text into tokens"
        raise UserError(must, f"none for {text!r}", "choose another text", setting)
    return found
