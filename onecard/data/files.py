"""From bytes to rows: JSONL, JSON, CSV and Parquet, each row with its line; what is no row is a BadRow.

A bad row must not hide the ones after it, so every reader goes on where its format allows: JSON lines always,
a JSON array and CSV up to their first error of syntax. Numbers are lines of the file, 1-based; rows in a
JSON array and in Parquet.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from onecard.errors import UserError

BOM = b"\xef\xbb\xbf"
BLANK = re.compile(r"[ \t\r\n]*")
HEAD_BYTES = 4096
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PAR1": "Parquet",
    b"\xff\xfe\0\0": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class BadRow(Exception):
    """A row that cannot be used: field, what must hold, what was found."""

    def __init__(self, field: str, must: str, found: str):
        self.field, self.must, self.found = field, must, found
        super().__init__(field, must, found)


Rows = Iterator[tuple[int, dict[str, Any] | BadRow]]


def read_rows(path: Path) -> Rows:
    """(number, row) of a file; a row that cannot be parsed comes as a BadRow.

    Raises:
        UserError: no such file, a folder, an unknown suffix, an empty, binary or unreadable file.
    """
    readers = {".jsonl": jsonl, ".ndjson": jsonl, ".json": json_file, ".csv": csv_file, ".parquet": parquet}
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError("the data must be a file", found, "check the path", str(path))
    suffix = path.suffix.lower()
    if suffix not in readers:
        must = "the data file's name must end in .jsonl, .ndjson, .json, .csv or .parquet"
        raise UserError(must, repr(path.suffix), "convert or rename it", str(path))
    if path.stat().st_size == 0:
        raise UserError("the data file must have rows", "an empty file", "check the file", str(path))
    try:
        if suffix != ".parquet":
            refuse_binary(path)
        yield from readers[suffix](path)
    except OSError as error:
        raise UserError("the data file must be readable", str(error), "check the file", str(path)) from None


def refuse_binary(path: Path) -> None:
    """Raise UserError for a compressed or binary file under a text file's name."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    kind = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if kind is None and head.count(0) > len(head) // 20:
        kind = "binary"
    if kind is not None:
        found = f"{kind} data under the name {path.suffix}"
        raise UserError("the data file must be UTF-8 text", found, "unpack, convert or rename it", str(path))


def jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if line == 1:
                raw = raw.removeprefix(BOM)
            if raw.strip():
                yield line, parse_row(raw)


def parse_row(raw: bytes) -> dict[str, Any] | BadRow:
    """A JSON object from one line of bytes."""
    repeated: list[str] = []
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=partial(to_object, repeated))
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        return BadRow("row", "a row must be UTF-8", found)
    except json.JSONDecodeError as error:
        return BadRow("row", "a row must be JSON", f"{error.msg.removesuffix(' at')} at column {error.colno}")
    except RecursionError:
        return BadRow("row", "a row must be an object of plain fields", "JSON nested too deep")
    except ValueError as error:  # an integer of thousands of digits
        return BadRow("row", "a row must be JSON", str(error).split(";")[0])
    return checked_row(row, repeated)


def to_object(repeated: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's dict; a key that occurs twice is noted, for json would take the last without a word."""
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


def json_file(path: Path) -> Rows:
    """An array of objects, numbered from 1; or JSON lines under the wrong name."""
    raw = path.read_bytes().removeprefix(BOM)
    if raw.lstrip().startswith(b"["):
        yield from json_array(raw, path)
        return
    if raw.lstrip().startswith(b"{") and b"\n" in raw.strip() and isinstance(whole := parse_row(raw), dict):
        found = f"one object with the keys {', '.join(map(shown, list(whole)[:8])) or 'none'}"
        raise UserError("a .json file must hold an array of objects", found, "write [object, …]", str(path))
    yield from jsonl(path)


def json_array(raw: bytes, path: Path) -> Rows:
    """The array's objects one by one, so that a bad one is told by its number."""
    number, repeated = 1, []
    decoder = json.JSONDecoder(object_pairs_hook=partial(to_object, repeated))
    try:
        text = raw.decode("utf-8")
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
        if text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data after the array", text, at + 1)
    except (ValueError, RecursionError) as error:
        found = "JSON nested too deep" if isinstance(error, RecursionError) else str(error).split(";")[0]
        where = f"{path}:{number}:row"
        raise UserError("a .json file must hold an array of objects", found, "correct it", where) from None


def skip_blank(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    assert match is not None  # the pattern matches nothing too
    return match.end()


def csv_file(path: Path) -> Rows:
    """Rows under a header; quoted cells may hold line breaks, and a row's line is that of its first cell."""
    csv.field_size_limit(1 << 30)
    line = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            check_header(header, path)
            line = reader.line_num
            for cells in reader:
                start, line = line + 1, reader.line_num
                if cells:
                    yield start, csv_row(header, cells)
        except csv.Error as error:
            where = f"{path}:{line + 1}:row"
            raise UserError("the file must be CSV with a header", str(error), "correct it", where) from None


def check_header(header: list[str], path: Path) -> None:
    twice = {name for name in header if header.count(name) > 1}
    if header and not twice and not any(map(undecoded, header)):
        return
    found = f'"{shown(min(twice))}" twice' if twice else ", ".join(map(shown, header)) or "an empty line"
    if path.suffix.lower() == ".parquet":
        raise UserError("a Parquet file must have each column once", found, "rename a column", str(path))
    must = "a CSV file must start with its columns' names in UTF-8, each once"
    raise UserError(must, found, "correct the header", f"{path}:1")


def csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        found = f"{len(cells)} cells under {len(header)} columns"
        return BadRow("row", "a row must have a cell for each column", found)
    for name, cell in zip(header, cells):
        if byte := undecoded(cell):
            return BadRow(name, "a cell must be UTF-8", f"byte 0x{byte:02x}")
    return dict(zip(header, cells))


def undecoded(text: str) -> int:
    """The first byte that was not UTF-8 (surrogateescape keeps it as U+DC80 and above), or 0."""
    return next((ord(letter) & 0xFF for letter in text if "\udc80" <= letter <= "\udcff"), 0)


def parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            check_header(file.schema_arrow.names, path)
            for batch in file.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except UserError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        where = f"{path}: after row {number}" if number else str(path)
        raise UserError("the file must be readable Parquet", str(error), "write it again", where) from None


def shown(text: str) -> str:
    """Text made safe to print: control characters and halves of surrogate pairs are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(value: Any) -> str:
    """What was found, briefly."""
    if value is None:
        return "null"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):
        return type(value).__name__
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"
