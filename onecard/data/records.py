"""A data file's rows as records, each with its file and line; every bad row told as file:line:field.

Formats, recognised by the rows' keys: chat `messages` (OpenAI), `prompt`/`completion`, alpaca (`instruction`,
`input`, `output`), ShareGPT `conversations`, plain `text`. `files.py` reads the files themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onecard.data.files import BadRow, describe, read_rows, shown
from onecard.errors import UserError

KEYS = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
    "function_response": "tool",
}
EXTRA = ("name", "tool_call_id", "reasoning_content")  # of a message, handed to the chat template
SHOWN_ERRORS = 20
FIX = "correct the row, or pass --on-bad-rows skip"


@dataclass(frozen=True)
class Record:
    """One example before tokenization: `messages` for a chat, else `prompt` and `completion`, or `text`.

    Attributes:
        line: 1-based line of the file; the row's number in Parquet and JSON arrays.
        num_prompt_messages: messages at the head that are never learned: a prompt of messages, as trl has it.
        unlearned: messages of weight 0, as OpenAI's format has it: read, not learned.
        tools: what the assistant may call, handed to the chat template.
        fields: what the file calls each message's content, for errors; empty where it is messages[i].content.
    """

    file: str
    line: int
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    alpaca: bool = False
    num_prompt_messages: int = 0
    unlearned: tuple[int, ...] = ()
    tools: list[dict[str, Any]] | None = None
    fields: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """chat, completion or text."""
        if self.messages is not None:
            return "chat"
        return "text" if self.text is not None else "completion"

    def field_of(self, i: int) -> str:
        """What the file calls message i's content."""
        return self.fields[i] if self.fields else f"messages[{i}].content"

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Records:
    """The good rows of a file, its format's name and the errors of the bad ones."""

    records: list[Record]
    format: str
    bad: list[UserError] = field(default_factory=list)
    file: str = ""

    @property
    def num_skipped(self) -> int:
        return len(self.bad)


def read_records(path: str | Path, format: str = "auto", on_bad_rows: str = "error") -> Records:
    """Read a data file.

    Args:
        path: .jsonl, .ndjson, .json, .csv or .parquet.
        format: a key of KEYS, or "auto".
        on_bad_rows: "error" raises one UserError that lists the bad rows; "skip" leaves them in `bad`.

    Raises:
        UserError: file missing, empty, of another kind or of no known format; bad rows.
    """
    rows, bad = [], []
    for line, row in read_rows(Path(path)):
        if isinstance(row, BadRow):
            bad.append(row_error(path, line, row))
        else:
            rows.append((line, row))
    if not rows and not bad:
        raise UserError("the data file must have rows", "none", "check the file", str(path))
    name = recognise(rows, path) if format == "auto" and rows else format
    records = []
    for line, row in rows:
        try:
            records.append(to_record(name, row, str(path), line))
        except BadRow as error:
            bad.append(row_error(path, line, error))
    bad.sort(key=lambda error: line_of(error, str(path)))
    if on_bad_rows == "error" or not records:
        raise_bad_rows(bad)
    return Records(records, name, bad, str(path))


def row_error(path: str | Path, line: int, error: BadRow) -> UserError:
    return UserError(error.must, shown(error.found), FIX, f"{path}:{line}:{shown(error.field)}")


def line_of(error: UserError, file: str) -> int:
    """The line of a bad row's error."""
    return int((error.where or "").removeprefix(f"{file}:").split(":")[0])


def raise_bad_rows(bad: list[UserError]) -> None:
    """One UserError for all bad rows, the first of them listed; nothing if there are none."""
    if not bad:
        return
    if len(bad) == 1:
        raise bad[0]
    lines = [f"{error.where}: {error.must}; found {error.found}" for error in bad[:SHOWN_ERRORS]]
    if len(bad) > SHOWN_ERRORS:
        lines.append(f"and {len(bad) - SHOWN_ERRORS} more")
    raise UserError("every row must be usable", f"{len(bad)} bad rows\n    " + "\n    ".join(lines), FIX)


