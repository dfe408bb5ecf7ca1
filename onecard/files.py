"""File safety: locks, writes that reach the disk, hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onecard.faults import about


def sha256(path: Path) -> str:
    with about(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path, wait: bool = False, shared: bool = False) -> Iterator[bool | None]:
    """Lock a folder for this process, or with `shared` against those that do not share it. Yields whether it succeeded,
    or None if the system has no such locks.

    The lock ends with the block, or at any end of the process.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        held = True
    except BlockingIOError:
        held = False
    try:
        yield held
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Force a written file to the disk."""
    with about(path), path.open("rb+") as file:
        os.fsync(file.fileno())


def write_synced(path: Path, data: bytes) -> None:
    with about(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable, if the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with about(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
