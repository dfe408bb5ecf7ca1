"""What every export shares: a folder that is whole or not there, room on the disk, the files beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard.errors import UserError
from onecard.hf.checkpoint import Checkpoint, TensorInfo

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.md", "LICENSE*")
INDEX = "model.safetensors.index.json"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that gets `target`'s name when the block ends well, and vanishes when it does not.

    Raises:
        UserError: target exists.
    """
    if target.exists():
        raise UserError("the output must be a new folder", "it exists", "choose another --output", str(target))
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    os.replace(temporary, target)


def check_room(target: Path, num_bytes: int) -> None:
    """Raise UserError unless the disk holds num_bytes more."""
    parent = next(p for p in (target.parent.resolve(), *target.parent.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes * 1.02:
        found = f"{free / 1e9:.1f} GB free for {num_bytes / 1e9:.1f} GB"
        raise UserError("the disk must have room for the result", found, "make room", str(parent))


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor of a file, read, not mapped: nothing of it stays in memory but the tensor."""
    with info.file.open("rb") as stream:
        stream.seek(info.begin)
        buffer = bytearray(info.nbytes)
        stream.readinto(buffer)
    dtype = torch.uint8 if info.dtype == "U8" else DTYPES[info.dtype]
    return torch.frombuffer(buffer, dtype=dtype).view(info.shape)


def write_others(folder: Path, checkpoint: Checkpoint, config: dict[str, Any], places: dict[str, str]) -> None:
    """config.json, every other file that the checkpoint brings along, and an index if it had one.

    Args:
        places: the file of each tensor that was written.
    """
    for pattern in OTHER_FILES:
        for path in checkpoint.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (folder / INDEX).is_file():
        total = sum((folder / name).stat().st_size for name in set(places.values()))
        content = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