def recognise(rows: list[tuple[int, dict[str, Any]]], path: str | Path) -> str:
    """The format whose keys most of the first hundred rows have."""
    first = [row for _, row in rows[:100]]
    counts = {name: sum(all(key in row for key in keys) for row in first) for name, keys in KEYS.items()}
    best = max(counts, key=lambda name: counts[name])
    if counts[best] == 0:
        keys = sorted({shown(str(key))[:40] for row in first for key in row})
        formats = "; ".join(f"{name}: {', '.join(keys)}" for name, keys in KEYS.items())
        raise UserError(
            f"rows must have the keys of a known format ({formats})",
            f"keys {', '.join(keys[:12]) or 'none'}",
            "rename the keys",
            str(path),
        )
    return best


def to_record(format: str, row: dict[str, Any], file: str, line: int) -> Record:
    """Check one row and make it a Record. Raises BadRow."""
    for key in KEYS[format]:
        if key not in row:
            found = f"keys {', '.join(list(row)[:12]) or 'none'}"
            raise BadRow(key, f'a row of format {format} must have "{key}"', found)
    if format == "text":
        return Record(file, line, text=check_text("text", row["text"]))
    if format == "alpaca":
        return alpaca_record(row, file, line)
    if format == "messages":
        chat = check_chat("messages", row["messages"])
        unlearned = check_weights(row["messages"])
        return Record(file, line, messages=chat, unlearned=unlearned, tools=check_tools(row.get("tools")))
    if format == "sharegpt":
        turns = from_sharegpt(row["conversations"])
        names = tuple(f"conversations[{i}]" for i in range(len(turns)))
        chat = check_chat("conversations", turns, names, "value")
        return Record(file, line, messages=chat, fields=tuple(f"{name}.value" for name in names))
    return pair_record(row, file, line)


def pair_record(row: dict[str, Any], file: str, line: int) -> Record:
    """prompt and completion: two strings, or two lists of messages of which the completion's are learned."""
    prompt, completion = row["prompt"], row["completion"]
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        prompt = check_text("prompt", prompt, empty=True)
        return Record(file, line, prompt=prompt, completion=check_text("completion", completion))
    if not any(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in completion):
        raise BadRow("completion", "a completion must have an assistant message", describe(completion))
    names = [f"prompt[{i}]" for i in range(len(prompt))]
    names += [f"completion[{i}]" for i in range(len(completion))]
    chat = check_chat("prompt", prompt + completion, names)
    fields = tuple(f"{name}.content" for name in names)
    return Record(file, line, messages=chat, num_prompt_messages=len(prompt), fields=fields)


def alpaca_record(row: dict[str, Any], file: str, line: int) -> Record:
    asked = check_text("instruction", row["instruction"])
    more = row.get("input")
    more = check_text("input", "" if more is None else more, empty=True)
    answer = check_text("output", row["output"])
    user = f"{asked}\n\n{more}" if more.strip() else asked
    turns = ({"role": "user", "content": user}, {"role": "assistant", "content": answer})
    return Record(file, line, messages=turns, alpaca=True, fields=("instruction", "output"))


