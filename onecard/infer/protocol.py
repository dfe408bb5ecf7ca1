"""The supported part of OpenAI's API: checks requests.

A parameter with a neutral value (best_of=1, echo=False) is accepted, since some clients always send it. Any other
value of it, and any unknown parameter, is an error that names it: an answer that ignores a parameter would be wrong.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from onecard.config import SamplingConfig

MAX_STOPS, MAX_STOP_CHARACTERS = 4, 4096
MAX_CHOICES, MAX_TOOLS = 128, 128
MESSAGE_CHARACTERS = 32  # added to each message's own, for the chat template's work
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logprobs": False,
    "modalities": ["text"],
    "tool_calls": [],
    "annotations": [],
    "store": False,
    "strict": False,
    "parallel_tool_calls": True,
    "service_tier": "auto",
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


class Function(Sent):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Sent):
    type: Literal["function"]
    function: Function


class CalledFunction(Sent):
    name: str = Field(min_length=1)
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _check_arguments(cls, arguments: str) -> str:
        try:
            found = json.loads(arguments)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError("the arguments of a call must be the JSON of an object")
        return arguments


class Call(Sent):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def turn(self) -> dict[str, Any]:
        """Return the call as chat templates read it, with the arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {"type": "function", "function": function} | ({"id": self.id} if self.id else {})


class Message(Sent):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[Call] = Field(default_factory=list)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message must have content or, of the assistant, tool_calls")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant may have tool_calls")
        return self

    def turn(self) -> dict[str, Any]:
        """Return the message in the form that chat templates accept."""
        parts = self.content or ""
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        calls = {"tool_calls": [call.turn() for call in self.tool_calls]} if self.tool_calls else {}
        return {"role": self.role, "content": content, **calls} | {k: v for k, v in more.items() if v}


class JsonSchema(Sent):
    """A schema that the answer must match. It is always kept to, so `strict` may have either value."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(Sent):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is for the type json_schema, which needs it")
        return self

    def schema(self) -> dict[str, Any] | None:  # type: ignore[override]  # pydantic's own of this name is deprecated
        """Return the JSON schema of the answer; None for any text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


class Request(Sent):
    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, float] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = Field(default_factory=list, max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat = ResponseFormat(type="text")
    # These say who asks and for what, and change no answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if isinstance(stops, list) and "" in stops:
            raise ValueError("a stop string must not be empty")
        if isinstance(stops, list) and any(isinstance(each, str) and len(each) > MAX_STOP_CHARACTERS for each in stops):
            raise ValueError(f"a stop string may have {MAX_STOP_CHARACTERS:,} characters")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _check_bias(cls, bias: dict[str, float]) -> dict[str, float]:
        for token, value in bias.items():
            if not (token.isascii() and token.isdigit()) or not -100 <= value <= 100:
                raise ValueError(f"a bias must be from -100 to 100, of a token's id; found {token[:20]}: {value}")
        return bias

    def sampling(self, choice: int = 0) -> SamplingConfig:
        """Return the sampling of one of the `n` choices. Each draws with a seed of its own."""
        same = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        return SamplingConfig(
            **{name: getattr(self, name) for name in same},
            logit_bias={int(token): value for token, value in self.logit_bias.items()},
            seed=None if self.seed is None else self.seed + choice,
            stop=tuple(self.stop),
        )


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Any = None

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs true")
        return self

    @field_validator("tool_choice")
    @classmethod
    def _check_choice(cls, choice: Any, info: ValidationInfo) -> Any:
        """Return none, auto, required, or the function that must be called, which is one of the tools."""
        if choice in (None, "none", "auto"):
            return choice
        names = [tool.function.name for tool in info.data.get("tools", [])]
        if choice == "required" and names:
            return choice
        if any(choice == {"type": "function", "function": {"name": name}} for name in names):
            return choice
        found = f"{str(choice)[:80]} with the tools {', '.join(names)[:200] or 'none'}"
        raise ValueError(f"it may be none, auto, required or a function, of which tools has some; found {found}")

    def forced(self) -> list[Tool]:
        """Return the tools of which the answer must call one; none if it may be text."""
        if self.tool_choice in (None, "none", "auto"):
            return []
        name = self.tool_choice["function"]["name"] if self.tool_choice != "required" else None
        return [tool for tool in self.tools if name in (None, tool.function.name)]

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def called(self) -> list[dict[str, Any]]:
        """Return the tools that the answer may call, for the chat template."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools]

    def text(self) -> str:
        """Return the text of all messages."""
        return "".join(message.turn()["content"] for message in self.messages)

    def size(self) -> int:
        """Return about how many characters the prompt has."""
        tools = sum(len(tool.model_dump_json()) for tool in self.tools)
        calls = sum(len(call.function.arguments) for message in self.messages for call in message.tool_calls)
        return len(self.text()) + tools + calls + MESSAGE_CHARACTERS * len(self.messages)


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def called(self) -> list[dict[str, Any]]:
        return []

    def forced(self) -> list[Tool]:
        return []

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


def parse(kind: type[Sent], body: bytes) -> Any:
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
