"""Read JSON lines, and the objects of a .json file: an array, or an array inside an object."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from onecard.data.files import BOM, TO_UTF8, BadRow, Reading, Rows, byte_found, describe, encoding_of, opened, shown
from onecard.errors import UserError

BLANK = re.compile(r"[ \t\r\n]*")
WRAPPERS = ("data", "train", "rows", "examples", "validation", "test")  # keys of the array; the first that is there


def jsonl(path: Path, reading: Reading) -> Rows:
    with opened(path, encoding_of(path, reading)) as file:
        for line, raw in enumerate(file, 1):
            if line == 1:
                raw = raw.removeprefix(BOM)
                refuse_array(raw, path)
            if raw.strip():
                yield line, parse_row(raw)


def refuse_array(first: bytes, path: Path) -> None:
    """Raise UserError if a file of JSON lines begins with an array of objects."""
    begin = first.strip()
    if begin == b"[" or (begin[:1] == b"[" and begin[1:].lstrip()[:1] == b"{"):
        must = "each line of JSON lines must hold one object"
        raise UserError(must, "an array of objects", "rename the file to .json", str(path))


def parse_row(raw: bytes) -> dict[str, Any] | BadRow:
    """Parse one line of bytes as a JSON object."""
    repeated: list[str] = []
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=partial(to_object, repeated))
    except UnicodeDecodeError as error:
        found = f"{byte_found(raw[error.start])} at column {error.start + 1}"
        return BadRow("row", "a row must be UTF-8", found, TO_UTF8)
    except json.JSONDecodeError as error:
        return BadRow("row", "a row must be JSON", f"{error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return BadRow("row", "a row must be an object of plain fields", "JSON nested too deep")
    except ValueError as error:  # an integer of thousands of digits
        return BadRow("row", "a row must be JSON", str(error).split(";")[0])
    return checked_row(row, repeated)


def to_object(repeated: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object's dict and note a repeated key, of which json would silently keep the last value."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated.append(next(key for key in keys if keys.count(key) > 1))
    return made


def checked_row(row: Any, repeated: list[str]) -> dict[str, Any] | BadRow:
    if repeated:
        return BadRow(repeated[0], "a key must occur once in an object", f'"{repeated[0]}" twice')
    if not isinstance(row, dict):
        return BadRow("row", "a row must be a JSON object", describe(row))
    return row


def json_file(path: Path, reading: Reading) -> Rows:
    """Read an array of objects, numbered from 1, an array inside an object, or JSON lines with the wrong suffix."""
    with opened(path, encoding_of(path, reading)) as file:
        raw = file.read().removeprefix(BOM)
    if raw.lstrip().startswith(b"["):
        if reading.split is not None:
            found = "an array"
            raise UserError("the data must have splits", found, "leave the split out", str(path))
        yield from json_array(raw, 0, path)
        return
    fields = fields_of(raw)
    whole = None if fields is None else list(fields)
    if fields and (reading.split is not None or any(fields.get(key, (0, False))[1] for key in WRAPPERS)):
        name = wrapper(fields, reading, path)
        yield from json_array(raw, fields[name][0], path)
    elif whole is not None and b"\n" in raw.strip():
        found = f"one object with the keys {', '.join(map(shown, whole[:8])) or 'none'}"
        do = f"write [object, …], or name the array {' or '.join(WRAPPERS[:2])}"
        raise UserError("a .json file must hold an array of objects", found, do, str(path))
    else:
        yield from jsonl(path, reading)


def fields_of(raw: bytes) -> dict[str, tuple[int, bool]] | None:
    """Return the byte position of each value of the file's one object, and whether it is an array of objects. None if
    the file is something else."""
    try:
        text = raw.decode("utf-8")
        decoder, found = json.JSONDecoder(), {}
        at = skip_blank(text, 0)
        if text[at : at + 1] != "{":
            return None
        at = skip_blank(text, at + 1)
        while text[at : at + 1] != "}":
            key, at = decoder.raw_decode(text, at)
            at = skip_blank(text, at)
            if not isinstance(key, str) or key in found or text[at : at + 1] != ":":
                return None
            start = skip_blank(text, at + 1)
            value, at = decoder.raw_decode(text, start)
            is_rows = isinstance(value, list) and all(isinstance(each, dict) for each in value[:1])
            found[key] = (len(text[:start].encode()), is_rows)
            at = skip_blank(text, at)
            if text[at : at + 1] == ",":
                at = skip_blank(text, at + 1)
            elif text[at : at + 1] != "}":
                return None
        return None if text[at + 1 :].strip() else found
    except (ValueError, RecursionError):
        return None


def wrapper(fields: dict[str, tuple[int, bool]], reading: Reading, path: Path) -> str:
    """Return the key of the array that is read, and tell the other keys."""
    arrays = [key for key, (_, is_rows) in fields.items() if is_rows]
    name = reading.split or next(key for key in WRAPPERS if key in arrays)
    if name not in arrays:
        found = f"arrays {', '.join(map(shown, arrays)) or 'none'}"
        raise UserError(f'the file must have an array of objects "{shown(name)}"', found, "correct split", str(path))
    rest = ", ".join(f'"{shown(key)[:40]}"' for key in fields if key != name)
    reading.told[f'rows are those of "{shown(name)}"' + f"; {rest} is not read" * bool(rest)] += 1
    return name


def json_array(raw: bytes, start: int, path: Path) -> Rows:
    """Parse an array's objects one by one, so that an error names the number of the bad one.

    Args:
        start: the byte where the array begins; if not 0, more may follow behind it.
    """
    number, repeated = 1, []
    decoder = json.JSONDecoder(object_pairs_hook=partial(to_object, repeated))
    try:
        text = raw[start:].decode("utf-8")
        at = skip_blank(text, text.index("[") + 1)
        while text[at : at + 1] != "]" or number > 1:
            value, at = decoder.raw_decode(text, at)
            yield number, checked_row(value, repeated)
            repeated.clear()
            at = skip_blank(text, at)
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            number, at = number + 1, skip_blank(text, at + 1)
        if start == 0 and text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data after the array", text, at + 1)
    except UnicodeDecodeError as error:
        must = "a .json file must be UTF-8 text"
        raise UserError(must, byte_found(error.object[error.start]), TO_UTF8, str(path)) from None
    except (ValueError, RecursionError) as error:
        found = "JSON nested too deep" if isinstance(error, RecursionError) else str(error).split(";")[0]
        where = f"{path}:{number}:row"
        raise UserError("a .json file must hold an array of objects", found, "correct it", where) from None


def skip_blank(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    assert match is not None  # the pattern also matches an empty string
    return match.end()
