"""Which columns of a source are read: the format that they show, and the mapping of other names onto the format's.

A format is recognised by its own names. A question and its answer also go by other names (`PAIRS`), and any name may be
in other letters, as in a spreadsheet: then the columns are mapped, which is told. If that finds nothing, the rows are
refused with the most similar mapping, as the flag to pass.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from onecard.config import SFT_FORMATS
from onecard.data.calls import is_absent
from onecard.data.files import BadRow, shown
from onecard.data.preference import ASKED
from onecard.errors import UserError, did_you_mean

Row = dict[str, Any]
VERDICTS = ("label", "kto_tag")  # whether an answer is good
FIRST_ROWS = 100  # that show the format
KEYS = {  # keys of each format; several sets where tools use other names
    "messages": (("messages",),),
    "prompt_completion": (("prompt", "completion"),),
    "alpaca": (
        ("instruction", "output"),
        ("instruction", "response"),
        ("question", "answer"),
        ("question", "response"),
        ("query", "response"),
    ),
    "sharegpt": (("conversations",), ("conversation",)),
    "text": (("text",),),
    "preference": (  # of sets that fit as well, the first is taken
        ("prompt", "chosen", "rejected"),
        *((asked, "chosen", "rejected") for asked in ASKED),
        ("chosen", "rejected"),
    ),
    "unpaired_preference": (
        *(("prompt", "completion", label) for label in VERDICTS),
        *((asked, "completion", label) for asked in ASKED for label in VERDICTS),
        *(("instruction", "output", label) for label in VERDICTS),
        *((chat, label) for chat in ("messages", "conversations", "conversation") for label in VERDICTS),
    ),
    "classification": (("text", "label"), ("prompt", "label"), ("messages", "label")),
}
LOSSES = {
    **dict.fromkeys(SFT_FORMATS, "--loss sft"), "preference": "--loss dpo", "unpaired_preference": "--loss kto",
    "classification": "--task classification",
}  # fmt: skip
PAIRS = (  # a question and its answer by other names, if the rows have no format's own keys
    ("input", "output"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("question", "solution"),
    ("query", "answer"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("input", "response"),
    ("input", "target"),
    ("user", "assistant"),
    ("prompt", "completion"),  # in other letters, or mapped, or of the format alpaca
)
WORDS = {  # parts of names, the best first
    "prompt": ("prompt", "question", "instruction", "query", "problem", "input", "task", "user", "human", "request"),
    "completion": (
        "completion", "response", "answer", "solution", "output", "reply", "target", "assistant", "result", "summary",
    ),
    "text": ("text", "content", "document", "body", "passage", "article"),
    "chosen": ("chosen", "preferred", "accepted", "better", "winner", "positive", "good"),
    "rejected": ("rejected", "dispreferred", "worse", "loser", "negative", "bad"),
    "label": ("label", "class", "category", "sentiment", "stars", "rating", "intent", "target"),
}  # fmt: skip
SIMILAR = 0.75  # least similarity of a name and a word


@dataclass(frozen=True)
class Layout:
    """How rows are read.

    Attributes:
        keys: the format's keys in a row, after `renamed`.
        columns: for names of ours, the file's columns.
        told: notices about them.
    """

    format: str
    keys: tuple[str, ...]
    columns: dict[str, str] = field(default_factory=dict)
    told: tuple[str, ...] = ()

    @property
    def mapping(self) -> str:
        """Return the mapping as its flag takes it; empty if the rows have the format's first names."""
        pair = self.format == "alpaca" and self.keys not in (KEYS["alpaca"][0], ("prompt", "completion"))
        read = dict(zip(("prompt", "completion"), self.keys)) if pair else {}
        return ",".join(f"{role}={column}" for role, column in {**read, **self.columns}.items())

    def in_file(self, name: str) -> str:
        """Return the file's name of a field, such as messages[0].content."""
        root = re.match(r"\w*", name)
        assert root is not None  # the pattern also matches an empty string
        return self.columns.get(root[0], root[0]) + name[root.end() :]


