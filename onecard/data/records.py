"""A data file's rows as records, each with its file and line; every bad row told as file:line:field.

Formats, recognised by the rows' keys: chat `messages` (OpenAI), `prompt`/`completion`, alpaca (`instruction`,
`input`, `output`), ShareGPT `conversations`, plain `text`. Files: JSONL, JSON, CSV, Parquet.
"""

from __future__ import annotations

import json
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
}
SHOWN_ERRORS = 20
FIX = "correct the row, or pass --on-bad-rows skip"


@dataclass(frozen=True)
class Record:
    """One example before tokenization: `messages` for a chat, else `prompt` and `completion`, or `text`."""

    file: str
    line: int
    messages: tuple[dict[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    alpaca: bool = False

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Records:
    """The good rows of a file, its format's name and the errors of the bad ones."""

    records: list[Record]
    format: str
    bad: list[UserError] = field(default_factory=list)


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
    bad.sort(key=lambda error: int((error.where or "").removeprefix(f"{path}:").split(":")[0]))
    if on_bad_rows == "error" or not records:
        raise_bad_rows(bad)
    return Records(records, name, bad)


def row_error(path: str | Path, line: int, error: BadRow) -> UserError:
    return UserError(error.must, error.found, FIX, f"{path}:{line}:{error.field}")


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
        keys = sorted({str(key) for row in first for key in row})
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
            raise BadRow(key, f'a row of format {format} must have "{key}"', f"keys {', '.join(row) or 'none'}")
    if format == "text":
        return Record(file, line, text=check_text("text", row["text"]))
    if format == "alpaca":
        return alpaca_record(row, file, line)
    if format == "messages":
        return Record(file, line, messages=check_chat("messages", row["messages"]))
    if format == "sharegpt":
        return Record(file, line, messages=check_chat("conversations", from_sharegpt(row["conversations"])))
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        return Record(file, line, messages=check_chat("completion", row["prompt"] + row["completion"]))
    prompt = check_text("prompt", row["prompt"], empty=True)
    return Record(file, line, prompt=prompt, completion=check_text("completion", row["completion"]))


def alpaca_record(row: dict[str, Any], file: str, line: int) -> Record:
    asked = check_text("instruction", row["instruction"])
    more = check_text("input", row.get("input") or "", empty=True)
    answer = check_text("output", row["output"])
    user = f"{asked}\n\n{more}" if more.strip() else asked
    turns = ({"role": "user", "content": user}, {"role": "assistant", "content": answer})
    return Record(file, line, messages=turns, alpaca=True)


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


def from_sharegpt(turns: Any) -> Any:
    """ShareGPT's from/value as role/content; what is not so is left for check_chat to tell."""
    if not isinstance(turns, list):
        return turns
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


def check_chat(field: str, turns: Any) -> tuple[dict[str, Any], ...]:
    """Check a list of messages; parts of text are joined."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(field, f"{field} must be a list of messages", describe(turns))
    made = tuple(check_turn(f"{field}[{i}]", turn) for i, turn in enumerate(turns))
    roles = [turn["role"] for turn in made]
    if "assistant" not in roles:
        raise BadRow(field, "a chat must have an assistant message to learn", f"roles {', '.join(roles)}")
    if "system" in roles[1:]:
        raise BadRow(f"{field}[{roles.index('system', 1)}].role", "system must come first", "a later system message")
    if next(role for role in roles if role not in ("system", "developer")) == "assistant":
        raise BadRow(field, "a user message must come before the assistant's", f"roles {', '.join(roles)}")
    return made


def check_turn(field: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(field, "a message must be an object with role and content", describe(turn))
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise BadRow(f"{field}.role", f"role must be one of {', '.join(ROLES)}", describe(role))
    extra = {key: turn[key] for key in ("tool_calls", "name", "tool_call_id") if turn.get(key) is not None}
    if isinstance(content, list):
        content = "".join(check_part(f"{field}.content[{i}]", part) for i, part in enumerate(content))
    if content is None and "tool_calls" in extra:
        content = ""
    must_say = role == "assistant" and "tool_calls" not in extra
    return {"role": role, "content": check_text(f"{field}.content", content, empty=not must_say), **extra}


def check_part(field: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise BadRow(field, "a part must be of type text", describe(part))
    return check_text(f"{field}.text", part.get("text"), empty=True)
