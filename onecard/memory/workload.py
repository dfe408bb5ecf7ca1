"""Sizes of the rows that go through the model in a run, and of its answers.

`train` knows them from its data. `plan` has no data and assumes them. With packing: rows of T tokens, rows of one
ROW_MULTIPLE less, and the last row of an epoch. Without packing: rows of every multiple of ROW_MULTIPLE up to T.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from onecard.config import (
    CACHE_PROBE,
    FUSION_PROBE_TOKENS,
    LOSS_PROBE_TOKENS,
    NUM_SAMPLES,
    PREFILL_TOKENS,
    ROW_MULTIPLE,
    SAMPLE_TOKENS,
    TrainConfig,
)
from onecard.data.dataset import Dataset
from onecard.data.loader import Loader

# Tokens that a loaded model reads before it trains: to check its fused modules (hf/fusion.py), and its loss on two
# documents, alone and together, and on one without its last token (train/evaluate.py).
PROBE_HEADS = frozenset({LOSS_PROBE_TOKENS - 1, LOSS_PROBE_TOKENS})
PROBE = frozenset({FUSION_PROBE_TOKENS, 2 * LOSS_PROBE_TOKENS}) | PROBE_HEADS
MOST_EPOCHS = 5  # epochs whose rows are counted; each epoch packs again, into rows of the same few sizes


@dataclass(frozen=True)
class Answers:
    """Answers of a model: `num_rows` at a time, padded to one length, to `prompts` of so many tokens."""

    num_rows: int
    prompts: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Workload:
    """Numbers of tokens in the products of a run.

    Attributes:
        trained, validated: tokens of micro-batches.
        trained_heads, validated_heads: supervised positions of micro-batches, on which the head runs.
        prompts: tokens of the pieces of prompts.
        answered: rows, and tokens of prompt and answer, of the largest answers in memory at a time.
        prompt_tokens: tokens of the largest piece of prompts in one forward, over all rows.
        referenced: examples whose reference is kept in host memory.
    """

    trained: frozenset[int]
    trained_heads: frozenset[int]
    validated: frozenset[int] = frozenset()
    validated_heads: frozenset[int] = frozenset()
    prompts: frozenset[int] = frozenset()
    answered: tuple[int, int] = (1, 0)
    prompt_tokens: int = 0
    referenced: int = 0

    @property
    def forward(self) -> frozenset[int]:
        return PROBE | self.trained | self.validated | self.prefilled

    @property
    def prefilled(self) -> frozenset[int]:
        """Tokens of the pieces of prompts, and of the cache's check before the first answer."""
        sizes = [len(piece) for piece in CACHE_PROBE]
        tried = {sum(sizes), max(sizes)}  # onecard's own products compute the shorter ones
        return self.prompts | tried if self.prompts else self.prompts

    @property
    def answering(self) -> frozenset[int]:
        """Same as `prefilled`, with the cache's check in all its pieces, of which one is a single token."""
        return self.prefilled | {len(piece) for piece in CACHE_PROBE} if self.prompts else self.prompts

    @property
    def heads(self) -> frozenset[int]:
        return frozenset({ROW_MULTIPLE}) | PROBE_HEADS | self.trained_heads | self.validated_heads

    def with_answers(self, more: Answers) -> Workload:
        """Return the workload with more answers."""
        pieces = {more.num_rows * size for tokens in more.prompts for size in pieces_of(tokens, more.num_rows)}
        if more.num_rows > 1:
            pieces.add(more.num_rows)  # one token each
        longest = max(more.prompts, default=0) + more.new_tokens
        held = max(self.answered, (more.num_rows, longest), key=lambda answer: answer[0] * answer[1])
        largest = max(pieces | {self.prompt_tokens})
        return replace(self, prompts=self.prompts | pieces, answered=held, prompt_tokens=largest)

    def with_rows(self, more: Workload) -> Workload:
        """Return the workload with the trained rows of another one as well."""
        heads = self.trained_heads | more.trained_heads
        return replace(self, trained=self.trained | more.trained, trained_heads=heads)


def pieces_of(tokens: int, num_rows: int) -> set[int]:
    """Return the sizes of a prompt's pieces. With several rows at a time, a prompt is one piece."""
    if num_rows > 1:
        return {tokens}
    return {min(PREFILL_TOKENS, tokens - start) for start in range(0, tokens, PREFILL_TOKENS)}


def multiple(tokens: int) -> int:
    """Round up to a multiple of ROW_MULTIPLE."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def assumed(config: TrainConfig, length: int) -> Workload:
    """Return the workload of a run with unknown data and rows of `length` tokens."""

    def sizes(tokens: int, packing: bool) -> frozenset[int]:
        full = multiple(tokens)
        if not packing:
            return frozenset(range(ROW_MULTIPLE, full + 1, ROW_MULTIPLE))
        return frozenset({full, max(full - ROW_MULTIPLE, ROW_MULTIPLE), ROW_MULTIPLE})

    row = length * config.documents_per_example
    trained = sizes(row * config.per_device_train_batch_size, config.packing)
    validated = sizes(row, True) if config.eval_names else frozenset()
    load = Workload(trained, trained, validated, validated)
    longest = min(length, PREFILL_TOKENS) // 2
    asked = [] if config.has_head else config.sample_prompts
    count = NUM_SAMPLES if asked is None else len(asked)
    prompts = tuple(max(longest - number, 1) for number in range(count))  # all of different sizes
    return load.with_answers(Answers(1, prompts, SAMPLE_TOKENS))


def known(loader: Loader, epochs: float, validation: Iterable[Dataset], prompts: list[list[int]]) -> Workload:
    """Return the workload of a run with its data and its sample prompts."""
    load = Workload(*sizes_of(loader, max(1, min(int(epochs), MOST_EPOCHS))))
    for dataset in validation:
        tokens, heads = sizes_of(Loader(dataset.examples, dataset.row_tokens, True, 1, 0), 1)
        load = replace(load, validated=load.validated | tokens, validated_heads=load.validated_heads | heads)
    return load.with_answers(Answers(1, tuple(len(ids) for ids in prompts), SAMPLE_TOKENS))


def sizes_of(loader: Loader, epochs: int) -> tuple[frozenset[int], frozenset[int]]:
    """Return tokens and supervised positions of the micro-batches, rounded up to ROW_MULTIPLE."""
    tokens, heads = set[int](), set[int]()
    for epoch in range(epochs):
        batches = loader.batches(epoch)
        tokens.update(map(multiple, np.unique(batches.sums(loader.examples.lengths)).tolist()))
        heads.update(map(multiple, np.unique(batches.sums(loader.examples.num_supervised)).tolist()))
    return frozenset(tokens), frozenset(heads - {0})