def check_text(field: str, value: Any, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(field, f"{field} must be a string", describe(value))
    if not empty and not value.strip():
        raise BadRow(field, f"{field} must not be empty", repr(value[:20]))
    if "\x00" in value:
        raise BadRow(field, f"{field} must be text", f"a NUL character at {value.index(chr(0))}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRow(field, f"{field} must be valid Unicode", "half of a surrogate pair")
    return value


def from_sharegpt(turns: Any) -> list[dict[str, Any]]:
    """ShareGPT's from/value as role/content; a missing value is left for check_chat to tell."""
    if not isinstance(turns, list):
        raise BadRow("conversations", "conversations must be a list of turns", describe(turns))
    made = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn:
            raise BadRow(f"conversations[{i}]", "a turn must have from and value", describe(turn))
        role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            must = f"from must be one of {', '.join(SHAREGPT_ROLES)}"
            raise BadRow(f"conversations[{i}].from", must, describe(turn["from"]))
        made.append({"role": role, "content": turn.get("value")})
    return made


def check_chat(
    field: str, turns: Any, names: Sequence[str] | None = None, content: str = "content"
) -> tuple[dict[str, Any], ...]:
    """Check a list of messages; parts of text are joined.

    Args:
        names: what the file calls each message; default field[i].
        content: what the file calls a message's content.
    """
    if not isinstance(turns, list) or not turns:
        raise BadRow(field, f"{field} must be a list of messages", describe(turns))
    names = names or [f"{field}[{i}]" for i in range(len(turns))]
    made = tuple(check_turn(name, turn, content) for name, turn in zip(names, turns))
    roles = [turn["role"] for turn in made]
    if "assistant" not in roles:
        raise BadRow(field, "a chat must have an assistant message to learn", f"roles {', '.join(roles)}")
    if "system" in roles[1:]:
        late = names[roles.index("system", 1)]
        raise BadRow(f"{late}.role", "system must come first", "a later system message")
    first = next(i for i, role in enumerate(roles) if role not in ("system", "developer"))
    if roles[first] != "user":
        must = "a user message must come before the assistant's"
        raise BadRow(f"{names[first]}.role", must, f"roles {', '.join(roles)}")
    return made


def check_turn(field: str, turn: Any, content_field: str = "content") -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(field, "a message must be an object with role and content", describe(turn))
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise BadRow(f"{field}.role", f"role must be one of {', '.join(ROLES)}", describe(role))
    name = f"{field}.{content_field}"
    given = [key for key in EXTRA if turn.get(key) is not None]
    extra: dict[str, Any] = {key: check_text(f"{field}.{key}", turn[key]) for key in given}
    if turn.get("tool_calls") is not None:
        extra["tool_calls"] = check_tool_calls(f"{field}.tool_calls", turn["tool_calls"], role)
    if isinstance(content, list):
        content = "".join(check_part(f"{name}[{i}]", part) for i, part in enumerate(content))
    if content is None and "tool_calls" in extra:
        content = ""
    must_say = role == "assistant" and "tool_calls" not in extra
    return {"role": role, "content": check_text(name, content, empty=not must_say), **extra}


def check_weights(turns: list[dict[str, Any]]) -> tuple[int, ...]:
    """The messages with weight 0; only the assistant's may have one, and at least one of theirs must be learned."""
    unlearned = []
    for i, turn in enumerate(turns):
        weight = turn.get("weight")
        if weight is None:
            continue
        if turn["role"] != "assistant" or weight not in (0, 1):
            raise BadRow(f"messages[{i}].weight", "weight must be 0 or 1, on an assistant message", describe(weight))
        if weight == 0:
            unlearned.append(i)
    if len(unlearned) == sum(turn["role"] == "assistant" for turn in turns):
        raise BadRow("messages", "an assistant message must have a weight other than 0", "all are 0")
    return tuple(unlearned)


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A row's tools: a list of objects, or the JSON text of one."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRow("tools", "tools must be a list, or the JSON of one", describe(tools)) from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools", "tools must be a list of objects", describe(tools))
    check_strings("tools", tools)
    return tools


def check_tool_calls(field: str, calls: Any, role: str) -> list[dict[str, Any]]:
    """An assistant's calls; arguments become objects, for templates write a string as a quoted string."""
    if role != "assistant":
        raise BadRow(field, "only the assistant may call tools", f"role {role}")
    if not isinstance(calls, list) or not calls:
        raise BadRow(field, "tool_calls must be a list of calls", describe(calls))
    return [check_call(f"{field}[{i}]", call) for i, call in enumerate(calls)]


def check_call(field: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{field}.function", "a call must have a function with a name", describe(call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            found = describe(arguments)
            raise BadRow(f"{field}.function.arguments", "arguments must be JSON", found) from None
    if not isinstance(arguments, dict):
        raise BadRow(f"{field}.function.arguments", "arguments must be an object", describe(arguments))
    check_strings(field, call)
    check_strings(f"{field}.function.arguments", arguments)
    return {**call, "function": {**function, "arguments": arguments}}


def check_strings(field: str, value: Any) -> None:
    """Every string and key of a JSON value must be text."""
    for name, text in strings_in(field, value):
        check_text(name, text, empty=True)


def strings_in(field: str, value: Any) -> Iterator[tuple[str, str]]:
    """(field, text) of every string and key in a JSON value."""
    rest = [(field, value)]
    while rest:  # not recursion: arguments may be nested deep
        field, value = rest.pop()
        if isinstance(value, str):
            yield field, value
        elif isinstance(value, dict):
            rest += [(field, key) for key in value] + [(f"{field}.{key}", value[key]) for key in value]
        elif isinstance(value, list):
            rest += [(f"{field}[{k}]", each) for k, each in enumerate(value)]


def check_part(field: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise BadRow(field, "a part must be of type text", describe(part))
    return check_text(f"{field}.text", part.get("text"), empty=True)
