"""Read rows from JSONL, JSON, CSV (compressed or not), Parquet and Arrow. An unusable row becomes a BadRow.

A bad row must not hide the rows after it. So every reader continues where its format allows: JSON lines always, a JSON
array and CSV up to their first syntax error. A row's number is its line in the file, 1-based. In a JSON array, Parquet
and Arrow it is the count of the row.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from onecard.errors import UserError

BOM = b"\xef\xbb\xbf"
BLANK = re.compile(r"[ \t\r\n]*")
HEAD_BYTES = 4096
ARROW = (".parquet", ".arrow")
PACKED = (".gz", ".xz", ".bz2", ".zst")
FIX = "correct the row, or pass --on-bad-rows skip"
TO_UTF8 = "convert the file to UTF-8, such as: iconv -f CP1252 -t UTF-8 FILE > NEW"
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
    """A row that cannot be used: field, what must hold, what was found, what to do."""

    def __init__(self, field: str, must: str, found: str, do: str = FIX):
        self.field, self.must, self.found, self.do = field, must, found, do
        super().__init__(field, must, found, do)


Rows = Iterator[tuple[int, dict[str, Any] | BadRow]]


def read_rows(path: Path) -> Rows:
    """Yield (number, row) of a file, or of a folder that datasets' save_to_disk wrote. A row that cannot be parsed
    becomes a BadRow.

    Raises:
        UserError: no such file, another folder, an unknown suffix, an empty, binary or unreadable file.
    """
    if path.is_dir():
        yield from saved_folder(path)
        return
    if not path.is_file():
        raise UserError("the data must be a file", "no such file", "check the path", str(path))
    readers = {".jsonl": jsonl, ".ndjson": jsonl, ".json": json_file, ".csv": csv_file}
    readers |= {".parquet": parquet, ".arrow": arrow_file}
    suffix = kind_of(path)
    if suffix not in readers or (suffix in ARROW and path.suffix.lower() in PACKED):
        must = (
            f"the data file's name must end in {', '.join(readers)}; .jsonl, .json and .csv also with .gz, .xz or .zst"
        )
        raise UserError(must, repr(path.suffix), "convert or rename it", str(path))
    if path.stat().st_size == 0:
        raise UserError("the data file must have rows", "an empty file", "check the file", str(path))
    try:
        if suffix not in ARROW:
            refuse_others(path)
        yield from readers[suffix](path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError("the data file must be readable", str(error), "check the file", str(path)) from None


def kind_of(path: Path) -> str:
    """Return the suffix of the format, which is before any suffix of the compression."""
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def is_arrow(path: Path) -> bool:
    """Whether the rows come from Arrow, which stores the same fields in all objects of a column."""
    return path.is_dir() or kind_of(path) in ARROW


def opened(path: Path) -> IO[bytes]:
    """Open the file to read its decompressed bytes."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, open)(path, "rb")


