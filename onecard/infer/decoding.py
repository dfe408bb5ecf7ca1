"""One answer, token by token: a KV cache, one sampler, text that grows by whole characters.

Everything that generates goes through `Answer.advance`: one forward pass of the model, over a piece of the prompt
or over one token. A caller may do other work between two of them, a server other answers' tokens: each answer has
a cache and a random generator of its own, so its tokens are the same bits whatever runs beside it.

transformers' LogitsProcessors shape the distribution; where a setting is not given, the checkpoint's
generation_config.json says it, as in transformers' own generate.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from onecard.config import PREFILL_TOKENS, SamplingConfig
from onecard.errors import UserError
from onecard.hf.attention import cache_name
from onecard.hf.load import tokenizing


class CachedContext:
    """A model's KV cache and the tokens whose keys and values it holds."""

    def __init__(self, model: Any):
        self.model, self.cache_name = model, cache_name(model)
        self.clear()

    def clear(self) -> None:
        self.tokens: list[int] = []
        self.cache = DynamicCache(config=self.model.config)

    def rewind(self, ids: list[int]) -> list[int]:
        """Keep what `ids` begin with, as far as the cache can be cut; what of them is left to feed, one at least."""
        shared = shared_prefix(self.tokens, ids[:-1])
        surplus = len(self.tokens) - shared
        if surplus and any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            self.clear()  # a sliding window has let go of what would be needed
            return ids
        if surplus:
            self.cache.crop(-surplus)
            self.tokens = self.tokens[:shared]
        return ids[shared:]

    @torch.no_grad()
    def feed(self, ids: list[int]) -> torch.Tensor:
        """Logits, (1, V) float32, of the token after `ids`, which follow what the cache holds."""
        assert not self.model.training, "a cache needs a model in eval mode"
        device = self.model.get_input_embeddings().weight.device
        out = self.model(
            input_ids=torch.tensor([ids], device=device),
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.tokens += ids
        return out.logits[:, -1].float()


class OneByOne(CachedContext):
    """As CachedContext for a model that goes on from its cache by one token only, as mamba does."""

    def feed(self, ids: list[int]) -> torch.Tensor:
        first = ids[:1] if self.tokens else ids
        logits = super().feed(first)
        for token in ids[len(first) :]:
            logits = super().feed([token])
        return logits


class Uncached(CachedContext):
    """As CachedContext for a model that does not go on from such a cache: each pass reads all tokens."""

    def rewind(self, ids: list[int]) -> list[int]:
        self.tokens = self.tokens[: shared_prefix(self.tokens, ids[:-1])]
        return ids[len(self.tokens) :]

    @torch.no_grad()
    def feed(self, ids: list[int]) -> torch.Tensor:
        self.tokens += ids
        device = self.model.get_input_embeddings().weight.device
        out = self.model(input_ids=torch.tensor([self.tokens], device=device), use_cache=False)
        return out.logits[:, -1].float()


def shared_prefix(held: list[int], wanted: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(held, wanted)) if a != b), min(len(held), len(wanted)))


class Sampler:
    """A token from logits: the likeliest at temperature 0, else drawn by a generator of its own."""

    def __init__(self, model: Any, sampling: SamplingConfig):
        stored = model.generation_config
        top_p = sampling.top_p if sampling.top_p is not None else stored.top_p or 1.0
        temperature = sampling.temperature if sampling.temperature is not None else stored.temperature
        temperature = 1.0 if temperature is None else temperature
        self.greedy = temperature < torch.finfo(torch.float32).tiny  # 0, or what divides by 0 in float32
        self.shape = LogitsProcessorList()
        if stored.repetition_penalty not in (None, 1.0):
            self.shape.append(RepetitionPenaltyLogitsProcessor(float(stored.repetition_penalty)))
        if not self.greedy:
            self.shape.append(Temperature(temperature))
            if stored.top_k:
                self.shape.append(TopKLogitsWarper(stored.top_k))
            if top_p < 1:
                self.shape.append(TopPLogitsWarper(top_p))
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    def pick(self, tokens: list[int], logits_1V: torch.Tensor) -> int:
        """The token after `tokens`."""
        if self.shape:
            ids: Any = torch.tensor([tokens], device=logits_1V.device)
            logits_1V = self.shape(ids, logits_1V)
        if self.greedy:
            return int(logits_1V.argmax(-1))
        return int(torch.multinomial(logits_1V.softmax(-1).cpu(), 1, generator=self.generator))


