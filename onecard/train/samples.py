"""A model's answers to sample prompts, for the report. The prompts have the same form as in training."""

from __future__ import annotations

from itertools import islice
from typing import Any

from onecard.config import NUM_SAMPLES, SAMPLE_TOKENS
from onecard.data.chat.mask import alpaca_text, prompt_ids, text_ids
from onecard.data.chat.spans import learned_turns
from onecard.data.dataset import Dataset
from onecard.data.records import Record
from onecard.infer.generate import generate

SHOWN_TEXT = 80  # characters of a plain text that serve as its prompt

Sample = tuple[str, list[int]]  # a prompt's shown text, and its tokens


def make_samples(prompts: list[str] | None, dataset: Dataset, tokenizer: Any) -> list[Sample]:
    """Return the user's prompts as chats, or the prompts of the first records that fit max_seq_length."""
    if prompts is not None:
        return [(text, prompt_ids([{"role": "user", "content": text}], tokenizer)) for text in prompts]
    samples, first = [], {record.where: record for record in islice(dataset.records, 10 * NUM_SAMPLES)}
    for record in first.values():  # a long text is the record of several examples
        text, ids = record_prompt(record, tokenizer)
        if 0 < len(ids) <= dataset.max_seq_length:
            samples.append((text, ids))
    return samples[:NUM_SAMPLES]


def record_prompt(record: Record, tokenizer: Any) -> tuple[str, list[int]]:
    """Return the prompt before a record's first learned answer, as text and tokens, in the form that inference uses."""
    if record.templated:
        return "", []
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
    """Return the index of the first learned answer after a user turn; 0 if there is none."""
    turns = record.messages or ()
    asked = (i for i in learned_turns(record) if any(turn["role"] == "user" for turn in turns[:i]))
    return next(asked, 0)


def answer_samples(model: Any, tokenizer: Any, samples: list[Sample], ends: tuple[int, ...] = ()) -> list[str]:
    """Answer the samples with greedy decoding. `ends` is the same as in `Answer`."""
    return [generate(model, tokenizer, ids, SAMPLE_TOKENS, ends=ends) for _, ids in samples]
