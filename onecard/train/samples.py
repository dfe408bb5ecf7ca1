"""What a model answers to some of the data's prompts, for the report: asked as training asks."""

from __future__ import annotations

from typing import Any

from onecard.config import NUM_SAMPLES, SAMPLE_TOKENS
from onecard.data.chat.mask import alpaca_text, prompt_ids, text_ids
from onecard.data.chat.spans import learned_turns
from onecard.data.dataset import Dataset
from onecard.data.records import Record
from onecard.infer.generate import generate

SHOWN_TEXT = 80  # characters of a plain text that stand for its prompt

Sample = tuple[str, list[int]]  # what is shown of a prompt, and its tokens


def make_samples(prompts: list[str] | None, dataset: Dataset, tokenizer: Any) -> list[Sample]:
    """The user's prompts as chats, or those of the first records that fit max_seq_length."""
    if prompts is not None:
        return [(text, prompt_ids([{"role": "user", "content": text}], tokenizer)) for text in prompts]
    samples = []
    for record in dataset.records[: 10 * NUM_SAMPLES]:
        text, ids = record_prompt(record, tokenizer)
        if 0 < len(ids) <= dataset.max_seq_length:
            samples.append((text, ids))
    return samples[:NUM_SAMPLES]


def record_prompt(record: Record, tokenizer: Any) -> tuple[str, list[int]]:
    """What stands before a record's first learned answer, as text and as tokens: an inference asks like this."""
    if record.messages is None:
        text = record.prompt if record.prompt is not None else (record.text or "")[:SHOWN_TEXT]
        return text, text_ids(text, tokenizer)
    if record.alpaca and not tokenizer.chat_template:
        text = alpaca_text(record)[0]
        return text, text_ids(text, tokenizer)
    asked = [dict(turn) for turn in record.messages[: first_asked(record)]]
    if not asked:
        return "", []
    text = asked[0]["content"] if len(asked) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in asked)
    return text, prompt_ids(asked, tokenizer, record.tools)


def first_asked(record: Record) -> int:
    """The first learned answer that somebody asked for; 0 if the assistant only speaks first."""
    turns = record.messages or ()
    asked = (i for i in learned_turns(record) if any(turn["role"] == "user" for turn in turns[:i]))
    return next(asked, 0)


def answer_samples(model: Any, tokenizer: Any, samples: list[Sample], ends: tuple[int, ...] = ()) -> list[str]:
    """The likeliest answers; `ends` as Answer's."""
    return [generate(model, tokenizer, ids, SAMPLE_TOKENS, ends=ends) for _, ids in samples]
