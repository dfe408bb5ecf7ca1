"""Reads a checkpoint's stored tensors: the one place that knows how their bytes become 16-bit values.

Most tensors are stored in their own dtype. Others have a `form`: FP8 codes with scales, or blocks of a GGUF file. The
load, the merge, the exports and the sample of a base read a whole tensor or some of its rows here. If one of our
storages has the values of a form, its codes and scales can be read, too (`read_packed`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.faults import about
from onecard.quant.scales import Storage
from onecard.quant.state import QuantState

DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32, "I16": 16,
    "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
STORED_DTYPES = {
    **FLOAT_DTYPES, "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
    "U32": torch.int32, "BOOL": torch.bool,  # the bits of U32, since torch has few operations on uint32
}  # fmt: skip
SLAB_VALUES = 1 << 18  # values that are in float32 at a time; more is not faster


class Form(Protocol):
    """How the values of a tensor are computed that is not stored in its dtype."""

    @property
    def kind(self) -> str:
        """What the user knows it by, such as FP8 (E4M3)."""
        ...

    @property
    def is_rounded(self) -> bool:
        """Whether the values have been rounded to few bits."""
        return True

    @property
    def least_rows(self) -> int:
        """The rows to compute together at least: 1, unless each call reads from all over the file."""
        return 1

    @property
    def storage(self) -> Storage | None:
        """Our storage that has exactly these values; None if there is none."""
        return None

    @property
    def obstacle(self) -> str | None:
        """Why this weight has no storage, if others of its kind may have one."""
        return None

    def rows(self, first: int, count: int) -> Tensor:
        """Return `count` rows in float32, from row `first` on. A vector has one row."""
        ...

    def packed(self, first: int, count: int, dtype: torch.dtype) -> tuple[Tensor, QuantState]:
        """Return the codes and the state of `count` rows from row `first` on, of a form with a storage."""
        raise TypeError(f"{self.kind} has no storage")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the load sees it.

    Attributes:
        dtype, shape, nbytes: of its values; for a tensor with a form, after the form's computation.
        begin: its first byte in the file; 0 for a tensor with a form.
        form: None for a tensor that is stored in its dtype.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    file: Path
    form: Form | None = None


def damaged(must: str, found: str, info: TensorInfo, name: str) -> UserError:
    """Return the error for stored values that no checkpoint has; `info`: of a tensor that holds them."""
    return UserError(must, found, "the checkpoint is damaged: fetch it again", f"{info.file}: {name}")


def computed(shape: tuple[int, ...], dtype: str, file: Path, form: Form) -> TensorInfo:
    """Return the entry of a tensor with a form."""
    return TensorInfo(dtype, shape, 0, prod(shape) * DTYPE_BITS[dtype] // 8, file, form)


def read_tensor(info: TensorInfo) -> Tensor:
    """Return a whole tensor in its dtype."""
    if info.form is None:
        return read_bytes(info, info.begin, info.nbytes).view(info.shape)
    count = info.shape[0] if len(info.shape) > 1 else 1
    return read_rows(info, 0, count).view(info.shape)


def read_rows(info: TensorInfo, first: int, count: int) -> Tensor:
    """Return `count` rows of a tensor in its dtype, from row `first` on. Nothing else is read."""
    num_rows = info.shape[0] if len(info.shape) > 1 else 1
    count, width = min(count, num_rows - first), prod(info.shape) // max(num_rows, 1)
    if info.form is None:
        size = info.nbytes // max(num_rows, 1)
        return read_bytes(info, info.begin + first * size, count * size).view(count, *info.shape[1:])
    out = torch.empty(count, width, dtype=FLOAT_DTYPES[info.dtype])
    step = max(SLAB_VALUES // width, info.form.least_rows)
    for start in range(0, count, step):
        size = min(step, count - start)
        out[start : start + size] = info.form.rows(first + start, size)
    return out


def read_columns(info: TensorInfo, first: int, count: int) -> Tensor:
    """Return `count` columns of a stored matrix, from column `first` on. Nothing else is read."""
    rows, columns = info.shape
    size, width = info.nbytes // rows // columns, info.nbytes // rows
    buffer = bytearray(rows * count * size)
    view = memoryview(buffer)
    with about(info.file), info.file.open("rb", buffering=0) as stream:
        for row in range(rows):
            stream.seek(info.begin + row * width + first * size)
            stream.readinto(view[row * count * size : (row + 1) * count * size])
    return torch.frombuffer(buffer, dtype=STORED_DTYPES[info.dtype]).view(rows, count)


def read_bytes(info: TensorInfo, begin: int, size: int) -> Tensor:
    """Return values of a tensor's dtype from some bytes of its file. The file is not mapped, so that no other pages of
    it stay in memory."""
    with about(info.file), info.file.open("rb") as stream:
        stream.seek(begin)
        buffer = bytearray(size)
        stream.readinto(buffer)
    return torch.frombuffer(buffer, dtype=STORED_DTYPES[info.dtype]) if size else torch.empty(0)


def read_packed(info: TensorInfo, first: int = 0, count: int | None = None) -> tuple[Tensor, QuantState]:
    """Return the codes and the state of `count` rows of a weight with a storage, from row `first` on. None: of all."""
    assert info.form is not None and info.form.storage is not None
    return info.form.packed(first, info.shape[0] - first if count is None else count, FLOAT_DTYPES[info.dtype])


class Lazy:
    """A stored tensor in a state_dict for from_pretrained, which reads it by `[...]` when its turn comes. One that
    stays packed has no values then: its converter reads it."""

    def __init__(self, info: TensorInfo, is_packed: bool):
        self.info, self.is_packed = info, is_packed

    def __getitem__(self, where: object) -> Tensor:
        assert where is Ellipsis
        return torch.empty(0) if self.is_packed else read_tensor(self.info)


def kinds_of(tensors: Iterable[TensorInfo]) -> list[str]:
    """Return the kinds of the forms among some tensors, in order."""
    return sorted({info.form.kind for info in tensors if info.form is not None})
