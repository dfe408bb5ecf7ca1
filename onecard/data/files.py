"""Open a data file as UTF-8 text, whatever its compression and encoding, and describe what is in it.

A bad row must not hide the rows after it. So every reader continues where its format allows: JSON lines always, a JSON
array and a table up to their first syntax error. An unusable row becomes a BadRow. A row's number is its line in the
file, 1-based. In a JSON array, Parquet and Arrow it is the count of the row.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from onecard.errors import UserError

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 4096
ARROW = (".parquet", ".arrow")
PACKED = (".gz", ".xz", ".bz2", ".zst")
SHOWN_ERRORS = 20
FIX = "correct the row, or pass --on-bad-rows skip"
TO_UTF8 = "name its encoding, such as --encoding cp1252, or convert the file to UTF-8"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PAR1": "Parquet",
    b"\xff\xfe\0\0": "UTF-32",
}


class BadRow(Exception):
    """A row that cannot be used: field, what must hold, what was found, what to do."""

    def __init__(self, field: str, must: str, found: str, do: str = FIX):
        self.field, self.must, self.found, self.do = field, must, found, do
        super().__init__(field, must, found, do)


Rows = Iterator[tuple[int, dict[str, Any] | BadRow]]


@dataclass
class Reading:
    """How files become rows: settings of a source, and `told`, the notices of its readers with the number of files.

    Attributes:
        streaming: a hub dataset is not stored on the disk.
    """

    encoding: str | None = None
    sample_by: str = "paragraph"
    split: str | None = None
    streaming: bool = False
    told: Counter[str] = field(default_factory=Counter)


def kind_of(path: Path) -> str:
    """Return the suffix of the format, which is before any suffix of the compression."""
    return Path(path.stem if path.suffix.lower() in PACKED else path.name).suffix.lower()


def is_arrow(path: Path) -> bool:
    """Whether the rows come from Arrow, which stores the same fields in all objects of a column."""
    return kind_of(path) in ARROW or not path.is_file()


def opened(path: Path, encoding: str | None = None) -> IO[bytes]:
    """Open the file to read its decompressed bytes, recoded from `encoding` to UTF-8."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        file: Any = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    else:
        file = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, open)(path, "rb")
    return file if encoding is None else io.BufferedReader(Recoded(file, encoding))


class Recoded(io.RawIOBase):
    """The bytes of a file in UTF-8. Bytes that its encoding lacks stay as they are, so that their row is refused."""

    def __init__(self, file: IO[bytes], encoding: str):
        self.file, self.rest = file, b""
        self.decoder = codecs.getincrementaldecoder(encoding)("surrogateescape")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = b"more"
        while chunk and not self.rest:
            chunk = self.file.read(io.DEFAULT_BUFFER_SIZE)
            self.rest = self.decoder.decode(chunk, final=not chunk).encode("utf-8", "surrogateescape")
        part, self.rest = self.rest[: len(buffer)], self.rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self.file.close()
        super().close()


def encoding_of(path: Path, reading: Reading) -> str | None:
    """Return the encoding that a text file is recoded from; None if it is UTF-8.

    Raises:
        UserError: the file's name is on a compressed or binary file, a Git LFS pointer or a web page; it begins with
            the mark of another encoding than the given one.
    """
    with opened(path) as file:
        head = file.read(HEAD_BYTES)
    kind = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    marked = "utf-16" if head.startswith(UTF16) else "utf-8" if head.startswith(BOM) else None
    given = codecs.lookup(reading.encoding).name.removesuffix("-sig") if reading.encoding else None
    if kind is None and marked and given and not given.startswith(marked):
        found = f"the mark of {marked.upper()} at its beginning"
        raise UserError(f"the file must be in the encoding {given}", found, "leave --encoding out", str(path))
    encoding = marked or given
    if encoding not in (None, "utf-8"):
        if marked is None and is_utf8(head):
            reading.told[f"it is also UTF-8: check whether --encoding {encoding} is meant"] += 1
        if kind is None:
            with opened(path, encoding) as file:
                head = file.read(HEAD_BYTES)
        reading.told[f"read as {encoding.upper()}"] += 1
    refuse_stand_in(head, path)
    if kind is None and head.count(0) > len(head) // 20:
        kind = "binary"
    if kind is not None:
        found = f"{kind} data under the name {path.suffix}"
        raise UserError("the data file must be UTF-8 text", found, "unpack, convert or rename it", str(path))
    return None if encoding == "utf-8" else encoding


def refuse_stand_in(head: bytes, path: Path) -> None:
    """Raise UserError if a file's beginning is that of a Git LFS pointer or of a web page."""
    if head.startswith(b"version https://git-lfs"):
        do = "fetch the file itself, such as: git lfs pull"
        raise UserError("the data file must have rows", "a pointer of Git LFS", do, str(path))
    if head[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError("the data file must have rows", "a web page", "download the file itself", str(path))


def is_utf8(head: bytes) -> bool:
    """Whether a beginning is UTF-8 with letters beyond ASCII. Text in another encoding is that only by chance."""
    try:
        return not codecs.getincrementaldecoder("utf-8")().decode(head).isascii()
    except UnicodeDecodeError:
        return False


def undecoded(text: str) -> int:
    """Return the first byte that was not UTF-8 (surrogateescape keeps it as U+DC80 and above), or 0."""
    return next((ord(letter) & 0xFF for letter in text if "\udc80" <= letter <= "\udcff"), 0)


def byte_found(byte: int) -> str:
    """Describe a byte that is not UTF-8, with its letter on most Windows machines."""
    letter = bytes([byte]).decode("cp1252", "ignore")
    return f"byte 0x{byte:02x}" + (f', which is "{letter}" in Windows-1252' if letter.isprintable() and letter else "")


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


def row_error(path: str | Path, line: int, error: BadRow) -> UserError:
    return UserError(error.must, shown(error.found), error.do, f"{path}:{line}:{shown(error.field)}")


def raise_bad_rows(bad: list[UserError]) -> None:
    """Raise one UserError for all bad rows, with a list of the first ones. Do nothing if there are none."""
    if not bad:
        return
    if len(bad) == 1:
        raise bad[0]
    lines = [f"{error.where}: {error.must}; found {error.found}" for error in bad[:SHOWN_ERRORS]]
    if len(bad) > SHOWN_ERRORS:
        lines.append(f"and {len(bad) - SHOWN_ERRORS} more")
    do = bad[0].do if len({error.do for error in bad}) == 1 else FIX
    raise UserError("every row must be usable", f"{len(bad)} bad rows\n    " + "\n    ".join(lines), do)
