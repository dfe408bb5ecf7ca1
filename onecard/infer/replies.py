"""Builds the JSON objects of OpenAI's chat.completion and text_completion, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from onecard.infer.engine import TextChunk
from onecard.infer.logprobs import Scored, TokenLogprob
from onecard.infer.protocol import ChatRequest
from onecard.infer.tools import ToolText


class Choice:
    """One of the answers to a request, as it grows."""

    def __init__(self, index: int, tools: ToolText | None):
        self.index, self.tools = index, tools
        self.text, self.num_tokens, self.num_cached = "", 0, 0
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprob] = []
        self.calls: list[dict[str, Any]] = []

    def add(self, piece: TextChunk) -> str:
        """Add a piece. Return the new text of the message, which leaves out calls of tools."""
        text, self.num_tokens, self.num_cached = piece.text, piece.num_tokens, piece.num_cached
        self.logprobs += piece.logprobs
        if self.tools:
            text = self.tools.push(text)
            if piece.finish_reason:
                rest, self.calls = self.tools.finish()
                text += rest
        self.text += text
        self.finish_reason = piece.finish_reason
        if self.calls and piece.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return text


class Reply:
    """The reply to a request of one or several choices.

    Args:
        tools: for each choice, what finds calls in its text; None if it may have none.
    """

    def __init__(self, request: Any, num_prompt_tokens: int, tools: list[ToolText | None]):
        self.chat, self.num_prompt_tokens = isinstance(request, ChatRequest), num_prompt_tokens
        self.include_usage, self.num_logprobs = request.stream_options.include_usage, request.num_logprobs
        self.choices = [Choice(i, each) for i, each in enumerate(tools)]
        self.shared = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    @property
    def complete(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        num_tokens = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.num_prompt_tokens + num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.choices[0].num_cached},
        }

    def whole(self) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self.choice(each, self.message(each), each.logprobs, each.finish_reason) for each in self.choices]
        return {**self.shared, "object": kind, "choices": choices, "usage": self.usage()}

    def message(self, choice: Choice) -> dict[str, Any]:
        if not self.chat:
            return {"text": choice.text}
        calls = {"tool_calls": choice.calls} if choice.calls else {}
        content = None if calls and not choice.text else choice.text
        return {"message": {"role": "assistant", "content": content, "refusal": None, **calls}}

    def choice(
        self, choice: Choice, said: dict[str, Any], logprobs: list[TokenLogprob], finish_reason: str | None
    ) -> dict[str, Any]:
        shown = None
        if self.num_logprobs is not None:
            shown = {"content": list(map(chat_logprob, logprobs)), "refusal": None} if self.chat else columns(logprobs)
        return {"index": choice.index, **said, "logprobs": shown, "finish_reason": finish_reason}

    def begin(self) -> Iterator[Any]:
        """Yield the first chunks of a stream: the role of each answer of a chat."""
        for choice in self.choices if self.chat else ():
            yield self.chunk(choice, {"role": "assistant", "content": ""}, [])

    def add(self, index: int, piece: TextChunk) -> Iterator[Any]:
        """Add a piece to a choice. Yield its chunks."""
        choice = self.choices[index]
        text = choice.add(piece)
        if text or piece.logprobs:
            yield self.chunk(choice, {"content": text}, list(piece.logprobs))
        if choice.calls:
            calls = [{"index": i, **call} for i, call in enumerate(choice.calls)]
            yield self.chunk(choice, {"tool_calls": calls}, [])
        if choice.finish_reason:
            yield self.chunk(choice, {}, [], choice.finish_reason)

    def end(self) -> Iterator[Any]:
        if self.include_usage:
            yield self.event([], self.usage())
        yield "[DONE]"

    def chunk(
        self, choice: Choice, delta: dict[str, Any], logprobs: list[TokenLogprob], finish_reason: str | None = None
    ) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
        made = self.choice(choice, said, logprobs, finish_reason)
        return self.event([made if logprobs else made | {"logprobs": None}], None)

    def event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        made = {**self.shared, "object": kind, "choices": choices}
        return made | ({"usage": usage} if self.include_usage else {})


def spelled(scored: Scored) -> dict[str, Any]:
    """Return a token of a chat's logprobs. The bytes of a part of a character are not known: null."""
    known = None if "\ufffd" in scored.text else list(scored.text.encode())
    return {"token": scored.text, "logprob": scored.logprob, "bytes": known}


def chat_logprob(each: TokenLogprob) -> dict[str, Any]:
    return {**spelled(each.drawn), "top_logprobs": list(map(spelled, each.likeliest))}


def columns(logprobs: list[TokenLogprob]) -> dict[str, Any]:
    """Return the logprobs of a completion. The drawn token is among the likeliest ones, as OpenAI has it."""
    return {
        "tokens": [each.drawn.text for each in logprobs],
        "token_logprobs": [each.drawn.logprob for each in logprobs],
        "top_logprobs": [{t.text: t.logprob for t in (each.drawn, *each.likeliest)} for each in logprobs],
        "text_offset": [each.start for each in logprobs],
    }
