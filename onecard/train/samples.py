"""What a model answers to some of the data's prompts, for the report: asked as training asks."""

from __future__ import annotations

from typing import Any

from onecard.data.dataset import Dataset
from onecard.data.template import prompt_ids, record_prompt
from onecard.infer.generate import generate

NUM_SAMPLES = 3
SAMPLE_TOKENS = 96

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


def answer_samples(model: Any, tokenizer: Any, samples: list[Sample]) -> list[str]:
    """The likeliest answers."""
    return [generate(model, tokenizer, ids, SAMPLE_TOKENS) for _, ids in samples]
