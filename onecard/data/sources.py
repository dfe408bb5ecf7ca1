"""Find the files of each source of the data, and read their rows: files, folders, patterns and hub datasets.

A source is written as PATH, PATH:SPLIT, ID, ID:CONFIG or ID:CONFIG:SPLIT, each with :WEIGHT behind it where it has one.
A path that exists goes before every other reading of the text.
"""

from __future__ import annotations

import glob
import json
import lzma
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onecard.config import Data, DataConfig, FormatConfig, Source
from onecard.data.files import ARROW, HEAD_BYTES, PACKED, BadRow, Reading, Rows, kind_of, refuse_stand_in, shown
from onecard.data.objects import json_file, jsonl
from onecard.data.tables import arrow_file, csv_file, parquet, saved_folder
from onecard.data.texts import text_file
from onecard.errors import UserError, first_line

READERS: dict[str, Callable[[Path, Reading], Rows]] = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_file,
    ".csv": csv_file,
    ".tsv": csv_file,
    ".txt": text_file,
    ".parquet": parquet,
    ".arrow": arrow_file,
}
FAMILIES = {".ndjson": ".jsonl", ".json": ".jsonl", ".tsv": ".csv"}  # suffixes that may be together in a folder
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".numbers")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_SPLIT = re.compile(r"([\w.-]+(?:/[\w.-]+)?:[\w.-]*):(.+)")
SAVED = ("state.json", "dataset_dict.json")  # of datasets' save_to_disk


def sources_of(data: Data, config: DataConfig) -> list[Source]:
    """Return the sources of the data, each with its own settings or else those of `config`.

    Raises:
        UserError: some sources have a weight and others do not; a single source has one.
    """
    given = data if isinstance(data, list) else [data]
    found = [parse(each if isinstance(each, Source) else Source(path=each)) for each in given]
    without = [source.path for source in found if source.weight is None]
    if without and len(without) < len(found):
        do = "write the share of each source behind its path, such as a.jsonl:0.7 b.jsonl:0.3"
        raise UserError("either all sources or none must have a weight", f"none for {without[0]}", do, "data")
    if len(found) == 1 and found[0].weight is not None:
        do = "leave it out, or take a part of the rows with max_rows"
        raise UserError("a weight is a share beside other sources", f"one source, {found[0].path}", do, "data")
    general = {"format": config.format, "columns": config.columns, "encoding": config.encoding}
    return [
        source.model_copy(update={key: value for key, value in general.items() if getattr(source, key) is None})
        for source in found
    ]


def parse(source: Source) -> Source:
    """Read split and weight from a source's path. Raises UserError if the source already has one of them."""
    text, more = source.path, {}
    if there(text):
        return source
    head, mark, tail = text.rpartition(":")
    if mark and (weight := number_of(tail)) is not None:
        if weight <= 0:
            raise UserError("a weight must be above 0", repr(tail), "correct it", text)
        text, more["weight"] = head, weight
        head, mark, tail = text.rpartition(":")
    split = HUB_SPLIT.fullmatch(text)
    if not text:
        raise UserError("a source must have a path", repr(source.path), "write it before its weight", "data")
    if not there(text) and head and tail and there(head):
        text, more["split"] = head, tail
    elif not there(text) and split is not None:
        text, more["split"] = split.groups()
    twice = next((key for key in more if getattr(source, key) is not None), None)
    if twice is not None:
        raise UserError(f"a source must have one {twice}", f"one in its path {source.path}", "leave one out", "data")
    return source.model_copy(update={"path": text, **more})


def number_of(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) else None


def there(path: str) -> bool:
    """Whether a path is a file, a folder, or a pattern of files."""
    return Path(path).expanduser().exists() or bool(glob.glob(path))