def layout_of(
    rows: Sequence[Row],
    format: str,
    columns: dict[str, str] | None,
    where: str,
    known: Sequence[str] = tuple(KEYS),
    missing: Collection[str] = (),
) -> Layout:
    """Find the format and the keys of the rows.

    Args:
        format: a key of KEYS, or "auto".
        columns: the user's mapping.
        known: the formats that "auto" may find.
        missing: columns of the mapping that are in no row, also not behind these rows.

    Raises:
        UserError: a column is missing; no row has the keys of the format, or of any format.
    """
    first, columns = rows[:FIRST_ROWS], dict(columns or {})
    check_there(first, columns, where, missing)
    named = [renamed(row, columns, where) for row in first]
    keys = keys_of(format, named, columns) if format != "auto" else ()
    found = Layout(format, keys, columns) if count_with(named, keys) else None
    if format == "auto":
        found = of_mapping(named, columns, known) or recognised(named, columns, known)
        found = found or in_other_letters(named, columns, known)
    if found is None or (format == "auto" and found.format not in known):
        raise unknown(named, format, columns, where, known)
    return found if not columns else Layout(found.format, found.keys, found.columns, told_mapping(found))


def absent(columns: set[str], rows: Iterable[tuple[str, int, Any]]) -> set[str]:
    """Return the columns that are in no row. Rows are read until each one is found."""
    for _, _, row in rows:
        columns = columns if isinstance(row, BadRow) else columns.difference(row)
        if not columns:
            break
    return columns


def check_there(rows: Sequence[Row], columns: dict[str, str], where: str, missing: Collection[str]) -> None:
    for role, column in columns.items():
        if column in missing:
            there = names_of(rows)
            raise UserError(
                f'the rows must have the column "{shown(column)}" that is mapped onto {role}',
                f"columns {listed(there)}{did_you_mean(column, there)}",
                "name a column of the rows; give a source with other columns a mapping of its own",
                where,
            )


def renamed(row: Row, columns: dict[str, str], where: str) -> Row:
    """Return the row with our names. Raises UserError if a column is mapped onto another one with other values."""
    if not columns:
        return row
    taken = set(columns.values())
    made = {key: value for key, value in row.items() if key not in taken}
    for role, column in columns.items():
        if column not in row:
            continue
        if not is_absent(made.get(role)) and made[role] != row[column]:
            raise UserError(
                "a column must not be mapped onto another one with other values",
                f'"{shown(column)}" and "{role}" in a row, for {role}',
                f'map "{role}" onto another name, such as system={role}, or remove it from the rows',
                where,
            )
        made[role] = row[column]
    return made


def of_mapping(rows: Sequence[Row], columns: dict[str, str], known: Sequence[str]) -> Layout | None:
    """Return what the user's mapping asks for. A question and its answer as texts are a chat; as lists, messages."""
    for format in ("preference", "unpaired_preference"):
        keys = keys_of(format, rows, columns)
        if format in known and columns.keys() & {"prompt", *keys} and count_with(rows, keys):
            return Layout(format, keys, columns)
    if "classification" in known and "label" in columns:
        keys = keys_of("classification", rows)
        if count_with(rows, keys):
            return Layout("classification", keys, columns)
    if "messages" in columns:
        return Layout("messages", ("messages",), columns)
    if "text" in columns:
        return Layout("text", ("text",), columns)
    pair = ("prompt", "completion")
    if not columns.keys() & set(pair) or not count_with(rows, pair):
        return None
    both = [row for row in rows if all(key in row for key in pair)]
    lists = all(isinstance(row[key], list) for row in both for key in pair)
    return Layout("prompt_completion" if lists else "alpaca", pair, columns)


def recognised(rows: Sequence[Row], columns: dict[str, str], known: Sequence[str]) -> Layout | None:
    """Return the known format whose keys are in the largest number of rows; if there is none, the same of PAIRS."""
    sets = {name: max(KEYS[name], key=lambda keys: count_with(rows, keys)) for name in known}
    best = max(sets, key=lambda name: count_with(rows, sets[name]))
    if count_with(rows, sets[best]):
        return Layout(best, sets[best], columns, told_pair(best, sets[best]))
    pair = max(PAIRS, key=lambda keys: count_with(rows, keys))
    is_there = "alpaca" in known and count_with(rows, pair)
    return Layout("alpaca", pair, columns, told_pair("alpaca", pair)) if is_there else None


