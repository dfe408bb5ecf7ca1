"""Finds calls of tools in an answer's text, in two usual formats, and makes the schema of a call that is forced.

hermes (Hermes, Qwen, SmolLM): <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once or several times.
llama (Llama 3): the whole answer is {"name": ..., "parameters": {...}}.

What does not parse, or calls a tool that the request does not have, stays text.

A forced call (tool_choice) is held to a JSON schema: the object above, without the marks of hermes, whose first one is
put at the end of the prompt. So the model goes on inside the marks, as it learned to.
"""

from __future__ import annotations

import json
import uuid
from typing import Any, Literal

from onecard.data.chat.mask import prompt_text
from onecard.errors import UserError

ToolFormat = Literal["hermes", "llama", "text"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
PROBE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up_weather",
        "description": "Look up the weather.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def format_of(tokenizer: Any) -> ToolFormat | None:
    """Return the format of calls that a chat template describes; text for another one; None if it knows no tools."""
    if not tokenizer.chat_template:
        return None
    try:
        text = prompt_text([{"role": "user", "content": "a"}], tokenizer, [PROBE])
    except UserError:
        return None
    if PROBE["function"]["name"] not in text:
        return None
    source = tokenizer.get_chat_template(tools=[PROBE]).replace("\\", "").replace(" ", "")
    if '{"name":' not in source:
        return "text"
    if OPEN in source:
        return "hermes" if '"arguments":' in source else "text"
    return "llama" if '"parameters":' in source else "text"


def arguments_key(kind: ToolFormat) -> str:
    """Return the key of a call's arguments."""
    return "parameters" if kind == "llama" else "arguments"


def forced_prefix(kind: ToolFormat) -> str:
    """Return what the prompt of a forced call ends with."""
    return f"{OPEN}\n" if kind == "hermes" else ""


def call_schema(tools: list[tuple[str, dict[str, Any] | None]], kind: ToolFormat) -> dict[str, Any]:
    """Return the JSON schema of a call of one of these tools.

    The schemas of the arguments stand under $defs, and their references are changed to point there.

    Args:
        tools: name and JSON schema of the arguments; None: any object.

    Raises:
        UserError: the arguments of a tool are not an object.
    """
    key, calls, definitions = arguments_key(kind), [], {}
    for i, (name, parameters) in enumerate(tools):
        schema = {"type": "object", **(parameters or {})}
        if schema["type"] != "object":
            found = f"type {str(schema['type'])[:80]}"
            raise UserError(f"the parameters of {name[:80]} must be an object", found, "correct the schema", "tools")
        definitions[f"tool{i}"] = moved(schema, f"#/$defs/tool{i}")
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, key: {"$ref": f"#/$defs/tool{i}"}},
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": definitions}


def moved(schema: Any, place: str) -> Any:
    """Return a schema whose references to itself are right at another place. Values that are data stay."""
    if isinstance(schema, list):
        return [moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str):
            made[key] = place + value[1:] if value.startswith("#") else value
        else:
            made[key] = value if key in ("const", "enum", "default", "examples") else moved(value, place)
    return made


class ToolText:
    """Separates the calls in a growing text from what is said beside them.

    Args:
        names: the tools that may be called.
        forced: the whole text is a call.
    """

    def __init__(self, kind: ToolFormat, names: set[str], forced: bool = False):
        self.kind: ToolFormat = kind
        self.names, self.held, self.num_shown, self.forced = names, "", 0, forced

    def push(self, text: str) -> str:
        """Add text. Return what cannot be part of a call."""
        self.held += text
        if self.forced:
            return ""
        if self.kind == "text":
            return self.release(len(self.held))
        if self.kind == "llama":
            begins = self.num_shown == 0 and self.held.lstrip()[:1] in ("", "{")
            return "" if begins else self.release(len(self.held))
        start = self.held.find(OPEN)
        if start < 0:  # an end that may begin the mark is held back
            start = next(i for i in range(len(self.held) + 1) if OPEN.startswith(self.held[i:]))
        return self.release(start)

    def release(self, end: int) -> str:
        shown, self.held = self.held[:end], self.held[end:]
        self.num_shown += len(shown)
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the text that was held back and is no call, and the calls."""
        calls: list[dict[str, Any]] = []
        if self.forced or self.kind == "llama":
            call = self.parse(self.held, arguments_key(self.kind))
            return ("", [call]) if call else (self.held, [])
        rest, said = self.held, ""
        while OPEN in rest:
            before, _, after = rest.partition(OPEN)
            inside, closed, behind = after.partition(CLOSE)
            call = self.parse(inside, "arguments")
            said += before if call else before + OPEN + inside + closed
            calls += [call] if call else []
            rest = behind
        said += rest
        return ("" if calls and not said.strip() else said), calls

    def parse(self, text: str, key: str) -> dict[str, Any] | None:
        """Return a call in OpenAI's form; None if the text is not one of a known tool."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        arguments = found.get(key, {}) if isinstance(found, dict) else None
        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(arguments, dict) or not isinstance(name, str) or name not in self.names:
            return None
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
