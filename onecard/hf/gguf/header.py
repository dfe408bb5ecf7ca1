"""Reads and checks the header of a GGUF file: metadata, and where each tensor lies.

The format (ggml-org/ggml, docs/gguf.md): the magic GGUF, the version, the counts of tensors and of keys; each key with
its type and value; each tensor with its name, dimensions (the fastest first), type and offset; then the data, aligned.
All numbers are little-endian. Every length is checked against the rest of the file before it is used: a damaged file
neither makes us read on for hours nor past its end. The parts of a split file each have a header of their own.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from onecard.documents import AGAIN, brief
from onecard.errors import UserError
from onecard.faults import about

VERSIONS = (2, 3)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by type
STRING, ARRAY = 8, 9
ALIGNMENT = 32
MAX_DIMENSIONS = 4
KINDS = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K "
    "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS"
).split()  # those of gguf.dequantize that language models are stored in
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Stored:
    """A tensor of a file.

    Attributes:
        kind: ggml's type, such as Q4_K.
        shape: rows first, as in torch.
        begin: its first byte in the file.
    """

    kind: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    file: Path


@dataclass(frozen=True)
class Header:
    """The header of a file, or of all parts of a split one.

    Attributes:
        digest: sha256 of the headers' bytes.
    """

    file: Path
    metadata: dict[str, Any]
    tensors: dict[str, Stored]
    digest: str

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]


class Cursor:
    """A place in a mapped file, which moves forward as values are read."""

    def __init__(self, content: mmap, file: Path):
        self.content, self.file, self.at = content, file, 0

    def skip(self, size: int) -> int:
        """Move by `size` bytes. Return the place before. Raises UserError if the file does not have them."""
        before = self.at
        if size > len(self.content) - before:
            raise damaged(self.file, f"{len(self.content):,} bytes, which end inside the header")
        self.at += size
        return before

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.content, self.skip(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        size = self.number("Q")
        begin = self.skip(size)
        try:
            return self.content[begin : begin + size].decode()
        except UnicodeDecodeError:
            raise damaged(self.file, f"a text that is not UTF-8 at byte {begin:,}") from None

    def value(self, kind: int) -> Any:
        """Read a value of one of the format's types."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise damaged(self.file, f"a value of type {kind}")
        item, count = self.number("I"), self.number("Q")
        if item in NUMBERS:
            code = NUMBERS[item]
            begin = self.skip(count * struct.calcsize(f"<{code}"))
            return list(struct.unpack_from(f"<{count}{code}", self.content, begin))
        if item != STRING:
            raise damaged(self.file, f"an array of values of type {item}")
        if count > len(self.content) - self.at:
            raise damaged(self.file, f"an array of {count:,} texts")
        return [self.text() for _ in range(count)]


def read_header(path: Path) -> Header:
    """Read the header of a file, and those of the other parts if it is split.

    Raises:
        UserError: not GGUF, another version or byte order, a damaged or truncated file, a missing part, a type of
            tensor that the gguf package cannot dequantize, or no gguf package.
    """
    if find_spec("gguf") is None:
        do = 'pip install "onecard[gguf]"'
        raise UserError("a base in GGUF needs the package gguf", "none", do, str(path))
    files, digest = list(parts_of(path)), sha256()
    metadata: dict[str, Any] = {}
    tensors: dict[str, Stored] = {}
    for file in files:
        found, stored, raw = read_part(file)
        digest.update(raw)
        metadata = metadata or found
        twice = next((name for name in stored if name in tensors), None)
        if twice is not None:
            raise damaged(file, f"a second tensor {twice}")
        tensors |= stored
    count = metadata.get("split.count", 1)
    if count not in (0, len(files)) or metadata.get("split.tensors.count", len(tensors)) != len(tensors):
        do = "keep the parts of a split file together under the names that they came with"
        found = f"{len(files)} files with {len(tensors):,} tensors"
        raise UserError(f"a GGUF file must have all its {count} parts", found, do, str(path))
    return Header(files[0], metadata, tensors, digest.hexdigest())


