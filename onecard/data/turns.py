"""Convert a row's turns to messages of one form, from the keys of OpenAI (role/content) and ShareGPT (from/value).

Every key of a turn is read, refused, or counted in `unused`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onecard.data.calls import bare_calls, check_text, check_tool_calls, is_absent, parsed
from onecard.data.files import BadRow, describe

ROLES = ("system", "developer", "user", "assistant", "tool")
OPENAI_ROLES = {role: role for role in ROLES} | {"function": "tool"}
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
WEIGHTS = ("weight", "loss_weight", "train", "training", "loss")  # OpenAI, ShareGPT; LLaMA-Factory; axolotl; swift
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
NAMES = ("name", "tool_call_id")  # passed to the chat template unchanged
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
USED = {"role", "from", "content", "value", "tool_calls", "function_call", *WEIGHTS, *THOUGHTS, *NAMES, *MEDIA}


@dataclass
class Chat:
    """Messages, the indices of those never learned, the file's name of each content, and the unused keys."""

    messages: tuple[dict[str, Any], ...]
    unlearned: tuple[int, ...] = ()
    fields: tuple[str, ...] = ()
    unused: Counter[str] = field(default_factory=Counter)


def read_chat(field: str, turns: Any, names: Sequence[str] | None = None, learned: bool = True) -> Chat:
    """Check a list of turns, or its JSON text, and convert it to messages.

    Args:
        names: the file's name of each turn; default field[i].
        learned: whether an assistant's message is learned, so that there must be one.
    """
    turns = parsed(field, turns, f"{field} must be a list of messages")
    if not isinstance(turns, list) or not turns:
        raise BadRow(field, f"{field} must be a list of messages", describe(turns))
    names = names or [f"{field}[{i}]" for i in range(len(turns))]
    made = [read_turn(name, turn) for name, turn in zip(names, turns)]
    roles = [turn["role"] for turn in made]
    if learned and "assistant" not in roles:
        raise BadRow(field, "a chat must have an assistant message to learn", f"roles {', '.join(roles)}")
    first = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), 0)
    if roles[first] == "tool":
        must = "a user's or the assistant's message must come before a tool's"
        raise BadRow(f"{names[first]}.role", must, f"roles {', '.join(roles)}")
    fields = tuple(f"{name}.{content_key(turn)}" for name, turn in zip(names, turns))
    unused = Counter({f"{field}[].{key}": 1 for turn in turns for key in turn if key not in USED})
    return Chat(tuple(made), unlearned_turns(field, turns, made, names) if learned else (), fields, unused)


def question_turns(row: dict[str, Any], asking: str, keys: Sequence[str]) -> tuple[list[dict[str, str]], list[str]]:
    """Return the messages before an alpaca row's answer, and the file's name of each: the row's system message, the
    earlier questions and answers, and the question with its input. Raises BadRow.

    Args:
        asking: the column of the question.
        keys: the format's own columns, which are no input.
    """
    beside = [key for key in ("input", "context") if key not in keys and row.get(key) is not None]
    more = [check_text(key, row[key], empty=True) for key in beside]
    more = [text for text in more if text.strip()]
    if len(more) == 2:
        raise BadRow("context", "a row must have either input or context, not both", "both")
    asked = check_text(asking, row[asking], empty=bool(more))
    key, system = system_of(row)
    turns, fields = ([{"role": "system", "content": system}], [key]) if system else ([], [])
    history = [] if is_absent(row.get("history")) else row["history"]
    if not isinstance(history, list):
        raise BadRow("history", "history must be a list of [question, answer]", describe(history))
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"history[{i}]", "history must be a list of [question, answer]", describe(pair))
        for k, role in enumerate(("user", "assistant")):
            turns.append({"role": role, "content": check_text(f"history[{i}][{k}]", pair[k])})
            fields.append(f"history[{i}][{k}]")
    user = "\n\n".join([asked, *more] if asked.strip() else more)
    return [*turns, {"role": "user", "content": user}], [*fields, asking]


def role_of(turn: Any) -> str | None:
    """Return our name of a turn's role; None if it has none that is known."""
    said = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return {**SHAREGPT_ROLES, **OPENAI_ROLES}.get(said) if isinstance(said, str) else None


def content_key(turn: dict[str, Any]) -> str:
    return "value" if "content" not in turn and ("value" in turn or "from" in turn) else "content"


