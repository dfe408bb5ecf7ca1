"""The parts of a row of preferences: a prompt, a chosen and a rejected answer, or one answer and its label.

An answer is a text or a list of messages. The prompt is a column of its own, or what both answers begin with: their
common first messages, or the common first words of two texts, as in trl's `extract_prompt`. trl cuts two texts at the
first character that differs. A cut inside a word would give tokens that the model never sees in a text, so the word
stays whole here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from onecard.data.calls import check_text, is_absent
from onecard.data.files import BadRow, describe
from onecard.data.turns import question_turns

QUESTIONS = ("instruction", "question", "query")  # columns of an alpaca question
ASKED = ("messages", "conversations", "conversation", *QUESTIONS)  # columns of a prompt that is a chat
LABELS = {True: True, False: False, "true": True, "false": False}  # 1 and 0 equal True and False


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers: texts, or lists of messages.

    Attributes:
        names: the file's names of the prompt's messages; empty if they are prompt[i].
        implicit: the number of the answers' first messages that are the prompt; None for a prompt of its own.
        is_own: whether the prompt is the beginning of the answers, and no column was read.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    names: tuple[str, ...] = ()
    implicit: int | None = None
    is_own: bool = False


def read_prompt(row: dict[str, Any], keys: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """Return a row's prompt, a text or messages, and the file's name of each message; None without one. Raises BadRow.

    A column `prompt` is taken as it is. A chat's messages, or an alpaca question, are messages: a text is the user's.

    Args:
        keys: the format's own columns, of which the first may be the prompt.
    """
    key = keys[0] if keys[0] in ASKED else "prompt"
    if is_absent(row.get(key)):
        return None, ()
    if key in QUESTIONS:
        turns, fields = question_turns(row, key, keys)
        return turns, tuple(fields)
    said = read_answer(key, row[key])
    if key == "prompt":
        return said, ()
    return as_messages(said), (key,) if isinstance(said, str) else tuple(f"{key}[{i}]" for i in range(len(said)))


def read_pair(row: dict[str, Any], keys: Sequence[str]) -> Pair:
    """Split a row with `chosen` and `rejected`. Raises BadRow.

    Args:
        keys: the format's own columns in the row; the first may be the prompt.
    """
    chosen, rejected = read_answer("chosen", row["chosen"]), read_answer("rejected", row["rejected"])
    if isinstance(chosen, list) != isinstance(rejected, list):
        must = "chosen and rejected must be of one kind: two texts or two lists of messages"
        raise BadRow("rejected", must, f"{describe(chosen)} and {describe(rejected)}")
    if chosen == rejected:
        raise BadRow("rejected", "rejected must differ from chosen", "the same answer twice")
    prompt, names = read_prompt(row, keys)
    if isinstance(chosen, str):
        return replace(text_pair(prompt, chosen, rejected), names=names)
    shared = common(chosen, rejected)
    if prompt is not None:
        messages = as_messages(prompt)
        if not (shared and begins_with(chosen[:shared], messages)):
            if shared and not names:
                must = "chosen and rejected must begin with the row's prompt, or with their own answers"
                raise BadRow("prompt", must, f"{describe(prompt)}, and {shared} other messages that both begin with")
            if not shared:
                return Pair(messages, chosen, rejected, names)
    if not shared:
        must = "chosen and rejected must answer the same prompt: begin with the same messages, or have a prompt column"
        raise BadRow("rejected", must, "another first message")
    if shared == min(len(chosen), len(rejected)):
        must = "chosen and rejected must each have an answer after the messages that they share"
        raise BadRow("chosen" if shared == len(chosen) else "rejected", must, "no other message")
    return Pair(chosen[:shared], chosen[shared:], rejected[shared:], (), shared, bool(names))


def as_messages(said: Any, role: str = "user") -> Any:
    """Return a list of messages; a text is one message of `role`."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def read_answer(field: str, value: Any) -> Any:
    """Return a text or a list of messages. A column of text may hold the messages as JSON, and an answer may be one
    message."""
    if isinstance(value, str) and value.lstrip().startswith("[") and "role" in value:
        with suppress(ValueError, RecursionError):  # else it is a text that looks like messages
            found = json.loads(value)
            value = found if all(isinstance(turn, dict) and "role" in turn for turn in found) else value
    if isinstance(value, dict):
        value = [value]
    return value if isinstance(value, list) and value else check_text(field, value)


def text_pair(prompt: Any, chosen: str, rejected: str) -> Pair:
    """Split two texts. A prompt of messages makes messages of them, too."""
    if isinstance(prompt, list):
        return Pair(prompt, as_messages(chosen, "assistant"), as_messages(rejected, "assistant"))
    if prompt is not None:
        return Pair(prompt, chosen, rejected)
    start = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 (characters, not paths)
    words = len(start) if start[-1:].isspace() else max(start.rfind(space) for space in " \n\t") + 1
    start = start[:words].rstrip(" ")
    if not start.strip():
        must = "chosen and rejected must answer the same prompt: begin with the same words, or have a prompt column"
        raise BadRow("rejected", must, "another first word")
    rest = chosen[len(start) :], rejected[len(start) :]
    for field, text in zip(("chosen", "rejected"), rest):
        check_text(field, text)
    return Pair(start, *rest)


def common(chosen: list[Any], rejected: list[Any]) -> int:
    """Return the number of first messages that two lists share."""
    differ = (i for i, (one, other) in enumerate(zip(chosen, rejected)) if one != other)
    return next(differ, min(len(chosen), len(rejected)))


def begins_with(shared: list[Any], messages: Any) -> bool:
    """Whether the shared messages are the prompt; a text prompt may follow a system message."""
    return shared == messages or (isinstance(messages, list) and len(messages) == 1 and shared[-1:] == messages)


def read_label(field: str, value: Any) -> bool:
    """Read whether an answer is desirable. Raises BadRow."""
    key = value.strip().lower() if isinstance(value, str) else value
    if not isinstance(key, (bool, int, str)) or key not in LABELS:
        raise BadRow(field, f"{field} must be true for a desirable answer, or false", describe(value))
    return LABELS[key]
