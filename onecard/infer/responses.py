"""The basic part of OpenAI's /v1/responses: text in, text out, whole or as events. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from onecard.infer.engine import TextChunk
from onecard.infer.protocol import ChatRequest, Message, Sent
from onecard.infer.replies import Choice


class InputPart(Sent):
    """Text of a message. An answer that was returned can be sent back, with its empty fields."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list, max_length=0)
    logprobs: list[Any] = Field(default_factory=list, max_length=0)


class InputMessage(Sent):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None

    def message(self) -> Message:
        parts = self.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Message(role=self.role, content=content)


class TextFormat(Sent):
    """response_format of the other API, without a level."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool = True

    def response_format(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {"type": self.type, "json_schema": {"name": self.name, "schema": self.schema_}}


class TextSettings(Sent):
    format: TextFormat = Field(default_factory=lambda: TextFormat.model_validate({"type": "text"}))


class ResponsesRequest(Sent):
    model: str
    input: str | list[InputMessage] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    text: TextSettings = TextSettings()
    stream: bool = False
    truncation: Literal["disabled"] = "disabled"
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("text")
    @classmethod
    def _check_schema(cls, text: TextSettings) -> TextSettings:
        if (text.format.type == "json_schema") != (text.format.schema_ is not None):
            raise ValueError("a schema is for the format json_schema, which needs it")
        return text

    def as_chat(self) -> ChatRequest:
        """Return the same request of the chat API."""
        first = [Message(role="system", content=self.instructions)] if self.instructions else []
        asked = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return ChatRequest.model_validate(
            {
                "model": self.model,
                "messages": [*first, *(each.message() for each in asked)],
                "max_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "stream": self.stream,
                "response_format": self.text.format.response_format(),
            }
        )


class ResponsesReply:
    """Builds the response and its events. One choice."""

    def __init__(self, asked: ResponsesRequest, request: ChatRequest, num_prompt_tokens: int, tools: list[Any]):
        self.asked, self.num_prompt_tokens = asked, num_prompt_tokens
        self.said, self.number = Choice(0, None), 0
        self.id, self.item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())

    @property
    def complete(self) -> bool:
        return self.said.finish_reason is not None

    def whole(self) -> dict[str, Any]:
        """Return the response as it is so far."""
        short = self.said.finish_reason == "length"
        status = "in_progress" if not self.complete else "incomplete" if short else "completed"
        num_tokens = self.said.num_tokens
        usage = {
            "input_tokens": self.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.said.num_cached},
            "output_tokens": num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_prompt_tokens + num_tokens,
        }
        asked = self.asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if short else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": [self.item()] if self.complete else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": asked.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": "auto",
            "tools": [],
            "top_p": asked.top_p,
            "truncation": asked.truncation,
            "usage": usage if self.complete else None,
        }

    def item(self) -> dict[str, Any]:
        status = "incomplete" if self.said.finish_reason == "length" else "completed"
        shown = {"status": status, "content": [self.part()]} if self.complete else {"status": "in_progress"}
        return {"id": self.item_id, "type": "message", "role": "assistant", "content": [], **shown}

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.said.text, "annotations": [], "logprobs": []}

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": f"response.{kind}", "sequence_number": self.number - 1, **fields}

    def of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self.event(kind, item_id=self.item_id, output_index=0, content_index=0, **fields)

    def begin(self) -> Iterator[Any]:
        yield self.event("created", response=self.whole())
        yield self.event("in_progress", response=self.whole())
        yield self.event("output_item.added", output_index=0, item=self.item())
        yield self.of_part("content_part.added", part=self.part())

    def add(self, index: int, piece: TextChunk) -> Iterator[Any]:
        if text := self.said.add(piece):
            yield self.of_part("output_text.delta", delta=text, logprobs=[])

    def end(self) -> Iterator[Any]:
        yield self.of_part("output_text.done", text=self.said.text, logprobs=[])
        yield self.of_part("content_part.done", part=self.part())
        yield self.event("output_item.done", output_index=0, item=self.item())
        short = self.said.finish_reason == "length"
        yield self.event("incomplete" if short else "completed", response=self.whole())
