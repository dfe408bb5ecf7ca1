"""Greedy answers to several prompts at a time: one forward pass gives a token to each.

Prompts are padded on the left, so that their next tokens stand in one column. The mask hides the padding, and each
prompt counts its own positions, so an answer is the one that its prompt gets alone. Products of several rows round in
another order: in float32 that changes a token only if two logits are equal to about seven digits.

Before a model's first batch, the logits of two prompts of different lengths are compared with those of each alone. If
they differ, the model's family does not follow the mask, and its prompts are answered one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from onecard.config import SamplingConfig
from onecard.hf.attention import cache_name
from onecard.infer.check import agree, bound_of, context_of
from onecard.infer.decoding import CachedContext, Text, end_tokens, room_for
from onecard.infer.generate import generate
from onecard.infer.sampling import Sampler
from onecard.kernels.cpu.contention import sharing_cores
from onecard.memory.measure import is_out_of_memory
from onecard.nn.embedding import device_of

PROBE = ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10])  # prompts, and then a token for each
GREEDY = SamplingConfig(temperature=0.0)


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    batch_size: int,
    goes_on: list[bool],
    ends: tuple[int, ...] = (),
) -> list[str]:
    """Return the greedy answer to each prompt, as `generate` gives it.

    Args:
        batch_size: prompts at a time, of those with similar lengths. 1: one after the other.
        goes_on, ends: same as in `Answer`, the first for each prompt.
    """
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if batch_size == 1 or len(prompts) == 1 or not takes_batches(model):
        for i in order:
            answers[i] = generate(model, tokenizer, prompts[i], max_new_tokens, goes_on=goes_on[i], ends=ends)
        return answers
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        texts = [Text(tokenizer, (), prompts[i][-1] if goes_on[i] else None) for i in chosen]
        found = answer_batch(model, tokenizer, [prompts[i] for i in chosen], texts, max_new_tokens, ends)
        for i, text in zip(chosen, found):
            answers[i] = text
    return answers


@torch.no_grad()
def answer_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], texts: list[Text], max_new_tokens: int, ends: tuple[int, ...]
) -> list[str]:
    """Answer prompts in one batch. A finished answer leaves it."""
    rows, stop = Rows(model, prompts), end_tokens(model.generation_config.eos_token_id, tokenizer, ends)
    left = [room_for(model, len(ids), max_new_tokens) for ids in prompts]
    tokens, said, sampler = [list(ids) for ids in prompts], ["" for _ in prompts], Sampler(model, GREEDY)
    active = list(range(len(prompts)))
    with sharing_cores():
        while active:
            going_on: list[int] = []
            picked = pick_all(sampler, [tokens[i] for i in active], rows.logits())
            for row, (i, token) in enumerate(zip(active, picked)):
                tokens[i].append(token)
                left[i] -= 1
                if token not in stop:
                    said[i] += texts[i].push(token)
                if token in stop or not left[i]:
                    said[i] += texts[i].finish()
                else:
                    going_on.append(row)
            active = [active[row] for row in going_on]
            rows.go_on(going_on, [tokens[i][-1] for i in active])
    return said


def pick_all(sampler: Sampler, tokens: list[list[int]], logits_BV: Tensor) -> list[int]:
    """Return each row's likeliest token, with one transfer from the device if no processor shapes the logits."""
    if not sampler.shape:
        return logits_BV.argmax(-1).tolist()
    return [sampler.pick(ids, logits_BV[row : row + 1]) for row, ids in enumerate(tokens)]


class Rows:
    """A batch of prompts and the cache of their keys and values. T is the width of the last pass."""

    def __init__(self, model: Any, prompts: list[list[int]]):
        self.model, self.cache_name = model, cache_name(model)
        self.device = device_of(model)
        width = max(map(len, prompts))
        self.ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=self.device)
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        self.mask_BL = torch.tensor(mask, device=self.device)  # over all columns so far
        self.positions_BT = (self.mask_BL.cumsum(1) - 1).clamp(min=0)
        self.cache = DynamicCache(config=model.config)

    def logits(self) -> Tensor:
        """Feed the tokens. Return each row's logits of the next one, float32 (B, V)."""
        out = self.model(
            input_ids=self.ids_BT,
            attention_mask=self.mask_BL,
            position_ids=self.positions_BT,
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        return out.logits[:, -1].float()

    def go_on(self, rows: list[int], tokens: list[int]) -> None:
        """Keep these rows, each with its next token."""
        kept = torch.tensor(rows, dtype=torch.int64, device=self.device)
        if len(rows) < len(self.mask_BL):
            self.cache.batch_select_indices(kept)
        self.ids_BT = torch.tensor(tokens, dtype=torch.int64, device=self.device)[:, None]
        self.mask_BL = torch.cat([self.mask_BL[kept], self.mask_BL.new_ones(len(rows), 1)], dim=1)
        self.positions_BT = self.positions_BT[kept, -1:] + 1


@torch.no_grad()
def takes_batches(model: Any) -> bool:
    """Whether the logits of two padded prompts, and of a token after each, are those of each prompt alone."""
    bound, nexts = bound_of(model), [11, 12]
    if context_of(model) is not CachedContext:
        return False
    try:
        rows = Rows(model, [list(ids) for ids in PROBE])
        found = [rows.logits()]
        rows.go_on([0, 1], nexts)
        found.append(rows.logits())
        for row, (ids, token) in enumerate(zip(PROBE, nexts)):
            alone = CachedContext(model)
            expected = [alone.feed(list(ids)), alone.feed([token])]
            if not all(agree(logits[row], one[0], bound) for logits, one in zip(found, expected)):
                return False
    except Exception as error:  # the model's own code takes no such batch
        if is_out_of_memory(error):
            raise
        return False
    return True
