"""How llama.cpp's named pre-tokenizers split text. A GGUF file holds such a name and no regular expression."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, pre_tokenizers

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"\p{Lt}\p{Lm}\p{Lo}\p{M}"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}{LETTERS}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}{LETTERS}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{SYMBOLS}|{SPACES}"
PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
TEKKEN = rf"{CASED}|{CAPITALS}|\p{{N}}|{PATHS}|{SPACES}"
GPT4O = rf"{CASED}{CONTRACTIONS}?|{CAPITALS}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{PATHS}|{SPACES}"
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool]] = {
    # llama.cpp's name: regular expressions, each splits the pieces so far; whether a piece that is a token stays whole
    "gpt-2": ((GPT2,), False),
    "llama-bpe": ((LLAMA3,), True),
    "smaug-bpe": ((LLAMA3,), False),
    "qwen2": ((QWEN2,), False),
    "tekken": ((TEKKEN,), True),
    "gpt-4o": ((GPT4O,), False),
    "smollm": ((r"\p{N}", GPT2), False),
    "deepseek-coder": ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"), False),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
    "superbpe": ((r"\p{N}+", r"(?=(\d{3})+(?!\d))"), False),
}


def cutter(splits: tuple[str, ...]) -> Any:
    """Return a pre-tokenizer that splits text as llama.cpp does with these regular expressions."""
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
