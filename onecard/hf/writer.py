"""Writes a safetensors file piece by piece, so that its tensors are never in memory together."""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.faults import about
from onecard.hf.stored import DTYPE_BITS, TensorInfo

STEP_BYTES = 1 << 24


class TensorFile:
    """A safetensors file: first shapes and dtypes, then the values of each tensor, in pieces, tensors in any order."""

    def __init__(self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]):
        """Write the header.

        Args:
            tensors: name -> (dtype as safetensors spells it, shape). Wider dtypes are first in the file, so that every
                tensor is aligned.
        """
        ordered = sorted(tensors.items(), key=lambda item: -DTYPE_BITS[item[1][0]])
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.next: dict[str, int] = {}
        self.end: dict[str, int] = {}
        at = 0
        for name, (dtype, shape) in ordered:
            size = prod(shape) * DTYPE_BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            self.next[name], self.end[name] = at, at + size
            at += size
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self.path, self.stream = path, path.open("wb")
        with about(path):
            self.stream.write(len(raw).to_bytes(8, "little") + raw)
        self.base = 8 + len(raw)

    def append(self, name: str, piece: Tensor | bytes) -> None:
        """Write the next values of a tensor, in its dtype."""
        if isinstance(piece, Tensor):
            piece = piece.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert self.next[name] + len(piece) <= self.end[name], f"{name} is longer than its header says"
        with about(self.path):
            self.stream.seek(self.base + self.next[name])
            self.stream.write(piece)
        self.next[name] += len(piece)

    def copy(self, name: str, info: TensorInfo) -> None:
        """Copy a whole tensor from another file, in which it has its dtype."""
        assert info.form is None
        with about(info.file), info.file.open("rb") as source:
            source.seek(info.begin)
            for at in range(0, info.nbytes, STEP_BYTES):
                self.append(name, source.read(min(STEP_BYTES, info.nbytes - at)))

    def close(self) -> None:
        """Sync the file to the disk and close it. Every tensor must be complete."""
        short = [name for name in self.next if self.next[name] != self.end[name]]
        assert not short, f"{short[0]} is shorter than its header says"
        with about(self.path):
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()