def in_other_letters(rows: Sequence[Row], columns: dict[str, str], known: Sequence[str]) -> Layout | None:
    """Return the format whose keys are in the rows but for capitals and spaces, with the mapping of its columns."""
    plain: dict[str, list[str]] = {}
    for name in names_of(rows):
        plain.setdefault(re.sub(r"[\s_-]+", "_", name.strip()).casefold(), []).append(name)
    ours = {
        "messages": (("messages",), (("messages",), *KEYS["sharegpt"])),
        "text": (("text",), KEYS["text"]),
        "preference": (("chosen", "rejected"), KEYS["preference"][-1:]),
        "classification": (("text", "label"), KEYS["classification"][:1]),
        "alpaca": (("prompt", "completion"), KEYS["alpaca"] + PAIRS),
    }
    for format, (roles, sets) in ours.items():
        for keys in sets if format in known else ():
            if all(len(plain.get(key, ())) == 1 for key in keys):
                made = columns | {role: plain[key][0] for role, key in zip(roles, keys)}
                return Layout(format, roles, made, told(made))
    return None


def told_pair(format: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    if format in ("preference", "unpaired_preference"):
        return (f"read {keys[0]} as the prompt, a chat",) if keys[0] in ASKED else ()
    if format == "alpaca" and keys != KEYS[format][0]:
        other = {role: key for role, key in zip(("prompt", "completion"), keys) if role != key}
        return told(other) if other else ()
    return () if keys == KEYS[format][0] else (f"read {' and '.join(keys)} as {' and '.join(KEYS[format][0])}",)


def told_mapping(layout: Layout) -> tuple[str, ...]:
    lines = [*told(layout.columns)] + [line for line in layout.told if line not in told(layout.columns)]
    if layout.keys == ("prompt", "completion") and layout.format == "alpaca":
        lines.append("prompt and completion are a chat; --format prompt_completion reads them as plain text")
    return tuple(lines)


def told(columns: dict[str, str]) -> tuple[str, ...]:
    return (f"read {', '.join(f'{shown(column)} as {role}' for role, column in columns.items())}",)


def unknown(rows: Sequence[Row], format: str, columns: dict[str, str], where: str, known: Sequence[str]) -> UserError:
    """Return the error for rows without the keys of the format, or of a known format, with the mapping to pass."""
    formats = {name: KEYS[name] for name in (known if format == "auto" else (format,))}
    each = "; ".join(f"{name}: {' or '.join(', '.join(keys) for keys in sets)}" for name, sets in formats.items())
    must = f"rows must have the keys of {'a known format' if format == 'auto' else 'their format'} ({each})"
    fitting = [name for name in KEYS if name not in formats and count_with(rows, keys_of(name, rows))]
    mapping = {**columns, **nearest(rows, columns, known)}
    if format == "auto" and fitting and tuple(known) != ("classification",):
        do = f"train on such rows with {LOSSES[fitting[0]]}"
    elif len(mapping) > len(columns):
        do = f"name the columns, such as {flag(mapping)}"
    else:
        pair = ("text", "label") if "classification" in known else ("chosen", "rejected")
        roles = ("prompt", "completion") if "alpaca" in known else pair
        do = f"name the columns, such as --columns {','.join(f'{role}=COLUMN' for role in roles)}"
    return UserError(must, f"keys {listed(names_of(rows))}", do, where)


def nearest(rows: Sequence[Row], columns: dict[str, str], known: Sequence[str]) -> dict[str, str]:
    """Return the mapping of the columns whose names and values are most similar to those of a format; {} if none is."""
    free = [name for name in names_of(rows) if name not in columns]

    def holding(test: Callable[[Any], bool]) -> list[str]:
        values = {name: [row[name] for row in rows if not is_absent(row.get(name))] for name in free}
        return [name for name in free if values[name] and all(map(test, values[name]))]

    chats, texts = holding(is_chat), holding(lambda value: isinstance(value, str))
    if chats and "messages" in known:
        return {"messages": chats[0]}
    asked = {role: [name for name in [*texts, *chats] if likeness(name, role) >= SIMILAR] for role in WORDS}
    ranked = {role: sorted(names, key=lambda name: -likeness(name, role)) for role, names in asked.items()}
    ranked = {role: names for role, names in ranked.items() if role not in columns}
    if "alpaca" not in known and "classification" in known:
        return nearest_labelled(rows, free, texts, columns)
    if "alpaca" not in known:
        return {role: ranked[role][0] for role in ("chosen", "rejected") if ranked.get(role)}
    pair = {role: ranked[role][0] for role in ("prompt", "completion") if ranked.get(role)}
    others = [name for name in texts if name not in pair.values()]
    for role in {"prompt", "completion"} - pair.keys() - columns.keys():
        if (pair or columns.keys() & {"prompt", "completion"}) and len(others) == 1:
            pair[role] = others[0]
    if len({*pair.values()}) == 2 or (pair and columns.keys() & {"prompt", "completion"}):
        return {role: pair[role] for role in ("prompt", "completion") if role in pair}
    if ranked.get("text") or len(texts) == 1:
        return {"text": (ranked.get("text") or texts)[0]}
    return dict(zip(("prompt", "completion"), texts)) if len(texts) == 2 else {}


def nearest_labelled(
    rows: Sequence[Row], free: Sequence[str], texts: Sequence[str], columns: dict[str, str]
) -> dict[str, str]:
    """Same as `nearest`, for a text and its label. The text is the longest one, unless a name says which it is."""
    named = sorted((name for name in free if likeness(name, "label") >= SIMILAR), key=lambda n: -likeness(n, "label"))
    found = {"label": named[0]} if named and "label" not in columns else {}
    rest = [name for name in texts if name not in found.values()]
    length = {name: sum(len(row.get(name) or "") for row in rows) for name in rest}
    if rest and not columns.keys() & {"text", "prompt", "messages"}:
        found["text"] = max(rest, key=lambda name: (likeness(name, "text") >= SIMILAR, length[name]))
    return {role: found[role] for role in ("text", "label") if role in found}


def likeness(name: str, role: str) -> float:
    """Return how similar a column's name is to the words of a role: 0 to 1, above 1 for an earlier word."""
    parts = [part for part in re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name) if part]
    words = WORDS[role]
    for rank, word in enumerate(words):
        if word in map(str.casefold, parts) or f"{word}s" in map(str.casefold, parts):
            return 2 - rank / len(words)
    return max(SequenceMatcher(None, name.casefold(), word).ratio() for word in words)


