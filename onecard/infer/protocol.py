"""The supported part of OpenAI's API: checks requests and builds replies.

A parameter with a neutral value (n=1, frequency_penalty=0) is accepted, since some clients always send it. Any other
value of it, and any unknown parameter, is an error that names it: an answer that ignores a parameter would be wrong.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from onecard.config import SamplingConfig

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 4096
MESSAGE_CHARACTERS = 32  # added to each message's own, for the chat template's work
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "tool_calls": [],
    "annotations": [],
    "store": False,
}


class ApiError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        self.status, self.code = status, code
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.headers = {"retry-after": "1"} if status == 503 else {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        super().__init__(message)


class Sent(BaseModel):
    """A JSON object. A null or NEUTRAL value counts as not given."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        return {key: value for key, value in sent.items() if value is not None and not is_neutral(key, value)}


def is_neutral(key: str, value: Any) -> bool:
    """Whether a value changes nothing. logprobs 0 is not false: it asks for the chosen token's logprob."""
    neutral = NEUTRAL.get(key)
    return key in NEUTRAL and value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class StreamOptions(Sent):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TextPart(Sent):
    type: Literal["text"]
    text: str


class Message(Sent):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        """Return the message in the form that chat templates accept."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class Request(Sent):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list, max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop string must not be empty")
        if isinstance(stops, list) and any(isinstance(each, str) and len(each) > MAX_STOP_CHARACTERS for each in stops):
            raise ValueError(f"a stop string may have {MAX_STOP_CHARACTERS:,} characters")
        return stops

    def sampling(self) -> SamplingConfig:
        return SamplingConfig(temperature=self.temperature, top_p=self.top_p, seed=self.seed, stop=tuple(self.stop))


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def text(self) -> str:
        """Return the text of all messages."""
        return "".join(message.turn()["content"] for message in self.messages)

    def size(self) -> int:
        """Return about how many characters the prompt has."""
        return len(self.text()) + MESSAGE_CHARACTERS * len(self.messages)


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]]

    def one_prompt(self) -> str | list[int]:
        """Return the prompt. Raises ApiError for several prompts."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise ApiError(400, "one prompt a request is supported", "prompt", "unsupported_value")
            prompt = prompt[0]
        return prompt

    def text(self) -> str:
        """Return the prompt if it is text, else an empty string."""
        prompt = self.one_prompt()
        return prompt if isinstance(prompt, str) else ""

    def size(self) -> int:
        """Return the prompt's number of characters or tokens."""
        return len(self.one_prompt())


def parse(kind: type[Request], body: bytes) -> Any:
    """Parse a request of `kind`. Raises ApiError that names the parameter."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    steps = [str(step) for step in first["loc"] if "[" not in str(step) and step not in ("str", "int")]
    param = ".".join(steps) or None  # without the names of the types that were tried
    if first["type"] == "extra_forbidden":
        value = repr(first["input"])
        raise ApiError(400, f"{param} is not supported (found {value[:80]})", param, "unsupported_parameter")
    message = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"{param}: {message}" if param else message, param, "invalid_value")


class Reply:
    """Builds the JSON objects of one answer, whole or in chunks."""

    def __init__(self, chat: bool, model: str, num_prompt_tokens: int, include_usage: bool):
        self.chat, self.num_prompt_tokens, self.include_usage = chat, num_prompt_tokens, include_usage
        self.shared = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def usage(self, num_tokens: int) -> dict[str, int]:
        total = self.num_prompt_tokens + num_tokens
        return {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}

    def choice(self, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}

    def whole(self, text: str, num_tokens: int, finish_reason: str) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        said: dict[str, Any] = {"message": message} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self.choice(said, finish_reason)]
        return {**self.shared, "object": kind, "choices": choices, "usage": self.usage(num_tokens)}

    def chunk(self, text: str, finish_reason: str | None = None, first: bool = False) -> dict[str, Any]:
        """Build one chunk. `first` adds the role of a chat's answer."""
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        said: dict[str, Any] = {"delta": delta} if self.chat else {"text": text}
        return self.event([self.choice(said, finish_reason)], None)

    def event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        made = {**self.shared, "object": kind, "choices": choices}
        return made | ({"usage": usage} if self.include_usage else {})
