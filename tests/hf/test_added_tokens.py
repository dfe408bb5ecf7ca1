"""Exact: the tokens that a setting or a file adds to a tokenizer, and the kinds that are refused."""

from pathlib import Path
from typing import Any

import pytest

from onecard.errors import UserError
from onecard.hf.tokens import NewTokens, add_tokens
from tests.conftest import make_tokenizer

WRONG: dict[str, tuple[str | list[str], list[str], str]] = {
    # kind: add_tokens, a text for a file; add_special_tokens; what the error says
    "an empty line": ("<a>\n\n<b>\n", [], "tokens.txt:2: a new token must be text without white space"),
    "a line with a space": ("<a>\n<b> \n", [], "tokens.txt:2: a new token must be text without white space"),
    "a line twice": ("<a>\n<b>\n<a>\n", [], "tokens.txt:1: a new token must be listed once"),
    "an empty file of tokens": ("", [], "must hold 1 to"),
    "no such file of tokens": (["none.txt"], [], "must be UTF-8 text, one token a line"),
    "a token in both lists": (["<a>"], ["<a>"], "in add_tokens or in add_special_tokens"),
    "only tokens that are there": (["<|im_end|>", "the"], [], "must be new"),
    "a piece of the vocabulary": (["Ġthe"], [], "must not be a piece"),
}


def add(folder: Path, kind: str) -> NewTokens:
    plain, special, _ = WRONG[kind]
    if isinstance(plain, str):
        (folder / "tokens.txt").write_text(plain, encoding="utf-8")
        plain = [str(folder / "tokens.txt")]
    return add_tokens(make_tokenizer(), plain, special)


@pytest.mark.parametrize("kind", list(WRONG))
def test_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        add(tmp_path, kind)
    assert WRONG[kind][2] in str(error.value)


def test_what_is_added(tmp_path: Path) -> None:
    tokenizer: Any = make_tokenizer()
    size, pieces = len(tokenizer), tokenizer("<think>", add_special_tokens=False)["input_ids"]
    (tmp_path / "tokens.txt").write_text("<think>\n<|im_end|>\n")
    new = add_tokens(tokenizer, [str(tmp_path / "tokens.txt")], ["<|y|>"])
    assert new.texts == {size: "<think>", size + 1: "<|y|>"} and new.num_rows == size + 2 == len(tokenizer)
    assert new.pieces[size] == pieces and len(pieces) > 1
    assert new.notes() == ["the tokenizer has <|im_end|> already: it gets no new row"]
    assert [tokenizer.added_tokens_decoder[i].special for i in new.texts] == [False, True]
    assert tokenizer("a<think>b", add_special_tokens=False)["input_ids"][1] == size
    assert not add_tokens(tokenizer, None, None)
