"""The log-probability of each token of an answer, and of the likeliest tokens in its place.

They are log softmax of the model's own logits in float32, before temperature, penalties, bias and grammar.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """A token, its text after the token before it, and its log-probability (natural logarithm)."""

    token: int
    text: str
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer.

    Attributes:
        likeliest: the likeliest tokens in its place, the first one first.
        start: characters of the answer before it.
    """

    drawn: Scored
    likeliest: tuple[Scored, ...]
    start: int


def score(
    tokenizer: Any, before: int | None, token: int, logits_1V: Tensor, num_likeliest: int, start: int
) -> TokenLogprob:
    """Return the log-probabilities at a position.

    Args:
        before: the token before it.
    """
    logprobs_V = logits_1V[0].log_softmax(-1)
    values, tokens = logprobs_V.topk(num_likeliest)
    found = dict(zip(tokens.tolist(), values.tolist()))
    likeliest = tuple(Scored(each, spell(tokenizer, before, each), value) for each, value in found.items())
    return TokenLogprob(Scored(token, spell(tokenizer, before, token), float(logprobs_V[token])), likeliest, start)


def spell(tokenizer: Any, before: int | None, token: int) -> str:
    """Return a token's text after another one: alone, the first token of a text loses its space."""
    known = [] if before is None else [before]
    first, whole = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (known, [*known, token]))
    return whole[len(first) :]