def is_chat(value: Any) -> bool:
    """Whether a value is a list of turns."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and len(value[0]) > 1


def flag(mapping: dict[str, str]) -> str:
    """Return a mapping as the command line takes it."""
    return f"--columns {shlex.quote(','.join(f'{role}={shown(column)}' for role, column in mapping.items()))}"


def names_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of the columns, in their order in the first row that has them."""
    return list(dict.fromkeys(str(key) for row in rows for key in row))


def listed(names: Sequence[str]) -> str:
    return ", ".join(shown(name)[:40] for name in names[:12]) + ", …" * (len(names) > 12) if names else "none"


def keys_of(format: str, rows: Sequence[Row], columns: Collection[str] = ()) -> tuple[str, ...]:
    """Return the format's set of keys that is in the largest number of rows. A prompt that is mapped is in the set."""
    sets = KEYS[format] + (PAIRS if format == "alpaca" else ())
    if format in ("preference", "unpaired_preference"):
        sets = tuple(keys for keys in sets if {"prompt", "messages"} & {*columns} <= {*keys}) or sets
    return max(sets, key=lambda keys: count_with(rows, keys))


def count_with(rows: Sequence[Row], keys: tuple[str, ...]) -> int:
    return sum(all(key in row for key in keys) for row in rows) if keys else 0
