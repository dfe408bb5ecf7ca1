"""The requests of a server: checks them against the model, turns them into work of the engine, and counts them."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from onecard.adapter.form import form_ids
from onecard.adapter.origin import Form
from onecard.adapter.tokens import vocabulary_of
from onecard.config import ServeConfig, parse_bytes
from onecard.data.chat.mask import LONGEST_TOKEN, text_ids
from onecard.errors import UserError
from onecard.infer.decoding import context_length, end_tokens
from onecard.infer.engine import Engine, GenerationRequest, TextChunk
from onecard.infer.grammar import Grammar, check_schema
from onecard.infer.metrics import Metrics
from onecard.infer.protocol import ApiError, ChatRequest
from onecard.infer.sampling import check_bias
from onecard.infer.tools import ToolFormat, ToolText, call_schema, forced_prefix

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
SHORT_PROMPT = 8192  # characters or tokens; another thread encodes longer prompts, so that short ones do not wait
Numbered = tuple[int, TextChunk]  # of a choice


@dataclass(frozen=True)
class Served:
    """The adapter, tokenizer and prompt form of a model's name.

    Attributes:
        adapter: the adapter's name in peft; None for the base.
        form: the form of the adapter's prompts; None if its folder does not say.
        tools: the format of calls of tools in its answers; None if its chat template has no tools.
    """

    adapter: str | None
    tokenizer: Any
    form: Form | None = None
    tools: ToolFormat | None = None


class Service:
    """The model, its names and the engine.

    Args:
        models: by the names that requests use.
    """

    def __init__(self, model: Any, models: dict[str, Served], config: ServeConfig):
        self.models, self.config = models, config
        self.eos_token_id = model.generation_config.eos_token_id
        self.vocab_sizes = {name: vocabulary_of(model, [str(served.adapter)]) for name, served in models.items()}
        length = context_length(model)
        self.max_model_len = min(config.max_model_len or length, length)
        self.engine = Engine(model, config.max_num_seqs, config.max_queued, parse_bytes(config.prefix_cache))
        self.metrics = Metrics(self.engine)
        # One thread for short prompts and one for long ones, each with its own tokenizers: a tokenizer is not
        # thread-safe, and the event loop must not block.
        self.encoders = {long: ThreadPoolExecutor(1) for long in (False, True)}
        self.tokenizers_for_long: dict[str, Any] = {}
        self.num_encoding = 0
        self.started = int(time.time())

    def prompt(self, request: Any, long: bool = False) -> tuple[list[int], list[Grammar | None]]:
        """Return the tokens of a request's messages or prompt, and each choice's grammar. Runs in an encoder's thread.
        Raises ApiError."""
        tokenizer, served = self.tokenizer(request.model, long), self.models[request.model]
        chat, vocab_size = isinstance(request, ChatRequest), self.vocab_sizes[request.model]
        try:
            self.check_length(request, tokenizer)
            if chat:
                turns = [message.turn() for message in request.messages]
                tools = request.called()
                if tools or any("tool_calls" in turn or turn["role"] == "tool" for turn in turns):
                    self.check_tools(request.model)
                ids = form_ids(turns, tokenizer, served.form, tools or None)
            else:
                prompt = request.one_prompt()
                ids = text_ids(prompt, tokenizer) if isinstance(prompt, str) else prompt
        except UserError as error:
            param = "messages" if chat else "prompt"
            raise ApiError(400, f"{error.must}; found: {error.found}", param, "invalid_value") from None
        if not ids or not all(0 <= token < vocab_size for token in ids):
            raise ApiError(400, "a prompt must have tokens, all of the vocabulary", "prompt", "invalid_value")
        try:
            check_bias(request.sampling().logit_bias, vocab_size)
            schema, where = request.response_format.schema(), "response_format"
            if forced := [(tool.function.name, tool.function.parameters) for tool in request.forced()]:
                kind = served.tools or "text"
                schema, where = call_schema(forced, kind), "tools"
                ids = ids + tokenizer(forced_prefix(kind), add_special_tokens=False)["input_ids"]
            if schema is None:
                return ids, [None] * request.n
            check_schema(schema, where)
        except UserError as error:
            raise ApiError(400, f"{error.must}; found: {error.found}", error.where, "invalid_value") from None
        ends = tuple(end_tokens(self.eos_token_id, tokenizer, served.form.end_tokens if served.form else ()))
        return ids, [Grammar(tokenizer, schema, ends, vocab_size) for _ in range(request.n)]

    def check_tools(self, name: str) -> None:
        """Raise ApiError if a model's chat template knows no tools."""
        if self.models[name].tools is None:
            raise ApiError(400, f"the chat template of {name} has no tools", "tools", "unsupported_value")

    def tokenizer(self, name: str, long: bool) -> Any:
        """Return a model's tokenizer for the thread of short or of long prompts."""
        if not long:
            return self.models[name].tokenizer
        if name not in self.tokenizers_for_long:
            self.tokenizers_for_long[name] = copy.deepcopy(self.models[name].tokenizer)
        return self.tokenizers_for_long[name]

    def check_length(self, request: Any, tokenizer: Any) -> None:
        """Raise ApiError if a text's beginning alone exceeds the model's context. The rest is not encoded.

        The beginning doubles until it is the whole text. At the cut, a few tokens may differ.
        """
        text, size = request.text(), 4 * self.max_model_len
        while size < len(text):
            num_tokens = len(text_ids(text[:size], tokenizer))
            if num_tokens > self.max_model_len + LONGEST_TOKEN:
                raise self.too_long(request, f"more than {self.max_model_len} in the prompt")
            size *= 2

    def too_long(self, request: Any, found: str) -> ApiError:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        message = f"this model's context is {self.max_model_len} tokens; found {found}"
        return ApiError(400, message, param, "context_length_exceeded")

    def max_new_tokens(self, request: Any, num_prompt_tokens: int) -> int:
        """Return the requested number of tokens, or the default. Raises ApiError if there is no room for it."""
        chat = isinstance(request, ChatRequest)
        asked = (request.max_completion_tokens if chat else None) or request.max_tokens
        room = self.max_model_len - num_prompt_tokens
        most = asked if asked is not None else room if chat else COMPLETION_TOKENS
        if room < max(1, most):
            raise self.too_long(request, f"{num_prompt_tokens} in the prompt and {max(1, most)} for the answer")
        return most

    async def submit(self, request: Any) -> tuple[list[GenerationRequest], asyncio.Queue[Numbered], list[Any]]:
        """Queue a request. Return the work of each choice, the queue of their chunks, and what finds each one's calls
        of tools. Raises ApiError."""
        if request.model not in self.models:
            names = ", ".join(self.models)
            raise ApiError(404, f"no model {request.model[:80]!r}; there are: {names}", "model", "model_not_found")
        if request.n > self.config.max_num_seqs:
            most = f"this server gives {self.config.max_num_seqs} choices at most; found {request.n}"
            raise ApiError(400, most, "n", "invalid_value")
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        ids, grammars = await self.encoded(request)
        num_tokens = self.max_new_tokens(request, len(ids))

        def emit(choice: int, piece: TextChunk) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, (choice, piece))

        served, chat = self.models[request.model], isinstance(request, ChatRequest)
        more = {"goes_on": not chat, "num_logprobs": request.num_logprobs}
        more["ends"] = served.form.end_tokens if served.form else ()
        works = [
            GenerationRequest(
                ids, num_tokens, request.sampling(i), served.adapter, served.tokenizer, partial(emit, i),
                grammar=grammar, **more,
            )
            for i, grammar in enumerate(grammars)
        ]  # fmt: skip
        if not self.engine.submit(*works):
            raise overloaded()
        forced = bool(request.forced())
        names = {tool["function"]["name"] for tool in request.called()}
        return works, pieces, [ToolText(served.tools or "text", names, forced) if names else None for _ in works]

    async def encoded(self, request: Any) -> tuple[list[int], list[Grammar | None]]:
        """Encode a request's prompt in a thread. Raises ApiError, also if too many requests wait."""
        if self.num_encoding >= self.config.max_num_seqs + self.config.max_queued:
            raise overloaded()
        long = request.size() > SHORT_PROMPT
        self.num_encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.encoders[long], self.prompt, request, long)
        finally:
            self.num_encoding -= 1

    async def measured(
        self, pieces: asyncio.Queue[Numbered], works: list[GenerationRequest]
    ) -> AsyncIterator[Numbered]:
        """Yield the pieces, and count them for /metrics."""
        begun, first = time.monotonic(), True
        self.metrics.prompt_tokens.inc(len(works[0].input_ids))
        while True:
            choice, piece = await pieces.get()
            if first:
                self.metrics.first_token.observe(time.monotonic() - begun)
                first = False
            if piece.finish_reason:
                self.metrics.answer_tokens.inc(piece.num_tokens)
                self.metrics.cached_tokens.inc(piece.num_cached if choice == 0 else 0)
                self.metrics.whole.observe(time.monotonic() - begun)
            yield choice, piece

    def close(self) -> None:
        self.engine.close()
        for encoder in self.encoders.values():
            encoder.shutdown(cancel_futures=True)

    def listed(self, name: str) -> dict[str, Any]:
        if name not in self.models:
            raise ApiError(404, f"no model {name[:80]!r}", "model", "model_not_found")
        return {"id": name, "object": "model", "created": self.started, "owned_by": "onecard"}


def overloaded() -> ApiError:
    return ApiError(503, "too many requests wait", code="overloaded")