def refuse_others(path: Path) -> None:
    """Raise UserError if a text file's name is on a compressed or binary file, a Git LFS pointer or a web page."""
    with opened(path) as file:
        head = file.read(HEAD_BYTES)
    kind = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if head.startswith(b"version https://git-lfs"):
        do = "fetch the file itself, such as: git lfs pull"
        raise UserError("the data file must have rows", "a pointer of Git LFS", do, str(path))
    if head[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError("the data file must have rows", "a web page", "download the file itself", str(path))
    if kind is None and head.count(0) > len(head) // 20:
        kind = "binary"
    if kind is not None:
        found = f"{kind} data under the name {path.suffix}"
        raise UserError("the data file must be UTF-8 text", found, "unpack, convert or rename it", str(path))


def jsonl(path: Path) -> Rows:
    with opened(path) as file:
        for line, raw in enumerate(file, 1):
            if line == 1:
                raw = raw.removeprefix(BOM)
            if raw.strip():
                yield line, parse_row(raw)


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


def json_file(path: Path) -> Rows:
    """Read an array of objects, numbered from 1, or JSON lines with the wrong suffix."""
    with opened(path) as file:
        raw = file.read().removeprefix(BOM)
    if raw.lstrip().startswith(b"["):
        yield from json_array(raw, path)
        return
    if raw.lstrip().startswith(b"{") and b"\n" in raw.strip() and isinstance(whole := parse_row(raw), dict):
        found = f"one object with the keys {', '.join(map(shown, list(whole)[:8])) or 'none'}"
        raise UserError("a .json file must hold an array of objects", found, "write [object, …]", str(path))
    yield from jsonl(path)


def json_array(raw: bytes, path: Path) -> Rows:
    """Parse the array's objects one by one, so that an error names the number of the bad one."""
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
    assert match is not None  # the pattern also matches an empty string
    return match.end()


def csv_file(path: Path) -> Rows:
    """Read rows under a header. Quoted cells may contain line breaks. A row's line is that of its first cell."""
    csv.field_size_limit(1 << 30)
    line = 0
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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
    refuse_other_separators(header, path)
    if header and not twice and not any(map(undecoded, header)):
        return
    found = f'"{shown(min(twice))}" twice' if twice else ", ".join(map(shown, header)) or "an empty line"
    if kind_of(path) in ARROW:
        raise UserError("a Parquet file must have each column once", found, "rename a column", str(path))
    if (byte := next(filter(None, map(undecoded, header)), 0)) and not twice:
        raise UserError("a CSV file must be UTF-8", byte_found(byte), TO_UTF8, f"{path}:1")
    must = "a CSV file must start with its columns' names in UTF-8, each once"
    raise UserError(must, found, "correct the header", f"{path}:1")


def refuse_other_separators(header: list[str], path: Path) -> None:
    """Raise UserError if the header's only column contains another separator: semicolon, tab or bar."""
    names = {";": "semicolons", "\t": "tabs", "|": "bars"}
    other = next((mark for mark in names if len(header) == 1 and mark in header[0]), None)
    if other is not None and kind_of(path) == ".csv":
        do = f"save it with commas, such as: pandas.read_csv(FILE, sep={other!r}).to_csv(NEW, index=False)"
        found = f"{names[other]} between {shown(header[0])[:80]}"
        raise UserError("a CSV file must have commas between its columns", found, do, f"{path}:1")


def byte_found(byte: int) -> str:
    """Describe a byte that is not UTF-8, with its letter on most Windows machines."""
    letter = bytes([byte]).decode("cp1252", "ignore")
    return f"byte 0x{byte:02x}" + (f', which is "{letter}" in Windows-1252' if letter.isprintable() and letter else "")


def csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        found = f"{len(cells)} cells under {len(header)} columns"
        return BadRow("row", "a row must have a cell for each column", found)
    for name, cell in zip(header, cells):
        if byte := undecoded(cell):
            return BadRow(name, "a cell must be UTF-8", byte_found(byte), TO_UTF8)
    return dict(zip(header, cells))


def undecoded(text: str) -> int:
    """Return the first byte that was not UTF-8 (surrogateescape keeps it as U+DC80 and above), or 0."""
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


def arrow_file(path: Path) -> Rows:
    """Read an Arrow file, a stream or with an index, as from datasets' cache and save_to_disk."""
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            has_index = source.read(6) == b"ARROW1"
            source.seek(0)
            read = pyarrow.ipc.open_file(source) if has_index else pyarrow.ipc.open_stream(source)
            check_header(read.schema.names, path)
            batches = map(read.get_batch, range(read.num_record_batches)) if has_index else read
            for row in (row for batch in batches for row in batch.to_pylist()):
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        where = f"{path}: after row {number}" if number else str(path)
        raise UserError("the file must be readable Arrow", str(error), "write it again", where) from None


def saved_folder(folder: Path) -> Rows:
    """Read the files of a dataset that datasets' save_to_disk wrote. One count numbers the rows of all files."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if each.is_dir())
        found = f"a folder of the splits {', '.join(map(shown, splits)) or 'none'}"
        raise UserError("the data must be one dataset", found, f"name one, such as {folder}/SPLIT", str(folder))
    must = "a data folder must be one that datasets' save_to_disk wrote"
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [Path(each["filename"]).name for each in state["_data_files"]]
    except FileNotFoundError:
        raise UserError("the data must be a file", "a folder", "name a file in it", str(folder)) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(must, f"state.json: {error}", "write it again", str(folder)) from None
    number = 0
    for name in names:
        if not (folder / name).is_file():
            raise UserError(must, f"no {shown(name)}", "copy the whole folder", str(folder))
        for _, row in arrow_file(folder / name):
            number += 1
            yield number, row


def shown(text: str) -> str:
    """Make text safe to print: escape control characters and halves of surrogate pairs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(value: Any) -> str:
    """Describe a value briefly, for an error."""
    if value is None:
        return "null"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError):
        return type(value).__name__
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"
