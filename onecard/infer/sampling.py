"""The choice of the next token from its logits.

transformers' LogitsProcessors shape the distribution, in the order of its own generate. A setting that is not given
comes from the checkpoint's generation_config.json. transformers has no penalty by the number of occurrences, so
`CountPenalty` is ours: of OpenAI's API, logit - count * frequency_penalty - (count > 0) * presence_penalty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from onecard.config import SamplingConfig
from onecard.errors import UserError


class Sampler:
    """Picks a token from logits: the likeliest at temperature 0, else a random one from its own generator.

    Args:
        num_prompt_tokens: tokens that the frequency and presence penalties do not count.
    """

    def __init__(self, model: Any, sampling: SamplingConfig, num_prompt_tokens: int = 0):
        stored = model.generation_config
        temperature = choose(sampling.temperature, stored.temperature, 1.0)
        self.greedy = temperature < torch.finfo(torch.float32).tiny  # 0, or so small that float32 divides by 0
        self.shape = LogitsProcessorList()
        if sampling.logit_bias:
            vocab_size = model.config.get_text_config().vocab_size
            check_bias(sampling.logit_bias, vocab_size)
            bias: Any = [[[token], value] for token, value in sampling.logit_bias.items()]
            self.shape.append(SequenceBiasLogitsProcessor(bias))
        penalty = choose(sampling.repetition_penalty, stored.repetition_penalty, 1.0)
        if penalty != 1:
            self.shape.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
        if sampling.frequency_penalty or sampling.presence_penalty:
            counted = (sampling.frequency_penalty, sampling.presence_penalty, num_prompt_tokens)
            self.shape.append(CountPenalty(*counted))
        if not self.greedy:
            self.shape.append(Temperature(temperature))
            if top_k := choose(sampling.top_k, stored.top_k, 0):
                self.shape.append(TopKLogitsWarper(top_k))
            if (top_p := choose(sampling.top_p, stored.top_p or None, 1.0)) < 1:
                self.shape.append(TopPLogitsWarper(top_p))
            if min_p := choose(sampling.min_p, stored.min_p, 0.0):
                self.shape.append(MinPLogitsWarper(min_p))
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def pick(self, tokens: list[int], logits_1V: Tensor) -> int:
        """Return the token after `tokens`, prompt included."""
        if self.shape:
            ids: Any = torch.tensor([tokens], device=logits_1V.device)
            logits_1V = self.shape(ids, logits_1V)
        if self.greedy:
            return int(logits_1V.argmax(-1))
        return int(torch.multinomial(logits_1V.softmax(-1).cpu(), 1, generator=self.generator))


def choose(asked: Any, stored: Any, neutral: Any) -> Any:
    """Return the first that is not None."""
    return next(value for value in (asked, stored, neutral) if value is not None)


def check_bias(bias: dict[int, float], vocab_size: int) -> None:
    """Raise UserError for a token that the model does not have."""
    if wrong := [token for token in bias if token >= vocab_size]:
        must = f"a bias must be of one of the model's {vocab_size:,} tokens"
        raise UserError(must, f"token {wrong[0]}", "correct the token", "logit_bias")


class Temperature(LogitsProcessor):
    """Subtracts the largest logit and divides by a temperature: finite or -inf for any small temperature."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        shaped: Any = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        return shaped


class CountPenalty(LogitsProcessor):
    """Lowers the logits of tokens that the answer has: by a penalty for each occurrence, and by one for any."""

    def __init__(self, frequency: float, presence: float, num_prompt_tokens: int):
        self.frequency, self.presence, self.num_prompt_tokens = frequency, presence, num_prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        said_1T = input_ids[:, self.num_prompt_tokens :]
        counts_1V: Any = torch.zeros_like(scores).scatter_add_(1, said_1T, torch.ones_like(said_1T, dtype=scores.dtype))
        return scores - self.frequency * counts_1V - self.presence * (counts_1V > 0)
