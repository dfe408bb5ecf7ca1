"""The shapes of messages that chat templates read, and the check that a rendering contains every word.

A template silently leaves out what it does not know: a field with another name, a call on a template without calls, the
content if it expects a list of parts. So the rendering is searched for every word of the messages. If a word is
missing, the messages are rendered in the next shape. If no shape keeps all words, the row is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

SPACES = re.compile(r"\s+")
TWO_THOUGHTS = re.compile(r"<think>\s*</think>\s*<think>")  # the template's empty thought, then the row's own
THOUGHT = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*", re.DOTALL)
NO_CONTENT = re.compile(r"content\W{0,3} is (not )?none")  # the template checks whether a message has content

Messages = list[dict[str, Any]]


class Missing(Exception):
    """A rendering does not contain words of message i. The exception has the field and the words."""

    def __init__(self, i: int, field: str, words: str):
        self.i, self.field, self.words = i, field, words
        super().__init__(i, field, words)


@dataclass(frozen=True)
class Shape:
    """The form in which the template receives messages.

    Attributes:
        parts: messages whose content is a list of parts: "all", "system" or "none".
        text_arguments: arguments of calls are JSON text.
        thoughts: the key of thoughts; "content" puts them before the answer, between <think> and </think>.
        last_thoughts: only the last message keeps its thoughts.
        bare_tools: tools have no enclosing `function`.
        no_content: the content of a message that only calls tools is null.
    """

    parts: str = "none"
    text_arguments: bool = False
    thoughts: str = "reasoning_content"
    last_thoughts: bool = False
    bare_tools: bool = False
    no_content: bool = False

    def messages(self, messages: Messages) -> Messages:
        return [self.message(turn, i == len(messages) - 1) for i, turn in enumerate(messages)]

    def message(self, turn: dict[str, Any], last: bool = True) -> dict[str, Any]:
        made = dict(turn)
        if self.last_thoughts and not last:
            made.pop("reasoning_content", None)
        if "reasoning_content" in made and self.thoughts != "reasoning_content":
            thought = made.pop("reasoning_content")
            if self.thoughts == "content":
                made["content"] = f"<think>\n{thought}\n</think>\n\n{made['content']}"
            else:
                made[self.thoughts] = thought
        if self.text_arguments and made.get("tool_calls"):
            made["tool_calls"] = [with_text_arguments(call) for call in made["tool_calls"]]
        if self.no_content and made.get("tool_calls") and not made["content"]:
            made["content"] = None
        elif self.parts == "all" or self.parts == made["role"]:
            made["content"] = [{"type": "text", "text": made["content"]}]
        return made

    def tools(self, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        if not (self.bare_tools and tools):
            return tools
        return [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]


USUAL = Shape()


def with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def ways(messages: Messages, tools: Any, template: str) -> Iterator[tuple[Messages, Shape]]:
    """Yield messages and shapes to try: first the usual shape, then the variants that the template's text suggests."""
    for written in rewritten(messages, template):
        yield from ((written, shape) for shape in shapes(written, tools, template))


def rewritten(messages: Messages, template: str) -> list[Messages]:
    """Return variants of the messages: unchanged, developer as system role, inline thoughts in their own field.

    If the template does not name the developer role, the unchanged variant is left out, as servers do.
    """
    found = [messages]
    if any(turn["role"] == "developer" for turn in messages):
        as_system = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in messages]
        found = [messages, as_system] if "developer" in template else [as_system]
    inline = any(thought_and_answer(turn)[1] != turn["content"] for turn in messages)
    if inline and ("reasoning" in template or "thinking" in template):
        found += [[with_split_thought(turn) for turn in written] for written in found]
    return found


def with_split_thought(turn: dict[str, Any]) -> dict[str, Any]:
    thought, said = thought_and_answer(turn)
    return {**turn, "content": said, "reasoning_content": thought} if thought else turn


