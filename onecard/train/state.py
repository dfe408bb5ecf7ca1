"""Checkpoints that are whole or not there: safetensors and JSON in a folder whose manifest is written last.

A checkpoint is written to a temporary folder, every file is synced to disk, `manifest.json` with their sizes and
sha256 comes last, and the folder is renamed. A kill at any instant leaves the checkpoint before or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from onecard.errors import UserError

PREFIX = "checkpoint-"
TEMPORARY = ".tmp-checkpoint-"
MANIFEST = "manifest.json"


@dataclass
class State:
    """A checkpoint that held its hashes; `skipped` tells which newer ones did not, and why."""

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, dict[str, Any]]
    skipped: list[str] = field(default_factory=list)


def save_state(
    root: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    documents: dict[str, dict[str, Any]],
    keep: int,
) -> Path:
    """Write checkpoint-<step> under `root` and remove all but the newest `keep`.

    Args:
        tensors: file stem -> named tensors, each a safetensors file.
        documents: file stem -> JSON object.

    Raises:
        UserError: disk full; what was there before is untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary, final = root / f"{TEMPORARY}{step}", root / f"{PREFIX}{step}"
    files = {f"{stem}.safetensors": lambda named=named: save(named) for stem, named in tensors.items()}
    files |= {f"{stem}.json": lambda d=d: json.dumps(d, indent=1).encode() for stem, d in documents.items()}
    try:
        temporary.mkdir()
        manifest = {}
        for name, content in files.items():
            data = content()
            write_synced(temporary / name, data)
            manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_synced(temporary / MANIFEST, json.dumps({"step": step, "files": manifest}, indent=1).encode())
        sync_folder(temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            "a checkpoint must fit on the disk", "no space left", "free some space and --resume", str(root)
        ) from None
    if final.exists():  # a resumed run has come here again
        remove(final)
    os.replace(temporary, final)
    sync_folder(root)
    for old in numbered(root)[keep:]:
        remove(old)
    return final


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: half deleted, it no longer counts as one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def numbered(root: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)), reverse=True)


def load_newest(root: Path) -> State | None:
    """The newest checkpoint whose hashes hold; None if there is none at all.

    Raises:
        UserError: there are checkpoints, and all are broken.
    """
    skipped = []
    for folder in numbered(root):
        try:
            contents = verified(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped.append(f"{folder.name}: {error}")
            continue
        tensors = {Path(name).stem: load(data) for name, data in contents.items() if name.endswith(".safetensors")}
        documents = {Path(name).stem: json.loads(data) for name, data in contents.items() if name.endswith(".json")}
        return State(int(folder.name.removeprefix(PREFIX)), folder, tensors, documents, skipped)
    if skipped:
        raise UserError(
            "a checkpoint must be whole to resume", "; ".join(skipped), "start again in a new folder", str(root)
        )
    return None


def verified(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each equal to its hash. Raises ValueError, KeyError or OSError."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    contents = {}
    for name, entry in manifest["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{name} lies outside the folder")
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{name} is not what the manifest says")
        contents[name] = data
    return contents