def parts_of(path: Path) -> Iterator[Path]:
    """Yield the files of a GGUF model, of which `path` is the first or only one."""
    match = PART.fullmatch(path.name)
    if match is None:
        yield path
        return
    stem, number, count = match.groups()
    if int(number) != 1:
        raise UserError("a split GGUF file is named by its first part", path.name, f"pass {stem}-00001-of-{count}.gguf")
    for i in range(1, int(count) + 1):
        part = path.with_name(f"{stem}-{i:05d}-of-{count}.gguf")
        if not part.is_file():
            raise UserError("every part of a split GGUF file must exist", f"no {part.name}", AGAIN, str(path))
        yield part


def read_part(file: Path) -> tuple[dict[str, Any], dict[str, Stored], bytes]:
    """Return one file's metadata and tensors, and the bytes of its header."""
    with about(file), file.open("rb") as stream:
        start = stream.read(8)
        if start[:4] != b"GGUF" or len(start) < 8:
            kind = "a pointer of git-lfs" if start == b"version " else f"{brief(start[:4])} as its first bytes"
            raise UserError("a GGUF file must begin with GGUF", kind, AGAIN, str(file))
        version = int.from_bytes(start[4:], "little")
        if version not in VERSIONS:
            big = int.from_bytes(start[4:], "big") in VERSIONS
            found = "a big-endian file" if big else f"version {version}"
            do = "make it again with a current llama.cpp on a little-endian machine"
            raise UserError("a GGUF file must be little-endian and of version 2 or 3", found, do, str(file))
        with mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            cursor = Cursor(content, file)
            cursor.skip(8)
            num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
            metadata: dict[str, Any] = {}
            for _ in range(num_keys):
                key = cursor.text()
                if key in metadata:
                    raise damaged(file, f"a second key {key}")
                metadata[key] = cursor.value(cursor.number("I"))
            return metadata, read_tensors(cursor, num_tensors, metadata), content[: cursor.at]


def read_tensors(cursor: Cursor, count: int, metadata: dict[str, Any]) -> dict[str, Stored]:
    """Read the tensors' entries. Raises UserError unless their data is in the file, one after another."""
    import gguf

    names = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, num_dimensions = cursor.text(), cursor.number("I")
        if name in entries or num_dimensions > MAX_DIMENSIONS:
            raise damaged(cursor.file, f"a second tensor {name}" if name in entries else f"{name} without a shape")
        shape = tuple(cursor.number("Q") for _ in range(num_dimensions))[::-1]
        code, offset = cursor.number("I"), cursor.number("Q")
        kind = names.get(code, f"type {code}")
        if kind not in KINDS:
            do = "use a file of K-quants, Q4_0 to Q8_0, F16 or BF16, or the original checkpoint"
            raise UserError("a tensor must have a type of quants or floats", kind, do, f"{cursor.file}: {name}")
        values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        if not shape or shape[-1] % values or 0 in shape:
            raise damaged(cursor.file, f"{name} of shape {list(shape)}, which is no number of blocks of {kind}")
        entries[name] = (kind, shape, offset, prod(shape) // values * size)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise damaged(cursor.file, f"general.alignment {brief(alignment)}")
    data, end, found = -(-cursor.at // alignment) * alignment, 0, {}
    for name, (kind, shape, offset, nbytes) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        if offset < end or offset % alignment:
            raise damaged(cursor.file, f"{name} at byte {data + offset:,}, where another tensor is")
        end = offset + nbytes
        if data + end > len(cursor.content):
            found_bytes = f"{len(cursor.content):,} bytes for {data + end:,}: truncated in {name}"
            raise damaged(cursor.file, found_bytes)
        found[name] = Stored(kind, shape, data + offset, nbytes, cursor.file)
    return found


def damaged(file: Path, found: str) -> UserError:
    return UserError("a GGUF file must be whole", found, AGAIN, str(file))
