"""Text generation: greedy or sampled, with a KV cache, optionally streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onecard.config import SamplingConfig
from onecard.infer.decoding import Answer
from onecard.infer.graphs import make_context
from onecard.kernels.cpu.contention import sharing_cores

GREEDY = SamplingConfig(temperature=0.0)


def generate(
    model: Any,
    tokenizer: Any,
    input_ids: list[int],
    max_new_tokens: int = 256,
    sampling: SamplingConfig = GREEDY,
    on_text: Callable[[str], None] | None = None,
    goes_on: bool = False,
    ends: tuple[int, ...] = (),
) -> str:
    """Return the text that continues `input_ids`, without special tokens.

    Args:
        max_new_tokens: the most tokens to generate. An end token or the end of the model's context stops earlier.
        sampling: the default selects the likeliest token.
        on_text: called with each finished piece of text.
        goes_on, ends: same as in `Answer`.

    Raises:
        UserError: a setting is invalid; the prompt has no tokens, or more than the model's context.
    """
    answer = Answer(model, tokenizer, input_ids, max_new_tokens, sampling, make_context(model), goes_on, ends)
    pieces = []
    with sharing_cores():
        while answer.finish_reason is None:
            pieces.append(answer.advance())
            if on_text and pieces[-1]:
                on_text(pieces[-1])
    return "".join(pieces)
