"""Tokenized sources on disk, mapped into memory: data of any size is tokenized once and needs little memory.

Up to a million tokens stay in memory. More go into a folder of the cache, whose name is a hash of all that the tokens
depend on: the files' places, sizes and times, the tokenizer with its chat template, the settings, and this code. The
folder is complete once it has its name. A source without such a hash, such as a hub dataset, has a file that is gone at
the end of the run.

The cache keeps a size: after a new entry, those that were read least recently are removed. A process holds a shared
lock on each entry that it uses, so no other process removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pyarrow as pa

from onecard.config import DataConfig, Source
from onecard.data.dataset import Dataset
from onecard.data.examples import SCHEMA, Digest, Examples, Stored, Turns, record_batches
from onecard.errors import UserError
from onecard.files import locked, sync, sync_folder, write_synced

FILE, SUMMARY, TEMPORARY = "examples.arrow", "summary.json", ".tmp-"
FRESH_SECONDS = 2.0  # a file that changed so lately may change again without another time
ENTRY = re.compile("[0-9a-f]{32}")
NOT_TOKENS = {"data_cache", "data_cache_size", "packing", "seed"}  # settings that change no token
KEPT = ("format", "max_seq_length", "num_unsupervised", "num_dropped", "num_lost", "mapping", "notices")
used: dict[Path, ExitStack] = {}  # the locks of entries that this process uses, until it ends


class Store:
    """Where the examples of one source are written.

    Args:
        folder: of the cache; None: everything stays in memory.
        key: of the source; None: it is not kept.
        most_bytes: that the cache keeps.
    """

    def __init__(self, folder: str | None = None, key: str | None = None, most_bytes: int = 1 << 62):
        self.most_bytes = most_bytes
        self.root, self.key = None if folder is None else cache_folder(folder), key
        self.temporary: Path | None = None
        self.lock = ExitStack()

    @property
    def entry(self) -> Path | None:
        return None if self.root is None or self.key is None else self.root / self.key

    def read(self) -> Dataset | None:
        """Return the dataset of a source that was tokenized before; None if there is none, or it is not whole."""
        if self.entry is None or not use(self.entry) or not (self.entry / SUMMARY).is_file():
            return None
        try:
            summary = json.loads((self.entry / SUMMARY).read_bytes())
            if (self.entry / FILE).stat().st_size != summary["size"]:
                return None
            turns = Turns(Counter(dict(map(tuple, summary["ends"]))), set(summary["inside"]))
            examples = mapped(self.entry / FILE, summary["digest"], turns)
            bad = [UserError(*parts) for parts in summary["bad"]]
            dataset = Dataset(examples, **{name: summary[name] for name in KEPT}, bad=bad)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None  # it is tokenized again
        with suppress(OSError):  # a folder that may only be read
            os.utime(self.entry)
        dataset.notices.append(f"tokenized before, read from {self.entry}")
        return dataset

    def write(self, stored: Iterable[Stored]) -> Examples:
        """Write examples, and return them: in memory if they are few. Raises UserError if the disk is full."""
        turns, digest = Turns(Counter(), set()), Digest()
        batches = noted(record_batches(stored), turns)
        first = list(islice(batches, 2))
        if len(first) < 2 or self.root is None:
            return Examples(pa.Table.from_batches([*first, *batches], SCHEMA), None, turns)
        try:
            path = self.begin() / FILE
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
                for batch in chain(first, batches):
                    writer.write_batch(batch)
                    digest.add(batch)
            sync(path)
        except OSError as error:
            do = "free some space, or choose another folder with --data-cache"
            raise UserError("tokenized data must fit on the disk", str(error), do, str(self.root)) from None
        return mapped(path, digest.hexdigest(), turns)

    def begin(self) -> Path:
        """Create a folder to write in, locked by this process. Remove those that no process has."""
        assert self.root is not None
        self.root.mkdir(parents=True, exist_ok=True)
        for stale in self.root.glob(f"{TEMPORARY}*"):
            try:
                with locked(stale) as held:
                    if held:
                        shutil.rmtree(stale, ignore_errors=True)
            except OSError:  # another process removed it
                continue
        self.temporary = Path(mkdtemp(prefix=TEMPORARY, dir=self.root))
        self.lock.enter_context(locked(self.temporary))
        return self.temporary

    def keep(self, dataset: Dataset) -> Dataset:
        """Keep a written dataset for later runs; one without a key loses its file, which stays mapped until the end."""
        if self.temporary is None:
            return dataset
        if self.entry is None:
            self.discard()
            return dataset
        turns = dataset.stored.turns
        summary = {
            **{name: getattr(dataset, name) for name in KEPT},
            "size": (self.temporary / FILE).stat().st_size,
            "digest": dataset.stored.digest,
            "ends": list(turns.ends.items()),
            "inside": sorted(turns.inside),
            "bad": [[error.must, error.found, error.do, error.where] for error in dataset.bad],
        }
        write_synced(self.temporary / SUMMARY, json.dumps(summary).encode())
        sync_folder(self.temporary)
        shutil.rmtree(self.entry, ignore_errors=True)  # one that is not whole
        try:
            os.rename(self.temporary, self.entry)
        except OSError:  # another run has just kept the same
            self.discard()
            return dataset
        self.lock.close()
        used.pop(self.entry, ExitStack()).close()  # of an entry that was not whole
        use(self.entry)
        dataset.notices.append(f"tokenized data is kept in {self.entry}")
        if count := self.make_room():
            what = "entry that was" if count == 1 else "entries that were"
            line = f"removed {count} {what} read least recently from {self.root}, to keep within --data-cache-size"
            dataset.notices.append(line)
        return dataset

    def make_room(self) -> int:
        """Remove the entries that were read least recently until the rest has `most_bytes`, and return their number.

        Entries that a process uses stay."""
        assert self.root is not None
        found = []
        for entry in self.root.iterdir():
            with suppress(OSError):  # another process removes it
                if ENTRY.fullmatch(entry.name):
                    size = sum(file.stat().st_size for file in entry.iterdir())
                    found.append((entry.stat().st_mtime_ns, size, entry))
        count, total = 0, sum(size for _, size, _ in found)
        for _, size, entry in sorted(found):
            if total <= self.most_bytes:
                break
            with suppress(OSError), locked(entry) as held:
                if held:
                    gone = entry.rename(self.root / f"{TEMPORARY}{entry.name}")  # never half an entry under its name
                    shutil.rmtree(gone, ignore_errors=True)
                    count, total = count + 1, total - size
        return count

    def discard(self) -> None:
        """Remove what was written; a mapped file stays readable."""
        if self.temporary is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
        self.lock.close()


def use(entry: Path) -> bool:
    """Lock an entry against its removal by other processes, until the end of this one. Returns whether it is there."""
    if entry in used:
        return True
    lock = ExitStack()
    try:
        if lock.enter_context(locked(entry, shared=True)) is False:  # another process removes it
            return False
    except OSError:
        return False
    used[entry] = lock
    return True


def mapped(path: Path, digest: str, turns: Turns) -> Examples:
    return Examples(pa.ipc.open_file(pa.memory_map(str(path))).read_all(), digest, turns)


def noted(batches: Iterable[pa.RecordBatch], turns: Turns) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        turns.add(batch)
        yield batch


def cache_folder(folder: str) -> Path:
    """Return the folder of tokenized data; "auto" is the user's cache folder."""
    if folder != "auto":
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "onecard" / "data"


def key_of(
    files: list[Path] | None, tokenizer: Any, source: Source, config: DataConfig, formats: list[str | None]
) -> str | None:
    """Return the hash of all that a source's tokens depend on; None if something of it cannot be told.

    Args:
        files: of the source; None: not on this disk.
        formats: that may be recognised, and the loss.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not files or backend is None:
        return None
    stats = [file.stat() for file in files]
    if max(stat.st_mtime for stat in stats) > time.time() - FRESH_SECONDS:
        return None
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    parts = {
        "files": [
            (str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            for file, stat in zip(files, stats)
        ],
        "tokenizer": [type(tokenizer).__name__, backend.to_str(), tokenizer.special_tokens_map],
        "chat template": tokenizer.chat_template,
        "source": source.model_dump(exclude={"weight"}),
        "settings": config.model_dump(include=set(DataConfig.model_fields) - NOT_TOKENS),
        "formats": formats,
        "code": [code.hexdigest(), *map(version, ("transformers", "tokenizers", "jinja2"))],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
