"""Read the rows of tables: CSV and TSV under a header, Parquet, Arrow, and folders of datasets' save_to_disk."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from onecard.data.files import (
    ARROW,
    TO_UTF8,
    BadRow,
    Reading,
    Rows,
    byte_found,
    encoding_of,
    kind_of,
    opened,
    shown,
    undecoded,
)
from onecard.errors import UserError

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
SEPARATOR_LINE = re.compile(r"sep=(.)\s*")  # the first line of some spreadsheet exports


def csv_file(path: Path, reading: Reading) -> Rows:
    """Read rows under a header. Quoted cells may contain line breaks. A row's line is that of its first cell.

    Rows of empty cells are no rows: spreadsheets write them below the last row.
    """
    csv.field_size_limit(1 << 30)
    line, encoding = 0, encoding_of(path, reading)
    with io.TextIOWrapper(opened(path, encoding), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        said = SEPARATOR_LINE.fullmatch(first)
        mark = said[1] if said else separator(first, path)
        if mark != "," and kind_of(path) == ".csv":
            reading.told[f"columns are separated by {SEPARATORS.get(mark, repr(mark))}"] += 1
        lines: Iterator[str] = file if said else chain([first], file)
        before = 1 if said else 0  # the line that the reader does not see
        reader = csv.reader(lines, delimiter=mark, strict=True)
        try:
            header = next(reader, [])
            check_header(header, path)
            line = reader.line_num
            for cells in reader:
                start, line = line + 1, reader.line_num
                if any(cells):
                    yield start + before, csv_row(header, cells)
        except csv.Error as error:
            where = f"{path}:{line + before + 1}:row"
            raise UserError("the file must be CSV with a header", str(error), "correct it", where) from None


def separator(header: str, path: Path) -> str:
    """Return what separates the columns: of a .csv file, commas unless the header has none and has another mark."""
    if kind_of(path) == ".tsv":
        return "\t"
    names = next(csv.reader([header]), [])
    return "," if len(names) != 1 else max((",", *SEPARATORS), key=names[0].count)


def check_header(header: list[str], path: Path) -> None:
    """Raise UserError unless each column has a name of its own. In CSV, some may have none."""
    named = [name for name in header if name or kind_of(path) in ARROW]
    twice = {name for name in named if named.count(name) > 1}
    if named and not twice and not any(map(undecoded, named)):
        return
    found = f'"{shown(min(twice))}" twice' if twice else ", ".join(map(shown, header)) or "an empty line"
    if kind_of(path) in ARROW:
        raise UserError("a Parquet file must have each column once", found, "rename a column", str(path))
    if (byte := next(filter(None, map(undecoded, header)), 0)) and not twice:
        raise UserError("a CSV file must be UTF-8", byte_found(byte), TO_UTF8, f"{path}:1")
    must = "a CSV file must start with its columns' names in UTF-8, each once"
    raise UserError(must, found, "correct the header", f"{path}:1")


def csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        found = f"{len(cells)} cells under {len(header)} columns"
        return BadRow("row", "a row must have a cell for each column", found)
    for name, cell in zip(header, cells):
        if byte := undecoded(cell):
            return BadRow(name or "row", "a cell must be UTF-8", byte_found(byte), TO_UTF8)
        if cell and not name:
            return BadRow("row", "a cell must be under the name of a column", f"{shown(cell)[:60]!r} under none")
    return {name: cell for name, cell in zip(header, cells) if name}


def parquet(path: Path, reading: Reading) -> Rows:
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


def arrow_file(path: Path, reading: Reading) -> Rows:
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


def saved_folder(folder: Path, reading: Reading) -> Rows:
    """Read the files of a dataset that datasets' save_to_disk wrote. One count numbers the rows of all files."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in folder.iterdir() if each.is_dir())
        if reading.split not in splits:
            found = f"a folder of the splits {', '.join(map(shown, splits)) or 'none'}"
            do = f"name one, such as {folder}:{splits[0] if splits else 'train'}"
            raise UserError("the data must be one dataset", found, do, str(folder))
        folder = folder / reading.split
    must = "a data folder must be one that datasets' save_to_disk wrote"
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [Path(each["filename"]).name for each in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(must, f"state.json: {error}", "write it again", str(folder)) from None
    number = 0
    for name in names:
        if not (folder / name).is_file():
            raise UserError(must, f"no {shown(name)}", "copy the whole folder", str(folder))
        for _, row in arrow_file(folder / name, reading):
            number += 1
            yield number, row
