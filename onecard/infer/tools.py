"""Finds calls of tools in an answer's text, in two usual formats.

hermes (Hermes, Qwen, SmolLM): <tool_call>{"name": ..., "arguments": {...}}</tool_call>, once or several times.
llama (Llama 3): the whole answer is {"name": ..., "parameters": {...}}.

What does not parse, or calls a tool that the request does not have, stays text.
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


class ToolText:
    """Separates the calls in a growing text from what is said beside them.

    Args:
        names: the tools that may be called.
    """

    def __init__(self, kind: ToolFormat, names: set[str]):
        self.kind, self.names, self.held, self.num_shown = kind, names, "", 0

    def push(self, text: str) -> str:
        """Add text. Return what cannot be part of a call."""
        self.held += text
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
        if self.kind == "llama":
            call = self.parse(self.held, "parameters")
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
