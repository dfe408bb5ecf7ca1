"""One answer, token by token: a KV cache, a sampler, and text that grows by whole characters.

All generation uses `Answer.advance`: one forward pass of the model, over a piece of the prompt or over one token.
Between two passes, a caller may do other work, and the server advances other answers. Each answer has its own cache
and random generator. `feed_together` in together.py feeds a token of each of several answers in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from onecard.config import PREFILL_TOKENS, SamplingConfig
from onecard.errors import UserError
from onecard.hf.attention import cache_name
from onecard.hf.load import tokenizing
from onecard.infer.grammar import Grammar
from onecard.infer.logprobs import TokenLogprob, score
from onecard.infer.sampling import Sampler
from onecard.nn.embedding import device_of


class CachedContext:
    """A model's KV cache and the tokens whose keys and values it holds."""

    def __init__(self, model: Any):
        self.model, self.cache_name = model, cache_name(model)
        self.clear()

    def clear(self) -> None:
        self.tokens: list[int] = []
        self.cache = DynamicCache(config=self.model.config)

    def rewind(self, ids: list[int]) -> list[int]:
        """Cut the cache to the prefix that it shares with `ids`, or clear it. Return the ids to feed, at least one."""
        shared = shared_prefix(self.tokens, ids[:-1])
        surplus = len(self.tokens) - shared
        if surplus and any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            self.clear()  # a sliding window has dropped earlier keys and values
            return ids
        if surplus:
            self.cache.crop(-surplus)
            self.tokens = self.tokens[:shared]
        return ids[shared:]

    @torch.no_grad()
    def feed(self, ids: list[int]) -> torch.Tensor:
        """Append `ids` to the cache. Return the next token's logits, (1, V) float32."""
        assert not self.model.training, "a cache needs a model in eval mode"
        device = device_of(self.model)
        out = self.model(
            input_ids=torch.tensor([ids], device=device),
            use_cache=True,
            logits_to_keep=1,
            **{self.cache_name: self.cache},
        )
        self.tokens += ids
        return out.logits[:, -1].float()

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a token's key and value, (1, H_kv, 1, D), to a layer. Return those that the token attends to."""
        held: Any = self.cache.layers[layer]
        return held.update(key, value)

    def reserve_token(self) -> None:
        """Make room for a token that `append` adds."""

    def prefix(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return each layer's keys and values of `tokens`, (1, H_kv, T, D), which nothing changes later; None if a
        layer does not have all of them."""
        layers: Any = self.cache.layers
        if any(type(layer) is not DynamicLayer or layer.keys is None for layer in layers):
            return None
        return [(layer.keys, layer.values) for layer in layers]  # an update makes new tensors

    def restore(self, tokens: list[int], prefix: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Begin with the keys and values of `tokens`, which `prefix` of another context begins with."""
        self.clear()
        for layer, (keys, values) in enumerate(prefix):
            self.cache.update(keys[:, :, : len(tokens)], values[:, :, : len(tokens)], layer)
        self.tokens = list(tokens)


class OneByOne(CachedContext):
    """Same as `CachedContext`, for a model that continues from its cache by one token only, such as mamba."""

    def feed(self, ids: list[int]) -> torch.Tensor:
        first = ids[:1] if self.tokens else ids
        logits = super().feed(first)
        for token in ids[len(first) :]:
            logits = super().feed([token])
        return logits


class Uncached(CachedContext):
    """Same as `CachedContext`, for a model that does not continue from such a cache: each pass reads all tokens."""

    def prefix(self) -> None:
        return None

    def rewind(self, ids: list[int]) -> list[int]:
        self.tokens = self.tokens[: shared_prefix(self.tokens, ids[:-1])]
        return ids[len(self.tokens) :]

    @torch.no_grad()
    def feed(self, ids: list[int]) -> torch.Tensor:
        self.tokens += ids
        device = device_of(self.model)
        out = self.model(input_ids=torch.tensor([self.tokens], device=device), use_cache=False)
        return out.logits[:, -1].float()


def shared_prefix(held: list[int], wanted: list[int]) -> int:
    """Return the length of the longest common prefix of two lists."""
    return next((i for i, (a, b) in enumerate(zip(held, wanted)) if a != b), min(len(held), len(wanted)))


class StopMatcher:
    """Finds a stop string in a growing text (Knuth, Morris and Pratt 1977).

    A character costs amortized constant time. The table grows with the longest match, so a long stop string costs
    nothing in advance.

    Attributes:
        matched: length of the longest prefix of the stop string at the text's end.
    """

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0
        self.borders = [0]  # of each prefix: the longest shorter prefix that is also its suffix

    def feed(self, text: str) -> int | None:
        """Return where in `text` the first complete stop string ends; None if there is none."""
        for i, character in enumerate(text):
            self.matched = self.after(self.matched, character)
            if self.matched == len(self.stop):
                return i + 1
            if self.matched > len(self.borders):
                self.borders.append(self.after(self.borders[-1], self.stop[len(self.borders)]))
        return None

    def after(self, matched: int, character: str) -> int:
        """Return the matched length after one more character."""
        while matched and self.stop[matched] != character:
            matched = self.borders[matched - 1]
        return matched + (self.stop[matched] == character)


class Text:
    """Decodes tokens one by one: whole characters, no special tokens, nothing from a stop string on.

    Args:
        before: the token that the text continues from; None if the text is independent.

    Attributes:
        num_decoded: characters of all tokens so far, without those of an incomplete character.
        num_released: characters that were returned so far.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), before: int | None = None):
        self.tokenizer, self.matchers = tokenizer, [StopMatcher(each) for each in stop]
        self.special = frozenset(tokenizer.all_special_ids)
        # The tokens of the last text, then those without text so far.
        self.tokens: list[int] = [] if before is None or before in self.special else [before]
        self.num_shown, self.held, self.stopped = len(self.tokens), "", False
        self.num_decoded = self.num_released = 0

    def push(self, token: int) -> str:
        """Add a token. Return the text that can be shown now."""
        if token in self.special:
            return ""
        self.tokens.append(token)
        text = self.new_text()
        if text.endswith("\ufffd"):  # the bytes of a character are incomplete
            return ""
        self.tokens, self.num_shown = self.tokens[self.num_shown :], len(self.tokens) - self.num_shown
        return self.release(text, last=False)

    def finish(self) -> str:
        """Return the text that was not shown so far."""
        return self.release(self.new_text(), last=True)

    def new_text(self) -> str:
        """Decode the new tokens after those before them: the first token of a text loses its space."""
        name = str(self.tokenizer.name_or_path)
        with tokenizing("the tokenizer must turn tokens into text", "fetch its tokenizer.json again", name):
            before, whole = (
                self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
                for tokens in (self.tokens[: self.num_shown], self.tokens)
            )
        return whole[len(before) :]

    def release(self, text: str, last: bool) -> str:
        """Return the text up to a stop string, without an end that may begin one."""
        num_held, self.held = len(self.held), self.held + text
        self.num_decoded += len(text)
        ends = [(matcher, matcher.feed(text)) for matcher in self.matchers]
        found = [num_held + end - len(matcher.stop) for matcher, end in ends if end is not None]
        self.stopped = self.stopped or bool(found)
        end = min(found, default=len(self.held))
        if not (last or found):
            end -= max((matcher.matched for matcher in self.matchers), default=0)
        shown, self.held = self.held[:end], "" if found else self.held[end:]
        self.num_released += len(shown)
        for matcher in self.matchers if found else ():
            matcher.matched = 0
        return shown


class Answer:
    """The continuation of a prompt, one pass of the model at a time.

    Args:
        goes_on: whether its text continues the prompt's, with the space between them; False for a chat.
        ends: end tokens in addition to the tokenizer's and the model's, such as a Form's.
        grammar: what the text must match; its end tokens are all of this answer's.
        num_logprobs: how many of the likeliest tokens `logprobs` has at each position; None: no logprobs.

    Attributes:
        finish_reason: None before the end; "stop" after an end token or a stop string; "length" after max_new_tokens,
            or at the end of the model's context.
        num_tokens: tokens drawn, the end token included.
        logprobs: of each token of the text, without end tokens and tokens of a stop string that ended it.

    Raises:
        UserError: same as `room_for`.
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
        num_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ):
        self.max_new_tokens = room_for(model, len(input_ids), max_new_tokens)
        self.sampler = Sampler(model, sampling, len(input_ids))
        self.context = context or CachedContext(model)
        self.rest = self.context.rewind(input_ids)
        self.ends = end_tokens(model.generation_config.eos_token_id, tokenizer, ends)
        self.text = Text(tokenizer, sampling.stop, input_ids[-1] if goes_on else None)
        self.num_tokens, self.finish_reason = 0, None
        self.num_logprobs, self.logprobs = num_logprobs, list[TokenLogprob]()
        self.grammar = grammar

    def advance(self) -> str:
        """Run one forward pass. Return the text that it adds, often none."""
        piece, self.rest = self.rest[:PREFILL_TOKENS], self.rest[PREFILL_TOKENS:]
        logits_1V = self.context.feed(piece)
        return "" if self.rest else self.take(logits_1V)

    def restart(self) -> None:
        """Feed all tokens again, into an empty context."""
        self.rest = [*self.context.tokens, *self.rest]
        self.context.clear()

    def take(self, logits_1V: torch.Tensor) -> str:
        """Draw the token after all that were fed. Return the text that it adds, often none."""
        shaped_1V = self.grammar.mask(logits_1V) if self.grammar else logits_1V
        token = self.sampler.pick(self.context.tokens, shaped_1V)
        if self.num_logprobs is not None and token not in self.ends:
            place = (self.context.tokens[-1], token, logits_1V)
            self.logprobs.append(score(self.text.tokenizer, *place, self.num_logprobs, self.text.num_decoded))
        self.rest, self.num_tokens = [token], self.num_tokens + 1
        text = "" if token in self.ends else self.text.push(token)
        complete = token in self.ends or self.text.stopped
        if self.grammar and not complete:
            self.grammar.accept(token)
            complete = self.grammar.complete
        if complete:
            self.finish_reason = "stop"
        elif self.num_tokens == self.max_new_tokens:
            self.finish_reason = "length"
        if not self.finish_reason:
            return text
        text += self.text.finish()
        if self.text.stopped:
            self.logprobs = [each for each in self.logprobs if each.start < self.text.num_released]
        return text


def context_length(model: Any) -> int:
    """Return the model's longest context in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def room_for(model: Any, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many tokens an answer may have. Raises UserError if the setting or the prompt leaves none."""
    if max_new_tokens < 1:
        raise UserError("max_new_tokens must be 1 or more", str(max_new_tokens), "correct it", "max_new_tokens")
    length = context_length(model)
    if not 1 <= num_prompt_tokens <= length:
        found = f"{num_prompt_tokens} tokens, of {length} that the model takes"
        raise UserError("a prompt must have tokens and leave room for an answer", found, "correct it", "prompt")
    return min(max_new_tokens, length - num_prompt_tokens + 1)  # the last one is not fed


def end_tokens(configured: int | list[int] | None, tokenizer: Any, learned: tuple[int, ...] = ()) -> list[int]:
    """Return all tokens that end an answer: the tokenizer's, those that end training rows, the generation config's."""
    found = configured if isinstance(configured, list) else [configured]
    return [token for token in dict.fromkeys([tokenizer.eos_token_id, *learned, *found]) if token is not None]