def name_of(data: Data) -> str:
    """Return the data's name for a title."""
    paths = [each.path if isinstance(each, Source) else each for each in (data if isinstance(data, list) else [data])]
    names = [Path(path).name for path in paths]
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def flags_of(data: Data, config: DataConfig) -> str | None:
    """Return the flags that name the data on the command line; None if only a file can."""
    words = data if isinstance(data, list) else [data]
    paths = [word for word in words if isinstance(word, str)]
    if len(paths) < len(words):
        return None
    flags = ["--data", *paths]
    for name, info in FormatConfig.model_fields.items():
        value = getattr(config, name)
        if value != info.default:
            flags.append(f"--{name.replace('_', '-')}")
            if name == "columns":
                value = ",".join(f"{role}={column}" for role, column in value.items())
            elif isinstance(value, dict):
                value = json.dumps(value, ensure_ascii=False)
            flags += [] if value is True else [str(value)]
    return shlex.join(flags)


def rows_of(source: Source, reading: Reading) -> Iterator[tuple[str, int, dict[str, Any] | BadRow]]:
    """Yield (file, number, row) of a source's rows, in the order of its files. A row that cannot be parsed becomes a
    BadRow.

    Raises:
        UserError: no such file, an unknown suffix, an empty, binary or unreadable file; a folder of several kinds of
            files; a hub dataset that cannot be loaded; no such split.
    """
    rows = all_rows(source, reading)
    for count, row in enumerate(rows, 1):
        yield row
        if count == source.max_rows:
            break


def all_rows(source: Source, reading: Reading) -> Iterator[tuple[str, int, dict[str, Any] | BadRow]]:
    path = Path(source.path).expanduser()
    if not there(source.path) and may_be_hub_id(source.path):
        name = source.path + f":{source.split}" * (source.split is not None)  # rows of two splits differ
        for number, row in hub_rows(source, reading.streaming):
            yield name, number, row
        return
    for file in files_of(path, reading):
        for number, row in read_rows(file, reading):
            yield str(file), number, row


def local_files(source: Source) -> list[Path] | None:
    """Return the files of a source on this disk, also those inside a folder of save_to_disk; None for a hub dataset."""
    path = Path(source.path).expanduser()
    if not there(source.path) and may_be_hub_id(source.path):
        return None
    found = files_of(path, Reading())
    inside = [sorted(each.rglob("*")) if each.is_dir() else [each] for each in found]
    return [each for files in inside for each in files if each.is_file()]


def may_be_hub_id(path: str) -> bool:
    name = path.split(":")[0]
    return HUB_ID.fullmatch(name) is not None and kind_of(Path(name)) not in {*READERS, *SPREADSHEETS}


def files_of(path: Path, reading: Reading) -> list[Path]:
    """Return the files of a path: itself, the sorted data files of a folder, or those that match a pattern."""
    if path.is_dir() and not any((path / name).is_file() for name in SAVED):
        found = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
        data = [each for each in found if kind_of(each) in READERS]
        if not data:
            names = [each.name + "/" * each.is_dir() for each in sorted(path.iterdir())[:8]]
            do = f"name a file, or a pattern such as {path}/**/*.jsonl"
            raise UserError("a folder must have data files", ", ".join(names) or "nothing", do, str(path))
        if len(data) < len(found):
            rest = ", ".join(shown(each.name) for each in found if each not in data)
            reading.told[f"not read in the folder: {rest[:120]}"] += 1
        return one_family(data, path)
    if path.exists():
        return [path]
    matching = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    files = [each for each in matching if each.is_file()]
    if matching and not files:
        raise UserError("a pattern must match files", "folders only", f"write {path}/*.jsonl", str(path))
    return one_family(files, path) if files else [path]


def one_family(files: list[Path], path: Path) -> list[Path]:
    """Return the files. Raises UserError if they are of several kinds, which may be other data."""
    kinds = Counter(FAMILIES.get(kind_of(file), kind_of(file)) for file in files)
    if len(kinds) > 1:
        found = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        folder = path if path.is_dir() else path.parent
        do = f"name one kind, such as {folder}/*{next(iter(kinds))}, or each as a source"
        raise UserError("the files of a source must be of one kind", found, do, str(path))
    return files


