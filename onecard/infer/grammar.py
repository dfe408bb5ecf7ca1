"""Answers and calls of tools that match a JSON schema: before each token, the logits of all tokens that the schema does
not allow become -inf.

llguidance computes the allowed tokens (it parses the answer so far, Earley 1970, over a trie of the vocabulary). White
space between JSON tokens is fixed: small models write spaces without an end where any number is allowed.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from onecard.errors import UserError, one_line

LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """The tokens that may follow, of one answer.

    Args:
        schema: a JSON schema; `check_schema` has accepted it.
        ends: end tokens. They are allowed when the answer is complete.
        vocab_size: number of tokens.
    """

    def __init__(self, tokenizer: Any, schema: dict[str, Any], ends: tuple[int, ...], vocab_size: int):
        from llguidance import LLMatcher

        self.matcher = LLMatcher(trie(tokenizer, ends, vocab_size), compiled(schema), log_level=0)
        self.check()

    def mask(self, logits_1V: Tensor) -> Tensor:
        """Return the logits with -inf for each token that is not allowed."""
        allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        self.check()
        forbidden_V = torch.ones(logits_1V.shape[1], dtype=torch.bool)  # a head may have more rows than tokens
        forbidden_V[: len(allowed)] = ~allowed[: len(forbidden_V)]
        return logits_1V.masked_fill(forbidden_V.to(logits_1V.device), -torch.inf)

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)
        self.check()

    @property
    def complete(self) -> bool:
        """Whether only an end token may follow."""
        return self.matcher.is_stopped()

    def check(self) -> None:
        if self.matcher.is_error():
            raise RuntimeError(f"the grammar failed: {one_line(self.matcher.get_error())}")


def compiled(schema: dict[str, Any]) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)


@lru_cache(maxsize=8)
def trie(tokenizer: Any, ends: tuple[int, ...], vocab_size: int) -> Any:
    """Return llguidance's form of a vocabulary, which takes about a second to make."""
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(ends))


def check_schema(schema: dict[str, Any], where: str = "response_format") -> None:
    """Raise UserError for a schema that llguidance does not keep to completely, or if it is not installed.

    Args:
        where: the parameter that has it.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        must, do = f"{where} needs llguidance", "pip install 'onecard[serve]' on the server"
        raise UserError(must, str(error), do, where) from None
    found = "too deep"
    try:
        json.dumps(schema)
        wrong, lines = LLMatcher.validate_grammar_with_warnings(compiled(schema))
        if not wrong and not lines:
            return
        found = one_line(lines[0])
    except (ValueError, RecursionError) as error:
        found = one_line(str(error)) or found
    raise UserError("the schema must be one that answers can be held to", found[:300], "simplify it", where)