def shapes(messages: Messages, tools: Any, template: str) -> Iterator[Shape]:
    """Yield the usual shape, then the shapes that the template's text suggests."""
    yield USUAL
    has_calls = any(turn.get("tool_calls") for turn in messages)
    has_thoughts = any(turn.get("reasoning_content") for turn in messages)
    thoughts = []
    if has_thoughts:
        thoughts = [key for key in ("thinking", "reasoning") if key in template]
        thoughts += ["content"] if "</think>" in template else []
    found = [replace(USUAL, thoughts=key) for key in thoughts]
    if has_calls:
        found += [replace(shape, text_arguments=True) for shape in [USUAL, *found]]
    if has_calls and NO_CONTENT.search(template):
        found += [replace(shape, no_content=True) for shape in [USUAL, *found]]
    if tools:
        found.append(replace(USUAL, bare_tools=True))
    if re.search(r"\btext\b", template):
        found += [replace(shape, parts=parts) for parts in ("all", "system") for shape in [USUAL, *found]]
    yield from found


def check_words(text: str, messages: Messages, tools: Any, spans: dict[int, tuple[int, int]]) -> list[int]:
    """Find every word of the messages in a rendering. The words of a learned message must be inside its span.

    Returns:
        indices of the messages before the last whose thoughts the template left out, as many templates do.

    Raises:
        Missing: the rendering does not contain a word.
    """
    at, without_thoughts = 0, []
    for i, turn in enumerate(messages):
        begin, end = spans.get(i, (at, len(text)))
        if turn["role"] in ("system", "developer"):
            begin = 0  # some templates write it later
        part = text[begin:end]
        thought, said = thought_and_answer(turn)
        after = find_words(part, said)
        if after is None:
            raise Missing(i, "content", said)
        if thought and (find_words(part, thought) is None or TWO_THOUGHTS.search(text, at, end)):
            if i == len(messages) - 1:
                raise Missing(i, "thoughts", thought)
            without_thoughts.append(i)
        for call in turn.get("tool_calls", ()):
            check_call_words(i, part, call["function"])
        at = max(at, begin + after) if turn["role"] not in ("system", "developer") else at
    for tool in tools or ():
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str) and name not in text:
            raise Missing(len(messages) - 1, "tools", name)
    return without_thoughts


def thought_and_answer(turn: dict[str, Any]) -> tuple[str, str]:
    """Return a message's thoughts, from their field or from <think>...</think> before the answer, and its answer."""
    if turn["role"] != "assistant":
        return "", turn["content"]
    if turn.get("reasoning_content"):
        return turn["reasoning_content"], turn["content"]
    found = THOUGHT.match(turn["content"])
    return (found.group(1), turn["content"][found.end() :]) if found else ("", turn["content"])


def find_words(text: str, words: str) -> int | None:
    """Return where words end in a text, or None. White space may differ, and words may be escaped as JSON."""
    words = words.strip()
    if (at := text.find(words)) >= 0:
        return at + len(words)
    for form in (json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]):
        if (at := text.find(form)) >= 0:
            return at + len(form)
    pattern = r"\s*".join(map(re.escape, SPACES.split(words)))
    found = re.search(pattern, text) if len(words) < 100_000 else None
    return found.end() if found else None


def check_call_words(i: int, text: str, function: dict[str, Any]) -> None:
    """Raise Missing if the text lacks a call's name, keys or values, or has its arguments as Python instead of JSON."""
    if function["name"] not in text:
        raise Missing(i, "tool_calls", function["name"])
    arguments = function["arguments"]
    for key, value in leaves(arguments):
        forms = [json.dumps(value, ensure_ascii=False).strip('"'), json.dumps(value), str(value).strip()]
        if key not in text or not any(form in text for form in forms):
            raise Missing(i, "tool_calls", f"{key}: {value}")
    written = str(arguments)
    if written != json.dumps(arguments, ensure_ascii=False) and written in text:
        raise Missing(i, "tool_calls", f"arguments as JSON, not as {written}")


def leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) for every value that is not an object or a list. The items of a list have the list's key."""
    rest = list(value.items())
    while rest:
        key, each = rest.pop()
        if isinstance(each, dict):
            rest += each.items()
        elif isinstance(each, list):
            rest += [(key, item) for item in each]
        else:
            yield key, each