class Temperature(LogitsProcessor):
    """Logits less their largest, divided by a temperature: finite or -inf, however small that is."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        shaped: Any = (scores - scores.amax(-1, keepdim=True)) / self.temperature
        return shaped


class StopMatcher:
    """Finds a stop string in a text that grows (Knuth, Morris and Pratt 1977).

    A character costs amortized constant time. The table grows with what was matched, so the string's own length costs
    nothing.

    Attributes:
        matched: characters at the text's end that the stop string begins with, as many as there can be.
    """

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0
        self.borders = [0]  # of each prefix: the longest shorter one that also ends it

    def feed(self, text: str) -> int | None:
        """Where in `text` the first whole stop string ends; None if none does."""
        for i, character in enumerate(text):
            self.matched = self.after(self.matched, character)
            if self.matched == len(self.stop):
                return i + 1
            if self.matched > len(self.borders):
                self.borders.append(self.after(self.borders[-1], self.stop[len(self.borders)]))
        return None

    def after(self, matched: int, character: str) -> int:
        """What is matched after one more character."""
        while matched and self.stop[matched] != character:
            matched = self.borders[matched - 1]
        return matched + (self.stop[matched] == character)


class Text:
    """Text from tokens as they come: whole characters, special tokens left out, nothing from a stop string on.

    Args:
        before: the token whose text this one goes on from; None: it is a text of its own.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), before: int | None = None):
        self.tokenizer, self.matchers = tokenizer, [StopMatcher(each) for each in stop]
        self.special = frozenset(tokenizer.all_special_ids)
        # The last that made text, then those that have not yet.
        self.tokens: list[int] = [] if before is None or before in self.special else [before]
        self.num_shown, self.held, self.stopped = len(self.tokens), "", False

    def push(self, token: int) -> str:
        """What can be shown after one more token."""
        if token in self.special:
            return ""
        self.tokens.append(token)
        text = self.new_text()
        if text.endswith("\ufffd"):  # a character whose bytes are not all there
            return ""
        self.tokens, self.num_shown = self.tokens[self.num_shown :], len(self.tokens) - self.num_shown
        return self.release(text, last=False)

    def finish(self) -> str:
        """What was held back."""
        return self.release(self.new_text(), last=True)

    def new_text(self) -> str:
        """Of the tokens not shown; decoded behind those before them, since a text's first token loses its space."""
        name = str(self.tokenizer.name_or_path)
        with tokenizing("the tokenizer must turn tokens into text", "fetch its tokenizer.json again", name):
            before, whole = (
                self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
                for tokens in (self.tokens[: self.num_shown], self.tokens)
            )
        return whole[len(before) :]

    def release(self, text: str, last: bool) -> str:
        """`text` less what may be the beginning of a stop string."""
        num_held, self.held = len(self.held), self.held + text
        ends = [(matcher, matcher.feed(text)) for matcher in self.matchers]
        found = [num_held + end - len(matcher.stop) for matcher, end in ends if end is not None]
        self.stopped = self.stopped or bool(found)
        end = min(found, default=len(self.held))
        if not (last or found):
            end -= max((matcher.matched for matcher in self.matchers), default=0)
        shown, self.held = self.held[:end], "" if found else self.held[end:]
        for matcher in self.matchers if found else ():
            matcher.matched = 0
        return shown


class Answer:
    """The continuation of a prompt, one pass of the model at a time.

    Args:
        goes_on: whether its text goes on from the prompt's, with the space between them; a chat's does not.
        ends: tokens that end it beside the tokenizer's and the model's, such as a Form's.

    Attributes:
        finish_reason: None while it goes on; "stop" after an end token or a stop string; "length" after max_new_tokens,
            or as many as the model's context has room for.
        num_tokens: tokens drawn, the end token included.

    Raises:
        UserError: as room_for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        input_ids: list[int],
        max_new_tokens: int,
        sampling: SamplingConfig,
        context: CachedContext | None = None,
        goes_on: bool = False,
        ends: tuple[int, ...] = (),
    ):
        self.max_new_tokens = room_for(model, len(input_ids), max_new_tokens)
        self.context = context or CachedContext(model)
        self.rest = self.context.rewind(input_ids)
        self.ends = end_tokens(model.generation_config.eos_token_id, tokenizer, ends)
        self.sampler = Sampler(model, sampling)
        self.text = Text(tokenizer, sampling.stop, input_ids[-1] if goes_on else None)
        self.num_tokens, self.finish_reason = 0, None

    def advance(self) -> str:
        """One pass; the text that it adds, often none."""
        piece, self.rest = self.rest[:PREFILL_TOKENS], self.rest[PREFILL_TOKENS:]
        logits = self.context.feed(piece)
        if self.rest:
            return ""
        token = self.sampler.pick(self.context.tokens, logits)
        self.rest, self.num_tokens = [token], self.num_tokens + 1
        text = "" if token in self.ends else self.text.push(token)
        if token in self.ends or self.text.stopped:
            self.finish_reason = "stop"
        elif self.num_tokens == self.max_new_tokens:
            self.finish_reason = "length"
        return text + self.text.finish() if self.finish_reason else text


def context_length(model: Any) -> int:
    """Tokens that the model takes."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def room_for(model: Any, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """How many tokens an answer may have. Raises UserError for a setting or a prompt that leaves none."""
    if max_new_tokens < 1:
        raise UserError("max_new_tokens must be 1 or more", str(max_new_tokens), "correct it", "max_new_tokens")
    length = context_length(model)
    if not 1 <= num_prompt_tokens <= length:
        found = f"{num_prompt_tokens} tokens, of {length} that the model takes"
        raise UserError("a prompt must have tokens and leave room for an answer", found, "correct it", "prompt")
    return min(max_new_tokens, length - num_prompt_tokens + 1)  # the last one is not fed


def end_tokens(configured: int | list[int] | None, tokenizer: Any, learned: tuple[int, ...] = ()) -> list[int]:
    """Every token that ends an answer: the tokenizer's, those that training rows ended in, the generation config's."""
    found = configured if isinstance(configured, list) else [configured]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *learned, *found]) if token is not None]
