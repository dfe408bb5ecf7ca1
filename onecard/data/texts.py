"""Read a .txt file as rows of text: its paragraphs, its lines, or the whole file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from onecard.data.files import BOM, TO_UTF8, BadRow, Reading, Rows, byte_found, encoding_of, opened


def text_file(path: Path, reading: Reading) -> Rows:
    """Yield the documents of a file, each with the number of its first line. `reading.sample_by` says what a document
    is, as in datasets: a line, a paragraph up to a blank line, or the whole file. Blank lines around it are no part."""
    with opened(path, encoding_of(path, reading)) as file:
        for number, raw in documents(file, reading.sample_by):
            try:
                yield number, {"text": raw.decode("utf-8").strip("\r\n")}
            except UnicodeDecodeError as error:
                yield number, BadRow("text", "a text must be UTF-8", byte_found(raw[error.start]), TO_UTF8)


def documents(lines: Iterable[bytes], sample_by: str) -> Iterator[tuple[int, bytes]]:
    held: list[bytes] = []
    first = 1
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(BOM) if number == 1 else line
        is_blank = not line.strip()
        if held and (sample_by == "line" or (is_blank and sample_by == "paragraph")):
            yield first, b"".join(held)
            held = []
        if is_blank and not held:
            continue
        first = first if held else number
        held.append(line)
    if held:
        yield first, b"".join(held)