def read_turn(name: str, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(name, "a message must be an object with role and content", describe(turn))
    for key in MEDIA:
        if not is_absent(turn.get(key)):
            raise BadRow(f"{name}.{key}", "rows must be text: images, videos and audio are not learned", f"a {key}")
    role, content, said_by = read_role(name, turn), turn.get(content_key(turn)), turn.get("from")
    extra: dict[str, Any] = {
        key: check_text(f"{name}.{key}", turn[key]) for key in NAMES if not is_absent(turn.get(key))
    }
    content_name = f"{name}.{content_key(turn)}"
    calls = read_calls(name, turn, role, content if said_by == "function_call" else None, content_name)
    if said_by == "function_call":
        content = ""
    if calls:
        extra["tool_calls"] = calls
    thoughts = {key: turn[key] for key in THOUGHTS if not is_absent(turn.get(key))}
    if len(set(map(str, thoughts.values()))) > 1:
        raise BadRow(f"{name}.{list(thoughts)[1]}", "a message must have one field of thoughts", " and ".join(thoughts))
    for key, value in list(thoughts.items())[:1]:
        extra["reasoning_content"] = check_text(f"{name}.{key}", value)
    if isinstance(content, list):
        content = "".join(check_part(f"{content_name}[{i}]", part) for i, part in enumerate(content))
    if content is None and calls:
        content = ""
    must_say = role == "assistant" and not calls
    return {"role": role, "content": check_text(content_name, content, empty=not must_say), **extra}


def read_role(name: str, turn: dict[str, Any]) -> str:
    key, roles = ("from", SHAREGPT_ROLES) if "from" in turn and "role" not in turn else ("role", OPENAI_ROLES)
    said = turn.get(key)
    role = {**SHAREGPT_ROLES, **OPENAI_ROLES}.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRow(f"{name}.{key}", f"{key} must be one of {', '.join(roles)}", describe(said))
    return role


def read_calls(name: str, turn: dict[str, Any], role: str, said: Any, content_name: str) -> list[dict[str, Any]] | None:
    """Return a turn's calls, from the one field that contains them; None if it has none."""
    found = [key for key in ("tool_calls", "function_call") if not is_absent(turn.get(key))]
    if len(found) + (said is not None) > 1:
        raise BadRow(f"{name}.{found[-1]}", "a message must have its calls in one field", " and ".join(found))
    if said is not None:
        return check_tool_calls(content_name, bare_calls(content_name, said), role)
    if not found:
        return None
    field = f"{name}.{found[0]}"
    calls = parsed(field, turn[found[0]], f"{field} must be JSON")
    if is_absent(calls):
        return None
    if role != "assistant":
        raise BadRow(field, "only the assistant may call tools", f"role {role}")
    return check_tool_calls(field, calls if found[0] == "tool_calls" else bare_calls(field, calls), role)


def check_part(field: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise BadRow(field, "a part must be of type text", describe(part))
    return check_text(f"{field}.text", part.get("text"), empty=True)


def unlearned_turns(field: str, turns: list[Any], made: list[dict[str, Any]], names: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the assistant's messages with weight 0. At least one of its messages must be learned."""
    unlearned = set()
    for i, (turn, name) in enumerate(zip(turns, names)):
        for key in WEIGHTS:
            weight = turn.get(key)
            if weight is None:
                continue
            if isinstance(weight, str) or weight not in (0, 1):
                raise BadRow(
                    f"{name}.{key}", f"{key} must be 0 or 1: a part of a weight is not learned", describe(weight)
                )
            if made[i]["role"] != "assistant" and weight == 1:
                must = f"{key} must be 0 on all but the assistant's messages: only they are learned"
                raise BadRow(f"{name}.{key}", must, describe(weight))
            if weight == 0 and made[i]["role"] == "assistant":
                unlearned.add(i)
    if len(unlearned) == sum(turn["role"] == "assistant" for turn in made):
        raise BadRow(field, "an assistant message must have a weight other than 0", "all are 0")
    return tuple(sorted(unlearned))


def system_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return the column with the row's system message, and the message; empty strings if there is none."""
    found = [key for key in ("system", "system_prompt") if not is_absent(row.get(key))]
    if len(found) == 2:
        raise BadRow(found[1], "a row must have one system message", " and ".join(found))
    return (found[0], check_text(found[0], row[found[0]])) if found else ("", "")