def read_rows(path: Path, reading: Reading) -> Rows:
    """Yield (number, row) of a file, or of a folder of save_to_disk. Raises UserError, same as `rows_of`."""
    if path.is_dir():
        yield from saved_folder(path, reading)
        return
    if not path.is_file():
        raise UserError("the data must be a file", "no such file", "check the path", str(path))
    suffix = kind_of(path)
    if suffix in SPREADSHEETS:
        do = f"save it as CSV, or: pandas.read_excel({path.name!r}).to_csv('{path.stem}.csv', index=False)"
        raise UserError(
            "the data must be in a file of text, Parquet or Arrow", f"a spreadsheet, {suffix}", do, str(path)
        )
    if suffix not in READERS or (suffix in ARROW and path.suffix.lower() in PACKED):
        must = f"the data file's name must end in {', '.join(READERS)}; those of text also with .gz, .xz, .bz2 or .zst"
        raise UserError(must, repr(path.suffix), "convert or rename it", str(path))
    if reading.split is not None and suffix != ".json":
        must = "a split must be of a hub dataset, a folder of splits, or an array in a .json file"
        raise UserError(must, f"{reading.split!r} of a {suffix} file", "leave the split out", str(path))
    if path.stat().st_size == 0:
        raise UserError("the data file must have rows", "an empty file", "check the file", str(path))
    with faults(path, reading):
        if suffix in ARROW:
            with path.open("rb") as file:
                refuse_stand_in(file.read(HEAD_BYTES), path)
        yield from READERS[suffix](path, reading)


@contextmanager
def faults(path: Path, reading: Reading) -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:  # of an encoding whose bytes cannot be kept for their row, or without its mark
        is_byte = isinstance(error, UnicodeDecodeError)
        found = f"{error.reason} at byte {error.start:,} of a part" if is_byte else str(error)
        must = f"the file must be in the encoding {reading.encoding or getattr(error, 'encoding', 'of its text')}"
        raise UserError(must, found, "correct --encoding, or the file", str(path)) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError("the data file must be readable", str(error), "check the file", str(path)) from None


def hub_rows(source: Source, streaming: bool) -> Rows:
    """Yield the rows of a hub dataset, which datasets downloads or finds in its cache, or streams from the hub without
    storing them. No code of the dataset runs."""
    import datasets

    name, _, config = source.path.partition(":")
    try:
        loaded: Any = datasets.load_dataset(name, config or None, split=source.split, streaming=streaming)
    except Exception as error:
        must = "the data must be a file, a folder, or a hub dataset in reach"
        do = "check the path; a hub dataset is ID, ID:CONFIG or ID:CONFIG:SPLIT, and needs a network or a cache"
        raise UserError(must, first_line(error), do, source.path) from None
    if isinstance(loaded, dict):
        splits = list(loaded)
        if "train" not in splits and len(splits) > 1:
            do = f"name one: {name}:{config or 'CONFIG'}:{splits[0]}"
            raise UserError("a hub dataset must have a split train, or one only", ", ".join(splits), do, source.path)
        loaded = loaded["train" if "train" in splits else splits[0]]
    number, tables = 0, loaded.with_format("arrow").iter(1024)
    while (table := next_table(tables, f"{source.path}:{number}")) is not None:
        for row in table.to_pylist():
            number += 1
            yield number, row


def next_table(tables: Iterator[Any], where: str) -> Any:
    """Return the next rows of a hub dataset; None at its end. Raises UserError if they cannot be read."""
    try:
        return next(tables, None)
    except Exception as error:  # of the network, a file's bytes, or a place where columns change
        must, do = "a hub dataset must be readable to its end", "check the network, then start again, or resume the run"
        raise UserError(must, f"{type(error).__name__}: {first_line(error)}", do, where) from None
