"""Statistical: a tokenizer's files, however they are damaged, are read or refused; so is a text that they fail at.

Damage is drawn from fixed seeds, as in test_documents.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onecard.config import DataConfig
from onecard.data.columns import Layout
from onecard.data.records import Record, Records
from onecard.data.tokens import prepare
from onecard.errors import UserError
from onecard.hf.load import load_tokenizer
from onecard.infer.decoding import Text
from tests.conftest import CHATML, make_tokenizer
from tests.test_documents import CASES, SLOW_CASES, check, placed

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
ENDLESS = {"Regex": "([a-z ]+)+!"}
TRUNCATION = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
LETTERS = "howmanyugsbleptdir?ĠĊ"
QUESTION = "how many mugs " * 5
TURNS = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": "two blue mugs  please"})


def small_tokenizer(folder: Path) -> dict[str, Any]:
    """tokenizer.json with a part of each kind, and few tokens."""
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = [token["content"] for token in found["added_tokens"]] + list(LETTERS)
    model = found["model"] | {"vocab": {word: i for i, word in enumerate(words)}, "merges": []}
    words_apart = {**SPLIT, "pattern": {"Regex": r"\p{N}{1,3}|[^\s\p{N}]+|\s+"}}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos, text = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return found | {
        "model": model,
        "normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words_apart, as_bytes]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [words.index("<|bos|>")], "tokens": ["<|bos|>"]}},
        },
        "truncation": TRUNCATION,
        "padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<|pad|>"},
    }  # fmt: skip


class TokenizerFiles:
    """A sound file of each kind beside the others, and what reads it."""

    def __init__(self, folder: Path):
        self.folder = folder
        make_tokenizer().save_pretrained(folder)
        self.small = small_tokenizer(folder)
        (folder / "tokenizer.json").write_text(json.dumps(self.small), encoding="utf-8")

    def kinds(self) -> dict[str, tuple[Any, Callable[[bytes], object]]]:
        """As Documents.kinds."""
        special = {"bos_token": "<|bos|>", "eos_token": {"content": "<|im_end|>", "lstrip": False, "normalized": False},
                   "pad_token": "<|pad|>", "additional_special_tokens": ["<|im_start|>"]}  # fmt: skip
        return {
            "tokenizer": (self.small, lambda raw: self.used("tokenizer.json", raw)),
            "special_tokens_map": (special, lambda raw: self.used("special_tokens_map.json", raw)),
            "chat_template": (CHATML, lambda raw: self.used("chat_template.jinja", raw)),
        }

    def used(self, name: str, raw: bytes) -> str:
        """What training and an answer do with the tokenizer, with these bytes as that file."""

        def use(path: Path) -> str:
            tokenizer = load_tokenizer(str(path.parent))
            read = Records([Record("d.jsonl", 1, TURNS)], Layout("messages", ("messages",)), files=["d.jsonl"])
            found = prepare(read, tokenizer, DataConfig())
            text = Text(tokenizer)
            return "".join(map(text.push, found.examples[0].input_ids)) + text.finish()

        return placed(self.folder / name, raw, use)


KINDS = ("tokenizer", "special_tokens_map", "chat_template")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    return TokenizerFiles(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kind, files):
    check(kind, files, range(CASES))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused(kind, files):
    check(kind, files, range(CASES, SLOW_CASES))


def test_the_sound_files_keep_the_words(files):
    raw = (files.folder / "tokenizer.json").read_bytes()
    assert files.used("tokenizer.json", raw) == f"user\n{QUESTION}\nassistant\ntwo blue mugs please\n"


SLOW_PATTERN = {"type": "Split", "pattern": {"Regex": "([a-z ]+)+!"}, "behavior": "Isolated", "invert": False}
LONG_PREFIX = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "continuing_subword_prefix": "abc"}
WITHOUT_TEXT = {"single": [], "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}
UNTURNED = "the tokenizer must turn the text into tokens"
SAID = {  # a part of tokenizer.json, and a word of the error
    "a panic as the file is read": ({"model": {"type": "BPE", **LONG_PREFIX}}, "must hold a tokenizer"),
    "a split without end": ({"pre_tokenizer": {**SPLIT, "pattern": ENDLESS}}, UNTURNED),
    "a replacement without end": ({"normalizer": {"type": "Replace", "pattern": ENDLESS, "content": "x"}}, UNTURNED),
    "a form without the text": ({"post_processor": {"type": "TemplateProcessing", **WITHOUT_TEXT}}, "two tokens"),
    "a key for the terminal": ({"added_tokens": [{"id": 0, "content": "x", "\x1b[2J": 1}]}, "plain characters"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_wrong_is_said(name, files, capfd):
    part, said = SAID[name]
    with pytest.raises(UserError, match=said):
        files.used("tokenizer.json", json.dumps(files.small | part).encode())
    assert "\x1b" not in capfd.readouterr().out


def test_a_token_that_cannot_be_turned_into_text_is_an_error_of_its_answer(tmp_path):
    """Not a panic, which would end the server's thread."""
    files = TokenizerFiles(tmp_path)
    number = len(files.small["model"]["vocab"])
    word = {**files.small["added_tokens"][0], "id": number, "content": "m" * 60, "special": False}
    decoder = {"type": "Replace", "pattern": {"Regex": "(m+)+!"}, "content": "x"}
    changed = files.small | {"added_tokens": [*files.small["added_tokens"], word], "decoder": decoder}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
    text = Text(load_tokenizer(str(tmp_path)))
    with pytest.raises(UserError, match="must turn tokens into text"):
        text.push(number)


def test_an_old_processors_template_is_read(tmp_path):
    tokenizer = make_tokenizer()
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == template
    loaded.save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(str(tmp_path), tmp_path / "adapter").chat_template == template
    (tmp_path / "chat_template.json").write_text('{"chat_template": 3}', encoding="utf-8")
    with pytest.raises(UserError, match="chat_template"):
        load_tokenizer(str(tmp_path))
